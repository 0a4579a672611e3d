"""Large weights that are read, cast and multiplied a block of rows at a time.

A weight is cut along its stored axis 0, or along another one if only that way a part of it can be computed
alone. Where that axis is the output of a product, blocks are independent; where it is summed over, blocks
are added up, which is done in float64 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch

from regauge.errors import BadInput

BLOCK = 1 << 20
"""Elements of a weight that are cast at once: 8 MiB in float64."""


@runtime_checkable
class Weights(Protocol):
    """Weights that can be asked for by rows."""

    def __call__(self, name: str) -> torch.Tensor: ...

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Rows ``index`` (int64, 1-D) of axis 0: shape ``(len(index), *rest)``."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """Weights that are computed when asked for, and that cannot be computed in parts along every axis."""

    def cuts(self, name: str) -> tuple[int, ...]:
        """Axes along which a part costs no more than its share."""
        ...

    def read_rows(self, name: str, start: int, stop: int, axis: int = 0) -> torch.Tensor:
        """Entries ``start:stop`` along an axis."""
        ...


@dataclass(frozen=True)
class LazyWeight:
    """A parameter that has not been read yet, with its axes possibly permuted.

    Attributes:
        name: canonical state-dict name.
        stored: shape as stored.
        source: where it comes from.
        dtype: dtype in which it is computed with.
        axes: stored axis at each position.
    """

    name: str
    stored: tuple[int, ...]
    source: Callable[[str], torch.Tensor]
    dtype: torch.dtype
    axes: tuple[int, ...] | None = None
    _held: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    @property
    def numel(self) -> int:
        return math.prod(self.stored)

    @property
    def order(self) -> tuple[int, ...]:
        return self.axes if self.axes is not None else tuple(range(len(self.stored)))

    def permuted(self, order: tuple[int, ...]) -> LazyWeight:
        return replace(self, axes=tuple(self.order[axis] for axis in order))

    def whole(self) -> torch.Tensor:
        """The whole weight, axes permuted, in its dtype."""
        return self._raw().to(self.dtype).permute(self.order)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of stored axis 0, in stored axis order."""
        if isinstance(self.source, Weights):
            found = self.source.rows(self.name, index)
            self._check((len(index), *self.stored[1:]), found)
        else:
            found = self._raw()[index]
        return found.to(self.dtype)

    def slices(self, size: int, axis: int = 0) -> list[tuple[int, int]]:
        """Bounds of blocks of about ``size`` elements along a stored axis."""
        length = self.stored[axis]
        step = max(1, size // max(1, self.numel // max(1, length)))
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def axis(self) -> int:
        """The stored axis to cut along: 0, or another one if a part of 0 would cost as much as the whole."""
        cuts = self.source.cuts(self.name) if isinstance(self.source, Divisible) else (0,)
        return cuts[0] if cuts else 0

    def cut(self, start: int, stop: int, axis: int = 0) -> torch.Tensor:
        if isinstance(self.source, Divisible):
            if axis in self.source.cuts(self.name):
                return self.source.read_rows(self.name, start, stop, axis).to(self.dtype)
        elif axis == 0 and isinstance(self.source, Weights):
            return self.rows(torch.arange(start, stop))
        return self._raw().narrow(axis, start, stop - start).to(self.dtype)

    def _raw(self) -> torch.Tensor:
        if not self._held:
            found = self.source(self.name)
            self._check(self.stored, found)
            self._held.append(found.detach())
        return self._held[0]

    def _check(self, expected: tuple[int, ...], found: torch.Tensor) -> None:
        if tuple(found.shape) != expected:
            raise BadInput(
                "a weight has another shape than was traced",
                parameter=self.name,
                expected=str(expected),
                found=str(tuple(found.shape)),
            )


def apply_lazily(name: str, args: Any, kwargs: Any, block: int, *, exact: bool) -> tuple[bool, Any]:
    """Apply an operation without reading a weight as a whole, where that is possible.

    Args:
        name: the operation.
        args, kwargs: its arguments, some of them ``LazyWeight``.
        block: elements to cast at once.
        exact: whether float64 is computed in, so that sums may be split.

    Returns:
        (True, result), or (False, None) if the weights must be read whole.
    """
    rule = _RULES.get(name)
    if rule is None:
        return False, None
    result = rule(args, kwargs, block, exact)
    return result is not None, result


def _view(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    return args[0]


def _cast(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    # In float64 every floating cast is the identity; otherwise it changes values.
    return args[0] if exact and isinstance(args[0], LazyWeight) and _to_float(args, kwargs) else None


def _to_float(args: Any, kwargs: Any) -> bool:
    dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
    return all(dtype.is_floating_point for dtype in dtypes)


def _transpose(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    weight: LazyWeight = args[0]
    order = list(range(len(weight.stored)))
    i, j = (args[1], args[2]) if len(args) == 3 else (0, 1)
    order[i], order[j] = order[j], order[i]
    return weight.permuted(tuple(order))


def _permute(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    weight: LazyWeight = args[0]
    return weight.permuted(tuple(axis % len(weight.stored) for axis in args[1]))


def _embedding(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    weight, index = args[0], args[1]
    if weight.order != tuple(range(len(weight.stored))):
        return None
    distinct, position = torch.unique(index, return_inverse=True)
    return weight.rows(distinct)[position]


def _linear(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    if isinstance(x, LazyWeight) or isinstance(bias, LazyWeight):
        return None
    product = _product(x, _transpose((weight,), {}, block, exact), block, exact)
    return product if product is None or bias is None else product + bias


def _mm(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    return None if isinstance(args[0], LazyWeight) else _product(args[0], args[1], block, exact)


def _addmm(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    if kwargs or isinstance(args[0], LazyWeight) or isinstance(args[1], LazyWeight):
        return None
    product = _product(args[1], args[2], block, exact)
    return None if product is None else product + args[0]


def _product(x: torch.Tensor, weight: LazyWeight, block: int, exact: bool) -> torch.Tensor | None:
    """``x @ weight`` for a weight (in, out) of two axes."""
    if len(weight.stored) != 2:
        return None
    axis = weight.axis()
    inner, outer = weight.order
    if axis == outer:
        out = torch.empty(
            (*x.shape[:-1], weight.stored[axis]), dtype=torch.promote_types(x.dtype, weight.dtype)
        )
        for start, stop in weight.slices(block, axis):
            out[..., start:stop] = torch.matmul(x, weight.cut(start, stop, axis).permute(inner, outer))
        return out
    if not exact:
        return None
    total = torch.zeros((*x.shape[:-1], weight.stored[outer]), dtype=x.dtype)
    for start, stop in weight.slices(block, axis):
        total += torch.matmul(x[..., start:stop], weight.cut(start, stop, axis).permute(inner, outer))
    return total


def grouped(
    x: torch.Tensor, ends: torch.Tensor, width: int, weight: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """Rows of ``x`` from ``ends[g - 1]`` to ``ends[g]`` times ``weight(g)``; rows after the last are zero."""
    out, start = x.new_zeros((x.shape[0], width)), 0
    for group, stop in enumerate(ends.tolist()):
        if stop > start:
            out[start:stop] = x[start:stop] @ weight(group)
            start = stop
    return out


def _grouped(args: Any, kwargs: Any, block: int, exact: bool) -> Any:
    if kwargs or len(args) != 3 or isinstance(args[0], LazyWeight):
        return None
    x, weight, ends = args
    if len(weight.stored) != 3 or weight.order[0] != 0:
        return None
    inner = tuple(axis - 1 for axis in weight.order[1:])
    width = weight.stored[weight.order[2]]
    return grouped(x, ends, width, lambda group: weight.cut(group, group + 1)[0].permute(inner))


_RULES: dict[str, Callable[[Any, Any, int, bool], Any]] = {
    "aten.alias.default": _view,
    "aten.detach.default": _view,
    "aten.contiguous.default": _view,
    "aten.to.dtype": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.to.device": _cast,
    "aten._to_copy.default": _cast,
    "aten.t.default": _transpose,
    "aten.transpose.int": _transpose,
    "aten.permute.default": _permute,
    "aten.embedding.default": _embedding,
    "aten.linear.default": _linear,
    "aten.mm.default": _mm,
    "aten.matmul.default": _mm,
    "aten.addmm.default": _addmm,
    "transformers.grouped_mm_fallback.default": _grouped,
    "aten._grouped_mm.default": _grouped,
}
