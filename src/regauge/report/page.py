"""The page: one HTML file with everything in it, which asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from regauge.certify import Verdict
from regauge.report import sections
from regauge.report.charts import certificate_chart, charts
from regauge.report.gathering import Report
from regauge.report.markup import Child, Markup, data, h
from regauge.report.plots import activations, spectra, weights
from regauge.report.text import integer, scientific, short

GENERATOR = "regauge report"
_SCRIPTS = ("chart.js", "strip.js", "report.js")
_WORDS = {
    Verdict.EQUIVALENT: (
        "good",
        "✓",
        "Equivalent",
        "The function is the same: exactly, up to rounding of what is stored.",
    ),
    Verdict.WITHIN_ROUNDING: (
        "good",
        "≈",
        "Equivalent within rounding",
        "The stored weights differ by no more than rounding them would explain.",
    ),
    Verdict.DIFFERENT: ("bad", "✕", "Different", "These are not the same function."),
}


def render(report: Report) -> str:
    """The HTML of a report. The same report gives the same text.

    Scripts and styles stand inline, and the content security policy admits them by their digests and
    nothing else: no other script, no connection, no image, no font.
    """
    style = _asset("report.css")
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)};"
        " base-uri 'none'; form-action 'none'"
    )
    found = charts(report) | {"certificate": certificate_chart(report)}
    parts = [
        ("changes", "What was done", sections.changes(report)),
        ("certificate", "Certificate", sections.certificate(report)),
        ("groups", "Groups", sections.groups(report)),
        ("weights", "Weights", weights(report)),
        ("spectra", "Singular values", spectra(report)),
        ("activations", "Activations", activations(report)),
        ("provenance", "Provenance", sections.provenance(report)),
    ]
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="generator", content=GENERATOR),
        h("meta", name="color-scheme", content="light dark"),
        h("title", f"{report.name} – regauge report"),
        h("style", Markup(style)),
    )
    body = h(
        "body",
        h("a", "Skip to the report", href="#changes", class_="skip"),
        _head(report),
        h(
            "nav",
            h("ul", [h("li", h("a", title, href=f"#{key}")) for key, title, _ in parts]),
            aria_label="Sections",
        ),
        h("main", [_section(key, title, content) for key, title, content in parts]),
        h("footer", h("p", "Made by regauge report. Everything shown is in this file; it loads nothing.")),
        h("div", id="tip", aria_hidden="true", hidden=True),
        h("div", id="aloud", role="status"),
        h("script", data(found), type="application/json", id="data"),
        h("script", Markup(script)),
    )
    return "<!doctype html>\n" + h("html", head, "\n", body, lang="en") + "\n"


def _asset(name: str) -> str:
    return resources.files(__package__ or __name__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(key: str, title: str, content: Markup) -> Markup:
    return h("section", h("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")


def _head(report: Report) -> Markup:
    certificate = report.certificate
    tone, sign, word, meaning = _WORDS[certificate.verdict]
    moves = [h("span", str(item.get("move", "")), class_="tag") for item in report.manifest.recipe]
    return h(
        "header",
        h("p", "regauge report", class_="eyebrow"),
        h("h1", h("bdi", report.name)),
        h(
            "p",
            f"{certificate.b.architecture}, made from ",
            h("bdi", report.source or certificate.a.name),
            " by ",
            h("span", moves, class_="tags"),
            class_="lead",
        ),
        h(
            "div",
            h("span", sign, class_="sign", aria_hidden="true"),
            h(
                "div",
                h("strong", word),
                " ",
                meaning,
                h("br"),
                h("span", certificate.reason, class_="reason"),
            ),
            class_=f"verdict {tone}",
            role="note",
        ),
        h("dl", [_tile(*tile) for tile in _tiles(report)], class_="tiles"),
    )


def _tile(label: str, value: Child, note: str) -> Markup:
    return h("div", h("dt", label), h("dd", value, h("small", note)))


def _tiles(report: Report) -> Sequence[tuple[str, Child, str]]:
    given, evidence = report.certificate, report.certificate.evidence
    tiles: list[tuple[str, Child, str]] = []
    if evidence.exact is not None:
        tiles.append(("exact error", scientific(evidence.exact.relative), "float64, before rounding"))
    floor = evidence.rounding
    ratio = (
        f"{short(round(evidence.float64.relative / floor, 2))} rounding floors"
        if floor
        else "float64, as stored"
    )
    tiles.append(("stored error", scientific(evidence.float64.relative), ratio))
    best = evidence.stored or evidence.float64
    if best.kl_mean is not None:
        tiles.append(
            (
                "KL divergence",
                scientific(best.kl_mean),
                "nats, mean; run as stored" if evidence.stored else "nats, mean",
            )
        )
    if best.top1 is not None:
        tiles.append(
            ("top-1 agreement", f"{100 * best.top1:.2f} %", f"of {integer(given.inputs.positions)} positions")
        )
    a, b = report.before.parameters, report.after.parameters
    tiles.append(("parameters", _millions(b), "as before" if a == b else f"before: {_millions(a)}"))
    return tiles


def _millions(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
