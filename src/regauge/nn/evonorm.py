"""EvoNorm B0 and S0: normalisation and activation in one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from regauge.errors import Refused
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.statistics import position_mean, randomise, upcast, variance


def _column(values: torch.Tensor) -> torch.Tensor:
    """[c] beside x [batch, c, height, width]."""
    return values[:, None, None]


class _EvoNorm(Normalisation):
    v: nn.Parameter | None

    def __init__(
        self,
        size: int,
        eps: float,
        nonlinearity: bool,
        zero_gain: bool,
        unbiased: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.nonlinearity, self.unbiased = size, eps, nonlinearity, unbiased
        gain = 0.0 if zero_gain else 1.0
        self.weight = nn.Parameter(torch.full((size,), gain, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.ones(size, device=device, dtype=dtype)) if nonlinearity else None

    def _affine(self, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (_column(self.weight) * z + _column(self.bias)).to(dtype)

    def fold(self) -> nn.Module:
        """An Affine along axis 1 with ``nonlinearity=False``, which leaves γ·x + β.

        Raises:
            Refused: otherwise, as it is not affine in x; or in training mode.
        """
        if self.nonlinearity:
            raise Refused(
                f"a {type(self).__name__} does not collapse to a simpler layer",
                expected="nonlinearity=False",
                found="an activation within, and statistics of every input",
            )
        self._settled()
        return Affine(self.weight, self.bias, 1).eval()

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, nonlinearity={self.nonlinearity}"


class EvoNormB0(_EvoNorm):
    """y = γ[c] · x / max(sqrt(s[c] + eps), v[c] · x + sqrt(i[n, c] + eps)) + β[c], x [n, c, height, width].

    i is the variance over space; s that over the batch and space in training, of all processes where
    ``torch.distributed`` is running, and ``moving_variance`` in evaluation, which moves by s.

    Args:
        size: entries of c.
        eps: added to the variances.
        decay: moving_variance ← decay · moving_variance + (1 − decay) · s.
        nonlinearity: False leaves y = γ·x + β.
        zero_gain: γ = 0 at the start, for the last norm of a block.
        unbiased: i divides by n − 1, as in the PyTorch version in wide use; by n, as in the authors',
            otherwise.
        synchronize: take s over all processes.

    Variances are biased otherwise, and float32 at least; the output has the dtype of the input.

    Source: Liu et al., Evolving Normalization-Activation Layers (2020), table 2.
    """

    moving_variance: torch.Tensor

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        decay: float = 0.9,
        *,
        nonlinearity: bool = True,
        zero_gain: bool = False,
        unbiased: bool = False,
        synchronize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, eps, nonlinearity, zero_gain, unbiased, device, dtype)
        self.decay, self.synchronize = decay, synchronize
        if nonlinearity:
            self.register_buffer("moving_variance", torch.ones(size, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y for x = ``input``, [n, c, height, width]."""
        x = upcast(input)
        if self.v is None:
            return self._affine(x, input.dtype)
        if self.training:
            rows, local = x.movedim(1, -1), not self.synchronize
            mean = position_mean(rows, local=local)[0]
            batch = position_mean((rows - mean) ** 2, local=local)[0]
            with torch.no_grad():
                self.moving_variance.copy_(self.decay * self.moving_variance + (1 - self.decay) * batch)
        else:
            batch = self.moving_variance.to(x.dtype)
        own = variance(x, (2, 3), unbiased=self.unbiased)
        denominator = torch.maximum(
            _column(torch.sqrt(batch + self.eps)), _column(self.v) * x + torch.sqrt(own + self.eps)
        )
        return self._affine(x / denominator, input.dtype)


class EvoNormS0(_EvoNorm):
    """y = γ[c] · x · sigmoid(v[c] · x) / sqrt(s[n, group of c] + eps) + β[c], x [n, c, height, width].

    s is the variance over the channels of a group and over space; training and evaluation are the same.

    Args:
        size: entries of c.
        groups: lowered by 1 until it divides size.
        eps: added to the variance.
        nonlinearity: False leaves y = γ·x + β.
        zero_gain: γ = 0 at the start.
        unbiased: s divides by the number of entries less 1, as in the PyTorch version in wide use; by their
            number, as in the authors', otherwise.

    Variances are float32 at least; the output has the dtype of the input.

    Source: as of :class:`EvoNormB0`.
    """

    def __init__(
        self,
        size: int,
        groups: int = 32,
        eps: float = 1e-5,
        *,
        nonlinearity: bool = True,
        zero_gain: bool = False,
        unbiased: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, eps, nonlinearity, zero_gain, unbiased, device, dtype)
        self.groups = next(number for number in range(min(groups, size), 0, -1) if size % number == 0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y for x = ``input``, [n, c, height, width]."""
        x = upcast(input)
        if self.v is None:
            return self._affine(x, input.dtype)
        grouped = (x * torch.sigmoid(_column(self.v) * x)).unflatten(1, (self.groups, -1))
        s = variance(x.unflatten(1, (self.groups, -1)), (2, 3, 4), unbiased=self.unbiased)
        return self._affine((grouped / torch.sqrt(s + self.eps)).flatten(1, 2), input.dtype)


def _bare_b0(size: int, random: torch.Generator) -> nn.Module:
    layer = EvoNormB0(size).to(torch.float64).eval()
    assert layer.v is not None
    randomise(layer.v.data, random)
    randomise(layer.moving_variance, random)
    return layer


def _bare_s0(size: int, random: torch.Generator) -> nn.Module:
    layer = EvoNormS0(size, 2).to(torch.float64).eval()
    assert layer.v is not None
    randomise(layer.v.data, random)
    return layer


def _scale(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    new, scale = copy.deepcopy(layer), 0.5 + float(torch.rand((), generator=random))
    assert isinstance(new, EvoNormB0 | EvoNormS0)
    assert new.v is not None
    new.eps *= scale**2
    with torch.no_grad():
        if isinstance(new, EvoNormB0):
            new.moving_variance.mul_(scale**2)
        else:
            new.v.div_(scale)
    return new, scale * x, lambda y: y


_SOURCE = "Liu et al. 2020, table 2"
ENTRIES: tuple[Entry, ...] = (
    Entry(
        "evonorm-b0",
        "EvoNorm B0",
        _SOURCE,
        lambda size, random: generic(_bare_b0(size, random), random, 0.1),
        _bare_b0,
        "images",
        (Law("x → s·x, moving variance → s²·moving variance, eps → s²·eps", _scale, True),),
    ),
    Entry(
        "evonorm-s0",
        "EvoNorm S0",
        _SOURCE,
        lambda size, random: generic(_bare_s0(size, random), random, 0.1),
        _bare_s0,
        "images",
        (Law("x → s·x, v → v / s, eps → s²·eps", _scale, True),),
    ),
)
