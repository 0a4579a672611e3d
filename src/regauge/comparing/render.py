"""A comparison as a table, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regauge.comparing.comparison import Comparison, Relation, Renumbering

if TYPE_CHECKING:
    from rich.console import RenderableType

    from regauge.comparing.align import AlignResult

_COLOURS = {
    Relation.EQUIVALENT: "green",
    Relation.WITHIN_ROUNDING: "green",
    Relation.DERIVED: "yellow",
    Relation.UNRELATED: "red",
}
_WORST = 5


def alignment_view(found: AlignResult, out: str) -> RenderableType:
    """How near the aligned model is, and the certificate that it is the same function."""
    from rich.console import Group
    from rich.text import Text

    from regauge.certify import render as certificate_view

    line = f"{out}: similarity {found.alignment.similarity:.6f}, ‖a − b‖ = {found.alignment.relative:.2e} ‖a‖"
    return Group(Text(line), Text(), certificate_view(found.result.certificate))


def render(found: Comparison) -> RenderableType:
    """Verdict, kinds of change, the gauge element, what is left over, and the certificate."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from regauge.certify import render as certificate_view

    parts: list[RenderableType] = [
        Text.assemble((str(found.relation), f"bold {_COLOURS[found.relation]}"), f": {found.reason}")
    ]
    for change in found.changes:
        parts.append(Text.assemble("  ", (change.kind, "bold"), f": {change.evidence}"))
    if found.renamed:
        parts.append(Text(f"{found.renamed} tensors of b were named by their contents", style="dim"))
    if found.vocabulary is not None:
        parts.append(Text(_vocabulary(found.vocabulary), style="dim"))
    if found.similarity is None:
        parts.append(Text(f"not aligned: {found.not_aligned}", style="dim"))
    else:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("gauge", "generators", "largest", "elements", "moved"):
            table.add_column(name, justify="left" if name == "gauge" else "right")
        for row in found.gauge:
            table.add_row(row.kind, str(row.generators), str(row.size), str(row.copies), str(row.moved))
        worst = sorted(found.tensors, key=lambda t: -t.relative)[:_WORST]
        left = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("left over", "‖a − b‖ / ‖a‖", "cosine"):
            left.add_column(name, justify="left" if name == "left over" else "right")
        left.add_row("all matrices", f"{found.relative:.2e}", f"{found.similarity:.6f}")
        for tensor in worst:
            left.add_row(f"  {tensor.parameter}", f"{tensor.relative:.2e}", f"{tensor.cosine:.6f}")
        parts += [Text(), table, Text(), left]
        alone = [*(f"{n} (only a)" for n in found.only_a), *(f"{n} (only b)" for n in found.only_b)]
        if alone:
            parts.append(Text(f"without a counterpart: {', '.join(alone[:8])}", style="dim"))
    if found.certificate is not None:
        parts += [Text(), certificate_view(found.certificate)]
    return Group(*parts)


def _vocabulary(found: Renumbering) -> str:
    line = f"vocabulary: {found.tokens:,} tokens, {found.renumbered:,} renumbered"
    alone = [f"{n:,} only in {name}" for name, n in (("a", found.only_a), ("b", found.only_b)) if n]
    line = ", ".join([line, *alone])
    return line if found.common else f"{line}; rows are compared by their ids"
