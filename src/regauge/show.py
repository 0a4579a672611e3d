"""Tables for people: an atlas, the moves, an error. Nothing here computes anything about a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from regauge.atlas import Atlas, Kind, Limit, Space
from regauge.errors import Refused, RegaugeError

if TYPE_CHECKING:
    from regauge.api import RewriteResult
    from regauge.exporting import Dynamic, ExportResult

NAMES = {
    Kind.PERMUTATION: "permutation",
    Kind.SIGN: "signs",
    Kind.POSITIVE: "positive scale",
    Kind.SCALE: "any scale",
    Kind.COMPLEX: "complex scale",
    Kind.ORTHOGONAL_ONES: "orthogonal fixing ones",
    Kind.ORTHOGONAL: "orthogonal",
    Kind.GENERAL_LINEAR: "general linear",
    Kind.TRANSLATION: "translation",
    Kind.NULL: "null directions",
}
_LADDER = (
    Kind.PERMUTATION,
    Kind.ORTHOGONAL_ONES,
    Kind.ORTHOGONAL,
    Kind.GENERAL_LINEAR,
    Kind.COMPLEX,
    Kind.SIGN,
    Kind.POSITIVE,
    Kind.SCALE,
)
_SHOWN_MODULES = 3


@dataclass(frozen=True)
class Row:
    """Spaces that differ only in the numbers within their parameter names (the layers of a stack).

    Attributes:
        label: modules whose parameters have the space, numbers written as ``*``.
        layers: how many spaces the row stands for.
        spaces: them, in the order of the atlas.
    """

    label: str
    layers: int
    spaces: tuple[Space, ...]

    @property
    def space(self) -> Space:
        return self.spaces[0]


def rows(atlas: Atlas) -> tuple[Row, ...]:
    """One row for each group of alike spaces, in the order of their first space.

    Spaces are alike if size, copies, kinds, limits and parameters are equal up to the numbers in names.
    """
    groups: dict[tuple[object, ...], list[Space]] = {}
    for space in atlas.spaces:
        groups.setdefault(_signature(space), []).append(space)
    return tuple(Row(_label(group), len(group), tuple(group)) for group in groups.values())


def _signature(space: Space) -> tuple[object, ...]:
    return (
        space.size,
        tuple(size for _, size in space.copies),
        space.admits,
        space.admits_folded,
        _limits(space.limits),
        _limits(space.limits_folded),
        tuple(sorted({(_starred(name), axis) for name, axis in space.parameters})),
    )


def _limits(limits: Sequence[Limit]) -> tuple[object, ...]:
    return tuple((limit.kind, _starred(limit.module), _starred(limit.reason)) for limit in limits)


def _starred(name: str) -> str:
    """Numbers that are a whole component of a dotted name, replaced by ``*``."""
    return re.sub(r"(?<![^\s.])\d+(?=\.|\s|$)", "*", name)


def _label(spaces: Sequence[Space]) -> str:
    """Common dotted part of the modules that own the parameters, then what differs.

    A number that is the same in all spaces of a group stays a number.
    """
    several = len(spaces) > 1
    owners = [name.rpartition(".")[0] or name for name, _ in spaces[0].parameters]
    starred = several or len(set(map(_starred, owners))) < len(set(owners))
    owners = list(dict.fromkeys(map(_starred, owners) if starred else owners))
    if not owners:
        return spaces[0].id
    parts = [owner.split(".") for owner in owners]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    rest = list(dict.fromkeys(".".join(part[len(common) :]) for part in parts if part[len(common) :]))
    head = ".".join(common)
    if not rest:
        return head
    tail = ", ".join(rest[:_SHOWN_MODULES])
    if len(rest) > _SHOWN_MODULES:
        tail += f", and {len(rest) - _SHOWN_MODULES} more"
    return f"{head}: {tail}" if head else tail


def _kinds(kinds: Iterable[Kind]) -> str:
    return ", ".join(NAMES[kind] for kind in kinds) or "nothing"


def limit_of(space: Space) -> Limit | None:
    """The limit that explains most: of the smallest kind the space does not admit, after folding if
    anything can be folded."""
    limits = [limit for limit in space.limits_folded or space.limits if limit.kind in _LADDER]
    return min(limits, key=lambda limit: _LADDER.index(limit.kind), default=None)


def _why(row: Row) -> Text:
    space, starred = row.space, row.layers > 1
    limit = limit_of(space)
    if limit is None:
        return Text("")
    module = _starred(limit.module) if starred else limit.module
    reason = _starred(limit.reason) if starred else limit.reason
    known = module in reason or row.label.startswith(module)
    place = "" if known else f" (in {module})"
    return Text(f"no {NAMES[limit.kind]}: {reason}{place}")


def atlas_view(atlas: Atlas, title: str, *, wide: bool = True) -> RenderableType:
    """The atlas at a glance: one row per group of alike spaces, then ties, folds, refusals and notes.

    Args:
        atlas: what to show.
        title: put above it.
        wide: whether there is room for a table (about 130 columns); otherwise a list.
    """
    lines: list[RenderableType] = [_table(atlas, title) if wide else _list(atlas, title)]
    lines.append(Text(_summary(atlas)))
    lines += [Text(f"tied: {' = '.join(names)}") for _, names in atlas.aliases]
    lines += [Text(f"foldable: {_listed(atlas.folds)}")] if atlas.folds else []
    lines += [Text(f"note: {note}") for note in atlas.notes]
    lines += [_refusals(atlas)] if atlas.refusals else []
    return Group(*lines)


def _later(atlas: Atlas) -> str:
    return "after untying and folding" if atlas.aliases else "after folding"


def _table(atlas: Atlas, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("space", overflow="fold", ratio=5)
    for name in ("×", "size", "per"):
        table.add_column(name, justify="right")
    table.add_column("admits now", ratio=3)
    if atlas.folded is not None:
        table.add_column(_later(atlas), ratio=3)
    table.add_column("what limits it", overflow="fold", ratio=5)
    for row in rows(atlas):
        space, why = row.space, _why(row)
        cells: list[RenderableType] = [row.label, str(row.layers), str(space.size), _per(space), _now(space)]
        if atlas.folded is not None:
            same = space.admits_folded == space.admits
            cells.append(Text("same", style="dim") if same else _then(space))
        table.add_row(*cells, why)
    return table


def _list(atlas: Atlas, title: str) -> RenderableType:
    blocks: list[RenderableType] = [Text(title, style="bold")]
    for row in rows(atlas):
        space, why = row.space, _why(row)
        size = f"{row.layers} × size {space.size}" + (f" per {_per(space)}" if space.copies else "") + ": "
        line = Text.assemble(size, _now(space))
        if atlas.folded is not None and space.admits_folded != space.admits:
            line.append(f"; {_later(atlas)}: ").append(_then(space))
        indented = Padding(Group(line, *([why] if why else [])), (0, 0, 0, 2))
        blocks += [Text(row.label, style="bold"), indented]
    return Padding(Group(*blocks), (0, 0, 1, 0))


def _per(space: Space) -> str:
    return "·".join(str(size) for _, size in space.copies)


def _now(space: Space) -> Text:
    return Text(_kinds(space.admits), style="" if space.admits else "dim")


def _then(space: Space) -> Text:
    return Text(_kinds(space.admits_folded), style="green")


def _summary(atlas: Atlas) -> str:
    counts = Counter(generator.kind for generator in atlas.generators)
    kinds = ", ".join(f"{counts[kind]} {NAMES[kind]}" for kind in Kind if counts[kind])
    text = f"{len(atlas.spaces)} spaces, {len(atlas.generators)} generators" + (f": {kinds}" if kinds else "")
    return f"{text}. ×: alike spaces (layers); per: independent elements in each (heads)"


def _listed(names: Sequence[str]) -> str:
    counts = Counter(map(_starred, names))
    return ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in counts.items())


def _refusals(atlas: Atlas) -> RenderableType:
    counts = Counter((_starred(refusal.module), refusal.reason) for refusal in atlas.refusals)
    lines = [
        f"  {reason}" + (f" (in {module})" if module else "") + (f" ×{count}" if count > 1 else "")
        for (module, reason), count in counts.items()
    ]
    return Text("left alone because it was not understood:\n" + "\n".join(lines), style="yellow")


def result_view(result: RewriteResult, out: str) -> RenderableType:
    """The certificate, and what was written where in which time."""
    from regauge.certify import render

    report = result.report
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    done = f"tensors: {report.computed} computed, {report.moved} permuted, {report.copied} copied"
    if report.resumed:
        done += f", {report.resumed} taken over from an interrupted run"
    written = f"written to {out}: {report.bytes_written / 1e6:,.1f} MB"
    return Group(render(result.certificate), Text(f"\n{done}\ntime: {times}\n{written}"))


def export_view(result: ExportResult) -> RenderableType:
    """The figures of each output, what it was run on, and what was written where in which time."""
    from regauge.certify.certificate import cells

    found = result.certificate
    logits = any(output.error.kl_mean is not None for output in found.outputs.values())
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("relative", "max abs", "KL mean", "KL max", "top-1")[: 5 if logits else 2]:
        table.add_column(name, justify="right")
    for name, output in found.outputs.items():
        table.add_row(name, *cells(output.error, logits))
        table.add_row("  floor: source against float64", *cells(output.floor, logits))
        table.add_row("  exported against float64", *cells(output.float64, logits))
    head = Text.assemble((str(found.verdict), "bold green"), f": {found.reason}")
    axes = [f"{axis.input}.{axis.axis} {axis.name} ≥ {axis.least}" + _most(axis) for axis in found.dynamic]
    fixed = [f"{name} stays {size}: the model's own code fixes it" for name, size in found.static.items()]
    sizes = [
        ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in probe.shapes.items())
        + f": {probe.relative:.2e}"
        for probe in found.probes
    ]
    source = found.source
    lines = [
        "dynamic: " + (", ".join(axes) or "nothing"),
        *fixed,
        f"inputs: {found.inputs}, seed {found.seed}; relative error by size, the first being the one traced:",
        *(f"  {size}" for size in sizes),
        f"source: {source.name} ({source.architecture}, {source.parameters:,} parameters,"
        f" sha256 {source.digest[:16]})",
    ]
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    files = ", ".join(map(str, result.files))
    written = f"\ntime: {times}\nwritten to {files}: {found.bytes / 1e6:,.1f} MB, sha256 {found.digest[:16]}"
    return Group(head, Text(), table, Text(), Text("\n".join(lines), style="dim"), Text(written))


def _most(axis: Dynamic) -> str:
    return "" if axis.most is None else f", ≤ {axis.most}"


def moves_view(moves: Mapping[str, Any]) -> RenderableType:
    """Every move: its identity, what it needs and keeps, its options."""
    return Group(
        *_described(
            moves,
            {"needs": lambda move: move.needs or "nothing", "preserves": lambda move: str(move.preserves)},
        )
    )


def cuts_view(cuts: Mapping[str, Any]) -> RenderableType:
    """Every cut: what it does and loses, its options."""
    title = Text("Cuts: another function, measured; only with --allow-cuts\n", style="yellow")
    return Group(title, *_described(cuts, {"loses": lambda cut: cut.loses}))


def _described(moves: Mapping[str, Any], rows: Mapping[str, Callable[[Any], str]]) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    for move in moves.values():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_row("identity", Text(move.identity))
        for label, cell in rows.items():
            table.add_row(label, Text(cell(move)))
        for key, option in move.options.items():
            table.add_row("option", Text(f"{key}={option_values(option)}  {option.help}"))
        blocks += [Text(move.name, style="bold"), Padding(table, (0, 0, 1, 2))]
    return blocks


def option_values(option: Any) -> str:
    """What an option may be, its default marked with a star."""
    values: tuple[Any, ...] = (True, False) if option.type is bool else tuple(option.choices)
    if not values:
        return f"<{option.type.__name__}>"
    texts = [f"{value}*" if value == option.default else str(value) for value in values]
    return "|".join(texts).lower() if option.type is bool else "|".join(texts)


def error_view(error: RegaugeError) -> RenderableType:
    """An error as a panel: what went wrong, where, expected and found, a way out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label in ("node", "parameter", "space", "expected", "found"):
        value = getattr(error, label)
        if value is not None:
            grid.add_row(label, Text(str(value)))
    if error.way_out is not None:
        grid.add_row("try", Text(error.way_out, style="bold"))
    body: list[RenderableType] = [Text(error.message)]
    if grid.row_count:
        body += [Text(), grid]
    colour = "yellow" if isinstance(error, Refused) else "red"
    title = f"{type(error).__name__}, exit {error.exit_code}"
    return Panel(Group(*body), title=title, title_align="left", border_style=colour)
