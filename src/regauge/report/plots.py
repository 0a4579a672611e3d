"""The sections of a report that hold plots, each with the table of its figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import torch

from regauge.report.figures import Spread
from regauge.report.gathering import Report
from regauge.report.markup import Cell, Column, Markup, code, h, join, table
from regauge.report.text import blank, integer, scientific, short, times


def weights(report: Report) -> Markup:
    """Outliers of every matrix."""
    both = report.source is not None
    rows = [
        [Cell(code(item.name)), _shape(item.shape), *_spreads(item.before, item.after, both)]
        for item in report.weights
    ]
    return join(
        h(
            "p",
            "How far the largest entry of a matrix stands out from the rest: what low-bit formats suffer"
            " from. A random normal matrix has about 5 and a kurtosis of 3.",
        ),
        h("p", _summary([(item.name, item.before, item.after) for item in report.weights], both)),
        _plot("weights"),
        _all("weights", "matrix", rows, both),
    )


def activations(report: Report) -> Markup:
    """Outliers of every module's output, errors of outputs, and errors per module."""
    both = report.source is not None
    inputs = ", ".join(f"{name} {times(shape)}" for name, shape in report.inputs.items())
    parts = [
        h(
            "p",
            f"{'Both models' if both else 'The model'} run in float32 on random inputs ({inputs}; seed"
            f" {report.manifest.seed}).",
        ),
        h("p", _summary([(item.name, item.before, item.after) for item in report.activations], both)),
        _plot("activations"),
    ]
    rows = [
        [Cell(code(item.name)), _shape(item.shape), *_spreads(item.before, item.after, both)]
        for item in report.activations
    ]
    parts.append(_all("activations", "module", rows, both))
    if both:
        parts += [h("h3", "Error per module"), _errors(report)]
    return join(parts)


def _errors(report: Report) -> Markup:
    outputs = [
        [
            Cell(code(output.name)),
            _shape(output.shape),
            _cell(output.error, scientific),
            "yes" if output.function else "no: its coordinates may move",
        ]
        for output in report.outputs
    ]
    rows = [
        [
            Cell(code(item.name)),
            _shape(item.shape),
            _cell(item.error, scientific),
            _cell(item.turned, scientific),
        ]
        for item in report.activations
    ]
    columns = [
        Column("module"),
        Column("shape"),
        Column("entry by entry", True),
        Column("up to an orthogonal map", True),
    ]
    return join(
        h(
            "p",
            "At the outputs of the function the two must agree. Inside, a move changes coordinates by design:"
            " where a space was permuted or turned, activations differ entry by entry and agree up to an"
            " orthogonal map; where a scale or shift was folded away they differ in both, and only the"
            " outputs tell.",
        ),
        h("p", _agreement(report)),
        table(
            "Error at the outputs",
            [
                Column("output"),
                Column("shape"),
                Column("error in float32", True),
                Column("part of the function"),
            ],
            outputs,
            cards=True,
        ),
        _plot("errors"),
        h(
            "details",
            h("summary", f"All figures: {integer(len(rows))} modules"),
            table("Error per module", columns, rows),
        ),
    )


def _agreement(report: Report) -> str:
    """How many modules agree, and in which sense."""
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    bound = max(torch.finfo(known.get(name, torch.float32)).eps for name in report.after.dtypes) ** 0.5
    pairs = [(item.error, item.turned) for item in report.activations]
    same = sum(error is not None and error < bound for error, _ in pairs)
    turned = sum(
        turned is not None and turned < bound and not (error or 0) < bound for error, turned in pairs
    )
    return (
        f"Modules that agree entry by entry: {integer(same)} of {integer(len(pairs))}; up to an orthogonal"
        f" map: {integer(turned)}; in other coordinates: {integer(len(pairs) - same - turned)}. Agreement: an"
        f" error below {scientific(bound)}, the square root of a rounding step of the stored dtype."
    )


def _summary(items: Sequence[tuple[str, Spread | None, Spread]], both: bool) -> Markup:
    """The median of max / rms, and where the largest is."""
    parts: list[Markup] = []
    for label, place in (("before", 1), ("after", 2)) if both else (("", 2),):
        found: list[tuple[float, str]] = []
        for item in items:
            figures = item[place]
            if isinstance(figures, Spread) and figures.outlier is not None:
                found.append((figures.outlier, item[0]))
        if found:
            largest, name = max(found)
            middle = median(value for value, _ in found)
            start = f"{label}: median" if label else "Median"
            parts.append(join(f"{start} {short(middle)}, largest {short(largest)} in ", code(name)))
    inside: list[Markup] = []
    for part in parts:
        inside += [join("; "), part] if inside else [part]
    return join("Largest over rms, " if both else "Largest over rms: ", inside, ".")


def spectra(report: Report) -> Markup:
    """Singular values of a few matrices."""
    if not report.spectra:
        return h("p", "No matrix is small enough.", class_="quiet")
    figures: list[Markup] = []
    for i, spectrum in enumerate(report.spectra):
        series = [("before", spectrum.before), ("after", spectrum.after)]
        conditions = [f"{label} {_condition(values)}" for label, values in series if values]
        caption = h(
            "figcaption",
            code(spectrum.name),
            h(
                "span",
                f" {times(spectrum.shape)}; σ₁/σₙ {', '.join(conditions)}",
                class_="quiet",
            ),
        )
        figures.append(
            h(
                "figure",
                caption,
                h("div", class_="chart small", data_chart=f"spectrum-{i}", data_group="spectra"),
                class_="plot",
            )
        )
    return join(
        h(
            "p",
            "Orthogonal maps and permutations leave them as they are; folding a scale or balancing heads does"
            " not. Of each kind of matrix the one in the middle layer, the largest kinds first.",
        ),
        h("div", data_controls="spectra"),
        h("div", figures, class_="grid"),
    )


def _condition(values: tuple[float, ...]) -> str:
    return short(values[0] / values[-1]) if values[-1] > 0 else "∞"


def _plot(key: str) -> Markup:
    return h(
        "figure",
        h("div", class_="chart", data_chart=key),
        h("noscript", "Plots need JavaScript; every figure is in the tables."),
        class_="plot",
    )


def _spreads(before: Spread | None, after: Spread, both: bool) -> list[Cell]:
    cells: list[Cell] = []
    for key in ("outlier", "kurtosis", "rms"):
        for item in (before, after) if both else (after,):
            cells.append(_cell(None if item is None else getattr(item, key), short))
    return cells


def _cell(value: float | None, form: object) -> Cell:
    if value is None or not callable(form):
        return Cell(blank())
    return Cell(h("span", str(form(value)), title=repr(value)), value)


def _shape(shape: tuple[int, ...]) -> Cell:
    return Cell(times(shape))


def _all(what: str, label: str, rows: list[list[Cell]], both: bool) -> Markup:
    columns = [Column(label), Column("shape")]
    for name in ("max / rms", "kurtosis", "rms"):
        columns += [
            Column(f"{name} {when}".strip(), True) for when in (("before", "after") if both else ("",))
        ]
    return h(
        "details",
        h("summary", f"All figures: {integer(len(rows))} {'matrices' if what == 'weights' else 'modules'}"),
        table(f"Outliers of {what}", columns, _as_rows(rows)),
    )


def _as_rows(rows: Iterable[list[Cell]]) -> list[list[Cell | str]]:
    return [list(row) for row in rows]
