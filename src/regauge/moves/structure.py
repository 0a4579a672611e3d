"""Moves that change which parameters exist: leave out those that do nothing, add some that do nothing yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regauge.errors import Refused
from regauge.moves.base import Change, Move, Option, Preserves, Scene
from regauge.patches import Patch, Replaceable, gain_modules, replaceable
from regauge.plan import Made


def plan_strip(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y = 1 · x + 0 = x: gains that are one and shifts and biases that are zero are no longer stored.

    A norm's gain g[c] = 1 (stored as 0 where the module multiplies with 1 + w) and shift b[c] = 0, a linear
    map's bias b[o] = 0, and a module that only multiplies by g = 1, for all entries; what they are is
    read from the weights as the moves so far leave them. Exact in every dtype.
    """
    patches: list[Patch] = []
    drops: set[str] = set()
    kept = 0
    for module in replaceable(scene.trace).values():
        without = dict(module.patch)
        for key, name, value in (("weight", module.weight, 1.0 - module.chart), ("bias", module.bias, 0.0)):
            if name is None or (key == "weight" and module.patch["module"] != "norm"):
                continue
            if bool((scene.read(name) == value).all()):
                without[key] = False
                drops.add(name)
            else:
                kept += 1
        if without != module.patch:
            patches.append(without)
    for path, name in gain_modules(scene.trace).items():
        if bool((scene.read(name) == 1).all()):
            patches.append({"path": path, "module": "identity"})
            drops.add(name)
        else:
            kept += 1
    if not patches:
        raise Refused(
            "every parameter of the norms, every gain and every bias does something",
            expected="a gain of ones, or a shift or bias of zeros",
            found=f"{kept} others" if kept else "none, or none in a module of its own",
            way_out="put fold-shifts, fold-scales, fold-value-bias or drop-key-bias before it",
        )
    return Change(drops=frozenset(drops), patches=tuple(patches))


def plan_add_bias(scene: Scene, options: Mapping[str, Any]) -> Change:
    """W x = W x + 0: a linear map without a bias gets one of zeros, so that a shift can be folded into it."""
    patches: list[Patch] = []
    made: dict[str, Made] = {}
    for module in replaceable(scene.trace).values():
        if module.patch["module"] == "linear" and module.bias is None and module.weight is not None:
            patches.append({**module.patch, "bias": True})
            made[f"{module.path}.bias"] = Made((module.patch["outputs"],), module.weight)
    if not patches:
        raise Refused(
            "every linear map has a bias already, or is not a module of its own",
            expected="a module that is one linear map without a bias, whose weight is not shared",
            found="none",
        )
    return Change(made=made, patches=tuple(patches))


def rms_patch(module: Replaceable) -> Patch:
    """The RMSNorm that takes the place of a LayerNorm whose input has mean zero."""
    return {**module.patch, "form": "rms"}


_NONE: Mapping[str, Option] = {}

STRIP = Move(
    "strip",
    "y = 1·x + 0 → y = x: gains of one and biases of zero are no longer stored",
    "norms and linear maps that are modules of their own, with such values; changes the structure",
    Preserves.OUTPUT,
    plan_strip,
    _NONE,
)
ADD_BIAS = Move(
    "add-bias",
    "W x → W x + b with b[o] = 0 for every linear map without a bias",
    "linear maps that are modules of their own; changes the structure",
    Preserves.OUTPUT,
    plan_add_bias,
    _NONE,
)
