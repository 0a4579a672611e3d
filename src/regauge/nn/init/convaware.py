"""Convolution-aware initialisation: the kernels of one filter are orthogonal to each other."""

from __future__ import annotations

import math
from typing import Literal

import torch

from regauge.errors import BadInput, Refused
from regauge.nn.init.weights import fans, fill, normal, orthonormal

_NOISE = 0.05


def conv_aware_(
    tensor: torch.Tensor,
    *,
    spectrum: Literal["complex", "real"] = "complex",
    noise: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """W[o, i, :] of W [out, in, *kernel] form, for each o, an orthogonal set over i; mean W² = 2/fan_in.

    The discrete Fourier transform is unitary: kernels whose complex spectra (with the symmetry of a real
    signal) are orthonormal are orthonormal kernels, and are drawn as such. Where there are more input
    channels than taps, every ∏ kernel of them form one set. Kernels of one tap are normal, and weights
    without a kernel are orthogonal, each with the same mean square.

    Source: Aghajanyan, Convolution Aware Initialization (arXiv 1702.06295, section 2). The published code
    draws real half-spectra: ``spectrum="real"``. These give point-symmetric kernels, W[o, i, x] = W[o, i, −x
    mod kernel], of rank 5 only for 3×3, and not orthogonal in space; the noise is what makes them span all
    taps.

    Args:
        tensor: a weight [out, in, *kernel], of any floating dtype.
        spectrum: ``complex``, or ``real`` as published, then with the variance, not the mean square,
        2/fan_in. noise: standard deviation of a normal added before the scaling: 0 for ``complex``, 0.05 for
            ``real`` if not given. The sets are orthogonal only without it.
        generator: of the draws.

    Raises:
        Refused: fewer than two axes.
        BadInput: another spectrum.
    """
    fan_in, _ = fans(tensor)
    if tensor.dim() == 2 and spectrum == "complex" and not noise:
        return fill(
            tensor, _scaled(orthonormal(tensor.shape[0], tensor.shape[1], generator), fan_in, centred=False)
        )
    filters = _filters(tuple(tensor.shape), spectrum, noise, generator)
    return fill(tensor, _scaled(filters, fan_in, centred=spectrum == "real"))


def conv_aware_keras(
    shape: tuple[int, ...],
    *,
    swapped: bool = True,
    noise: float = _NOISE,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """W of the published code in Keras's layout [*kernel, in, out], from real half-spectra, in float64.

    As published, a kernel of two axes comes back as [*kernel, out, in], which is wrong unless in = out.

    Args:
        shape: (*kernel, in, out), of a kernel of one to three axes.
        swapped: the published order of axes for two kernel axes; False for [*kernel, in, out].
        noise: its ``eps_std``.
        generator: of the draws.

    Raises:
        Refused: no kernel axis.
    """
    *kernel, inputs, outputs = shape
    if not kernel:
        raise Refused("there is no kernel", expected="(*kernel, in, out)", found=str(shape))
    filters = _filters((outputs, inputs, *kernel), "real", noise, generator)
    filters = _scaled(filters, inputs * math.prod(kernel), centred=True)
    axes = tuple(range(2, filters.dim()))
    return filters.permute(*axes, *((0, 1) if swapped and len(kernel) == 2 else (1, 0))).contiguous()


def _filters(
    shape: tuple[int, ...], spectrum: str, noise: float | None, generator: torch.Generator | None
) -> torch.Tensor:
    """[out, in, *kernel] before the global scale."""
    if spectrum not in ("complex", "real"):
        raise BadInput("there is no such spectrum", expected="complex or real", found=repr(spectrum))
    outputs, inputs, *kernel = shape
    real = spectrum == "real"
    noise = (_NOISE if real else 0.0) if noise is None else noise
    taps = math.prod(kernel)
    if taps == 1:
        return normal(shape, generator)
    half = (*kernel[:-1], kernel[-1] // 2 + 1)
    size = math.prod(half) if real else taps
    filters = torch.stack([_rows(inputs, size, generator) for _ in range(outputs)])
    if real:
        axes = tuple(range(2, len(shape)))
        spectra = filters.reshape(outputs, inputs, *half)
        filters = torch.fft.irfftn(spectra.to(torch.complex128), s=tuple(kernel), dim=axes)
    filters = filters.reshape(shape)
    return filters + noise * normal(shape, generator) if noise else filters


def _rows(count: int, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """[count, size]: rows of as many orthogonal matrices as needed."""
    bases = [orthonormal(size, size, generator) for _ in range(-(-count // size))]
    return torch.cat(bases)[:count]


def _scaled(filters: torch.Tensor, fan_in: int, *, centred: bool) -> torch.Tensor:
    """filters · s with mean square, or variance, 2/fan_in."""
    square = filters.var(correction=0) if centred else filters.square().mean()
    return filters * (2 / fan_in / square).sqrt()
