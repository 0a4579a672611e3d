"""Residual networks without norms: Fixup's initial weights and its scalars.

Source: Zhang et al., Fixup Initialization (arXiv 1901.09321); hongyi-zhang/Fixup. The authors' training
scripts give every bias and every multiplier, that of the head included, a tenth of the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from regauge.errors import BadInput


class FixupBlock(nn.Module):
    """y = φ(z + skip(x + p_1)) with z = s · L_m(… φ(L_1(x + p_1) + q_1) + p_2 …) + q_m; skip(x) = x if None.

    p = ``before`` [m] and q = ``after`` [m] start at zero, s = ``scale`` [1] at one.

    Args:
        layers: L_1 … L_m: modules with a ``weight``, such as convolutions, without a bias of their own.
        skip: what the other path does where sizes change; it gets x + p_1, while no module there means x.
        activation: φ.
        last: whether φ stands behind the sum.

    Raises:
        BadInput: no layer.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        skip: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.relu,
        last: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not layers:
            raise BadInput("a block without layers", expected="one or more")
        here = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(layers)
        self.skip, self.activation, self.last = skip, activation, last
        self.before = nn.Parameter(torch.zeros(len(layers), **here))
        self.after = nn.Parameter(torch.zeros(len(layers), **here))
        self.scale = nn.Parameter(torch.ones(1, **here))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first = input + self.before[0]
        z = first
        for index, layer in enumerate(self.layers):
            z = layer(z if index == 0 else self.activation(z) + self.before[index])
            z = (self.scale * z if index == len(self.layers) - 1 else z) + self.after[index]
        y = z + (input if self.skip is None else self.skip(first))
        return (self.activation(y) if self.last else y).to(input.dtype)


class PaddedSkip(nn.Module):
    """y[n, c, …] = x[n, c, …] at every ``stride``-th place, and as many channels of zeros behind: twice the
    channels of x [batch, c, height, width]. The skip of the authors' networks for CIFAR."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input[..., :: self.stride, :: self.stride]
        return torch.cat([x, torch.zeros_like(x)], 1)


def fixup_(
    blocks: Sequence[FixupBlock], head: nn.Linear | None = None, generator: torch.Generator | None = None
) -> None:
    """Fixup's weights, in place, for the blocks of a whole network in their order.

    In a block of m layers W_1 … W_{m−1} ~ N(0, 2 / (outputs · kernel)) · L^(−1/(2m − 2)) with L the number of
    blocks, and W_m = 0; the head is zero; scalars are zero and one. Layers outside the blocks are left as
    they are: the authors use PyTorch's default for the first one.

    Args:
        blocks: all residual blocks.
        head: the classifier.
        generator: of the random numbers.

    Raises:
        BadInput: a layer of a block has no weight [outputs, inputs, …], or has a bias.
    """
    with torch.no_grad():
        for block in blocks:
            weights = [_weight(layer) for layer in block.layers]
            for weight in weights[:-1]:
                fan = weight.shape[0] * weight[0, 0].numel()
                shrink = len(blocks) ** (-1 / (2 * len(weights) - 2))
                weight.normal_(0, math.sqrt(2 / fan) * shrink, generator=generator)
            weights[-1].zero_()
            block.before.zero_()
            block.after.zero_()
            block.scale.fill_(1)
        if head is not None:
            for parameter in head.parameters():
                parameter.zero_()


def _weight(layer: nn.Module) -> nn.Parameter:
    own = dict(layer.named_parameters())
    if set(own) != {"weight"} or own["weight"].dim() < 2:
        raise BadInput(
            "a layer of a Fixup block has one weight and nothing else",
            expected="weight [outputs, inputs, …]",
            found=", ".join(f"{name} {list(value.shape)}" for name, value in own.items()) or "no parameter",
        )
    return own["weight"]
