"""Batch normalisation at inference is an affine map, and mostly none at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regauge.errors import Refused
from regauge.interpret import op_name
from regauge.moves.base import Change, Move, Option, Preserves, Scene
from regauge.patches import Patch, Replaceable, own_parameter, plain_modules, replaceable
from regauge.plan import Made, Step
from regauge.steps import AffineStep

HOMOGENEOUS = ("aten.relu", "aten.leaky_relu", "aten.relu_")
"""f(a x) = a f(x) for a > 0, entry by entry."""


_FORMS = (["aten.batch_norm"], ["aten._native_batch_norm_legit_no_training", "getitem"])


@dataclass(frozen=True)
class _Found:
    """A batch norm in a module of its own, with its parameters by role; ``node`` is the operation."""

    node: fx.Node
    path: str
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float


def plan_fold_batchnorm(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[c] = a[c] x[c] + h[c], a = g / sqrt(v + eps), h = b - m a, goes into the map before it.

    - x = W z + b₀, read by nothing else:  W[c, …] ← a[c] W[c, …], b₀[c] ← a[c] b₀[c] + h[c], and y = x.
    - x = relu(W z + b₀), all a[c] > 0:  W[c, …] ← a[c] W[c, …], b₀[c] ← a[c] b₀[c], y[c] = x[c] + h[c].
      The shift stays where it is: zeros put around y afterwards stay zeros, nothing changes at the border.
    - otherwise y[c] = a[c] x[c] + h[c], without statistics.

    Source: Jacob et al., arXiv 1712.05877, section 3.2, for the first.
    """
    modules = replaceable(scene.trace)
    by_node = {node: module for module in modules.values() for node in module.nodes}
    steps: dict[str, list[Step]] = {}
    made: dict[str, Made] = {}
    drops: set[str] = set()
    patches: list[Patch] = []
    for found in _batch_norms(scene):
        scale, shift = _affine(scene, found)
        writer, through = _writer(found, by_node)
        held = {"path": found.path, "module": "affine", "size": len(scale)}
        own = {name for name in (found.weight, found.bias, found.mean, found.variance) if name is not None}
        drops |= own | {name for name in scene.trace.buffers.values() if name.startswith(f"{found.path}.")}
        if writer is not None and (not through or bool((scale > 0).all())):
            rest = None if through else shift
            patches += _into(writer, scale, rest, steps, made)
            keeps = {"bias": shift} if through else {}
        else:
            keeps = {"weight": scale, "bias": shift}
        patches.append(
            {**held, "weight": "weight" in keeps, "bias": "bias" in keeps}
            if keeps
            else {"path": found.path, "module": "identity"}
        )
        for leaf, value in keeps.items():
            made[f"{found.path}.{leaf}"] = Made((len(scale),), found.mean, lambda _, value=value: value)
    if not patches:
        raise Refused(
            "there is no batch norm to fold",
            expected="a batch norm with running statistics, in a module of its own",
            found="none",
        )
    drops -= made.keys()
    return Change(
        {name: tuple(held) for name, held in steps.items()},
        made=made,
        drops=frozenset(drops),
        patches=tuple(patches),
    )


def _batch_norms(scene: Scene) -> list[_Found]:
    trace = scene.trace
    found: list[_Found] = []
    for path, nodes in plain_modules(trace).items():
        if nodes[0].kwargs or [op_name(node) for node in nodes] not in _FORMS:
            continue
        _, *given = nodes[0].args[:5]
        training, eps = (nodes[0].args[5], nodes[0].args[7]) if len(nodes) == 1 else (False, nodes[0].args[6])
        weight, bias, mean, variance = names = [own_parameter(trace, path, arg) for arg in given]
        alone = all(name is not None or arg is None for name, arg in zip(names, given, strict=True))
        if training or not alone or mean is None or variance is None:
            continue
        found.append(_Found(nodes[0], path, weight, bias, mean, variance, float(eps)))  # type: ignore[arg-type]
    return found


def _affine(scene: Scene, found: _Found) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, float64."""
    mean, variance = (scene.read(name).to(torch.float64) for name in (found.mean, found.variance))
    scale = torch.rsqrt(variance + found.eps)
    if found.weight is not None:
        scale = scale * scene.read(found.weight).to(torch.float64)
    shift = -mean * scale
    if found.bias is not None:
        shift = shift + scene.read(found.bias).to(torch.float64)
    return scale, shift


def _writer(found: _Found, by_node: Mapping[str, Replaceable]) -> tuple[Replaceable | None, bool]:
    """The map whose output only the batch norm reads, if there is one, and whether through a rectifier."""
    node, through = found.node.args[0], False
    while isinstance(node, fx.Node) and len(node.users) == 1:
        module = by_node.get(node.name)
        if module is not None:
            positions = len(module.patch.get("kernel", ()))
            channel = node.meta["val"].dim() - 1 - positions
            linear = module.patch["module"] in ("linear", "convolution")
            good = linear and len(module.nodes) == 1 and channel == 1
            return (module if good else None), through
        if op_name(node) not in HOMOGENEOUS:
            break
        node, through = node.args[0], True
    return None, through


def _into(
    writer: Replaceable,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    steps: dict[str, list[Step]],
    made: dict[str, Made],
) -> list[Patch]:
    """Scale (and shift) the output of a map; a patch if it needs a bias for that."""
    assert writer.weight is not None
    axis = 1 if writer.patch.get("transposed") else 0
    steps.setdefault(writer.weight, []).append(AffineStep(axis, scale))
    if writer.bias is not None:
        steps.setdefault(writer.bias, []).append(AffineStep(0, scale, shift))
        return []
    if shift is None:
        return []
    made[f"{writer.path}.bias"] = Made((len(scale),), writer.weight, lambda _: shift)
    return [{**writer.patch, "bias": True}]


_NONE: Mapping[str, Option] = {}

FOLD_BATCHNORM = Move(
    "fold-batchnorm",
    "y = a·(W z + b) + h → W ← a·W, b ← a·b + h; through a ReLU the scale alone",
    "batch norms with running statistics; changes the structure",
    Preserves.OUTPUT,
    plan_fold_batchnorm,
    _NONE,
)
