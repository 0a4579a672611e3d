"""Mimetic initialisation: products of weights that look like those of trained models."""

from __future__ import annotations

import math

import torch

from regauge.errors import Refused
from regauge.nn.init.weights import fill, normal, orthonormal


def mimetic_value_(
    value: torch.Tensor,
    output: torch.Tensor,
    *,
    noise: float = 0.7,
    identity: float = -0.7,
    generator: torch.Generator | None = None,
) -> None:
    """W_Vᵀ W_Oᵀ = α Z + β I [d, d], Z ~ N(0, 1/d): what attention adds cancels part of the input.

    Split by M = U Σ Vᵀ as W_Vᵀ = U √Σ and W_Oᵀ = √Σ Vᵀ, which is exact for an inner size of at least d, and
    the best approximation of that rank below it. Any invertible R between them gives the same product.

    Source: Trockman, Kolter, Mimetic Initialization of Self-Attention Layers (arXiv 2305.09828, section 4).

    Args:
        value: W_V [inner, d], as in nn.Linear; a part of a fused weight is a view of it, filled in place.
        output: W_O [d, inner].
        noise, identity: α and β. In the paper β is negative for images; for language it is weaker and changes
            its sign with depth.
        generator: of Z.

    Raises:
        Refused: the shapes do not fit.
    """
    inner, d = _square(value, output.T)
    left, right = _split(_target(d, noise, identity, generator), inner)
    fill(value, left.T)
    fill(output, right)


def mimetic_query_(
    query: torch.Tensor,
    key: torch.Tensor,
    heads: int = 1,
    *,
    noise: float = 0.4,
    identity: float = 0.4,
    generator: torch.Generator | None = None,
) -> None:
    """W_Qᵀ W_K of each head = the best rank-k part of α Z + β I [d, d], Z ~ N(0, 1/d) anew for every head.

    A head of k rows keeps only about k/d of the identity. Further as :func:`mimetic_value_`.

    Args:
        query, key: [heads · k, d], head by head, as in nn.Linear.
        heads: of both.
        noise, identity: α and β.
        generator: of Z.

    Raises:
        Refused: the shapes do not fit, or keys are shared by several queries.
    """
    inner, d = _square(query, key)
    if heads < 1 or inner % heads:
        raise Refused("the rows are no whole heads", expected=f"a divisor of {inner}", found=str(heads))
    k = inner // heads
    for head in range(heads):
        left, right = _split(_target(d, noise, identity, generator), k)
        fill(query[head * k : (head + 1) * k], left.T)
        fill(key[head * k : (head + 1) * k], right.T)


def mimetic_ssm_(
    log_decay: torch.Tensor,
    step_bias: torch.Tensor,
    step: torch.Tensor | None,
    write: torch.Tensor,
    read: torch.Tensor,
    convolution: torch.Tensor | None = None,
    *,
    decay: float = -8.0,
    generator: torch.Generator | None = None,
) -> None:
    """y_t ≈ Σ_{s≤t} (W_C u_t · W_B u_s) u_s: a selective state space layer starts as causal linear attention.

    log(−A) = −8, so the state does not fade (e^{−3e-4} a step); softplus(step bias) = 1, and no dependence of
    the step on u; W_C = W_B with orthonormal rows (columns where N > d), so W_Cᵀ W_B is the projection
    nearest to the identity; the convolution is its last tap.

    Source: Trockman et al., Mimetic Initialization Helps State Space Models Learn to Recall (arXiv
    2410.11135). The constants are those of re-implementations; the authors' code was not at hand.

    Args:
        log_decay: log(−A), any shape.
        step_bias: [channels], before softplus.
        step: the weight that makes the step depend on u; filled with zeros.
        write, read: W_B, W_C [N, d]: state size, channels.
        convolution: [channels, 1, taps], depthwise and causal, the last tap being the present.
        decay: log(−A).
        generator: of the rows.

    Raises:
        Refused: the shapes do not fit.
    """
    if write.dim() != 2 or write.shape != read.shape:
        raise Refused(
            "what is written and read must be one space",
            expected="two weights [N, d]",
            found=f"{tuple(write.shape)} and {tuple(read.shape)}",
        )
    rows = orthonormal(write.shape[0], write.shape[1], generator)
    fill(write, rows)
    fill(read, rows)
    fill(log_decay, torch.full_like(log_decay, decay))
    fill(step_bias, torch.full_like(step_bias, math.log(math.e - 1), dtype=torch.float64))
    if step is not None:
        fill(step, torch.zeros_like(step))
    if convolution is not None:
        delta = torch.zeros_like(convolution)
        delta[..., -1] = 1
        fill(convolution, delta)


def _square(first: torch.Tensor, second: torch.Tensor) -> tuple[int, int]:
    if first.dim() != 2 or first.shape != second.shape:
        raise Refused(
            "these weights have no square product",
            expected="[inner, d] twice, with an output weight transposed",
            found=f"{tuple(first.shape)} and {tuple(second.shape)}",
            way_out="repeat shared keys for every query head first",
        )
    return first.shape[0], first.shape[1]


def _target(d: int, noise: float, identity: float, generator: torch.Generator | None) -> torch.Tensor:
    z = normal((d, d), generator) / math.sqrt(d)
    return noise * z + identity * torch.eye(d, dtype=torch.float64, device=z.device)


def _split(target: torch.Tensor, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right, [d, inner] each: left rightᵀ = target up to that rank; columns beyond d are zero."""
    u, s, vh = torch.linalg.svd(target)
    d = len(s)
    root = s[:inner].sqrt()
    left, right = target.new_zeros(d, inner), target.new_zeros(d, inner)
    left[:, : len(root)], right[:, : len(root)] = u[:, :inner] * root, vh[:inner].T * root
    return left, right
