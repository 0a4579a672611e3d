"""Region Normalization: batch statistics of the inside and the outside of a mask, each by itself."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional

from regauge.errors import BadInput
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.statistics import randomise, upcast


def region_norm(x: torch.Tensor, region: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """z = region · (x − μ[c]) / sqrt(σ²[c] + eps · n / r), μ, σ² over the r positions of the region.

    Args:
        x: [batch, c, height, width]; n = batch · height · width.
        region: [batch, 1, height, width], 0 or 1, in the dtype of x; r is its sum. z = 0 where r = 0.
        eps: added to the variance of x with μ in place of what is outside, which is σ² · r / n.
    """
    n, r = region.numel(), region.sum().clamp_min(1)
    axes = (0, 2, 3)
    mean = (x * region).sum(axes, keepdim=True) / r
    off = (x - mean) * region
    return off / torch.sqrt((off * off).sum(axes, keepdim=True) / r + eps * n / r)


class RegionNormB(Normalisation):
    """y = z(M)·(1 + γ_f[c]) + M·β_f[c] + z(1 − M)·(1 + γ_b[c]) + (1 − M)·β_b[c], z by :func:`region_norm`.

    There are no running statistics: evaluation is as training, and depends on the batch. They are those of
    one process.

    Args:
        size: entries of c, axis 1 of x [batch, c, height, width].
        eps: of :func:`region_norm`.
        shift_everywhere: add β_f + β_b at all positions, as the authors' code does; a shift of the foreground
            then moves the background too.

    Statistics are float32 at least; the output has the dtype of the input.

    Raises:
        BadInput: a mask of other axes.

    Source: Yu et al., Region Normalization for Image Inpainting (2020), section 3.2, with the statistics of
        the
    authors' code, over the batch.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        shift_everywhere: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.shift_everywhere = size, eps, shift_everywhere
        for name in ("foreground_gain", "foreground_shift", "background_gain", "background_shift"):
            self.register_parameter(name, nn.Parameter(torch.zeros(size, device=device, dtype=dtype)))

    def forward(self, input: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """y for x = ``input``.

        Args:
            input: [batch, c, height, width].
            mask: [batch, 1, any, any], 1 for the foreground; resized to the nearest. None: all is foreground.
        """
        x = upcast(input)
        shape = (x.shape[0], 1, *x.shape[2:])
        if mask is None:
            region = torch.ones(shape, dtype=x.dtype, device=x.device)
        elif mask.dim() != 4 or mask.shape[:2] != shape[:2]:
            raise BadInput(
                "the mask does not fit the input",
                expected=f"[{x.shape[0]}, 1, height, width]",
                found=f"{tuple(mask.shape)}",
            )
        else:
            region = functional.interpolate(mask.to(x.dtype), x.shape[2:])
        y = torch.zeros_like(x)
        for side, part in (("foreground", region), ("background", 1 - region)):
            gain, shift = (self.get_parameter(f"{side}_{kind}")[:, None, None] for kind in ("gain", "shift"))
            y = y + region_norm(x, part, self.eps) * (1 + gain)
            y = y + (shift if self.shift_everywhere else part * shift)
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


class RegionNormL(Normalisation):
    """y = (z(M) + z(1 − M)) · (1 + G(a)) + B(a), M = [a ≥ threshold], a = sigmoid(A([mean_c x, max_c x])).

    A, G and B are convolutions: A of two channels into one, without a bias; G and B of one into one. a is
    [batch, 1, height, width]; no gradient passes through M. Statistics are as in :class:`RegionNormB`.

    Args:
        size: entries of c, axis 1 of x [batch, c, height, width].
        threshold: of M.
        kernel: length of the kernels, odd.
        eps: of :func:`region_norm`.

    Statistics are float32 at least; the output has the dtype of the input.

    Raises:
        BadInput: an even kernel.

    Source: as of :class:`RegionNormB`, section 3.3.
    """

    def __init__(
        self,
        size: int,
        threshold: float = 0.8,
        kernel: int = 7,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise BadInput("the kernel has a middle", expected="an odd length", found=f"{kernel}")
        self.size, self.threshold, self.eps = size, threshold, eps
        half = kernel // 2
        self.attention = nn.Conv2d(2, 1, kernel, padding=half, bias=False, device=device, dtype=dtype)
        self.gain = nn.Conv2d(1, 1, kernel, padding=half, device=device, dtype=dtype)
        self.shift = nn.Conv2d(1, 1, kernel, padding=half, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y for x = ``input``, [batch, c, height, width]."""
        x = upcast(input)
        seen = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        attention = torch.sigmoid(self._convolve(self.attention, seen))
        region = (attention.detach() >= self.threshold).to(x.dtype)
        z = region_norm(x, region, self.eps) + region_norm(x, 1 - region, self.eps)
        y = z * (1 + self._convolve(self.gain, attention)) + self._convolve(self.shift, attention)
        return y.to(input.dtype)

    @staticmethod
    def _convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        # In the dtype of the weights: autocast may change it, and what follows is again in that of x.
        return conv(x.to(conv.weight.dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, threshold={self.threshold}, eps={self.eps}"


def _make_b(size: int, random: torch.Generator) -> nn.Module:
    return generic(RegionNormB(size), random)


def _bare_b(size: int, random: torch.Generator) -> nn.Module:
    return RegionNormB(size).to(torch.float64).eval()


def _bare_l(size: int, random: torch.Generator) -> nn.Module:
    layer = RegionNormL(size, 0.5, 3).to(torch.float64).eval()
    for parameter in layer.parameters():
        randomise(parameter, random, -0.5, 0.5)
    with torch.no_grad():
        for conv in (layer.gain, layer.shift):
            conv.weight.zero_()
            assert conv.bias is not None
            conv.bias.zero_()
    return layer


def _make_l(size: int, random: torch.Generator) -> nn.Module:
    return generic(_bare_l(size, random), random)


def _shift(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    shift = torch.randn(x.shape[1], generator=random, dtype=torch.float64)
    return copy.deepcopy(layer), x + shift[:, None, None], lambda y: y


_SOURCE = "Yu et al. 2020, section 3"
ENTRIES: tuple[Entry, ...] = (
    Entry(
        "region-b",
        "Region Normalization, basic",
        _SOURCE,
        _make_b,
        _bare_b,
        "images",
        (Law("x[:, c] → x[:, c] + a[c]", _shift, True),),
    ),
    Entry("region-l", "Region Normalization, learned", _SOURCE, _make_l, _bare_l, "images"),
)
