"""Plots as plain data for ``report.js``: names on one axis, one or more figures on the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regauge.report.figures import Spread
from regauge.report.gathering import Report
from regauge.report.names import layer, role

BEFORE, AFTER = {"key": "before", "label": "before"}, {"key": "after", "label": "after"}


def charts(report: Report) -> dict[str, Any]:
    """Id -> plot. See ``chart.js`` for the fields; every figure is the one in the tables."""
    found = {"weights": _weights(report), "activations": _activations(report)}
    if report.source is not None:
        found["errors"] = _errors(report)
    for i, spectrum in enumerate(report.spectra):
        values: dict[str, Any] = {"after": spectrum.after}
        if spectrum.before is not None:
            values["before"] = spectrum.before
        found[f"spectrum-{i}"] = {
            "kind": "lines",
            "label": f"singular values of {spectrum.name}",
            "x": "index",
            "index": spectrum.index,
            "series": _series(spectrum.before is not None),
            "metrics": [{"key": "value", "label": "singular value", "values": values}],
        }
    return found


def certificate_rows(report: Report) -> list[tuple[str, str, float]]:
    """(key, label, relative error) of what the certificate measured, for its picture and no others."""
    evidence, floor = report.certificate.evidence, report.certificate.floor_dtype
    named = (
        ("exact", "float64, before rounding", evidence.exact),
        ("float64", "float64, weights as stored", evidence.float64),
        ("floor", f"floor: re-rounded to {floor}", evidence.floor),
        ("floor", "floor: the other re-rounded", evidence.floor_b),
        ("stored", "run in the stored dtype", evidence.stored),
        ("stored-floor", f"floor: re-rounded to {floor}", evidence.stored_floor),
    )
    return [(key, label, figures.relative) for key, label, figures in named if figures is not None]


def certificate_chart(report: Report) -> dict[str, Any]:
    """Relative errors on one logarithmic axis; those in float64 beside the threshold and three floors."""
    rows = certificate_rows(report)
    floor = report.certificate.evidence.rounding
    marks = [{"label": "counts as exact", "value": report.certificate.exact_threshold}]
    allowed = report.certificate.floor_factor * floor
    if 0 < allowed < float("inf"):
        marks.append({"label": f"{report.certificate.floor_factor:g} floors", "value": allowed})
    return {
        "kind": "strip",
        "label": "relative errors of the certificate",
        "rows": [
            {"key": key, "label": label, "value": value if value < float("inf") else None}
            for key, label, value in rows
        ],
        "marks": marks,
        "compared": sum(not key.startswith("stored") for key, _, _ in rows),
    }


def _series(both: bool) -> list[dict[str, str]]:
    return [BEFORE, AFTER] if both else [AFTER]


def _weights(report: Report) -> dict[str, Any]:
    spreads = {
        "before": [item.before for item in report.weights],
        "after": [item.after for item in report.weights],
    }
    return {
        "kind": "dots",
        "label": "outliers of weights",
        "x": "matrices, in the order of the model",
        **_points([(item.name, item.shape) for item in report.weights]),
        "series": _series(report.source is not None),
        "metrics": [
            _metric("outlier", "max / rms", "max |w| / rms", spreads),
            _metric("kurtosis", "kurtosis", "kurtosis (normal: 3)", spreads),
            _metric("rms", "rms", "root mean square", spreads),
        ],
    }


def _activations(report: Report) -> dict[str, Any]:
    items = report.activations
    spreads = {"before": [item.before for item in items], "after": [item.after for item in items]}
    return {
        "kind": "dots",
        "label": "outliers of activations",
        "x": "modules, in the order they return",
        **_points([(item.name, item.shape) for item in items]),
        "series": _series(report.source is not None),
        "metrics": [
            _metric("outlier", "max / rms", "max |x| / rms", spreads),
            _metric("kurtosis", "kurtosis", "kurtosis (normal: 3)", spreads),
            _metric("rms", "rms", "root mean square", spreads),
        ],
    }


def _errors(report: Report) -> dict[str, Any]:
    items = [item for item in report.activations if item.error is not None or item.turned is not None]
    outputs = [item for item in report.outputs if item.function and item.error is not None]
    points = [(item.name, item.shape) for item in items] + [
        (f"output {item.name}", item.shape) for item in outputs
    ]
    values = {
        "error": [item.error for item in items] + [item.error for item in outputs],
        "turned": [item.turned for item in items] + [None] * len(outputs),
    }
    return {
        "kind": "dots",
        "label": "error per module",
        "x": "modules, in the order they return",
        **_points(points),
        "series": [
            {"key": "error", "label": "entry by entry"},
            {"key": "turned", "label": "up to an orthogonal map"},
        ],
        "metrics": [{"key": "error", "label": "relative error", "values": values}],
    }


def _points(items: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    return {
        "names": [name for name, _ in items],
        "shapes": [list(shape) for _, shape in items],
        "roles": [role(name) for name, _ in items],
        "layers": [layer(name) for name, _ in items],
    }


def _metric(
    key: str, short: str, label: str, spreads: Mapping[str, Iterable[Spread | None]]
) -> dict[str, Any]:
    values: dict[str, list[float | None]] = {}
    for series, items in spreads.items():
        found = [None if item is None else getattr(item, key) for item in items]
        if any(value is not None for value in found):
            values[series] = found
    return {"key": key, "short": short, "label": label, "values": values}
