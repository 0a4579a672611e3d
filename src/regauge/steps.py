"""Steps of a plan: what is done to the block of one parameter, and which axes it may be cut along."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regauge.act import act, act_in_place, needs_arithmetic
from regauge.atlas import Action
from regauge.blocks import bound_axes, check_element, check_floating, view_block
from regauge.elements import Element, Permutation
from regauge.errors import RegaugeError


@dataclass(frozen=True, eq=False)
class ActStep:
    """Apply ``element`` to the block of ``action``; see ``act``.

    Attributes:
        action, element, copies: as for ``act``.
        shape: shape of the whole parameter. Without it, no axis is known to be covered completely, so the
            step asks for the whole tensor.
    """

    action: Action
    element: Element
    copies: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_element(self.action, self.element, self.copies)

    @property
    def axes(self) -> frozenset[int]:
        """Axes with the acting factor, a copy, or a part that is not the whole axis."""
        return bound_axes(self.action, (*self.copies, self.action.acting), self.shape)

    @property
    def arithmetic(self) -> bool:
        return needs_arithmetic(self.action, self.element)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return act(tensor, self.action, self.element, self.copies, shape=self.shape)

    def apply_(self, tensor: torch.Tensor) -> torch.Tensor:
        """``apply`` on a contiguous tensor that may be overwritten."""
        return act_in_place(tensor, self.action, self.element, self.copies, self.shape or tuple(tensor.shape))

    def order(self, shape: tuple[int, ...]) -> tuple[int, torch.Tensor] | None:
        """(axis, index) if the step only reorders one axis, alike everywhere along the others."""
        if not isinstance(self.element, Permutation) or (self.shape or shape) != shape or not shape:
            return None
        axis, part = self.action.axis, self.action.parts[self.action.axis]
        parts = enumerate(zip(self.action.parts, shape, strict=True))
        alone = all(other.size == size for i, (other, size) in parts if i != axis)
        if not alone or any(all(factor.name != name for factor in part.factors) for name in self.copies):
            return None
        action = Action(self.action.parameter, (part,), 0, self.action.acting, self.action.exponent)
        return axis, act(torch.arange(shape[axis]), action, self.element, self.copies)


@dataclass(frozen=True)
class FillStep:
    """Set the block of ``action`` to ``value - chart``: a gain becomes ``value`` whatever it was."""

    action: Action
    value: float
    shape: tuple[int, ...] | None = None

    @property
    def axes(self) -> frozenset[int]:
        return bound_axes(self.action, (), self.shape)

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.detach().clone(memory_format=torch.contiguous_format)
        view_block(out, self.action, (), self.shape or tuple(tensor.shape)).fill_(
            self.value - self.action.chart
        )
        return out


@dataclass(frozen=True)
class CenterStep:
    """Subtract the mean along the acting factor of ``action``: ``(I - 1 1ᵀ / n)`` on its block."""

    action: Action
    shape: tuple[int, ...] | None = None

    @property
    def axes(self) -> frozenset[int]:
        return bound_axes(self.action, (self.action.acting,), self.shape)

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        check_floating(tensor, self.action)
        out = tensor.detach().clone(memory_format=torch.contiguous_format)
        block = view_block(out, self.action, (self.action.acting,), self.shape or tuple(tensor.shape))
        x = block.to(torch.float64) + self.action.chart
        block.copy_(x - x.mean(dim=0, keepdim=True) - self.action.chart)
        return out


@dataclass(frozen=True, eq=False)
class AddStep:
    """Add ``delta``: float64, one dimension per axis, of size 1 along axes where it is the same."""

    delta: torch.Tensor

    @property
    def axes(self) -> frozenset[int]:
        return frozenset(axis for axis, size in enumerate(self.delta.shape) if size != 1)

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        _check_fit(tensor, self.delta, "summand")
        return (tensor.detach().to(torch.float64) + self.delta).to(tensor.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class ScaleStep:
    """Multiply by ``factor``: float64, one dimension per axis, of size 1 along axes where it is the same."""

    factor: torch.Tensor

    @property
    def axes(self) -> frozenset[int]:
        return frozenset(axis for axis, size in enumerate(self.factor.shape) if size != 1)

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        _check_fit(tensor, self.factor, "factor")
        return (tensor.detach().to(torch.float64) * self.factor).to(tensor.dtype).contiguous()


def _check_fit(tensor: torch.Tensor, other: torch.Tensor, what: str) -> None:
    sizes = zip(other.shape, tensor.shape, strict=False)
    if tensor.dim() != other.dim() or any(size not in (1, full) for size, full in sizes):
        raise RegaugeError(
            f"the {what} does not fit", expected=str(tuple(other.shape)), found=str(tuple(tensor.shape))
        )


@dataclass(frozen=True, eq=False)
class AffineStep:
    """y[…, i, …] = scale[i] · x[…, i, …] + shift[i] along one axis; float64 vectors as long as the axis."""

    axis: int
    scale: torch.Tensor
    shift: torch.Tensor | None = None

    @property
    def axes(self) -> frozenset[int]:
        return frozenset({self.axis})

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[self.axis] != len(self.scale):
            raise RegaugeError(
                "the affine map does not fit",
                expected=f"{len(self.scale)} entries along axis {self.axis}",
                found=str(tuple(tensor.shape)),
            )
        along = [1] * tensor.dim()
        along[self.axis] = -1
        result = tensor.detach().to(torch.float64) * self.scale.reshape(along)
        if self.shift is not None:
            result = result + self.shift.reshape(along)
        return result.to(tensor.dtype).contiguous()
