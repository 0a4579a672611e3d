"""Names of modules and parameters, taken apart for axes and filters of plots."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NUMBER = re.compile(r"(?<![^\s.])\d+(?=\.|\s|$)")


def role(name: str) -> str:
    """The name, or a sentence with names in it, with numbers that are a whole component replaced by ``*``."""
    return _NUMBER.sub("*", name)


def layer(name: str) -> tuple[str, int | None]:
    """(path of the stack, number in it) of the first component that is a number; else (``""``, None)."""
    match = _NUMBER.search(name)
    return ("", None) if match is None else (name[: match.start()].rstrip("."), int(match[0]))


def shown(path: Path) -> str:
    """The last component of a path as text: undecodable bytes and control characters become U+FFFD."""
    text = os.fsencode(path.name or str(path)).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
