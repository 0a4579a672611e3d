"""A norm with running statistics, such as batch normalisation, is an affine map at inference, mostly none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.errors import Refused
from regauge.interpret import op_name
from regauge.moves.affine import AffineModule, affine_modules
from regauge.moves.base import Change, Move, Option, Preserves, Scene
from regauge.moves.forward import absorb, find_readers, pads, readers_of
from regauge.patches import Patch, Replaceable, replaceable
from regauge.plan import Made, Step
from regauge.steps import AffineStep

HOMOGENEOUS = ("aten.relu", "aten.leaky_relu", "aten.relu_")
"""f(a x) = a f(x) for a > 0, entry by entry."""


def plan_fold_batchnorm(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y[c] = a[c] x[c] + h[c], a = g / sqrt(v + eps), h = b - m a, goes into the maps around it.

    - x = W z + b₀, read by nothing else:  W[c, …] ← a[c] W[c, …], b₀[c] ← a[c] b₀[c] + h[c], and y = x.
    - x = relu(W z + b₀), all a[c] > 0:  W[c, …] ← a[c] W[c, …], b₀[c] ← a[c] b₀[c], y[c] = x[c] + h[c].
      The shift stays where it is: zeros put around y afterwards stay zeros, nothing changes at the border.
    - what is left, y[c] = a′[c] x[c] + h′[c], goes into the only map that reads y, see
      :mod:`regauge.moves.forward`: where that pads nothing, or with ``forward=padded`` by padding values.
    - otherwise y[c] = a′[c] x[c] + h′[c] stays, without statistics.

    What is said of batch norms holds for every norm that divides by stored statistics, see
    :mod:`regauge.moves.affine`, features on the last axis included.

    Source: Jacob et al., arXiv 1712.05877, section 3.2, for the first.
    """
    modules = replaceable(scene.trace)
    by_node = {node: module for module in modules.values() for node in module.nodes}
    steps: dict[str, list[Step]] = {}
    made: dict[str, Made] = {}
    drops: set[str] = set()
    patches: dict[str, Patch] = {}
    left: list[tuple[AffineModule, int, torch.Tensor, torch.Tensor]] = []
    for found in affine_modules(scene, _has_root):
        axis = found.axis
        before, after = found.source.meta["val"], found.result.meta["val"]
        same = (before.shape, before.dtype) == (after.shape, after.dtype)
        if axis is None or not same or found.norm is not None or found.weight is not None:
            continue
        scale, shift = found.along(axis)
        writer, through = _writer(found, by_node)
        drops |= set(found.own)
        if writer is not None and (not through or bool((scale > 0).all())):
            _into(writer, scale, None if through else shift, steps, made, patches)
            scale, shift = torch.ones_like(scale), shift if through else torch.zeros_like(shift)
        left.append((found, axis, scale, shift))

    def read(name: str) -> torch.Tensor:
        value = made[name].value(scene.read) if name in made else scene.read(name).to(torch.float64)
        for step in steps.get(name, ()):
            value = step.apply(value)
        return value

    for found, axis, scale, shift in left:
        has = {"weight": bool((scale != 1).any()), "bias": bool((shift != 0).any())}
        readers = find_readers(found.result, scale, by_node, axis) if any(has.values()) else []
        if readers and all(_may_absorb(reader, scale, str(options["forward"])) for reader in readers):
            for reader in readers:
                absorb(reader, scale, shift, read, steps, made, patches)
            has = dict.fromkeys(has, False)
        patches[found.path] = (
            {"path": found.path, "module": _kept(found), "size": len(scale), **has}
            if any(has.values())
            else {"path": found.path, "module": "identity"}
        )
        for leaf, value in (("weight", scale), ("bias", shift)):
            if has[leaf]:
                made[f"{found.path}.{leaf}"] = Made((len(scale),), found.own[0], lambda _, value=value: value)
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


ROOTS = frozenset(
    (
        *("aten.rsqrt", "aten.sqrt", "aten.pow", "aten.batch_norm"),
        "aten._native_batch_norm_legit_no_training",
    )
)
"""What turns a variance into a scale; a module without one is a gain, and no norm."""


def _has_root(names: frozenset[str]) -> bool:
    return bool(names & ROOTS) and not names & {"aten.linear", "aten.layer_norm", "aten.rms_norm"}


def _kept(found: AffineModule) -> str:
    """What stays: a map of axis 1, or of the last one. Where these are one, the code says which is meant."""
    if found.axis == found.source.meta["val"].dim() - 1 and not found.second:
        return "affine-last"
    if found.axis == 1:
        return "affine"
    raise Refused(
        "a norm whose statistics are constants cannot be folded here",
        node=f"{found.result.name} in {found.path}",
        expected="channels on axis 1 or on the last axis",
        found=f"axis {found.axis}",
    )


def _writer(found: AffineModule, by_node: Mapping[str, Replaceable]) -> tuple[Replaceable | None, bool]:
    """The map whose output only the batch norm reads, if there is one, and whether through a rectifier."""
    node, through = found.source, False
    while found.alone if node is found.source else len(readers_of(node)) == 1:
        module = by_node.get(node.name)
        if module is not None:
            positions = len(module.patch.get("kernel", ()))
            channel = node.meta["val"].dim() - 1 - positions
            linear = module.patch["module"] in ("linear", "convolution")
            good = linear and len(module.nodes) == 1 and channel == found.axis
            return (module if good else None), through
        if op_name(node) not in HOMOGENEOUS:
            break
        (node,), through = node.all_input_nodes, True
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
