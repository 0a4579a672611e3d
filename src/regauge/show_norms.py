"""The table of normalisation layers, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from regauge.nn.catalog import Row
from regauge.nn.symmetry import SYMMETRIES, Effect

_IMPLIED = {"rotation": ("rotation of differences", "signs", "permutation")}
"""Part of another group, and not named beside it."""


_TITLE = "Normalisation layers, every cell found by trying in float64"
_LABELS = ("does not see", "passes on", "with its parameters", "at inference")
_NOTE = "Up to eps. t counts tokens or positions, c features. Probed without gains and shifts."


def norms_view(rows: Sequence[Row], *, wide: bool = True) -> RenderableType:
    """One row, or on a narrow terminal one block, for each layer; the symmetries are explained below."""
    notes = Table.grid(padding=(0, 2))
    for symmetry in SYMMETRIES:
        notes.add_row(Text(symmetry.name, style="bold"), Text(symmetry.text))
    body = _table(rows) if wide else _blocks(rows)
    return Group(body, notes, Text(_NOTE, style="dim"))


def _table(rows: Sequence[Row]) -> RenderableType:
    table = Table(title=_TITLE, title_justify="left", show_lines=True)
    table.add_column("layer")
    for title in (*_LABELS, "LayerNorm", "RMSNorm", "BatchNorm"):
        table.add_column(title if title in _LABELS else f"from {title}")
    for row in rows:
        upgrades = (row.upgrades[form] or "–" for form in ("layer", "rms", "batch"))
        table.add_row(row.entry.title, *map(Text, _cells(row)), *upgrades)
    return table


def _blocks(rows: Sequence[Row]) -> RenderableType:
    blocks: list[RenderableType] = [Text(_TITLE + "\n", style="italic")]
    for row in rows:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        for label, cell in zip(_LABELS, _cells(row), strict=True):
            grid.add_row(label, Text(cell))
        become = [f"{_FORMS[form]} ({mode})" for form, mode in row.upgrades.items() if mode]
        grid.add_row("can replace", Text(", ".join(become) or "–"))
        blocks += [Text(f"{row.entry.title}  ({row.entry.name})", style="bold"), Padding(grid, (0, 0, 1, 2))]
    return Group(*blocks)


_FORMS = {"layer": "LayerNorm", "rms": "RMSNorm", "batch": "BatchNorm"}


def _cells(row: Row) -> tuple[str, str, str, str]:
    gauges = "\n".join(row.gauges) or "–"
    return _cell(row, Effect.NONE), _cell(row, Effect.ALONG), gauges, row.fold or "stays"


def norms_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [
        {
            "name": row.entry.name,
            "title": row.entry.title,
            "source": row.entry.source,
            "evaluation": _named(row.evaluation),
            "training": _named(row.training),
            "gauges": list(row.gauges),
            "fold": row.fold,
            "upgrades": dict(row.upgrades),
        }
        for row in rows
    ]


def _named(effects: Mapping[str, Effect]) -> dict[str, str]:
    return {name: str(effect) for name, effect in effects.items() if effect}


def _cell(row: Row, wanted: Effect) -> str:
    """Names of the symmetries with this effect; where training differs, both."""
    evaluation, training = (_names(effects, wanted) for effects in (row.evaluation, row.training))
    if evaluation == training:
        return evaluation or "–"
    return f"{evaluation or '–'}\ntraining: {training or '–'}"


def _names(effects: Mapping[str, Effect], wanted: Effect) -> str:
    names = [name for name, effect in effects.items() if effect is wanted]
    implied = {part for name in names for part in _IMPLIED.get(name, ())}
    return ", ".join(name for name in names if name not in implied)
