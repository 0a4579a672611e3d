"""Numbers as text."""

from __future__ import annotations

from collections.abc import Sequence

from regauge.report.markup import Markup, h


def integer(value: int) -> str:
    """With commas between thousands."""
    return f"{value:,}"


def scientific(value: float) -> str:
    """Three digits: ``1.23e-07``, ``0.123``, ``1.23``; zero is ``0``."""
    if not value:
        return "0"
    return f"{value:.3g}" if 0.01 <= abs(value) < 1000 else f"{value:.2e}"


def short(value: float) -> str:
    """Four digits, and an exponent only where it is needed; with commas between thousands."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def megabytes(value: int) -> str:
    """Bytes in units of a thousand: ``230.7 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value} B"


def times(shape: Sequence[int]) -> str:
    """``2×48``."""
    return "×".join(map(str, shape))


def blank() -> Markup:
    """What stands where there is no figure."""
    return h("span", "–", class_="none")
