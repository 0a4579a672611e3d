"""Fixup: residual branches that start at zero, with steps whose sum does not depend on the depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from regauge.errors import BadInput, Refused
from regauge.nn.init.weights import Layer, fans, fill, linear_weight, normal


def fixup_scale(branches: int, layers: int) -> float:
    """L^(−1/(2m−2)) for L residual branches of m layers each: 1/√L for m = 2, L^(−1/4) for m = 3.

    Raises:
        Refused: m < 2, where only the last layer exists and is zero; or L < 1.
    """
    if layers < 2 or branches < 1:
        raise Refused(
            "no layer of this branch is scaled",
            expected="at least one branch, of two or more layers",
            found=f"{branches} branches of {layers} layers",
        )
    return branches ** (-1 / (2 * layers - 2))


def fixup_(
    branches: Sequence[Sequence[Layer]],
    *,
    count: int | None = None,
    mode: Literal["fan_out", "fan_in"] = "fan_out",
    gain: float = math.sqrt(2),
    generator: torch.Generator | None = None,
) -> None:
    """W_last = 0, other W[o, i, …] ~ N(0, s²), s = gain / √fan · L^(−1/(2m−2)); their biases are 0.

    L is the number of branches of the whole network, m that of layers in the branch. A branch of one layer is
    just zero. Scalar biases and multipliers, and the classifier (zero), belong to the model.

    Source: Zhang, Dauphin, Ma, Fixup Initialization (arXiv 1901.09321, section 3), whose code has fan_out.

    Args:
        branches: the linear layers of each residual branch, in order: modules, or weights [out, in, *kernel].
        count: L, where ``branches`` are only some of those of the network.
        mode: fan_out = out · ∏ kernel as in the code of the authors, or fan_in, with which the forward
            variance is that of He et al.
        gain: √2 for ReLU.
        generator: of the draws, which are made in the order of the layers.

    Raises:
        Refused: an empty branch, a layer that is not linear, a layer that occurs twice.
        BadInput: another mode.
    """
    if mode not in ("fan_out", "fan_in"):
        raise BadInput("there is no such mode", expected="fan_out or fan_in", found=repr(mode))
    found = [[linear_weight(layer) for layer in branch] for branch in branches]
    weights = [weight for branch in found for weight, _ in branch]
    if not all(found) or len({id(weight) for weight in weights}) < len(weights):
        raise Refused(
            "Fixup needs the layers of every branch, each once",
            expected="branches of one or more layers that share no weight",
            found="an empty branch" if not all(found) else "a weight that occurs twice",
        )
    total = len(branches) if count is None else count
    for branch in found:
        for weight, bias in branch:
            fan_in, fan_out = fans(weight)
            if weight is branch[-1][0]:
                fill(weight, torch.zeros_like(weight))
            else:
                std = gain / math.sqrt(fan_out if mode == "fan_out" else fan_in)
                std *= fixup_scale(total, len(branch))
                fill(weight, std * normal(weight.shape, generator))
            if bias is not None:
                fill(bias, torch.zeros_like(bias))
