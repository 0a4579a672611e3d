"""AdaB2N: batch norm for data that come task after task."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from regauge.errors import BadInput, Refused
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry, Law, Moved, generic
from regauge.nn.read import read_norm
from regauge.nn.statistics import hold, randomise, total, upcast


class _AdaB2N(Normalisation):
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    current: torch.Tensor
    loss: torch.Tensor | None
    _dims: tuple[int, ...]

    def __init__(
        self,
        size: int,
        tasks: int = 1,
        kappa: float = 1.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        absent_share: bool = False,
        synchronize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tasks < 1 or not 0 <= kappa <= 1 or not 0 < momentum < 1:
            raise BadInput(
                "these settings are out of range",
                expected="tasks from 1, kappa in [0, 1], momentum in (0, 1)",
                found=f"tasks={tasks}, kappa={kappa}, momentum={momentum}",
            )
        self.size, self.tasks, self.kappa, self.eps, self.momentum = size, tasks, kappa, eps, momentum
        self.absent_share, self.synchronize = absent_share, synchronize
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))
        self.task_weight = nn.Parameter(torch.zeros(tasks, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(size, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(size, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))
        self.register_buffer("current", torch.zeros((), device=device, dtype=torch.long))
        self.loss = None
        self._of: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The loss belongs to the graph of one step, and cannot be copied.
        return {**self.__dict__, "loss": None, "_of": None}

    def set_tasks(self, tasks: torch.Tensor | None) -> None:
        """The task of every sample of the next batch, [batch] of integers; it serves for one forward call.

        Raises:
            BadInput: a task beyond the present one.
        """
        if tasks is not None and int(tasks.max()) > int(self.current):
            raise BadInput(
                "a sample of a task that has not begun",
                expected=f"tasks 0 to {int(self.current)}",
                found=f"{int(tasks.max())}",
                way_out="call end_task() when a task ends",
            )
        self._of = tasks

    def end_task(self) -> None:
        """The next task begins.

        Raises:
            BadInput: it was the last.
        """
        if int(self.current) + 1 >= self.tasks:
            raise BadInput(
                "there is no further task", expected=f"{self.tasks} tasks", found=f"{self.tasks} ended"
            )
        self.current.add_(1)

    def rate(self) -> torch.Tensor:
        """η of the last step, []: 1/η = (1 + c + … + c^(k−2)) + c^(k−1) / m^κ, c = (1 − m)^κ, k steps."""
        k = self.num_batches_tracked.to(torch.promote_types(self.running_mean.dtype, torch.float32))
        decay = (1 - self.momentum) ** self.kappa
        if self.kappa == 0:
            return 1 / k
        power = decay ** (k - 1)
        return 1 / ((1 - power) / (1 - decay) + power / self.momentum**self.kappa)

    def _shares(self, x: torch.Tensor, tasks: torch.Tensor | None) -> torch.Tensor:
        """How much each sample counts, [batch]."""
        if tasks is None:
            ones = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
            return ones / self._all(ones.sum())
        own = functional.one_hot(tasks, self.tasks).to(x.dtype)
        counts = self._all(own.sum(0))
        seen = torch.arange(self.tasks, device=x.device) <= self.current
        posterior = torch.where(
            seen, torch.exp(self.task_weight.to(x.dtype)) + counts, torch.zeros_like(counts)
        )
        if not self.absent_share:
            posterior = torch.where(counts > 0, posterior, torch.zeros_like(posterior))
        return (own * (posterior / posterior.sum() / counts.clamp_min(1))).sum(1)

    def _all(self, x: torch.Tensor) -> torch.Tensor:
        return total(x) if self.synchronize else x

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y for x = ``input``."""
        if input.dim() not in self._dims:
            raise BadInput(
                "an input of another number of axes",
                expected=" or ".join(map(str, self._dims)),
                found=f"{tuple(input.shape)}",
            )
        x = upcast(input)
        x = x.reshape(*x.shape[:2], -1)  # [batch, c, positions]
        tasks, self._of = self._of, None
        if self.training:
            # Sums, as autocast would take the products of matrices in fewer bits.
            shares = self._shares(x, tasks)[:, None]
            mean = self._all((shares * x.mean(2)).sum(0))
            variance = self._all((shares * ((x - mean[:, None]) ** 2).mean(2)).sum(0))
            self._move(mean, variance)
        else:
            mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
            self.loss = None
        gain = self.weight / torch.sqrt(variance + self.eps)
        y = (x - mean[:, None]) * gain[:, None] + self.bias[:, None]
        return y.reshape(input.shape).to(input.dtype)

    def _move(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = self.rate().to(mean.dtype)
            for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
                running.copy_((1 - rate) * running + rate * batch)
        of_mean = functional.mse_loss(mean, hold(self.running_mean).to(mean.dtype))
        self.loss = of_mean + functional.mse_loss(variance, hold(self.running_var).to(mean.dtype))

    def fold(self) -> nn.Module:
        """An Affine along axis 1: g = γ / sqrt(σ² + eps), b = β − γ·μ / sqrt(σ² + eps).

        Raises:
            Refused: in training mode.
        """
        self._settled()
        gain = self.weight / torch.sqrt(self.running_var + self.eps)
        return Affine(gain, self.bias - gain * self.running_mean, 1).eval()

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """From a batch norm, with its parameters and statistics; the same in evaluation mode.

        In training mode the first output is the same too; the running statistics then move otherwise. The
        number of steps starts from 0, so with kappa below 1 the first step moves them far.

        Raises:
            Refused: another kind of norm, or another eps.
        """
        plain = read_norm(norm).need(("batch",), cls.__name__)
        assert plain.mean is not None
        assert plain.variance is not None
        if options.get("eps", plain.eps) != plain.eps:
            raise Refused(
                "another eps is another function", expected=f"eps={plain.eps}", found=f"eps={options['eps']}"
            )
        given: dict[str, Any] = {"eps": plain.eps}
        if plain.momentum is not None:
            given["momentum"] = plain.momentum
        like: dict[str, Any] = {"device": plain.like.device, "dtype": plain.like.dtype}
        layer = cls(plain.size, **{**given, **like, **options})
        with torch.no_grad():
            for own, value in (
                (layer.weight, plain.gain),
                (layer.bias, plain.shift),
                (layer.running_mean, plain.mean),
                (layer.running_var, plain.variance),
            ):
                if value is not None:
                    own.copy_(value)
        return layer.train(plain.training)

    def extra_repr(self) -> str:
        return (
            f"{self.size}, tasks={self.tasks}, kappa={self.kappa}, eps={self.eps}, momentum={self.momentum}"
        )


class AdaB2N2d(_AdaB2N):
    """y[:, c] = γ[c] · (x[:, c] − μ[c]) / sqrt(σ²[c] + eps) + β[c], batch statistics weighted by task.

    Training: with a[i] the weight of sample i, μ = Σ_i a[i] · mean of x[i] over space and σ² = Σ_i a[i] ·
        mean
    of (x[i] − μ)²; a = 1 / batch where no tasks are set. With tasks, a[i] = q[task of i] / samples of that
    task, q[t] ∝ exp(ψ[t]) + samples of t, over the tasks begun; gradients pass through μ, σ² and ψ. Running
    statistics r ← (1 − η)·r + η·batch, σ² biased, η as :meth:`rate` gives. Evaluation: the running ones.

    ``loss`` is then mean_c (μ − running μ)² + mean_c (σ² − running σ²)², to be added to that of the task with
    a factor; None in evaluation mode, and neither stored nor copied with the layer.

    Args:
        size: entries of c, axis 1 of x [batch, size, height, width].
        tasks: how many there will be.
        kappa: η is 1/k in step k at 0 and ``momentum`` at 1.
        eps: added to σ².
        momentum: m.
        absent_share: a task that has begun and is absent from the batch keeps its share q, so Σ a < 1, as in
            the authors' code; otherwise the present tasks have all.
        synchronize: take statistics over all processes where ``torch.distributed`` is running.

    Statistics are float32 at least; the output has the dtype of the input.

    Raises:
        BadInput: settings out of range, an input of another number of axes.

    Source: Lyu et al., Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and
    Adaptation (2023), section 4.
    """

    _dims = (4,)


class AdaB2N1d(_AdaB2N):
    """:class:`AdaB2N2d` for x [batch, size] or [batch, size, positions]."""

    _dims = (2, 3)


def set_tasks(model: nn.Module, tasks: torch.Tensor | None) -> None:
    """:meth:`set_tasks` of every AdaB2N in the model; call it before each forward call in training."""
    for module in model.modules():
        if isinstance(module, _AdaB2N):
            module.set_tasks(tasks)


def end_task(model: nn.Module) -> None:
    """:meth:`end_task` of every AdaB2N in the model."""
    for module in model.modules():
        if isinstance(module, _AdaB2N):
            module.end_task()


def _bare(size: int, random: torch.Generator) -> nn.Module:
    layer = AdaB2N2d(size, 3).to(torch.float64).eval()
    randomise(layer.running_mean, random, -1.0, 1.0)
    randomise(layer.running_var, random)
    return layer


def _make(size: int, random: torch.Generator) -> nn.Module:
    return generic(_bare(size, random), random)


def _shift(layer: nn.Module, x: torch.Tensor, random: torch.Generator) -> Moved:
    new = copy.deepcopy(layer)
    assert isinstance(new, AdaB2N2d)
    shift = torch.randn(new.size, generator=random, dtype=torch.float64)
    new.running_mean.add_(shift)
    return new, x + shift[:, None, None], lambda y: y


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "adab2n",
        "AdaB2N",
        "Lyu et al. 2023, section 4",
        _make,
        _bare,
        "images",
        (Law("x[:, c] → x[:, c] + a[c], μ → μ + a", _shift, True),),
    ),
)
