"""The barrier curves as one SVG file that loads nothing: two lines, labelled where they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from regauge.errors import BadInput
from regauge.merging.barrier import Barrier
from regauge.report.markup import Markup, h

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 700, 64, 362
_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#222}.title{font-size:17px;font-weight:600}"
    ".grid{stroke:#ddd}.axis{stroke:#888}.line{fill:none;stroke-width:2.5}"
    ".aligned{stroke:#0b62a8}.plain{stroke:#b5480c}text.aligned{fill:#0b62a8;stroke:none}"
    "text.plain{fill:#b5480c;stroke:none}circle.aligned{fill:#0b62a8}circle.plain{fill:#b5480c}"
)
_GAP = 20
"""Least distance of two labels, in pixels."""


def barrier_svg(found: Barrier, a: str, b: str) -> str:
    """The plot as SVG. The same figures give the same text.

    Args:
        found: the curves; losses that are not finite are left out.
        a, b: names of the two models.
    """
    curves = [
        (key, label, held)
        for key, label, held in (
            ("aligned", "after alignment", found.aligned),
            ("plain", "as they are", found.plain),
        )
        if held is not None
    ]
    known = [loss for _, _, held in curves for loss in held.losses if math.isfinite(loss)]
    low, high, ticks = _scale(known)

    def x(t: float) -> float:
        return _LEFT + t * (_RIGHT - _LEFT)

    def y(loss: float) -> float:
        return _BOTTOM - (loss - low) / (high - low) * (_BOTTOM - _TOP)

    title = f"Loss between {a} and {b}"
    parts: list[Markup] = [
        h("title", title),
        h("desc", "; ".join(f"{label}: barrier {held.barrier:.4g} nats" for _, label, held in curves)),
        h("style", Markup(_STYLE)),
        h("rect", width=_WIDTH, height=_HEIGHT, fill="#fff"),
        h("text", title, x=_LEFT, y=26, class_="title"),
        h("text", f"nats a token, {found.tokens} tokens", x=_LEFT, y=46),
    ]
    for tick in ticks:
        parts.append(h("line", x1=_LEFT, x2=_RIGHT, y1=_px(y(tick)), y2=_px(y(tick)), class_="grid"))
        parts.append(h("text", f"{tick:g}", x=_LEFT - 8, y=_px(y(tick) + 5), text_anchor="end"))
    parts.append(h("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="axis"))
    for t, anchor, name in ((0.0, "start", a), (0.5, "middle", "t = 0.5"), (1.0, "end", b)):
        parts.append(h("text", name, x=_px(x(t)), y=_BOTTOM + 22, text_anchor=anchor))
    parts.append(
        h("text", "weights (1 − t) · A + t · B", x=_px(x(0.5)), y=_BOTTOM + 44, text_anchor="middle")
    )
    for key, _, held in curves:
        parts += _curve(key, [(x(t), y(v)) for t, v in zip(found.places, held.losses, strict=True)])
    parts += _labels([(key, label, _peak(held.losses, y)) for key, label, held in curves], x)
    return h(
        "svg",
        parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width=_WIDTH,
        height=_HEIGHT,
        role="img",
    )


def write_svg(path: Path, text: str) -> None:
    """Write a new file. Raises ``BadInput`` if it exists already or cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise BadInput(f"cannot write {path}", found=error.strerror or str(error)) from error


def _curve(key: str, points: Sequence[tuple[float, float]]) -> list[Markup]:
    path, pen = "", "M"
    marks: list[Markup] = []
    for x, y in points:
        if math.isfinite(y):
            path += f"{pen}{_px(x)} {_px(y)}"
            marks.append(h("circle", cx=_px(x), cy=_px(y), r=3.5, class_=key))
        pen = "L" if math.isfinite(y) else "M"
    return [h("path", d=path, class_=f"line {key}"), *marks]


def _peak(losses: Sequence[float], y: Callable[[float], float]) -> tuple[int, float]:
    """Where a label stands: above the largest loss of the middle half."""
    n = len(losses)
    inner = [i for i in range(n // 4, n - n // 4) if math.isfinite(losses[i])] or [0]
    at = max(inner, key=lambda i: losses[i])
    return at, float(y(losses[at])) if math.isfinite(losses[at]) else float(_TOP)


def _labels(items: Sequence[tuple[str, str, tuple[int, float]]], x: Callable[[float], float]) -> list[Markup]:
    """Names beside the curves, above each other with a gap."""
    found: list[Markup] = []
    last = math.inf
    for key, label, (_, height) in sorted(items, key=lambda item: -item[2][1]):
        at = min(height - 10, last - _GAP)
        last = at
        found.append(
            h("text", label, x=_px(x(0.5)), y=_px(max(at, _TOP - 4)), class_=key, text_anchor="middle")
        )
    return found


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Lowest and highest value of the axis, and its ticks."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-6 * max(1.0, abs(high)):
        low, high = low - 0.05, high + 0.05
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _px(value: float) -> str:
    return f"{value:.1f}"
