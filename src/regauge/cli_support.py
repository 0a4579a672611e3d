"""What every command shares: where things are printed, how a run ends, where a source lies."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from regauge.errors import BadInput, RegaugeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regauge.api import RewriteResult
    from regauge.exporting import ExportResult

EXIT_INTERRUPTED = 130
EXIT_BUG = 70
PACKAGED = "packaged:"
_PLAIN_WIDTH = 140
_WIDE = 130
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr; wide enough for tables if that is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    found = Console(file=stream, soft_wrap=False, highlight=False)
    if not found.is_terminal and "COLUMNS" not in found._environ:  # pyright: ignore[reportPrivateUsage]
        found.width = _PLAIN_WIDTH
    return found


def show(view: RenderableType) -> None:
    console().print(view)


def wide() -> bool:
    """Whether a table with six columns fits."""
    return console().width >= _WIDE


def print_json(data: Any) -> None:
    """Plain data, or text that is JSON already, to stdout."""
    print(data if isinstance(data, str) else json.dumps(data, indent=2))


@contextmanager
def outcome(*, as_json: bool = False, resumes: bool = False) -> Generator[None]:
    """Turns errors into messages on stderr and exit codes: 1, 2, 3 as in :mod:`regauge.errors`, 130 after
    Ctrl-C, 70 (with a traceback) for a bug.

    Args:
        as_json: print the error as one JSON object instead of a panel.
        resumes: whether running the same command again goes on from here.
    """
    try:
        yield
    except RegaugeError as error:
        if as_json:
            print(json.dumps(error.to_dict() | {"exit_code": error.exit_code}), file=sys.stderr)
        else:
            from regauge.show import error_view

            console(stderr=True).print(error_view(error))
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        rest = " Run the same command again to go on from here." if resumes else ""
        print(f"\nInterrupted. The source is untouched and nothing was put at OUT.{rest}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        print("This is a bug in regauge, not a mistake of yours: please report it.", file=sys.stderr)
        raise typer.Exit(EXIT_BUG) from error


def parse_size(text: str) -> int:
    """``2GB``, ``500 MB``, ``1.5GiB`` or plain bytes.

    Raises:
        BadInput: anything else, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    size = int(float(match[1]) * (_UNITS | _BINARY)[match[2]]) if match else 0
    if size < 1:
        raise BadInput(
            "cannot read an amount of memory", expected="for example 2GB, 500MB or 1.5GiB", found=repr(text)
        )
    return size


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


def packaged_module(source: str) -> tuple[nn.Module, dict[str, torch.Tensor]] | None:
    """Module and example inputs of a packaged model that is not a directory (CREPE); else None."""
    from regauge import packaged

    name = source.removeprefix(PACKAGED)
    kinds = {row.name: row.kind for row in packaged.available()}
    if not source.startswith(PACKAGED) or kinds.get(name) != "module":
        return None
    return packaged.module(name), packaged.example(name)


@contextmanager
def progress_bar(*, quiet: bool) -> Generator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr, or None where nobody would see it.

    What it yields is called with a stage, the amount done and the total; 0 as total: not known.
    """
    err = console(stderr=True)
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield update


def rewritten(result: RewriteResult, out: str) -> dict[str, Any]:
    """What ``rewrite --json`` prints."""
    return {
        "out": out,
        "verdict": str(result.certificate.verdict),
        "certificate": json.loads(result.certificate.to_json()),
        "seconds": dict(result.seconds),
        "manifest": dict(result.manifest),
    }


def exported(result: ExportResult) -> dict[str, Any]:
    """What ``export --json`` prints."""
    return {
        "out": str(result.files[0]),
        "files": list(map(str, result.files)),
        "verdict": str(result.certificate.verdict),
        "certificate": json.loads(result.certificate.to_json()),
        "seconds": dict(result.seconds),
    }


def described(move: Any) -> dict[str, Any]:
    """A move or a cut as plain data, for ``moves --json``."""
    cut = hasattr(move, "loses")
    return {
        "name": move.name,
        "type": "cut" if cut else "move",
        "identity": move.identity,
        **({"loses": move.loses} if cut else {"needs": move.needs, "preserves": str(move.preserves)}),
        "options": {
            key: {
                "type": option.type.__name__,
                "default": option.default,
                "choices": list(option.choices),
                "help": option.help,
            }
            for key, option in move.options.items()
        },
    }
