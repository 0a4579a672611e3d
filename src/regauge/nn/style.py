"""Norms whose gain and shift come from a second image: AdaIN, and the group-wise colouring of GDWCT."""

from __future__ import annotations

import copy

import torch
from torch import nn

from regauge.errors import BadInput, Refused
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.statistics import upcast


class AdaIN(Normalisation):
    """y[i, c] = sd(s[i, c]) · (x[i, c] − mean x[i, c]) / sqrt(var(x[i, c]) + eps) + mean s[i, c], over space.

    var is biased; sd, of the style s, is unbiased and without eps, as in the authors' code.

    Args:
        eps: added to the variance of the content x.

    Statistics are float32 at least; the output has the dtype of the content.

    Raises:
        BadInput: other numbers of samples or channels.

    Source: Huang and Belongie, Arbitrary Style Transfer in Real-Time with Adaptive Instance Normalization
    (2017), section 5.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """y for x = ``content`` and s = ``style``.

        Args:
            content: [batch, c, height, width].
            style: [batch, c, any, any], or [1, c, any, any] for the whole batch.
        """
        _same_channels(content, style)
        x, s = upcast(content), upcast(style)
        off = x - x.mean((2, 3), keepdim=True)
        gain = s.std((2, 3), keepdim=True) / torch.sqrt(off.square().mean((2, 3), keepdim=True) + self.eps)
        return (off * gain + s.mean((2, 3), keepdim=True)).to(content.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _same_channels(content: torch.Tensor, style: torch.Tensor) -> None:
    if content.shape[1] != style.shape[1] or style.shape[0] not in (1, content.shape[0]):
        raise BadInput(
            "the style does not fit the content",
            expected=f"{content.shape[0]} or 1 samples of {content.shape[1]} channels",
            found=f"{tuple(style.shape)}",
        )


def _perceptron(first: int, hidden: int, last: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, last)
    )


class GroupColouring(Normalisation):
    """y = a · (X·x_c + m(s)) + (1 − a) · x, X block-diagonal, one block n × n a group of n channels.

    x_c is x less its mean over batch and space. A_g = t(s_g), [n, n], from the style of the group; U_g is A_g
    with columns of length 1, D_g the lengths of those columns, X_g = U_g·D_g·U_gᵀ, symmetric with eigenvalues
    from 0. x is not whitened, and U not orthogonal; :meth:`penalties` ask for both. A column of zeros adds
    nothing. Evaluation is as training, and depends on the batch.

    Args:
        size: channels, axis 1 of x [batch, size, height, width].
        groups: of channels.
        hidden: width of the two networks t (n into n², shared by the groups) and m (size into size), of three
            linear maps with relu between.
        share: a at the start; :meth:`clamp` keeps it within [0, 1] and belongs before each step.
        colouring, mean: other networks in place of t and m.

    Statistics are float32 at least; the output has the dtype of the content.

    Raises:
        BadInput: groups that do not divide size, or a style of another size.

    Source: Cho et al., Image-to-Image Translation via Group-wise Deep Whitening-and-Coloring Transformation
    (2019), section 3, in the form of the authors' code.
    """

    def __init__(
        self,
        size: int,
        groups: int,
        hidden: int = 256,
        share: float = 0.6,
        colouring: nn.Module | None = None,
        mean: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or size % groups:
            raise BadInput("groups must divide size", expected=f"a divisor of {size}", found=f"{groups}")
        self.size, self.groups = size, groups
        n = size // groups
        self.colouring = colouring or _perceptron(n, hidden, n * n)
        self.mean = mean or _perceptron(size, hidden, size)
        self.share = nn.Parameter(torch.full((), share))
        self.to(device=device, dtype=dtype)

    def clamp(self) -> None:
        """a ← a within [0, 1], in place."""
        with torch.no_grad():
            self.share.clamp_(0, 1)

    def directions(self, style: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """U and the lengths D: [batch, groups, n, n] and [batch, groups, 1, n].

        Args:
            style: [batch, size] or [batch, size, 1, 1].
        """
        s = style.flatten(1)
        if s.shape[1] != self.size:
            raise BadInput("the style has another size", expected=f"{self.size}", found=f"{s.shape[1]}")
        grouped = s.unflatten(1, (self.groups, -1))
        n = self.size // self.groups
        a = upcast(self.colouring(grouped)).unflatten(2, (n, n))
        lengths = torch.linalg.vector_norm(a, dim=-2, keepdim=True)
        return a / lengths.clamp_min(torch.finfo(a.dtype).tiny), lengths

    def _centred(self, content: torch.Tensor) -> torch.Tensor:
        """x_c, [batch, groups, n, positions]."""
        x = upcast(content)
        x = x - x.mean((0, 2, 3), keepdim=True)
        return x.flatten(2).unflatten(1, (self.groups, -1))

    def forward(self, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
        """y for x = ``content`` [batch, size, height, width], s = ``style`` [batch, size] or [..., 1, 1]."""
        u, lengths = self.directions(style)
        coloured = u * lengths @ (u.mT @ self._centred(content))
        coloured = coloured.flatten(1, 2).reshape(content.shape)
        shift = upcast(self.mean(style.flatten(1)))[:, :, None, None]
        y = self.share * (coloured + shift) + (1 - self.share) * upcast(content)
        return y.to(content.dtype)

    def penalties(self, content: torch.Tensor, style: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mean |cov − I| and mean |U − I|, the losses for whitening and colouring, before their factors.

        cov = x_c·x_cᵀ / (batch · positions − 1) + 1e-5·I, one a group; the authors' factors are 1e-3 and 10.
        The second is on U, as in their code, and not on UᵀU.
        """
        x = self._centred(content).permute(1, 2, 0, 3).flatten(2)
        one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            covariance = x @ x.mT / (x.shape[2] - 1) + 1e-5 * one
        return (covariance - one).abs().mean(), (self.directions(style)[0] - one).abs().mean()

    def extra_repr(self) -> str:
        return f"{self.size}, groups={self.groups}"


