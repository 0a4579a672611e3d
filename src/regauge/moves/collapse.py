"""Layers with more parameters than their function needs become plain norms and linear maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.errors import Refused
from regauge.moves.affine import AffineModule, affine_modules
from regauge.moves.base import Change, Move, Option, Preserves, Scene
from regauge.patches import Patch, replaceable
from regauge.plan import Made

_NORMS = frozenset(("aten.layer_norm", "aten.rms_norm"))


def plan_collapse(scene: Scene, options: Mapping[str, Any]) -> Change:
    """What a module makes of its parameters before it uses them is made once, and stored.

    - g(θ)[c] · x̂[…, c] + b(θ)[c] becomes a plain norm with gain g and shift b, for any parameters θ: a
      constant factor (LayerNorm Scaling), a magnitude and a direction;
    - η[o] · Σ_i W[o, i] γ[i] x[…, i] + b[o] becomes one linear map, W[o, i] ← η[o] W[o, i] γ[i].
    """
    known = replaceable(scene.trace)
    patches: list[Patch] = []
    made: dict[str, Made] = {}
    drops: set[str] = set()
    for found in affine_modules(scene, _worth):
        if found.path in known:
            continue
        values = _linear(found) if found.weight is not None else _norm(found)
        if values is None:
            continue
        patch, tensors = values
        patches.append({"path": found.path, **patch})
        drops |= set(found.own)
        for leaf, value in tensors.items():
            made[f"{found.path}.{leaf}"] = Made(
                tuple(value.shape), found.own[0], lambda _, value=value: value
            )
    if not patches:
        raise Refused(
            "no layer here has more parameters than its function needs",
            expected="a norm or linear map whose gain is made of several parameters or constants",
            found="none in a module of its own",
        )
    return Change(made=made, drops=frozenset(drops - made.keys()), patches=tuple(patches))


def _worth(names: frozenset[str]) -> bool:
    return (bool(names & _NORMS) and "aten.linear" not in names) or {"aten.linear", "aten.mul"} <= names


def _norm(found: AffineModule) -> tuple[Patch, dict[str, torch.Tensor]] | None:
    last = found.source.meta["val"].dim() - 1
    if found.norm is None or not found.axes <= {last}:
        return None
    form, size, eps = found.norm
    scale, shift = found.along(last)
    tensors = {"weight": scale} | ({"bias": shift} if bool(shift.any()) else {})
    patch = {"module": "norm", "form": form, "size": size, "eps": eps, "weight": True}
    return {**patch, "bias": "bias" in tensors}, tensors


def _linear(found: AffineModule) -> tuple[Patch, dict[str, torch.Tensor]] | None:
    last = found.source.meta["val"].dim() - 1
    if found.weight is None or not found.axes <= {last}:
        return None
    scale, shift = found.along(last)
    outputs, inputs = found.weight.shape
    tensors = {"weight": scale[:, None] * found.weight} | ({"bias": shift} if bool(shift.any()) else {})
    patch = {"module": "linear", "inputs": inputs, "outputs": outputs}
    return {**patch, "bias": "bias" in tensors, "transposed": False}, tensors


_NONE: Mapping[str, Option] = {}
COLLAPSE = Move(
    "collapse",
    "g(θ) ⊙ x̂ + b(θ) → g ⊙ x̂ + b and η ⊙ W (γ ⊙ x) → W′ x: what is made of parameters alone is stored",
    "norms and linear maps in modules of their own that combine parameters; changes the structure",
    Preserves.OUTPUT,
    plan_collapse,
    _NONE,
)
