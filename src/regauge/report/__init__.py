"""A page about a rewritten directory: what was done, the certificate, how weights and activations changed.

:func:`report` writes it. See ``docs/report.md``.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from regauge.errors import BadInput
from regauge.report.gathering import Progress, Report, gather
from regauge.report.page import render
from regauge.sources import resolve

__all__ = ["Progress", "Report", "gather", "render", "report"]


def report(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    source: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one self-contained HTML file about a directory that ``regauge rewrite`` wrote.

    The same directories give the same bytes. Nothing is written but the file, which appears whole or not
    at all.

    Args:
        directory: with ``regauge.json`` in it; only read.
        out: file that does not exist yet; default ``DIRECTORY-report.html`` beside the directory.
        source: what the directory was made from, see :func:`regauge.sources.resolve`: then everything is
            shown before and after, and errors per layer. Only read.
        progress: called with (what is being done, done, total).

    Returns:
        The path of the file.

    Raises:
        BadInput: no ``regauge.json``; weights that it does not certify; another source; ``out`` exists or
            cannot be written; a model that transformers cannot run.
        CheckpointError: damaged or missing weight files.
    """
    path = Path(directory)
    place = Path(os.path.abspath(path))
    target = place.with_name(f"{place.name}-report.html") if out is None else Path(out)
    if os.path.lexists(target):
        raise BadInput(
            "the report exists already, and nothing is overwritten",
            expected="a file that does not exist yet",
            found=str(target),
            way_out="remove it, or name another with --out",
        )
    if not target.parent.is_dir():
        raise BadInput(
            "there is no such directory for the report", found=str(target.parent), way_out="make it first"
        )
    text = render(gather(place, None if source is None else resolve(source), progress))
    _put(target, text.encode())
    return target


def _appear(temporary: str, target: Path) -> None:
    """Give the file its name, unless the name was taken in the meantime."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise
        os.rename(temporary, target)


def _put(target: Path, content: bytes) -> None:
    """A file that appears whole, or not at all, and never in the place of another."""
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        _appear(temporary, target)
    except OSError as error:
        raise BadInput(f"cannot write {target}", found=error.strerror or str(error)) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