class FixedStyle(Normalisation):
    """y = layer(x, style) for one style.

    Args:
        layer: :class:`AdaIN` or :class:`GroupColouring`.
        style: as the layer takes it; with a batch of 1 it serves batches of any size.
    """

    style: torch.Tensor

    def __init__(self, layer: AdaIN | GroupColouring, style: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("style", style.detach().clone())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layer(input, self.style)

    def fold(self) -> nn.Module:
        """``Sequential(InstanceNorm2d, Affine)`` for AdaIN with one style, g = sd(s), b = mean s.

        Raises:
            Refused: another layer, several styles, or training mode.
        """
        if not isinstance(self.layer, AdaIN) or self.style.shape[0] != 1:
            raise Refused(
                "this style does not collapse to a gain and a shift",
                expected="AdaIN with one style",
                found=f"{type(self.layer).__name__} with {self.style.shape[0]}",
            )
        self._settled()
        s = self.style[0]
        norm = nn.InstanceNorm2d(len(s), self.layer.eps)
        return nn.Sequential(norm, Affine(s.std((1, 2)), s.mean((1, 2)), 1)).eval()


def _adain(size: int, random: torch.Generator) -> nn.Module:
    style = torch.randn(1, size, 3, 4, generator=random, dtype=torch.float64)
    return FixedStyle(AdaIN(), style + 0.5).eval()


def _bare_adain(size: int, random: torch.Generator) -> nn.Module:
    """A style of mean 0 and standard deviation 1."""
    layer = _adain(size, random)
    assert isinstance(layer, FixedStyle)
    s = layer.style
    s.copy_((s - s.mean((2, 3), keepdim=True)) / s.std((2, 3), keepdim=True))
    return layer


def _gdwct(size: int, random: torch.Generator) -> nn.Module:
    layer = GroupColouring(size, 1 if size % 2 else 2, 8)
    for parameter in layer.parameters():
        parameter.data.zero_()  # the first values are drawn from the global generator
    generic(layer, random, 0.5)
    style = torch.randn(1, size, generator=random, dtype=torch.float64)
    return FixedStyle(layer, style).eval()


def _rescale(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    new, scale = copy.deepcopy(layer), 0.5 + float(torch.rand((), generator=random))
    assert isinstance(new, FixedStyle)
    assert isinstance(new.layer, AdaIN)
    new.layer.eps *= scale**2
    shift = torch.randn(x.shape[1], generator=random, dtype=torch.float64)
    return new, scale * x + shift[:, None, None], lambda y: y


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "adain",
        "AdaIN, one style",
        "Huang and Belongie 2017, section 5",
        _adain,
        _bare_adain,
        "images",
        (Law("x[:, c] → s·x[:, c] + a[c], eps → s²·eps", _rescale, True),),
    ),
    Entry("gdwct", "GDWCT, one style", "Cho et al. 2019, section 3", _gdwct, _gdwct, "images"),
)
