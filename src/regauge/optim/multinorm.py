"""Steps along the gradient normalised in several norms in turn: SinkGD, SWAN. No state for matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regauge.api import given_inputs
from regauge.errors import BadInput
from regauge.optim.base import Group, GroupedOptimizer, check, norm_dtype
from regauge.optim.invariant import trainable
from regauge.optim.moments import adam_direction, adam_directions, moved
from regauge.optim.uses import Use, Uses
from regauge.trace import trace


def rows(x: Tensor) -> Tensor:
    """x[i, :] ← sqrt(n) · x[i, :] / ‖x[i, :]‖ for x [m, n]: entries of every row have mean square one. Rows
    of zeros stay zero."""
    return _spread(x, 1)


def columns(x: Tensor) -> Tensor:
    """x[:, j] ← sqrt(m) · x[:, j] / ‖x[:, j]‖ for x [m, n]; columns of zeros stay zero."""
    return _spread(x, 0)


def _spread(x: Tensor, axis: int) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return x * torch.where(length > 0, x.shape[axis] ** 0.5 / length, 0.0)


def whiten(x: Tensor, steps: int = 30) -> Tensor:
    """(x xᵀ)^{-1/2} x, or x (xᵀ x)^{-1/2} for more rows than columns, by Newton–Schulz.

    y ← 1.5 y − 0.5 y yᵀ y starts at y = x / ‖x‖, whose singular values lie in (0, 1]; each step brings them
    nearer to one, and leaves those that are zero. The 30 steps do for singular values above 1e-4 ‖x‖.
    """
    tall = x.shape[0] > x.shape[1]
    y = x.mT if tall else x
    length = torch.linalg.vector_norm(y)
    y = y * torch.where(length > 0, 1 / length, 0.0)
    for _ in range(steps):
        y = 1.5 * y - 0.5 * (y @ y.mT) @ y
    return y.mT if tall else y


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {"rows": rows, "columns": columns, "whiten": whiten}
"""Projections by name; each maps a matrix to one of norm one, in its norm."""


def normalised(x: Tensor, projections: Sequence[str], iterations: int) -> Tensor:
    """The projections in turn, so many times; in float32 at least. Positive factors of x do not matter,
    however small."""
    y = x.to(norm_dtype(x))
    largest = y.abs().amax()
    y = y * torch.where(largest > 0, 1 / largest, 0.0)
    for _ in range(iterations):
        for name in projections:
            y = PROJECTIONS[name](y)
    return y.to(x.dtype)


class MultiNorm(GroupedOptimizer):
    """W ← W (1 − lr · wd) − lr · X, where X is the gradient after projections onto unit spheres in turn.

    Args:
        params: matrices, named or not, or groups. A group with ``adam=True`` may hold tensors of any shape
            and takes the step of AdamW with ``betas`` and ``eps``: see :func:`with_adam`.
        lr, weight_decay: as in the formula.
        projections: names of :data:`PROJECTIONS`, in order.
        iterations: how many times all of them.
        betas, eps, adam: for groups that take the step of AdamW.
        maximize, foreach: see :class:`regauge.optim.base.GroupedOptimizer`.

    Raises:
        BadInput: a number out of range, an unknown projection, a tensor that is no matrix; in ``step`` a
            sparse gradient.

    Source: Scetbon et al., Gradient Multi-Normalization for Stateless and Scalable LLM Training,
    arXiv 2502.06742.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        projections: Sequence[str] = ("rows", "columns"),
        iterations: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        infinite = float("inf")
        check(lr=(lr, 0, infinite), weight_decay=(weight_decay, 0, infinite), eps=(eps, 0, infinite))
        check(iterations=(iterations, 1, infinite), beta1=(betas[0], 0, 1), beta2=(betas[1], 0, 1))
        defaults = {
            "lr": lr,
            "projections": tuple(projections),
            "iterations": iterations,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "adam": False,
            "nesterov": False,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in group["projections"]:
            if name not in PROJECTIONS:
                raise BadInput("unknown projection", expected=", ".join(PROJECTIONS), found=str(name))
        for param in group["params"]:
            if param.dim() != 2 and not group["adam"]:
                raise BadInput(
                    "normalisation by rows and columns is for matrices",
                    expected="two axes",
                    found=f"shape {tuple(param.shape)}",
                    way_out="a group with adam=True for the rest: regauge.optim.with_adam(model, inputs)",
                )

    def _direction(self, group: Group, param: Tensor, grad: Tensor) -> tuple[Tensor, float]:
        if group["adam"]:
            return adam_direction(group, self.state, param, grad)
        return normalised(grad, group["projections"], group["iterations"]), float(group["lr"])

    def _single(self, group: Group, param: Tensor, grad: Tensor) -> None:
        direction, size = self._direction(group, param, grad)
        if group["weight_decay"] > 0:
            param.mul_(1 - float(group["lr"]) * group["weight_decay"])
        param.add_(direction.mul_(-size))

    def _together(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        if group["adam"]:
            directions, sizes = adam_directions(group, self.state, params, grads)
        else:
            directions = [normalised(g, group["projections"], group["iterations"]) for g in grads]
            sizes = [float(group["lr"])] * len(params)
        kept = 1 - float(group["lr"]) * group["weight_decay"]
        moved(params, directions, sizes, [kept] * len(params) if group["weight_decay"] > 0 else None)


class SinkGD(MultiNorm):
    """W ← W (1 − lr · wd) − lr · X, X = L times: rows to length sqrt(n), columns to length sqrt(m).

    X has length sqrt(m n) over all entries. Its columns are normalised exactly, its rows up to what is left
    after L iterations. As L grows, X does not change when rows and columns of the gradient are multiplied by
    positive numbers.

    Args: as :class:`MultiNorm`.

    Source: Scetbon et al., arXiv 2502.06742 (SinkGD); 5 iterations.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, iterations: int = 5, **options: Any) -> None:
        super().__init__(params, lr, projections=("rows", "columns"), iterations=iterations, **options)


class SWAN(MultiNorm):
    """W ← W (1 − lr · wd) − lr · (Y Yᵀ)^{-1/2} Y, where Y is the gradient with rows of mean square one.

    Where a matrix has more rows than columns it is Y (Yᵀ Y)^{-1/2}, the same matrix of unit singular values.

    Args: as :class:`MultiNorm`.

    Source: Ma et al., SWAN: SGD with Normalization and Whitening, arXiv 2412.13148.
    """

    def __init__(self, params: Iterable[Any], lr: float, **options: Any) -> None:
        super().__init__(params, lr, projections=("rows", "whiten"), iterations=1, **options)


def with_adam(model: nn.Module, inputs: Any, *, lr: float, adam_lr: float) -> list[dict[str, Any]]:
    """Two groups: matrices of linear maps, for the projections; all else with the step of AdamW.

    A matrix of a linear map is a parameter with two axes that is only ever contracted with, is not looked up
    and does not give the logits; derived from the trace. For embeddings most rows of a gradient are zero.

    Args:
        model, inputs: as in :func:`regauge.optim.scale_invariant`.
        lr, adam_lr: of the two groups.

    Raises:
        TraceError: the model cannot be exported. BadInput: no inputs.
    """
    args, kwargs = given_inputs(inputs)
    uses = Uses(trace(model, args, kwargs))
    matrices = {
        name
        for name in trainable(model)
        if len(uses.trace.shapes[name]) == 2
        and {used.use for used in uses.of(name)} == {Use.MATRIX}
        and not uses.embedding(name)
    }
    held = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    made = [
        {"params": [item for item in held if item[0] in matrices], "lr": lr},
        {"params": [item for item in held if item[0] not in matrices], "lr": adam_lr, "adam": True},
    ]
    return [group for group in made if group["params"]]
