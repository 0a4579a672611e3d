"""Entries of a configuration by path, sections included: read, and changed at the top level."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]


def leaves(content: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every entry that is no section, with its path."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def at(content: Any, path: Path) -> Any:
    """The entry at a path; None if there is none."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def changes(content: Mapping[str, Any], edits: Mapping[Path, Any]) -> dict[str, Any]:
    """Edits as changes to the top level; sections are copied, and made where they are missing."""
    changed: dict[str, Any] = {}
    for path, value in edits.items():
        if len(path) == 1:
            changed[path[0]] = value
            continue
        if path[0] not in changed:
            changed[path[0]] = copy.deepcopy(content.get(path[0])) or {}
        place = changed[path[0]]
        for key in path[1:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return changed
