"""HTML with every text escaped: only what :func:`h` made goes in as it is."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_VOID = ("meta", "br", "wbr")
_BREAK = re.compile(r"(?<=\.)(?=\w)")


class Markup(str):
    """HTML that needs no escaping. Made by :func:`h` and :func:`join`, and of files of this package."""

    __slots__ = ()


Child = str | Iterable["str | Markup"]


def h(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element.

    Args:
        tag: its name.
        children: text, which is escaped, or markup, which is not.
        attributes: a trailing underscore is dropped, others become hyphens; None and False are left out.
    """
    names = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    text = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in names.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{text}>" if tag in _VOID else f"<{tag}{text}>{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """Children one after the other."""
    parts: list[str] = []
    for child in children:
        for item in [child] if isinstance(child, str) else child:
            parts.append(str(item) if isinstance(item, Markup) else html.escape(item))
    return Markup("".join(parts))


def dotted(text: str) -> Markup:
    """A text with dotted names, which may break after their dots."""
    parts = [join(part) for part in _BREAK.split(text)]
    return Markup(h("wbr").join(parts))


def code(name: str) -> Markup:
    """A name as code, see :func:`dotted`."""
    return h("code", dotted(name))


def data(value: Any) -> Markup:
    """Plain data as JSON that can stand in a script element: no ``<``, ``>``, ``&`` or line separator."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it shows, and the number it is sorted by if that is a number."""

    content: Child
    number: float | None = None


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether it holds numbers. ``fixed``: cannot be sorted by."""

    label: str
    number: bool = False
    fixed: bool = False


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell | str]],
    *,
    cards: bool = False,
) -> Markup:
    """A table in a box that scrolls sideways; its headings are buttons that sort it.

    Args:
        caption: what it is, for screen readers.
        columns: one for each cell of a row.
        rows: cells; a plain text is sorted by itself, a number by its value.
        cards: on a narrow screen each row becomes a list of its cells with their headings.
    """

    def role(name: str) -> str | None:
        return name if cards else None  # what the narrow layout would take away

    head = [
        h(
            "th",
            column.label if column.fixed else h("button", column.label, type="button"),
            scope="col",
            class_="n" if column.number else None,
            role=role("columnheader"),
        )
        for column in columns
    ]
    body: list[Markup] = []
    for row in rows:
        cells: list[Markup] = []
        for column, item in zip(columns, row, strict=True):
            cell = item if isinstance(item, Cell) else Cell(item)
            cells.append(
                h(
                    "td",
                    h("div", cell.content) if cards else cell.content,
                    class_="n" if column.number else None,
                    data_v=None if cell.number is None else repr(cell.number),
                    data_label=column.label if cards else None,
                    role=role("cell"),
                )
            )
        body.append(h("tr", cells, role=role("row")))
    whole = h(
        "table",
        h("caption", caption),
        h("thead", h("tr", head, role=role("row")), role=role("rowgroup")),
        h("tbody", body, role=role("rowgroup")),
        class_="cards" if cards else None,
        role=role("table"),
    )
    return h("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
