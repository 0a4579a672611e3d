"""`regauge compare` and `regauge align`: the relation of two models, and one in the gauge of the other."""

from __future__ import annotations

from typing import Annotated

import typer

from regauge.cli_options import AsJson, Memory, Out, Storage, TextFile
from regauge.cli_support import (
    outcome,
    parse_size,
    print_json,
    progress_bar,
    rewritten,
    show,
    torch_dtype,
)
from regauge.errors import EXIT_CERTIFICATE


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="The one you know.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.", show_default=False)],
    text: TextFile = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random inputs and of the rounding floor.")] = 0,
    max_memory: Memory = None,
    json: AsJson = False,
) -> None:
    """Are these two the same function, is one derived from the other, or are they unrelated?

    B is moved into A's gauge: heads, neurons and channels in A's order, the
    residual stream in A's basis. What is left over then says how they are
    related; both also run on the same inputs. Names, sharding, dtype, folded
    norms, untied heads and LayerNorm against RMSNorm make no difference.

    \b
    Exit codes: 0 equivalent, 1 derived or unrelated.

    \b
    Examples:
      regauge compare ./llama ./mystery
      regauge compare packaged:gemma-3-270m ./finetuned --json
    """
    with outcome(as_json=json):
        from regauge.comparing import compare as run
        from regauge.comparing.render import render

        limit = None if max_memory is None else parse_size(max_memory)
        with progress_bar(quiet=json) as progress:
            found = run(a, b, text=text, seed=seed, max_memory=limit, progress=progress)
        if json:
            print_json(found.to_json())
        else:
            show(render(found))
        if not found.equivalent:
            raise typer.Exit(EXIT_CERTIFICATE)


def align(
    a: Annotated[str, typer.Argument(metavar="A", help="Whose gauge is taken.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The one that is moved.", show_default=False)],
    out: Out,
    dtype: Storage = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random inputs and of the rounding floor.")] = 0,
    max_memory: Memory = None,
    text: TextFile = None,
    json: AsJson = False,
) -> None:
    """Write B moved into A's gauge: the same function as B, ready to diff, average or merge with A.

    Heads, neurons and channels come in A's order, the residual stream in A's
    basis, norm scales and shifts with A's values. The certificate says that
    OUT is B.

    \b
    Examples:
      regauge align ./base ./disguised ./aligned
      regauge align ./run1 ./run2 ./run2-aligned --dtype float32
    """
    with outcome(as_json=json, resumes=True):
        from regauge.comparing.align import align as run
        from regauge.comparing.render import alignment_view

        limit = None if max_memory is None else parse_size(max_memory)
        with progress_bar(quiet=json) as progress:
            found = run(
                a,
                b,
                out,
                dtype=None if dtype is None else torch_dtype(dtype),
                seed=seed,
                max_memory=limit,
                text=text,
                progress=progress,
            )
        if json:
            plain = rewritten(found.result, str(out))
            plain["similarity"], plain["relative"] = found.alignment.similarity, found.alignment.relative
            print_json(plain)
        else:
            show(alignment_view(found, str(out)))
