"""Tables about fingerprints and what is near to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from regauge.provenance import Fingerprint, Hit, Row


def fingerprint_view(found: Fingerprint, source: str) -> Table:
    """One row for each thing that is known."""
    table = Table(title=f"Fingerprint of {source}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    counts = ", ".join(f"{count} {sort}" for sort, count in found.details.get("products", {}).items())
    table.add_row("architecture", found.architecture)
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("vector", f"{len(found.vector)} numbers from products: {counts}")
    missing = found.details.get("missing", ())
    if missing:
        table.add_row("not seen", f"{len(missing)} parameters, such as {missing[0]}")
    table.add_row("digest", found.digest or f"none: {found.details.get('not run', 'not asked for')}")
    table.add_row("size", f"{len(found.to_json()):,} bytes")
    table.add_row("time", f"{found.seconds:.1f} s")
    return table


def hits_view(hits: Sequence[Hit], source: str) -> Table:
    """Neighbours, nearest first."""
    table = Table(title=f"Nearest to {source}")
    for name in ("distance", "related", "name", "same function", "architecture", "parameters"):
        table.add_column(name, justify="right" if name in ("distance", "parameters") else "left")
    for hit in hits:
        same = {True: "yes", False: "no", None: "not compared"}[hit.same_function]
        related = "yes" if hit.related else "no"
        table.add_row(f"{hit.distance:.2e}", related, hit.name, same, hit.architecture, f"{hit.parameters:,}")
    return table


def rows_view(rows: Sequence[Row]) -> Table:
    """The entries of an index."""
    table = Table(title=f"{len(rows)} entries")
    table.add_column("name")
    table.add_column("architecture")
    table.add_column("parameters", justify="right")
    table.add_column("digest")
    for row in rows:
        table.add_row(row.name, row.architecture, f"{row.parameters:,}", row.digest or "")
    return table
