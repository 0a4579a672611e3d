"""The tokens of a tokenizer and their ids, read as plain data; no code of a tokenizer runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_tokens(directory: Path) -> dict[str, int] | None:
    """Token -> id, from ``tokenizer.json``, or else ``vocab.json`` or ``vocab.txt``.

    A token that is both in the vocabulary and among the added ones has the id of the vocabulary.

    Returns:
        None if there is no such file, or one that cannot be understood: then nothing is known of the tokens.
    """
    whole = _json(directory / "tokenizer.json")
    if isinstance(whole, dict):
        model, added = whole.get("model"), whole.get("added_tokens") or []
        found = _ids(model.get("vocab")) if isinstance(model, dict) else None
        if found is None or not isinstance(added, list):
            return None
        for entry in added:
            if not isinstance(entry, dict) or not _is_entry(entry.get("content"), entry.get("id")):
                return None
            found.setdefault(entry["content"], entry["id"])
        return found or None
    found = _ids(_json(directory / "vocab.json"))
    if found is None:
        found = _lines(directory / "vocab.txt")
    if found is not None:
        for token, place in (_ids(_json(directory / "added_tokens.json")) or {}).items():
            found.setdefault(token, place)
    return found or None


def _ids(vocabulary: Any) -> dict[str, int] | None:
    """Token -> id of a mapping, or of a list of [token, score] in the order of their ids."""
    if isinstance(vocabulary, list):
        if not all(isinstance(entry, list) and entry for entry in vocabulary):
            return None
        pairs = [(entry[0], place) for place, entry in enumerate(vocabulary)]
    elif isinstance(vocabulary, dict):
        pairs = list(vocabulary.items())
    else:
        return None
    if not all(_is_entry(token, place) for token, place in pairs):
        return None
    found: dict[str, int] = {}
    for token, place in pairs:
        found.setdefault(token, place)
    return found


def _is_entry(token: Any, place: Any) -> bool:
    return isinstance(token, str) and isinstance(place, int) and not isinstance(place, bool) and place >= 0


def _lines(path: Path) -> dict[str, int] | None:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    found: dict[str, int] = {}
    for place, token in enumerate(lines[:-1] if lines[-1] == "" else lines):
        found.setdefault(token.rstrip("\r"), place)
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
