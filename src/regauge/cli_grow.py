"""``regauge grow``: a larger model that computes the same."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from regauge.cli_options import AsJson, Memory, Out, Source, Storage, TextFile, write_and_show
from regauge.cli_support import outcome
from regauge.errors import RecipeError


class New(StrEnum):
    PAIRS = "pairs"
    ZERO = "zero"
    SPLIT = "split"


Neurons = Annotated[
    str | None, typer.Option("--neurons", metavar="N", help="Neurons of every feed-forward layer.")
]
Width = Annotated[
    str | None,
    typer.Option("--width", metavar="N", help="Width of the residual stream, where RMSNorms read it."),
]
Heads = Annotated[
    str | None,
    typer.Option("--heads", metavar="N", help="Heads of keys and values, each with its query heads."),
]
Queries = Annotated[
    str | None,
    typer.Option(
        "--queries", metavar="N", help="Query heads for every head of keys and values, where they are shared."
    ),
]
Keys = Annotated[
    str | None,
    typer.Option("--keys", metavar="N", help="Entries of a key and a query."),
]
Values = Annotated[
    str | None,
    typer.Option("--values", metavar="N", help="Entries of a value."),
]
Channels = Annotated[
    str | None, typer.Option("--channels", metavar="N", help="Channels between two convolutions.")
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", metavar="N", help="Layers; each new one starts as a copy that adds nothing."),
]
Stack = Annotated[
    str | None,
    typer.Option("--stack", metavar="PATH", help="With --layers: which list of them, if there are several."),
]


def grow(
    source: Source,
    out: Out,
    neurons: Neurons = None,
    width: Width = None,
    heads: Heads = None,
    queries: Queries = None,
    keys: Keys = None,
    values: Values = None,
    channels: Channels = None,
    layers: Layers = None,
    stack: Stack = None,
    new: Annotated[
        New,
        typer.Option("--new", help="New entries: pairs that cancel, zeros, or shares of old ones."),
    ] = New.PAIRS,
    noise: Annotated[
        float, typer.Option("--noise", help="With --new split: how unequal the shares are, 0 to below 1.")
    ] = 0.5,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="PATTERN", help="Only where a parameter's name matches, as *.3.*"),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what is drawn. Default: 0.")] = None,
    dtype: Storage = None,
    max_memory: Memory = None,
    text: TextFile = None,
    json: AsJson = False,
) -> None:
    """Make a model larger without changing what it computes, ready to be trained on.

    A size is a number, or +N for N more. The new entries are hidden: what reads
    them is zero, or they come in pairs that cancel, or they share the work of old
    ones. The result is certified as after rewrite, and stays a stock model where
    the architecture has such a configuration.

    \b
    Examples:
      regauge grow ./llama ./larger --neurons 16384 --heads +2
      regauge grow packaged:gemma-3-270m ./larger --width 768
      regauge grow ./gpt2 ./larger --neurons +512 --new split
      regauge grow ./whisper ./larger --layers 6 --stack model.decoder.layers
    """
    sizes = {
        "neurons": neurons,
        "residual": width,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "values": values,
        "channels": channels,
    }
    with outcome(as_json=json, resumes=True):
        from regauge.recipe import parse_recipe

        given = {name: size for name, size in sizes.items() if size is not None}
        if not given and layers is None:
            raise RecipeError(
                "say what is to grow",
                expected="a size, such as --neurons +512",
                found="none",
                way_out="`regauge grow --help` lists what can grow",
            )
        for option, value, use, needed in (
            ("--where", where, given, "a size, such as --neurons +512"),
            ("--stack", stack, layers, "--layers"),
        ):
            if value is not None and not use:
                raise RecipeError(
                    f"{option} says nothing here", expected=f"{needed} beside it", found=f"{option} {value}"
                )
        moves: list[dict[str, Any]] = []
        if layers is not None:
            moves.append({"name": "insert-layers", "layers": layers, **_set(stack=stack)})
        if given:
            moves.append({"name": "grow", **given, "new": new.value, "noise": noise, **_set(where=where)})
        plan = parse_recipe({"moves": moves})
        write_and_show(source, out, plan, dtype, seed, max_memory, text, as_json=json)


def _set(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}
