"""The table of normalisation layers, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from regauge.nn.catalog import Row
from regauge.nn.symmetry import SYMMETRIES, Effect

_IMPLIED = {"rotation": ("rotation of differences", "signs", "permutation")}
"""Part of another group, and not named beside it."""


def norms_view(rows: Sequence[Row]) -> RenderableType:
    """One row for each layer; the symbols are explained below it."""
    table = Table(title="Normalisation layers, every cell found by trying in float64", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for title in ("does not see", "passes on", "with its parameters", "at inference"):
        table.add_column(title)
    for title in ("LayerNorm", "RMSNorm", "BatchNorm"):
        table.add_column(f"from {title}", justify="center")
    for row in rows:
        table.add_row(
            row.entry.title,
            _cell(row, Effect.NONE),
            _cell(row, Effect.ALONG),
            "\n".join(row.gauges) or "–",
            row.fold or "stays",
            *(row.upgrades[form] or "–" for form in ("layer", "rms", "batch")),
        )
    notes = Table.grid(padding=(0, 2))
    for symmetry in SYMMETRIES:
        notes.add_row(Text(symmetry.name, style="bold"), Text(symmetry.text))
    last = Text(
        "Up to eps. t counts tokens or positions, c features. Probed without gains and shifts.", "dim"
    )
    return Group(table, notes, last)


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
