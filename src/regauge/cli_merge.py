"""``regauge merge``: weights of several models in one, after alignment."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from regauge.cli_options import AsJson, Memory, Storage
from regauge.cli_support import outcome, parse_size, print_json, progress_bar, show, torch_dtype
from regauge.errors import BadInput


class Method(StrEnum):
    LINEAR = "linear"
    SLERP = "slerp"
    TASK = "task"
    TIES = "ties"
    DARE = "dare"


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B [C ...] OUT", help="Models, and the new directory.", show_default=False),
    ],
    method: Annotated[Method, typer.Option("--method", help="How; the list is below.")] = Method.LINEAR,
    base: Annotated[
        str | None, typer.Option("--base", metavar="SRC", help="What the models were fine-tuned from.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="One for each model. Default: 1.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="λ of task, ties and dare. Default: 1.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="Share of entries kept. Default: 0.2 for ties, 0.1 for dare."),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="First move the others into the gauge of the first.")
    ] = True,
    dtype: Storage = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Score the models and the result on this UTF-8 file.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Of the text, at least.", min=2)] = 2048,
    barrier: Annotated[
        bool, typer.Option("--barrier", help="Also score 11 points on the line from A to B; needs --text.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="With --barrier: new SVG. Default: OUT-barrier.svg."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn at random.")] = 0,
    max_memory: Memory = None,
    json: AsJson = False,
) -> None:
    """Merge models tensor by tensor into one of the same size, after alignment.

    Two models of one origin may hold their neurons, heads and channels in
    another order or basis; their plain average is noise. So the others are
    first moved into the gauge of A (of the base, if there is one): the same
    functions, in A's coordinates. The result is another function: how far it
    is from the first model is measured and printed.

    \b
    Methods:
      linear  the weighted mean of the weights
      slerp   the point on the arc from A to B, tensor by tensor
      task    base + scale * the sum of what each model adds to the base
      ties    the same, trimmed to the largest entries, where signs agree
      dare    the same, most entries dropped at random, the rest scaled up

    \b
    Examples:
      regauge merge ./llama ./finetuned ./merged
      regauge merge ./one ./two ./merged --barrier --text book.txt
      regauge merge ./math ./code ./merged --method task --base ./llama --scale 0.5
      regauge merge ./one ./two ./three ./soup --weights 2,1,1 --no-align
    """
    with outcome(as_json=json, resumes=True):
        limit = None if max_memory is None else parse_size(max_memory)
        *sources, out = models
        if not sources:
            raise BadInput("say what to merge, and where to", expected="A B OUT", found=" ".join(models))
        target = Path(out)
        picture = _plot(target, plot, barrier)
        from regauge.merging import merge as run
        from regauge.merging.render import render

        with progress_bar(quiet=json) as progress:
            found = run(
                sources,
                target,
                method=method.value,
                base=base,
                weights=_weights(weights),
                scale=scale,
                density=density,
                align=align,
                dtype=None if dtype is None else torch_dtype(dtype),
                text=text,
                tokens=tokens,
                barrier=barrier,
                seed=seed,
                max_memory=limit,
                progress=progress,
            )
        extra: dict[str, Any] = {}
        if found.barrier is not None:
            from regauge.merging.plot import barrier_svg, write_svg

            write_svg(picture, barrier_svg(found.barrier, *(source.name for source in found.sources)))
            extra["plot"] = str(picture)
        if json:
            print_json(found.to_dict() | extra)
        else:
            show(render(found))
            if extra:
                print(f"plot: {picture}")


def _plot(out: Path, plot: Path | None, barrier: bool) -> Path:
    if plot is not None and not barrier:
        raise BadInput("--plot says nothing here", expected="--barrier beside it", found=f"--plot {plot}")
    path = plot or out.with_name(f"{out.name}-barrier.svg")
    if barrier and path.exists():
        raise BadInput("the plot exists already", found=str(path), way_out="choose another path with --plot")
    return path


def _weights(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput("cannot read the weights", expected="for example 1,0.5", found=repr(text)) from error
