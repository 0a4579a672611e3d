"""The sections of a report that say what was done, what was certified, and which groups act."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from regauge.certify.figures import Figures
from regauge.moves import MOVES
from regauge.report.gathering import Report, Size
from regauge.report.markup import Cell, Child, Column, Markup, code, dotted, h, join, table
from regauge.report.text import blank, integer, megabytes, scientific, short, times

_KEPT = 12


def changes(report: Report) -> Markup:
    """Moves, structure patches, parameters, and sizes before and after."""
    parts = [_moves(report), _sizes(report)]
    manifest = report.manifest
    if manifest.patches:
        parts += [
            h("h3", "Structure"),
            h("p", "Modules that were replaced by others:"),
            _patches(manifest.patches),
        ]
    for title, names in (("made", manifest.parameters.made), ("dropped", manifest.parameters.dropped)):
        if names:
            parts.append(_names(f"Parameters {title}: {len(names)}", names))
    if not (manifest.patches or manifest.parameters.made or manifest.parameters.dropped):
        parts.append(h("p", "No module was replaced; no parameter was made or dropped.", class_="quiet"))
    return join(parts)


def _moves(report: Report) -> Markup:
    columns = [
        Column("#", True, True),
        Column("move", fixed=True),
        Column("identity", fixed=True),
        Column("keeps", fixed=True),
        Column("generators", True, True),
        Column("membership", True, True),
        Column("pairing", True, True),
    ]
    rows: list[list[Cell | str]] = []
    for place, item in enumerate(report.manifest.recipe):
        name = str(item.get("move", ""))
        known = MOVES.get(name)
        used = [one for one in report.manifest.algebra if one.place == place]
        options = {key: value for key, value in item.items() if key != "move"}
        tags = [h("span", f"{key}={_plain(value)}", class_="tag") for key, value in options.items()]
        rows.append(
            [
                Cell(str(place + 1), place + 1),
                Cell(join(h("b", name), *(join(" ", tag) for tag in tags))),
                Cell(h("span", known.identity, class_="math") if known else blank()),
                str(known.preserves) if known else "",
                Cell(integer(len(used)) if used else blank(), len(used)),
                _worst([one.membership for one in used]),
                _worst([one.pairing for one in used]),
            ]
        )
    note = (
        "Membership: how far the elements used are from their group; pairing: largest relative change of"
        " ⟨reader, writer⟩ on random probes. Neither rests on inputs of the model."
    )
    written = report.manifest.written
    return join(
        table("Moves, in order", columns, rows, cards=True),
        h("p", note, class_="quiet"),
        h(
            "p",
            f"{integer(written.tensors)} tensors were read again after writing; the largest difference from"
            f" the plan is {short(written.worst_ulps)} units of the last place.",
            class_="quiet",
        ),
    )


def _worst(values: list[float]) -> Cell:
    return Cell(scientific(max(values)), max(values)) if values else Cell(blank())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _sizes(report: Report) -> Markup:
    a, b, given = report.before, report.after, report.certificate
    rows: list[list[Cell | str]] = []
    for label, old, new in (
        ("class", given.a.architecture, given.b.architecture),
        ("dtypes", _dtypes(a), _dtypes(b)),
    ):
        if old != new or label == "dtypes":
            rows.append([label, old, new, "same" if old == new else Cell(blank())])
    for label, old, new, unit in (
        ("parameters", a.parameters, b.parameters, integer),
        ("tensors", a.tensors, b.tensors, integer),
        ("bytes of tensors", a.tensor_bytes, b.tensor_bytes, megabytes),
        ("weight files", a.file_bytes, b.file_bytes, megabytes),
    ):
        cells = [
            blank() if value is None else h("span", unit(value), title=integer(value)) for value in (old, new)
        ]
        change: Child = (
            blank() if old is None or new is None else _change(old, new, relative=label != "tensors")
        )
        rows.append([label, *map(Cell, cells), Cell(change)])
    columns = [
        Column(label, fixed=True, number=i > 0) for i, label in enumerate(("", "before", "after", "change"))
    ]
    note = h("p", "Parameters: entries, tied ones counted once.", class_="quiet")
    return join(h("h3", "Size"), table("Size before and after", columns, rows, cards=True), note)


def _dtypes(size: Size) -> str:
    if len(size.dtypes) == 1:
        return next(iter(size.dtypes))
    return ", ".join(f"{name} {100 * count / size.parameters:.3g} %" for name, count in size.dtypes.items())


def _change(old: int, new: int, *, relative: bool) -> str:
    if old == new:
        return "same"
    return f"{100 * (new - old) / old:+.2f} %" if relative and old else f"{new - old:+,}"


def _patches(patches: Iterable[dict[str, Any]]) -> Markup:
    rows = [
        [
            code(str(patch.get("path", ""))),
            str(patch.get("module", "")),
            ", ".join(
                f"{key}={_plain(value)}" for key, value in patch.items() if key not in ("path", "module")
            ),
        ]
        for patch in patches
    ]
    return table("Modules replaced", [Column("path"), Column("now"), Column("arguments")], rows, cards=True)


def _names(title: str, names: tuple[str, ...]) -> Markup:
    items = h("ul", [h("li", code(name)) for name in names], class_="names")
    return h("details", h("summary", title), items, open=len(names) <= _KEPT)


def certificate(report: Report) -> Markup:
    """The figures of the certificate, what it was made on, and the bounds of the verdict."""
    given, evidence = report.certificate, report.certificate.evidence
    floor = f"floor: original re-rounded to {given.floor_dtype}"
    named = (
        ("float64, before rounding", evidence.exact, False),
        ("float64, weights as stored", evidence.float64, False),
        (floor, evidence.floor, True),
        ("floor: the other re-rounded", evidence.floor_b, True),
        ("run in the stored dtype", evidence.stored, False),
        (floor, evidence.stored_floor, True),
    )
    columns = [
        Column("", fixed=True),
        Column("relative error", True, True),
        Column("max abs", True, True),
        Column("KL mean", True, True),
        Column("KL max", True, True),
        Column("top-1", True, True),
    ]
    rows = [
        [Cell(h("span", label, class_="sub" if sub else None)), *_figures(figures)]
        for label, figures, sub in named
        if figures
    ]
    inputs = given.inputs
    shapes = ", ".join(f"{name} {times(shape)}" for name, shape in inputs.shapes.items())
    facts: list[tuple[str, Child]] = [
        ("positions", f"{integer(inputs.positions)} in {integer(inputs.batches)} × ({shapes})"),
        ("inputs", f"{inputs.source}, seed {inputs.seed}"),
        *(
            ("rows looked up", f"{integer(read)} of {integer(total)} of {name}")
            for name, (read, total) in inputs.rows.items()
        ),
        ("same bits in float64", "yes, everywhere" if evidence.bits else "no"),
        ("counts as exact", f"relative error below {scientific(given.exact_threshold)} in float64"),
        ("counts as rounding", f"at most {short(given.floor_factor)} rounding floors"),
    ]
    return join(
        h("figure", h("div", class_="chart", data_chart="certificate"), class_="plot"),
        table("Figures of the certificate", columns, rows, cards=True),
        _facts(facts),
        h(
            "p",
            "The certificate is evidence on the inputs named, and on no others. Relative error: ‖a − b‖ / ‖a‖"
            " over all outputs. Floor: what re-rounding the original's own weights does to it. KL in nats,"
            " over positions.",
            class_="quiet",
        ),
    )


def _figures(figures: Figures) -> list[Cell]:
    cells = [
        Cell(scientific(figures.relative), figures.relative),
        Cell(scientific(figures.max_abs), figures.max_abs),
    ]
    cells += [
        Cell(blank()) if v is None else Cell(scientific(v), v) for v in (figures.kl_mean, figures.kl_max)
    ]
    return [*cells, Cell(blank() if figures.top1 is None else f"{100 * figures.top1:.2f} %", figures.top1)]


def _facts(facts: Iterable[tuple[str, Child]]) -> Markup:
    return h("dl", [h("div", h("dt", name), h("dd", value)) for name, value in facts], class_="facts")


def groups(report: Report) -> Markup:
    """The group table of the rewritten model."""
    folds = any(group.folded is not None for group in report.groups)
    columns = [
        Column("space"),
        Column("layers", number=True),
        Column("size", number=True),
        Column("per"),
        Column("admits"),
        *([Column("after folding")] if folds else []),
        Column("what limits it"),
    ]
    rows: list[list[Cell | str]] = []
    for group in report.groups:
        row: list[Cell | str] = [
            Cell(code(group.label)),
            Cell(integer(group.layers), group.layers),
            Cell(integer(group.size), group.size),
            times(group.per) if group.per else Cell(blank()),
            Cell(_kinds(group.admits)),
        ]
        if folds:
            same = group.folded in (None, group.admits)
            row.append(Cell(h("span", "same", class_="quiet") if same else _kinds(group.folded or ())))
        why = join(h("b", f"no {group.limited}: "), dotted(group.limit)) if group.limit else blank()
        where = (
            [h("span", " in ", dotted(group.module), class_="quiet")]
            if group.module and group.module not in group.limit
            else []
        )
        rows.append([*row, Cell(h("span", why, where, class_="why"))])
    parts = [
        h(
            "p",
            "Axes that must change together form a space; a group that acts on it keeps the function. Layers:"
            " how many alike spaces a row stands for; per: how many independent elements each has (heads).",
        ),
        table("Spaces of the rewritten model", columns, rows, cards=True),
    ]
    if report.left_alone:
        parts += [
            h("h3", "Left alone because it was not understood"),
            h("ul", [h("li", text) for text in report.left_alone]),
        ]
    return join(parts)


def _kinds(kinds: tuple[str, ...]) -> Markup:
    if not kinds:
        return h("span", "nothing", class_="quiet")
    return join([h("span", kind, class_="tag") for kind in kinds])


def provenance(report: Report) -> Markup:
    """Digests, software, and time by stage."""
    given, manifest = report.certificate, report.manifest
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in manifest.seconds.items())
    return _facts(
        [
            ("original", join(h("bdi", given.a.name), h("br"), h("code", given.a.digest))),
            ("result", join(h("bdi", given.b.name), h("br"), h("code", given.b.digest))),
            ("inputs", h("code", given.inputs.digest)),
            ("seed", str(manifest.seed)),
            ("software", ", ".join(f"{name} {version}" for name, version in manifest.software.items())),
            ("time", seconds or "not recorded"),
        ]
    )
