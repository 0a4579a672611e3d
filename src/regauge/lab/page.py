"""The page of a sweep: one HTML file with its curves and tables, which asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from regauge.report.markup import Cell, Column, Markup, code, data, h, join, table
from regauge.report.names import layer, role
from regauge.report.text import blank, short

GENERATOR = "regauge lab report"
Record = Mapping[str, Any]


def render(
    name: str, results: Sequence[Record], logs: Mapping[str, Sequence[Record]], rows: Sequence[Record]
) -> str:
    """The HTML of a sweep. The same results give the same text.

    Scripts and styles stand inline, and the content security policy admits them by their digests and nothing
    else.

    Args:
        name: of the sweep.
        results: of :func:`regauge.lab.sweep.results`.
        logs: name of a run -> its records.
        rows: of :func:`regauge.lab.sweep.summary`.
    """
    groups = {str(result["group"]): f"g{i}" for i, result in enumerate(_firsts(results))}
    style = _asset("regauge.report", "report.css") + _colours(len(groups))
    script = "\n".join(
        [
            *(_asset("regauge.report", file) for file in ("chart.js", "strip.js")),
            _asset("regauge.lab", "lab.js"),
            _asset("regauge.report", "report.js"),
        ]
    )
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)};"
        " base-uri 'none'; form-action 'none'"
    )
    found = charts(results, logs, groups)
    sections = [
        ("results", "Results", _summary(rows)),
        ("curves", "Curves", _plot("curves", found, "Mean over the seeds that did not diverge.")),
        ("gradient", "Gradient norm by layer", _layered("gradient", found)),
        ("variance", "Variance of the stream by layer", _layered("variance", found)),
        ("weights", "Weight norm by layer", _layered("weights", found)),
        ("runs", "Runs", _runs(results)),
    ]
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="generator", content=GENERATOR),
        h("meta", name="color-scheme", content="light dark"),
        h("title", f"{name} – {GENERATOR}"),
        h("style", Markup(style)),
    )
    body = h(
        "body",
        h("a", "Skip to the results", href="#results", class_="skip"),
        h("header", h("p", GENERATOR, class_="eyebrow"), h("h1", h("bdi", name))),
        h("nav", h("ul", [h("li", h("a", t, href=f"#{k}")) for k, t, _ in sections]), aria_label="Sections"),
        h("main", [_section(*section) for section in sections]),
        h("footer", h("p", f"Made by {GENERATOR}. Everything shown is in this file; it loads nothing.")),
        h("div", id="tip", aria_hidden="true", hidden=True),
        h("div", id="aloud", role="status"),
        h("script", data(found), type="application/json", id="data"),
        h("script", Markup(script)),
    )
    return "<!doctype html>\n" + h("html", head, "\n", body, lang="en") + "\n"


def charts(
    results: Sequence[Record], logs: Mapping[str, Sequence[Record]], groups: Mapping[str, str]
) -> dict[str, Any]:
    """Id -> plot, as in ``chart.js``: curves over the steps, and for each layer what was first and last."""
    held: dict[str, list[Sequence[Record]]] = {group: [] for group in groups}
    for result in results:
        if result["diverged"] is None:
            held[str(result["group"])].append([r for r in logs[str(result["name"])] if "loss" in r])
    series = [{"key": key, "label": group} for group, key in groups.items()]
    steps = sorted({int(r["step"]) for runs in held.values() for records in runs for r in records})
    found: dict[str, Any] = {
        "curves": {
            "kind": "lines",
            "label": "loss over the steps",
            "x": "step, the first is 1",
            "index": [step + 1 for step in steps],
            "series": series,
            "metrics": [
                _curve(key, label, steps, held, groups)
                for key, label in (("held_out", "held-out loss"), ("loss", "loss of the batch"))
            ],
        }
    }
    for key in ("gradient", "variance", "weights"):
        names: dict[str, None] = {}
        for runs in held.values():
            for records in runs:
                names |= dict.fromkeys(records[0][key])
        found[key] = {
            "kind": "dots",
            "label": key,
            "x": "parts of the model, from the input to the output",
            "names": list(names),
            "shapes": [[] for _ in names],
            "roles": [role(name) for name in names],
            "layers": [list(layer(name)) for name in names],
            "series": series,
            "metrics": [
                _by_part(key, "at the end", -1, names, held, groups),
                _by_part(key, "at the start", 0, names, held, groups),
            ],
        }
    return found


def _curve(
    key: str,
    label: str,
    steps: Sequence[int],
    held: Mapping[str, list[Sequence[Record]]],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    values: dict[str, list[float | None]] = {}
    for group, runs in held.items():
        if runs:
            at = [{int(r["step"]): r[key] for r in records} for records in runs]
            values[groups[group]] = [_mean([one.get(step) for one in at]) for step in steps]
    return {"key": key, "short": label, "label": label, "values": values}


def _by_part(
    key: str,
    label: str,
    place: int,
    names: Mapping[str, None],
    held: Mapping[str, list[Sequence[Record]]],
    groups: Mapping[str, str],
) -> dict[str, Any]:
    values: dict[str, list[float | None]] = {}
    for group, runs in held.items():
        if runs:
            found = [[records[place][key].get(name) for records in runs] for name in names]
            values[groups[group]] = [_mean(items) for items in found]
    return {"key": label.replace(" ", "-"), "short": label, "label": f"{key} {label}", "values": values}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _firsts(results: Sequence[Record]) -> list[Record]:
    """The first run of every group."""
    found: dict[str, Record] = {}
    for result in results:
        found.setdefault(str(result["group"]), result)
    return list(found.values())


def _summary(rows: Sequence[Record]) -> Markup:
    columns = [Column("setting"), Column("runs", True), Column("diverged", True)]
    columns += [Column("held-out loss", True), Column("±", True), Column("loss", True), Column("±", True)]
    cells = [
        [
            Cell(code(str(row["group"]))),
            *(_cell(row[key], str) for key in ("runs", "diverged")),
            *(_cell(row[key], short) for key in ("held_out", "held_out_half", "loss", "loss_half")),
        ]
        for row in rows
    ]
    return join(
        h("p", "Means over the seeds that did not diverge; ± half of the 95 % interval by Student's t."),
        table("Results", columns, cells),
    )


def _runs(results: Sequence[Record]) -> Markup:
    columns = [Column("run"), Column("held-out loss", True), Column("loss", True), Column("ended")]
    rows = [
        [
            Cell(code(str(result["name"]))),
            _cell(result["held_out"], short),
            _cell(result["loss"], short),
            "" if result["diverged"] is None else f"step {result['diverged']}: {result['reason']}",
        ]
        for result in results
    ]
    return table("Runs", columns, rows)


def _layered(key: str, found: Mapping[str, Any]) -> Markup:
    spec = found[key]
    metric = spec["metrics"][0]
    labels = {item["key"]: item["label"] for item in spec["series"]}
    columns = [Column("setting"), *(Column(name, True) for name in spec["names"])]
    rows = [
        [Cell(code(labels[series])), *(_cell(value, short) for value in values)]
        for series, values in metric["values"].items()
    ]
    return join(
        _plot(key, found, "Mean over the seeds that did not diverge."),
        h("details", h("summary", f"All figures {metric['short']}"), table(metric["label"], columns, rows)),
    )


def _plot(key: str, found: Mapping[str, Any], text: str) -> Markup:
    if not any(metric["values"] for metric in found[key]["metrics"]):
        return h("p", "Every run diverged.", class_="quiet")
    return join(
        h("p", text),
        h(
            "figure",
            h("div", class_="chart", data_chart=key),
            h("noscript", "Plots need JavaScript; figures are in the tables."),
            class_="plot",
        ),
    )


def _cell(value: Any, form: Callable[[Any], str]) -> Cell:
    if value is None:
        return Cell(blank())
    return Cell(h("span", form(value), title=repr(value)), value)


def _section(key: str, title: str, content: Markup) -> Markup:
    return h("section", h("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")


def _colours(count: int) -> str:
    """Hues at equal distances, of one lightness in light and another in dark."""
    rules: list[str] = []
    for i in range(count):
        hue = round(360 * i / max(count, 1))
        rules.append(f".s-g{i} {{ color: light-dark(hsl({hue} 70% 36%), hsl({hue} 70% 66%)); }}")
    return ":root { color-scheme: light dark; }\n" + "\n".join(rules) + "\n"


def _asset(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
