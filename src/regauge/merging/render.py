"""What a merge did as tables, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regauge.merging.barrier import Barrier
from regauge.merging.methods import METHODS
from regauge.merging.result import Merged

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


_KEPT = {True: "", False: " as it is", None: ""}


def render(found: Merged) -> RenderableType:
    """Where it is, the models, the barrier curve, and how far the result is from the first model."""
    from rich.console import Group
    from rich.text import Text

    method = METHODS[found.method]
    first = found.base or found.sources[0]
    parts: list[RenderableType] = [
        Text.assemble(("merged", "bold"), f" to {found.out}: {found.method}, {method.identity}")
    ]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in found.warnings]
    parts += [Text(), _models(found)]
    if found.barrier is not None:
        parts += [Text(), *_barrier(found.barrier)]
    parts += [
        Text(),
        Text.assemble(
            (f"beside {first.name}", "bold"), f": {found.certificate.reason}: another function, measured"
        ),
    ]
    return Group(*parts)


def _models(found: Merged) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    scored = found.loss is not None
    for name in ("model", "weight", "similarity", *(("loss",) if scored else ())):
        table.add_column(name, justify="left" if name == "model" else "right")
    for source in (*((found.base,) if found.base else ()), *found.sources):
        row = [
            source.name,
            "base" if source.weight is None else f"{source.weight:g}",
            "" if source.similarity is None else f"{source.similarity:.4f}" + _KEPT[source.moved],
        ]
        table.add_row(*row, *([f"{source.loss:.4f}"] if scored and source.loss is not None else []))
    if scored:
        table.add_row("the result", "", "", f"{found.loss:.4f}")
    return table


def _barrier(found: Barrier) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("t", justify="right")
    curves = [(n, c) for n, c in (("aligned", found.aligned), ("as they are", found.plain)) if c is not None]
    for name, _ in curves:
        table.add_column(f"loss, {name}", justify="right")
    for i, t in enumerate(found.places):
        table.add_row(f"{t:.1f}", *(f"{curve.losses[i]:.4f}" for _, curve in curves))
    table.add_row("barrier", *(f"{curve.barrier:.4f}" for _, curve in curves), style="bold")
    note = [] if found.without is None else [Text(f"as they are: none; {found.without}", style="dim")]
    return [table, *note]
