"""``certify --margin``: options, and what runs and prints it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from regauge.cli_support import parse_size, print_json, progress_bar, show
from regauge.errors import BadInput

_PANEL = "Within a margin, on a text"

Margin = Annotated[
    float | None,
    typer.Option("--margin", help="Largest mean difference that counts as none.", rich_help_panel=_PANEL),
]
Level = Annotated[
    float | None,
    typer.Option("--level", help="Error rate of the tests. Default: 0.05.", rich_help_panel=_PANEL),
]
Power = Annotated[
    float | None,
    typer.Option("--power", help="Chance of a decision to plan for. Default: 0.8.", rich_help_panel=_PANEL),
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", help="Tokens of text to score. Default: 8192.", rich_help_panel=_PANEL),
]
DocumentRule = Annotated[
    str | None,
    typer.Option(
        "--document",
        metavar="REGEX",
        help="What stands between documents. Default: lines are joined to about a row.",
        rich_help_panel=_PANEL,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="Classifiers: the number of the right class of each line of the text.",
        rich_help_panel=_PANEL,
    ),
]


def compare_on_text(
    a: str,
    b: str,
    text: Path | None,
    margin: float | None,
    options: Mapping[str, Any],
    seed: int,
    max_memory: str | None,
    *,
    as_json: bool,
) -> None:
    """Score both models on a text, print what was found, and end with its exit code."""
    if margin is None or text is None:
        raise BadInput(
            "a comparison within a margin needs a text and a margin",
            expected="--text FILE --margin M",
            found="no --margin" if margin is None else "no --text",
        )
    limit = None if max_memory is None else parse_size(max_memory)
    from regauge.api import resolve
    from regauge.equivalence import equivalence, render

    with progress_bar(quiet=as_json) as progress:
        result = equivalence(
            resolve(a),
            resolve(b),
            text,
            margin,
            seed=seed,
            max_memory=limit,
            progress=progress,
            **options,
        )
    if as_json:
        print_json(result.to_json())
    else:
        show(render(result))
    if result.exit_code:
        raise typer.Exit(result.exit_code)
