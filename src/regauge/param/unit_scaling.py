"""Unit scaling: operations whose outputs and gradients have unit scale for normal inputs and weights.

Weights are N(0, 1). Every operation multiplies its output by one constant and the gradient of each input by
another. With ``constrained`` (where an operation has it), gradients of inputs take the constant of the
output, which then are true gradients; gradients of weights may be scaled freely anyway.

Source: Blake et al., Unit Scaling (arXiv 2303.11257) and u-μP (arXiv 2407.17465, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from regauge.errors import BadInput
from regauge.param.scaling import scale


def between(share: float, low: float, high: float) -> float:
    """low^(1−a) · high^a."""
    return low ** (1 - share) * high**share


def gelu_scales(mult: float = 1.0) -> tuple[float, float]:
    """Constants of output and gradient: I(a; 2, √(2/(1−1/π))), I(a; 2, √2), a = 1/(1 + 1/(4m²))."""
    share = 1 / (1 + 0.25 / mult**2)
    return between(share, 2, math.sqrt(2 / (1 - 1 / math.pi))), between(share, 2, math.sqrt(2))


def silu_scales(mult: float = 1.0) -> tuple[float, float]:
    """I(a; 2, √(2/(1−1/π))), a = 1/(1 + 1/(4m²)), and I(b; 2, √2), b = 1/(1 + 1/m²)."""
    return gelu_scales(mult)[0], between(1 / (1 + 1 / mult**2), 2, math.sqrt(2))


def softmax_scales(size: int, mult: float = 1.0) -> tuple[float, float]:
    """I(a; n, √n) and I(a; n/m, √(n/m)), a = 1/(1 + 4/m²), between flat and one-hot, over n entries."""
    share = 1 / (1 + 4 / mult**2)
    return between(share, size, math.sqrt(size)), between(share, size / mult, math.sqrt(size / mult))


def attention_scale(length: int, head: int, mult: float = 1.0, *, causal: bool = False) -> float:
    """1 / I(a; √(c/T), 1), a = 1/(1 + 4d/m²); c = log T if causal, else 1, over T positions; 1 for T = 1."""
    spread = math.log(length) if causal and length > 1 else 1.0
    return 1 / between(1 / (1 + 4 * head / mult**2), math.sqrt(spread / length), 1.0)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    constrained: bool = True,
    power: float = 0.5,
) -> torch.Tensor:
    """y[…, o] = i^{−1/2} (W x + b); ∂x × o^{−1/2} (i^{−1/2} if constrained); ∂W, ∂b × n^{−1/2}, n tokens.

    Args:
        input: [..., i]; n is the product of the leading axes.
        weight: [o, i].
        bias: [o].
        power: p, for i^{−p} at the output.
    """
    out, inputs = weight.shape
    tokens = input.numel() // inputs
    forward = inputs**-power
    x = scale(input, backward=forward if constrained else out**-0.5)
    w, b = scale(weight, backward=tokens**-0.5), _parameter(bias, tokens**-0.5)
    return scale(F.linear(x, w, b), forward=forward)


def readout(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    constrained: bool = False,
) -> torch.Tensor:
    """y[…, o] = i^{−1} (W x + b), gradients as of :func:`linear`: the last layer, which shrinks with
    width."""
    return linear(input, weight, bias, constrained=constrained, power=1.0)


def matmul(left: torch.Tensor, right: torch.Tensor, *, constrained: bool = True) -> torch.Tensor:
    """y[…, l, r] = k^{−1/2} Σ_k a[…, l, k] b[…, k, r]; ∂a × r^{−1/2}, ∂b × l^{−1/2} unless constrained."""
    forward = left.shape[-1] ** -0.5
    a = scale(left, backward=forward if constrained else right.shape[-1] ** -0.5)
    b = scale(right, backward=forward if constrained else left.shape[-2] ** -0.5)
    return scale(a @ b, forward=forward)


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    constrained: bool = True,
) -> torch.Tensor:
    """y × (i·k)^{−1/2}; ∂x × (stride·groups / (o·k))^{1/2} unless constrained; ∂W, ∂b × positions^{−1/2}.

    Args:
        input: [..., channels, length]; positions are those of the output, times the batch.
        weight: [o, i, k], i the channels of one group.
        bias: [o].
        stride, padding, dilation, groups: as of F.conv1d.
    """
    out, inputs, taps = weight.shape
    length = (input.shape[-1] + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    tokens = length * math.prod(input.shape[:-2])
    forward = (inputs * taps) ** -0.5
    x = scale(input, backward=forward if constrained else (stride * groups / (out * taps)) ** 0.5)
    w, b = scale(weight, backward=tokens**-0.5), _parameter(bias, tokens**-0.5)
    return scale(F.conv1d(x, w, b, stride, padding, dilation, groups), forward=forward)


def gelu(
    input: torch.Tensor, mult: float = 1.0, *, approximate: str = "none", constrained: bool = True
) -> torch.Tensor:
    """y = s · GELU(m x)/m, with :func:`gelu_scales`."""
    forward, backward = gelu_scales(mult)
    x = scale(input, backward=forward if constrained else backward)
    return scale(F.gelu(x * mult, approximate=approximate) / mult, forward=forward)


def silu(input: torch.Tensor, mult: float = 1.0, *, constrained: bool = True) -> torch.Tensor:
    """y = s · x σ(m x), with :func:`silu_scales`."""
    forward, backward = silu_scales(mult)
    x = scale(input, backward=forward if constrained else backward)
    return scale(x * torch.sigmoid(x * mult), forward=forward)


def silu_glu(input: torch.Tensor, gate: torch.Tensor, mult: float = 1.0) -> torch.Tensor:
    """y = s · x g σ(m g); s, and both gradients, × I(1/(1 + 1/m²); 2, √2)."""
    factor = silu_scales(mult)[1]
    x, g = scale(input, backward=factor), scale(gate, backward=factor)
    return scale(x * g * torch.sigmoid(g * mult), forward=factor)


def softmax(
    input: torch.Tensor, dim: int = -1, mult: float = 1.0, *, constrained: bool = True
) -> torch.Tensor:
    """y = s · softmax(m x) along one axis, with :func:`softmax_scales`: of mean s/n, so not of mean zero."""
    forward, backward = softmax_scales(input.shape[dim], mult)
    x = scale(input, backward=forward if constrained else backward)
    return scale(torch.softmax(x * mult, dim), forward=forward)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    mult: float = 1.0,
) -> torch.Tensor:
    """y = s · softmax((m/d) q kᵀ) v, and all gradients × s, with s of :func:`attention_scale`.

    m = √d gives the usual logits q kᵀ/√d.

    Args:
        query, key, value: [..., T, d], d that of a head of queries and keys.
        mask: as ``attn_mask`` of F.scaled_dot_product_attention; s takes no notice of it.
        causal: whether position t reads positions up to t only.
        mult: m.
    """
    length, head = value.shape[-2], query.shape[-1]
    factor = attention_scale(length, head, mult, causal=causal)
    q, k, v = (scale(part, backward=factor) for part in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=mult / head)
    return scale(y, forward=factor)


def layer_norm(
    input: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """F.layer_norm, with the gradients of gain and shift × √(size / entries of x)."""
    factor = math.sqrt(math.prod(shape) / input.numel())
    return F.layer_norm(input, list(shape), _parameter(weight, factor), _parameter(bias, factor), eps)


def rms_norm(
    input: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """F.rms_norm, with the gradient of the gain × √(size / entries of x)."""
    factor = math.sqrt(math.prod(shape) / input.numel())
    return F.rms_norm(input, list(shape), _parameter(weight, factor), eps)


def embedding(tokens: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """y[…, c] = W[token, c], with ∂W × √(V / tokens): W [V, c]."""
    return F.embedding(tokens, scale(weight, backward=math.sqrt(len(weight) / tokens.numel())), padding_idx)


def add(left: torch.Tensor, right: torch.Tensor, *, constrained: bool = True) -> torch.Tensor:
    """y = (a + b)/√2; the gradient of one that is copied c times by broadcasting × c^{−1/2} unless
    constrained.

    With a single number on one side it is the plain sum.
    """
    entries = math.prod(torch.broadcast_shapes(left.shape, right.shape))
    forward = 1.0 if 1 in (left.numel(), right.numel()) else 2**-0.5
    a = scale(left, backward=forward if constrained else (entries // left.numel()) ** -0.5)
    b = scale(right, backward=forward if constrained else (entries // right.numel()) ** -0.5)
    return scale(a + b, forward=forward)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    mult: float = 1.0,
    *,
    ignore_index: int = -100,
    divide_by_all: bool = False,
) -> torch.Tensor:
    """L = mean over tokens of −log softmax(m x)[target]; ∂x = V/√(V−1) (softmax(m x) − onehot).

    The gradient is that of the sum over tokens, not of the mean, and does not shrink with m.

    Args:
        logits: [n, V], or [V].
        target: [n], or without axes.
        mult: m.
        ignore_index: targets that count nothing.
        divide_by_all: the mean of the value over all n, ignored ones too, as in the authors' code.

    Raises:
        BadInput: other shapes.
    """
    if logits.dim() not in (1, 2) or logits.shape[:-1] != target.shape:
        raise BadInput(
            "these are no logits of tokens",
            expected="[n, V] and [n], or [V] and a single target",
            found=f"{tuple(logits.shape)} and {tuple(target.shape)}",
        )
    size = logits.shape[-1]
    x = scale(logits, forward=mult, backward=size / math.sqrt(size - 1))
    loss = F.cross_entropy(x, target, ignore_index=ignore_index, reduction="sum")
    counted = torch.full_like(target, 1) if divide_by_all else target != ignore_index
    return scale(loss, forward=counted.sum().to(loss.dtype).reciprocal())


def _parameter(value: torch.Tensor | None, factor: float) -> torch.Tensor | None:
    return None if value is None else scale(value, backward=factor)
