"""IDInit: identities that are padded to the shape of the weight."""

from __future__ import annotations

import torch

from regauge.nn.init.weights import fans, fill, normal


def _identity(rows: int, columns: int) -> torch.Tensor:
    """W[i, i mod columns] = 1, and no other entry: one identity, or several on top of each other."""
    w = torch.zeros(rows, columns, dtype=torch.float64)
    index = torch.arange(rows)
    w[index, index % columns] = 1
    return w


def idi_(
    tensor: torch.Tensor,
    scale: float = 1.0,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """W[i, i mod in] = τ, 0 elsewhere, of W [out, in]; with in > out, inputs from ``out`` on are not read.

    A weight [out, in, *kernel] is filled as the matrix [out, in · ∏ kernel], the kernel varying fastest:
    output i copies tap (i mod ∏ kernel) of channel i div ∏ kernel, so that all taps of a patch are passed on.

    Source: Pan et al., IDInit (arXiv 2503.04626, sections 3.1 and 3.3).

    Args:
        tensor: a weight [out, in, *kernel], of any floating dtype.
        scale: τ.
        noise: standard deviation of a normal added to every entry, 1e-6 in the paper's loose condition; 0 for
            none. Two outputs that copy the same input part only by it or by the gradients.
        generator: of the noise.

    Raises:
        Refused: fewer than two axes.
    """
    fan_in, _ = fans(tensor)
    w = scale * _identity(tensor.shape[0], fan_in).reshape(tensor.shape)
    if noise:
        w = w.to(generator.device if generator else "cpu") + noise * normal(tensor.shape, generator)
    return fill(tensor, w)


def idiz_(tensor: torch.Tensor, scale: float = 1e-6) -> torch.Tensor:
    """W = IDI_ε with −ε next to it: at [i, (i + 1) mod in] for out ≥ in; else IDI_{−ε} in columns ≥ out.

    For the last layer of a residual branch: features that repeat cancel, the output is at most of size ε, and
    every unit has a gradient. With one input there is nothing to subtract, and W = ε. Kernels as in
    :func:`idi_`.

    Source: Pan et al., IDInit (arXiv 2503.04626, section 3.2).

    Args:
        tensor: a weight [out, in, *kernel], of any floating dtype.
        scale: ε. Zero makes the branch exactly zero, at the price of no gradient before this layer.

    Raises:
        Refused: fewer than two axes.
    """
    columns, _ = fans(tensor)
    rows = tensor.shape[0]
    w = _identity(rows, columns)
    if columns > rows:
        w[:, rows:] -= _identity(rows, columns - rows)
    elif columns > 1:
        w -= _identity(rows, columns).roll(1, dims=1)
    return fill(tensor, scale * w.reshape(tensor.shape))
