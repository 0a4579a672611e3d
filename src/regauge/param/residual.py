"""Unit-scaled residual streams: how much each branch adds, and the learning rates that go with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from regauge.errors import BadInput
from regauge.param.scaling import scale


def residual(
    branch: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor, tau: float = 1.0
) -> torch.Tensor:
    """y = (τ f(x) + x)/√(1+τ²), of unit scale if f(x) and x are, with a true gradient.

    The factor τ/√(1+τ²) of the branch acts on gradients at its input, not at its output, so that gradients
    inside the branch have unit scale too.

    Source: Blake et al., u-μP (arXiv 2407.17465, section 4.3 and appendix F).

    Args:
        branch: f, of the same shape.
        input: x.
        tau: τ, what the branch adds relative to the skip.
    """
    whole = math.sqrt(1 + tau**2)
    inside = branch(scale(input, backward=tau / whole))
    return scale(inside, forward=tau / whole) + input * (1 / whole)


def transformer_tau(index: int, layers: int, mult: float = 1.0, ratio: float = 1.0) -> float:
    """τ_i = α_i / √(N/2 + ⌈i/2⌉ α_a² + ⌊i/2⌋ α_m²); α_m = ρ √(2/(1+r²)), α_a = r α_m; even i is attention.

    All attention layers then add the same share to the last stream, all MLPs too, and the average layer ρ
    times what the embedding has, spread over N/2 pairs.

    Source: as of :func:`residual` (appendix G).

    Args:
        index: i, from 0: attention and MLP by turns.
        layers: N, both kinds counted.
        mult: ρ.
        ratio: r, of attention to MLP.

    Raises:
        BadInput: not 0 ≤ i < N.
    """
    if not 0 <= index < layers:
        raise BadInput("there is no such branch", expected=f"0 ≤ index < {layers}", found=str(index))
    mlp = mult * math.sqrt(2 / (1 + ratio**2))
    attention = ratio * mlp
    sum_before = (index + 1) // 2 * attention**2 + index // 2 * mlp**2
    return (mlp if index % 2 else attention) / math.sqrt(layers / 2 + sum_before)


def learning_rate_factor(
    role: Literal["weight", "bias", "norm", "output"],
    fan_in: int = 1,
    depth: int | None = None,
    optimizer: Literal["adam", "sgd"] = "adam",
    *,
    readout_constrained: bool = False,
) -> float:
    """η_p / η. Adam: fan_in^{−1/2} for weights, 1 otherwise; × N^{−1/2} in a stack of N residual branches.

    SGD with a constrained readout: √fan_in for weights, size for biases and gains, 1 for the output.

    Source: as of :func:`residual` (table 2), and the authors' code for SGD. Weight decay is meant to be
    independent of the learning rate: divide it by η_p.

    Args:
        role: of the parameter. An embedding [V, c] is a weight with fan_in c.
        fan_in: of a weight; for a bias or gain and SGD, its size.
        depth: N, of parameters in residual branches.
        optimizer: ``adam`` or ``sgd``.
        readout_constrained: for SGD it must be; other rules of SGD are not offered.

    Raises:
        BadInput: another role or optimizer, or SGD without a constrained readout.
    """
    if role not in ("weight", "bias", "norm", "output") or optimizer not in ("adam", "sgd"):
        raise BadInput(
            "no rule is known for this parameter",
            expected="weight, bias, norm or output, with adam or sgd",
            found=f"{role}, {optimizer}",
        )
    if optimizer == "sgd" and not readout_constrained:
        raise BadInput("SGD is offered with a constrained readout only", way_out="readout_constrained=True")
    stack = 1.0 if depth is None else depth**-0.5
    if role == "output":
        return stack
    if optimizer == "adam":
        return stack * (fan_in**-0.5 if role == "weight" else 1.0)
    return stack * (math.sqrt(fan_in) if role == "weight" else fan_in)


@dataclass(frozen=True)
class StreamScale:
    """What makes one branch of a plain stream x + f(norm(x)) that of a unit-scaled one.

    Attributes:
        branch: factor of the last linear map of the branch, weight and bias: 1/(τ c), c the scale before it.
        eps: factor of the eps of the norm at its start: 1/c².
    """

    branch: float
    eps: float


def stream_scales(taus: Sequence[float]) -> tuple[tuple[StreamScale, ...], float]:
    """x_l = c_l s_l, c_l = Π_{k<l} √(1+τ_k²): s_{l+1} = (τ f/(τ c_l) + s_l)/√(1+τ²) is x_{l+1}/c_{l+1}.

    For streams that are only read through norms. The last norm reads s = x/c: its eps is divided by c², the
    second value returned being c.

    Raises:
        BadInput: a τ that is not positive.
    """
    if any(tau <= 0 for tau in taus):
        raise BadInput("a branch with τ = 0 adds nothing", expected="τ > 0", found=str(list(taus)))
    found: list[StreamScale] = []
    whole = 1.0
    for tau in taus:
        found.append(StreamScale(1 / (tau * whole), whole**-2))
        whole *= math.sqrt(1 + tau**2)
    return tuple(found), whole
