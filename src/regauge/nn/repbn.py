"""RepBN, and PRepBN: a LayerNorm or RMSNorm that becomes one step by step."""

from __future__ import annotations

import copy
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from regauge.errors import BadInput, Refused
from regauge.nn.absorb import Convolution, merge_into_previous
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.read import read_norm
from regauge.nn.statistics import hold, kept, position_mean, randomise, upcast


class RepBN(Normalisation):
    """y[..., c] = γ[c] · (x[..., c] − μ[c]) / sqrt(σ²[c] + eps) + β[c] + α · x[..., c].

    Training: μ, σ² are the mean and variance (biased) over all positions that are not padding, of all
        processes
    where ``torch.distributed`` is running; running ones move by the mean and the unbiased variance.
    Evaluation: the running ones.

    Args:
        size: entries of c, the last axis of x. A batch is x [..., size], such as [batch, positions, size].
        eps: added to σ².
        momentum: of the running statistics.
        zero_gain: α = γ = 0 at the start, so that y = 0; 1 otherwise.
        pass_padding: at padding, y = x + α·x, as in the authors' language model; normalised like the rest
            otherwise.
        synchronize: take statistics over all processes.

    Statistics are float32 at least; the output has the dtype of the input.

    Raises:
        BadInput: a padding mask has another shape than x without c.

    Source: Guo et al., SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
    Re-parameterized Batch Normalization (2024), section 3.2.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        zero_gain: bool = False,
        pass_padding: bool = False,
        synchronize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.momentum = size, eps, momentum
        self.pass_padding, self.synchronize = pass_padding, synchronize
        gain = 0.0 if zero_gain else 1.0
        self.alpha = nn.Parameter(torch.full((1,), gain, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.full((size,), gain, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(size, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def forward(
        self,
        input: torch.Tensor,
        pad_mask: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y for x = ``input``.

        Args:
            input: [..., size].
            pad_mask: the shape of x without c, true at padding.
            counted: [], whether the running statistics move by this batch; None for yes.
        """
        x = upcast(input)
        keep = kept(x, pad_mask)
        if self.training:
            local = not self.synchronize
            mean, count = position_mean(x, keep, local=local)
            variance = position_mean((x - mean) ** 2, keep, local=local)[0]
            with torch.no_grad():
                self._move(mean, variance * count / (count - 1).clamp_min(1), counted)
        else:
            mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        z = (x - mean) * (self.weight / torch.sqrt(variance + self.eps)) + self.bias
        if self.pass_padding and keep is not None:
            z = torch.where(keep.to(torch.bool), z, x)
        return (z + self.alpha * x).to(input.dtype)

    def _move(self, mean: torch.Tensor, variance: torch.Tensor, counted: torch.Tensor | None) -> None:
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            moved = (1 - self.momentum) * running + self.momentum * batch
            running.copy_(moved if counted is None else torch.where(counted, moved, running.to(moved.dtype)))
        self.num_batches_tracked.add_(1 if counted is None else counted)

    def fold(self) -> nn.Module:
        """An Affine along the last axis: g = γ / sqrt(σ² + eps) + α, b = β − γ·μ / sqrt(σ² + eps).

        Raises:
            Refused: in training mode.
        """
        self._settled()
        scale = self.weight / torch.sqrt(self.running_var + self.eps)
        return Affine(scale + self.alpha, self.bias - scale * self.running_mean).eval()

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, momentum={self.momentum}"


