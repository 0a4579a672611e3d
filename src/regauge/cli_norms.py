"""``regauge norms``: the table of normalisation layers."""

from __future__ import annotations

from typing import Annotated

import typer

from regauge.cli_options import AsJson
from regauge.cli_support import outcome, print_json, show
from regauge.errors import BadInput


def norms(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these layers.", show_default=False)
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what each normalisation layer ignores, what it folds to, and what can become it.

    Nothing in the table is looked up: each layer is built with random parameters
    and tried in float64, so that what is printed is true of the code that runs.

    \b
    Examples:
      regauge norms
      regauge norms rmsnorm seednorm
      regauge norms --json
    """
    with outcome(as_json=json):
        from regauge.nn.catalog import ENTRIES, row
        from regauge.show_norms import norms_data, norms_view

        known = {entry.name: entry for entry in ENTRIES}
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise BadInput("unknown layer", found=unknown[0], expected=", ".join(known))
        found = [row(known[name]) for name in (names or known)]
        if json:
            print_json(norms_data(found))
        else:
            show(norms_view(found))
