"""``regauge norms``, ``upgrade`` and ``fold``: the table of norms, and what is done with it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from regauge.cli_options import AsJson, Memory, Out, Source, Storage, TextFile, write_and_show
from regauge.cli_support import outcome, print_json, show, wide
from regauge.errors import BadInput


class Kind(StrEnum):
    SEEDNORM = "seednorm"
    GATEDNORM = "gatednorm"
    PREAFFINE = "preaffine"
    MAGNITUDE = "magnitude"
    BRANCHED = "branched"
    LNS = "lns"
    RMSNORM = "rmsnorm"


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
            show(norms_view(found, wide=wide()))


def upgrade(
    source: Source,
    out: Out,
    norm: Annotated[Kind, typer.Option("--norm", help="What every norm becomes.", show_default=False)],
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="PATTERN", help="Only norms whose path matches, as *.layers.3.*"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="With --norm gatednorm: width of the gate. Default: 16.")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head a copy of its own first.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what is drawn. Default: 0.")] = None,
    dtype: Storage = None,
    max_memory: Memory = None,
    text: TextFile = None,
    json: AsJson = False,
) -> None:
    """Replace the norms of a model by layers that compute the same and can learn more.

    The new parameters start where they change nothing; the result is certified
    as after rewrite. What no parameters can make equal is refused: see
    [bold]regauge norms[/bold] for what can become what.

    \b
    Examples:
      regauge upgrade packaged:gemma-3-270m ./new --norm seednorm
      regauge upgrade ./llama ./new --norm gatednorm --rank 32
      regauge upgrade ./gpt2 ./new --norm rmsnorm --untie
    """
    with outcome(as_json=json, resumes=True):
        from regauge.recipe import parse_recipe

        first: list[Any] = ["untie"] if untie else []
        if norm is Kind.RMSNORM:
            if where is not None or rank is not None:
                raise BadInput(
                    "--norm rmsnorm replaces all LayerNorms", way_out="leave out --where and --rank"
                )
            moves = ["fold-shifts", "fold-scales"]
            first += [{"name": name, "optional": True} for name in moves]
            first += [{"name": "center", "norm": "rms"}]
        elif rank is not None and norm is not Kind.GATEDNORM:
            raise BadInput("--rank is the width of a gate", expected="--norm gatednorm", found=norm.value)
        else:
            given = {"where": where, "rank": rank}
            options = {name: value for name, value in given.items() if value is not None}
            first += [{"name": "upgrade", "norm": norm.value, **options}]
        plan = parse_recipe({"moves": first})
        write_and_show(source, out, plan, dtype, seed, max_memory, text, as_json=json)


def fold(
    source: Source,
    out: Out,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head a copy of its own first.")] = False,
    dtype: Storage = None,
    max_memory: Memory = None,
    text: TextFile = None,
    json: AsJson = False,
) -> None:
    """Fold everything that is constant at inference into the weights around it.

    Norms with running statistics, gains and shifts of norms, gains made of several
    parameters: each goes into the maps beside it where that is exact, and is no
    longer stored. What does not fold stays.

    \b
    Examples:
      regauge fold ./vit-with-batchnorm ./folded
      regauge fold ./llama ./folded --untie
    """
    with outcome(as_json=json, resumes=True):
        from regauge.recipe import parse_recipe

        names = ["collapse", "fold-batchnorm", "fold-shifts", "fold-scales", "fold-layer-scale", "strip"]
        moves: list[Any] = [{"name": name, "optional": True} for name in names]
        plan = parse_recipe({"moves": [{"name": "untie", "optional": True}] * untie + moves})
        write_and_show(source, out, plan, dtype, None, max_memory, text, as_json=json)
