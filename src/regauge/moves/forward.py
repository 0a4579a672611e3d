"""An affine map of channels goes into the convolution or linear map that reads it, zero padding included."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import fx

from regauge.interpret import op_name
from regauge.patches import Patch, Replaceable
from regauge.plan import Made, Step
from regauge.primitive import SILENT
from regauge.steps import AddStep, ScaleStep

MAX_POOL = {"aten.max_pool1d": 1, "aten.max_pool2d": 2, "aten.max_pool3d": 3}
"""Operation -> how many axes of positions it pools over."""


def find_readers(
    node: fx.Node, scale: torch.Tensor, by_node: Mapping[str, Replaceable], axis: int = 1
) -> list[Replaceable]:
    """The maps that alone read y = a[c] x + h[c], directly or through max pooling; empty if others do.

    max_k (a[c] x[k] + h[c]) = a[c] max_k x[k] + h[c] for a[c] > 0, so the affine map may stand behind the
    pooling. Max pooling pads with −∞, which stays −∞.

    Args:
        node: what computes y.
        scale: a, float64.
        by_node: name of an operation -> the replaceable module it is.
        axis: of y that c counts.
    """
    while True:
        axes = node.meta["val"].dim()
        users = readers_of(node)
        found = [_reader(user, node, axis, by_node.get(user.name)) for user in users]
        readers = [reader for reader in found if reader is not None]
        if readers or not found:
            return readers if len(readers) == len(found) else []
        (user, *more) = users
        pools = user.op == "call_function" and axis == 1 and MAX_POOL.get(op_name(user)) == axes - 2
        if more or not pools or not bool((scale > 0).all()):
            return []
        node = user


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The operations that use a value, and the output; not checks of its dtype."""
    return [user for user in node.users if user.op != "call_function" or op_name(user) not in SILENT]


def _reader(user: fx.Node, node: fx.Node, axis: int, module: Replaceable | None) -> Replaceable | None:
    """The module, if it is a map of the channels that reads nothing but this value, once."""
    if module is None or module.patch["module"] not in ("linear", "convolution") or len(module.nodes) != 1:
        return None
    positions = len(module.patch.get("kernel", ()))
    data = 1 if op_name(user) == "aten.addmm" else 0
    channels = axis == node.meta["val"].dim() - 1 - positions and user.args[data] is node
    return module if channels else None


def pads(reader: Replaceable) -> bool:
    """Whether the reader puts zeros around what it reads."""
    return any(reader.patch.get("padding", ()))


def absorb(
    reader: Replaceable,
    scale: torch.Tensor,
    shift: torch.Tensor,
    read: Callable[[str], torch.Tensor],
    steps: dict[str, list[Step]],
    made: dict[str, Made],
    patches: dict[str, Patch],
) -> None:
    """W ∗ (a x + h) + b₀ becomes W′ ∗ x + b₀′, channel c of group g, kernel position k, output o in g.

    - W′[o, c, k] = W[o, c, k] a[c],  b₀′[o] = b₀[o] + Σ_{c,k} W[o, c, k] h[c];
    - zeros around a x + h become p[c] = −h[c] / a[c] around x, since a p + h = 0; all a[c] ≠ 0 then.

    Without the second line the result is wrong along the border. Source: the first is batch norm folded
    forward as in AIMET (``batch_norm_fold.py``), which refuses padding and groups.

    Args:
        read: current float64 value of a parameter by name, ``steps`` and ``made`` included.
        steps, made, patches: of the change so far; added to.
    """
    assert reader.weight is not None
    patch = patches.get(reader.path, reader.patch)
    weight = read(reader.weight)
    turned = bool(patch.get("transposed"))
    rows = weight.T if turned else weight
    if rows.dim() > 2:
        rows = rows.flatten(2).sum(2)  # [outputs, inputs of the group], summed over positions
    outputs, width = rows.shape
    groups = patch.get("groups", 1)

    def spread(value: torch.Tensor) -> torch.Tensor:
        """[outputs, inputs of the group]: row o holds the channels that output o reads."""
        return value.reshape(groups, 1, width).expand(-1, outputs // groups, -1).reshape(outputs, width)

    delta = (rows * spread(shift)).sum(1)
    if bool((scale != 1).any()):
        factor = spread(scale) if groups > 1 else scale[None]
        factor = factor.T if turned else factor.reshape(*factor.shape, *(1,) * (weight.dim() - 2))
        steps.setdefault(reader.weight, []).append(ScaleStep(factor))
    bias = f"{reader.path}.bias" if reader.bias is None else reader.bias
    if patch["bias"]:
        steps.setdefault(bias, []).append(AddStep(delta))
    else:
        made[bias] = Made((outputs,), reader.weight, lambda _: delta)
        patches[reader.path] = patch = {**patch, "bias": True}
    if pads(reader):
        outside = -shift / scale
        made[f"{reader.path}.pad"] = Made((len(scale),), reader.weight, lambda _: outside)
        patches[reader.path] = {**patch, "pad": True}
