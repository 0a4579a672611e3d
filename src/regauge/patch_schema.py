"""What a config may say about replaced modules. A config may come from a stranger: everything is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regauge.errors import BadInput
from regauge.modeling_regauge import HOOKS, KEEPS, KEY, MODEL_TYPE

FORMAT = 1
LARGEST = 1 << 31
LONGEST = 1 << 16


class Numbers(dict[str, float]):
    """Stands for a mapping from names to numbers."""


class Series(dict[str, list[float]]):
    """Stands for a mapping from names to lists of numbers."""


_NORM = {"form": str, "size": int, "eps": float, "weight": bool, "bias": bool}
_OFFSET_NORM = {**_NORM, "offset": float}
_CONVOLUTION = {"inputs": int, "outputs": int, "kernel": list, "stride": list, "padding": list}
FIELDS: Mapping[str, Mapping[str, type]] = {
    "norm": _NORM,
    "seed-norm": {**_OFFSET_NORM, "heads": int, "scale": float, "dropout": float},
    "gated-norm": {**_OFFSET_NORM, "rank": int},
    "pre-affine-norm": _OFFSET_NORM,
    "scaled-norm": {**_OFFSET_NORM, "scale": float},
    "magnitude-norm": {"form": str, "size": int, "eps": float, "bias": bool},
    "scaled-linear": {"inputs": int, "outputs": int, "bias": bool, "transposed": bool},
    "linear": {"inputs": int, "outputs": int, "bias": bool, "transposed": bool},
    "complex-linear": {"inputs": int, "outputs": int, "bias": bool},
    "convolution": {**_CONVOLUTION, "dilation": list, "groups": int, "bias": bool, "pad": bool},
    "affine": {"size": int, "weight": bool, "bias": bool},
    "affine-last": {"size": int, "weight": bool, "bias": bool},
    "identity": {},
    "embedding": {"rows": int, "size": int, "padding": object},
    "parameter": {"shape": tuple},
    "attributes": {"values": Numbers},
    "buffers": {"values": Series},
    **{hook: {} for hook in HOOKS},
}
"""Module -> its arguments; all of them are needed. ``object``: an int or null. ``tuple``: a shape."""


def check_patches(content: Mapping[str, Any]) -> None:
    """Check the key "regauge" of a ``config.json``; nothing if there is none.

    Raises:
        BadInput: anything but what this version writes.
    """
    patched = content.get("model_type") == MODEL_TYPE
    if KEY not in content and not patched:
        return
    held = content.get(KEY)
    if not patched or not isinstance(held, Mapping):
        raise _bad("model_type and the key 'regauge' do not go together", content.get("model_type"))
    if held.get("format") != FORMAT or not isinstance(held.get("stock_type"), str):
        raise _bad(f"format {FORMAT} with a stock_type", (held.get("format"), held.get("stock_type")))
    patches = held.get("patches")
    if not isinstance(patches, list):
        raise _bad("a list of patches", patches)
    seen: set[tuple[str, str]] = set()
    for patch in patches:
        _check(patch)
        key = (patch["path"], patch["module"] if patch["module"] in KEEPS else "replaced")
        if key in seen:
            raise _bad("one replacement for each module", patch["path"])
        seen.add(key)


def _check(patch: Any) -> None:
    if not isinstance(patch, Mapping) or not isinstance(patch.get("path"), str) or not patch["path"]:
        raise _bad("a patch with a path", patch)
    module = patch.get("module")
    if not isinstance(module, str) or module not in FIELDS:
        raise _bad(f"one of {', '.join(FIELDS)}", module)
    fields = {"path": str, "module": str, **FIELDS[module]}
    if fields.keys() != patch.keys():
        raise _bad(f"the fields {', '.join(fields)}", sorted(map(str, patch)))
    for name, kind in fields.items():
        if not _fits(patch[name], kind):
            raise _bad(f"{name} of type {kind.__name__}, within bounds", patch[name])


def _fits(value: Any, kind: type) -> bool:
    if kind is object:
        return value is None or _fits(value, int)
    if kind is tuple:
        return isinstance(value, list) and len(value) <= 8 and all(_fits(item, int) for item in value)
    if kind is list:
        return isinstance(value, list) and 1 <= len(value) <= 3 and all(_fits(item, int) for item in value)
    if kind in (Numbers, Series):
        named = isinstance(value, dict) and all(isinstance(n, str) and n.isidentifier() for n in value)
        return named and all(_number(v) if kind is Numbers else _series(v) for v in value.values())
    if kind is int:
        return type(value) is int and 0 <= value < LARGEST
    if kind is float:
        return type(value) in (int, float) and 0 <= value < 1e6
    return type(value) is kind


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < LARGEST


def _series(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= LONGEST and all(map(_number, value))


def _bad(expected: str, found: Any) -> BadInput:
    return BadInput(
        "config.json holds structure patches that cannot be used",
        expected=expected,
        found=repr(found)[:200],
        way_out="write the directory again with this version of regauge",
    )