class PRepBN(Normalisation):
    """y = λ · norm1(x) + (1 − λ) · norm2(x), norm1 a LayerNorm or RMSNorm, norm2 a RepBN, λ falling to 0.

    λ = 1 for ``warm`` steps, in which norm2 keeps its statistics, then λ = start · left / steps (float32),
    left counting down from ``steps`` to 0, one a step. Both are counted in every ``every``-th call in
    training.

    In evaluation the layer is norm2 alone, at any time, as in the authors' code: before the end of the
    schedule that is another function than the one that is trained. ``evaluate="now"`` mixes by the present λ
    there too.

    Args:
        size: entries of c, the last axis of x.
        first: norm1, ``layer`` or ``rms``.
        first_eps: eps of norm1.
        warm, steps, start: of the schedule.
        every: calls a step; with gradients accumulated over k batches, k.
        evaluate: ``end`` or ``now``.
        others: of :class:`RepBN`.

    The authors' language models use first="rms", zero_gain=True, pass_padding=True, every=16, warm=10000,
    steps=18000.

    Raises:
        BadInput: another kind of norm, or a schedule without steps.

    Source: as of :class:`RepBN`, section 3.2.
    """

    warm: torch.Tensor
    left: torch.Tensor
    calls: torch.Tensor

    def __init__(
        self,
        size: int,
        first: Literal["layer", "rms"] = "layer",
        first_eps: float = 1e-6,
        warm: int = 0,
        steps: int = 300000,
        start: float = 1.0,
        every: int = 1,
        evaluate: Literal["end", "now"] = "end",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if first not in ("layer", "rms") or evaluate not in ("end", "now"):
            raise BadInput(
                "no such kind",
                expected="first: layer or rms; evaluate: end or now",
                found=f"{first}, {evaluate}",
            )
        if min(steps, every) < 1 or warm < 0:
            raise BadInput(
                "a schedule has steps",
                expected="steps and every from 1, warm from 0",
                found=f"steps={steps}, every={every}, warm={warm}",
            )
        self.first, self.steps, self.start, self.every, self.evaluate = first, steps, start, every, evaluate
        form = nn.LayerNorm if first == "layer" else nn.RMSNorm
        self.norm1 = form(size, first_eps, device=device, dtype=dtype)
        self.norm2 = RepBN(size, device=device, dtype=dtype, **others)
        for name, value in (("warm", warm), ("left", steps), ("calls", 0)):
            self.register_buffer(name, torch.full((), value, device=device, dtype=torch.long))

    def share(self) -> torch.Tensor:
        """λ of the next step, [], float32."""
        falling = self.start * self.left.to(torch.float32) / self.steps
        return torch.where(self.warm > 0, torch.ones_like(falling), falling)

    def forward(self, input: torch.Tensor, pad_mask: torch.Tensor | None = None) -> torch.Tensor:
        """y for x = ``input``; ``pad_mask``, the shape of x without c, is true at padding."""
        if not self.training and self.evaluate == "end":
            return self.norm2(input, pad_mask)
        x = upcast(input)
        share = hold(self.share())
        old, new = self._norm1(x), self.norm2(x, pad_mask, self.warm == 0)
        if self.training:
            self._advance()
        return (share.to(x.dtype) * old + (1 - share).to(x.dtype) * new).to(input.dtype)

    def _norm1(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.norm1.weight.to(x.dtype)
        if isinstance(self.norm1, nn.RMSNorm):
            return functional.rms_norm(x, weight.shape, weight, self.norm1.eps)
        return functional.layer_norm(x, weight.shape, weight, self.norm1.bias.to(x.dtype), self.norm1.eps)

    def _advance(self) -> None:
        step = self.calls == 0
        warming = self.warm > 0
        self.warm.sub_((step & warming).long())
        self.left.sub_((step & ~warming).long()).clamp_min_(0)
        self.calls.add_(1).remainder_(self.every)

    def fold(self) -> nn.Module:
        """What norm2 folds to, an Affine along the last axis.

        Raises:
            Refused: in training mode, or before the end of the schedule.
        """
        self._settled()
        if float(self.share()) > 0:
            raise Refused(
                "a PRepBN in the middle of its schedule is not folded",
                expected="λ = 0, where only the batch norm is left",
                found=f"λ = {float(self.share()):.6g}, {int(self.warm)} + {int(self.left)} steps left",
                way_out="train it to the end of the schedule",
            )
        return self.norm2.fold()

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a LayerNorm or RMSNorm, as norm1: the same while λ = 1, so in the first step of training.

        In evaluation it is the same with ``evaluate="now"`` only.

        Raises:
            Refused: another kind of norm, λ below 1 at the start, or evaluation mode without
                ``evaluate="now"``.
        """
        plain = read_norm(norm).need(("layer", "rms"), cls.__name__)
        if not plain.training and options.get("evaluate", "end") != "now":
            raise Refused(
                f"in evaluation mode a {cls.__name__} is its batch norm alone",
                expected='training mode, or evaluate="now"',
                found="evaluation mode",
                way_out="call train() before it",
            )
        given = {"first": plain.form, "first_eps": plain.eps}
        options = given | options
        layer = cls(plain.size, device=plain.like.device, dtype=plain.like.dtype, **options)
        share = float(layer.share())
        if any(options[name] != given[name] for name in given) or share != 1:
            raise Refused(
                f"this {cls.__name__} does not start as the norm given",
                expected=f"first={plain.form}, first_eps={plain.eps}, λ = 1",
                found=f"first={options['first']}, first_eps={options['first_eps']}, λ = {share}",
            )
        with torch.no_grad():
            if plain.gain is not None:
                layer.norm1.weight.copy_(plain.gain)
            if plain.shift is not None:
                layer.norm1.get_parameter("bias").copy_(plain.shift)
        return layer.train(plain.training)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, start={self.start}, every={self.every}, evaluate={self.evaluate}"


def merge_patch_embedding(conv: Convolution, norm: RepBN, *, published: bool = False) -> Convolution:
    """The convolution that is ``norm`` behind ``conv`` with its channels moved to the last axis.

    Args:
        conv: x [batch, c, height, width], or nn.Linear.
        norm: in evaluation mode.
        published: multiply the bias of ``conv`` by γ / sqrt(σ² + eps), without α, as the authors' code does.
            The result then differs by α · bias.

    Raises:
        Refused: see :func:`regauge.nn.absorb.merge_into_previous`.
    """
    affine = norm.fold()
    assert isinstance(affine, Affine)
    merged = merge_into_previous(conv, affine, channels_last=True)
    if published and conv.bias is not None:
        assert merged.bias is not None
        with torch.no_grad():
            merged.bias.sub_(norm.alpha * conv.bias)
    return merged


def _bare(size: int, random: torch.Generator) -> nn.Module:
    layer = RepBN(size).to(torch.float64).eval()
    randomise(layer.running_mean, random, -1.0, 1.0)
    randomise(layer.running_var, random)
    return layer


def _make(size: int, random: torch.Generator) -> nn.Module:
    return generic(_bare(size, random), random)


def _ended(norm2: nn.Module) -> nn.Module:
    assert isinstance(norm2, RepBN)
    layer = PRepBN(norm2.size, steps=10).to(torch.float64).eval()
    layer.norm2 = norm2
    layer.left.zero_()
    return layer


def _shift(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    new = copy.deepcopy(layer)
    norm = new.norm2 if isinstance(new, PRepBN) else new
    assert isinstance(norm, RepBN)
    shift = torch.randn(norm.size, generator=random, dtype=torch.float64)
    with torch.no_grad():
        norm.running_mean.add_(shift)
        norm.bias.sub_(norm.alpha * shift)
    return new, x + shift, lambda y: y


_SHIFT = "x → x + a, μ → μ + a, β → β − α·a"
ENTRIES: tuple[Entry, ...] = (
    Entry("repbn", "RepBN", "Guo et al. 2024, section 3.2", _make, _bare, laws=(Law(_SHIFT, _shift, True),)),
    Entry(
        "prepbn",
        "PRepBN",
        "Guo et al. 2024, section 3.2",
        lambda size, random: _ended(_make(size, random)),
        lambda size, random: _ended(_bare(size, random)),
        laws=(Law(_SHIFT, _shift),),
    ),
)
