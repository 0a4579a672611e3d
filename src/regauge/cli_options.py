"""Options that several commands share, and what writes a new directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regauge.cli_support import parse_size, print_json, progress_bar, rewritten, show, torch_dtype

if TYPE_CHECKING:
    from regauge.recipe import Recipe


class Dtype(StrEnum):
    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="A Hugging Face directory, a GGUF file, or packaged:NAME.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout; errors as JSON on stderr.")]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="Compare on the tokens of this UTF-8 file, not random inputs.")
]
Memory = Annotated[str | None, typer.Option("--max-memory", metavar="SIZE", help="Stay near this, e.g. 2GB.")]

Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="New directory; must not exist.", show_default=False)
]
Storage = Annotated[
    Dtype | None, typer.Option("--dtype", help="Storage of the result. Default: as the source.")
]


def write_and_show(
    source: str,
    out: Path,
    plan: Recipe,
    dtype: Dtype | None,
    seed: int | None,
    max_memory: str | None,
    text: Path | None,
    *,
    as_json: bool,
    cut: bool = False,
) -> None:
    """Carry out a recipe, with a progress bar, and print what was done."""
    limit = None if max_memory is None else parse_size(max_memory)
    from regauge.api import rewrite

    with progress_bar(quiet=as_json) as progress:
        result = rewrite(
            source,
            out,
            plan,
            dtype=None if dtype is None else torch_dtype(dtype),
            seed=seed,
            max_memory=limit,
            text=text,
            progress=progress,
            cut=cut,
        )
    if as_json:
        print_json(rewritten(result, str(out)))
    else:
        from regauge.show import result_view

        show(result_view(result, str(out)))
