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
from regauge.moves.forward import absorb, find_reader, pads
from regauge.patches import Patch, Replaceable, own_parameter, plain_modules, replaceable
from regauge.plan import Made, Step
from regauge.steps import AffineStep

HOMOGENEOUS = ("aten.relu", "aten.leaky_relu", "aten.relu_")
"""f(a x) = a f(x) for a > 0, entry by entry."""


_FORMS = (["aten.batch_norm"], ["aten._native_batch_norm_legit_no_training", "getitem"])


@dataclass(frozen=True)
class _Found:
    """A batch norm in a module of its own, with its parameters by role; ``node`` and ``result`` are the
    operation and its value."""

    node: fx.Node
    result: fx.Node
    path: str
    weight: str | None
    bias: str | None
    mean: str
    variance: str
    eps: float


def plan_fold_batchnorm(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[c] = a[c] x[c] + h[c], a = g / sqrt(v + eps), h = b - m a, goes into the maps around it.

    - x = W z + b₀, read by nothing else:  W[c, …] ← a[c] W[c, …], b₀[c] ← a[c] b₀[c] + h[c], and y = x.
    - x = relu(W z + b₀), all a[c] > 0:  W[c, …] ← a[c] W[c, …], b₀[c] ← a[c] b₀[c], y[c] = x[c] + h[c].
      The shift stays where it is: zeros put around y afterwards stay zeros, nothing changes at the border.
    - what is left, y[c] = a′[c] x[c] + h′[c], goes into the only map that reads y, see
      :mod:`regauge.moves.forward`: where that pads nothing, or with ``forward=padded`` by padding values.
    - otherwise y[c] = a′[c] x[c] + h′[c] stays, without statistics.

    Source: Jacob et al., arXiv 1712.05877, section 3.2, for the first.
    """
    modules = replaceable(scene.trace)
    by_node = {node: module for module in modules.values() for node in module.nodes}
    steps: dict[str, list[Step]] = {}
    made: dict[str, Made] = {}
    drops: set[str] = set()
    patches: dict[str, Patch] = {}
    left: list[tuple[_Found, torch.Tensor, torch.Tensor]] = []
    for found in _batch_norms(scene):
        scale, shift = _affine(scene, found)
        writer, through = _writer(found, by_node)
        own = {name for name in (found.weight, found.bias, found.mean, found.variance) if name is not None}
        drops |= own | {name for name in scene.trace.buffers.values() if name.startswith(f"{found.path}.")}
        if writer is not None and (not through or bool((scale > 0).all())):
            _into(writer, scale, None if through else shift, steps, made, patches)
            scale, shift = torch.ones_like(scale), shift if through else torch.zeros_like(shift)
        left.append((found, scale, shift))

    def read(name: str) -> torch.Tensor:
        value = made[name].value(scene.read) if name in made else scene.read(name).to(torch.float64)
        for step in steps.get(name, ()):
            value = step.apply(value)
        return value

    for found, scale, shift in left:
        has = {"weight": bool((scale != 1).any()), "bias": bool((shift != 0).any())}
        reader = find_reader(found.result, scale, by_node) if any(has.values()) else None
        if reader is not None and _may_absorb(reader, scale, str(options["forward"])):
            absorb(reader, scale, shift, read, steps, made, patches)
            has = dict.fromkeys(has, False)
        patches[found.path] = (
            {"path": found.path, "module": "affine", "size": len(scale), **has}
            if any(has.values())
            else {"path": found.path, "module": "identity"}
        )
        for leaf, value in (("weight", scale), ("bias", shift)):
            if has[leaf]:
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
        patches=tuple(patches.values()),
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
        found.append(_Found(nodes[0], nodes[-1], path, weight, bias, mean, variance, float(eps)))  # type: ignore[arg-type]
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


def _may_absorb(reader: Replaceable, scale: torch.Tensor, forward: str) -> bool:
    """Whether the option allows it; a padding value needs a scale to divide by."""
    if not pads(reader):
        return forward != "none"
    return forward == "padded" and bool((scale != 0).all())


def _into(
    writer: Replaceable,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    steps: dict[str, list[Step]],
    made: dict[str, Made],
    patches: dict[str, Patch],
) -> None:
    """Scale (and shift) the output of a map; a patch if it needs a bias for that."""
    assert writer.weight is not None
    axis = 1 if writer.patch.get("transposed") else 0
    steps.setdefault(writer.weight, []).append(AffineStep(axis, scale))
    if writer.bias is not None:
        steps.setdefault(writer.bias, []).append(AffineStep(0, scale, shift))
    elif shift is not None:
        made[f"{writer.path}.bias"] = Made((len(scale),), writer.weight, lambda _: shift)
        patches[writer.path] = {**writer.patch, "bias": True}


FOLD_BATCHNORM = Move(
    "fold-batchnorm",
    "y = a·(W z + b) + h → W ← a·W, b ← a·b + h; after a ReLU the scale alone; the rest into what reads y",
    "batch norms with running statistics; changes the structure",
    Preserves.OUTPUT,
    plan_fold_batchnorm,
    {
        "forward": Option(
            str,
            "unpadded",
            "what is left goes into a reader that pads nothing, or also by padding values, or stays",
            ("unpadded", "padded", "none"),
        )
    },
)
