"""How a group element changes one block of one parameter, as a function and as steps of a plan.

The block of an ``Action`` is the product of one ``Part`` per axis. It is viewed as [copies…, acting, rest…],
reshaped to [K, n, m], changed column by column, and written back; the rest of the parameter keeps its bits.
The element of copy indices ``(i, j, …)`` is the one numbered row-major, in the order of ``Generator.copies``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from regauge.atlas import Action, Generator, Kind, Part
from regauge.elements import Diagonal, Element, Matrix, Permutation, Product, is_subgroup
from regauge.errors import RegaugeError

_CHUNK = 1 << 17
"""Entries that an element without a matrix is applied to at once: 1 MiB, which stays in the cache."""

_CHUNK_COLUMNS = 1 << 10
"""Columns that a dense element is applied to at once."""


def act(
    tensor: torch.Tensor,
    action: Action,
    element: Element,
    copies: Sequence[str] = (),
    *,
    shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Apply an element to one block of a parameter.

    Args:
        tensor: the parameter, or a cut of it along axes that the action leaves free (see ``ActStep.axes``).
        action: the block, the acting factor, exponent and chart.
        element: K elements on a space of size n, the size of the acting factor.
        copies: names of the factors that number the K elements, in the order of ``Generator.copies``.
        shape: shape of the whole parameter; default that of ``tensor``.

    Returns:
        A new contiguous tensor of the same shape and dtype. Computed in float64 and cast once, unless the
        element only moves entries or flips signs, which needs no arithmetic.

    Raises:
        RegaugeError: the block does not lie in the parameter, meets a position twice, or does not hold the
            acting factor and every copy exactly once; or the element has another K or n.
    """
    copies = tuple(copies)
    _check_element(action, element, copies)
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    return _act(out, action, element, copies, tuple(tensor.shape if shape is None else shape))


def _act(
    out: torch.Tensor, action: Action, element: Element, copies: tuple[str, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """``act`` on a contiguous tensor that may be overwritten."""
    block = _block(out, action, (*copies, action.acting), shape)
    if not _arithmetic(action, element):
        y = element.apply(block.reshape(element.count, element.n, -1), action.exponent)
    else:
        _check_floating(out, action)
        if isinstance(element, Diagonal) and out.dtype is torch.float64:
            return _scale(out, block, action, element, len(copies))
        if element.count * element.n * _CHUNK_COLUMNS < block.numel():
            return _in_chunks(out, block, action, element, len(copies))
        y = _moved(block, action, element)
    if out.dtype == y.dtype and block.is_contiguous() and block.numel() == out.numel():
        return y.reshape(out.shape).contiguous()
    block.copy_(y.reshape(block.shape))
    return out


def _moved(block: torch.Tensor, action: Action, element: Element) -> torch.Tensor:
    x = block.reshape(element.count, element.n, -1).to(torch.float64)
    y = element.apply(x + action.chart if action.chart else x, action.exponent)
    return y - action.chart if action.chart else y


def _in_chunks(
    out: torch.Tensor, block: torch.Tensor, action: Action, element: Element, copies: int
) -> torch.Tensor:
    """The same, some columns at a time: they fit the cache, and nothing of the block's size is made."""
    rest = block.shape[copies + 1 :]
    longest = max(range(len(rest)), key=lambda dim: rest[dim])
    dim = copies + 1 + longest
    wanted = _CHUNK_COLUMNS if _dense(element) else max(1, _CHUNK // (element.count * element.n))
    columns = block.numel() // (element.count * element.n)
    for part in block.split(max(1, wanted * rest[longest] // columns), dim):
        part.copy_(_moved(part, action, element).reshape(part.shape))
    return out


def _dense(element: Element) -> bool:
    """Whether every column costs a product with a matrix, which is read anew for every chunk."""
    return isinstance(element, Matrix) or (isinstance(element, Product) and any(map(_dense, element.parts)))


def _scale(
    out: torch.Tensor, block: torch.Tensor, action: Action, element: Diagonal, copies: int
) -> torch.Tensor:
    """A diagonal in place: the same operations on every entry as ``Diagonal.apply``."""
    divide = action.exponent == -1
    vector = element.vector if action.exponent in (1, -1) else element.power(action.exponent).vector
    vector = vector.reshape(*block.shape[: copies + 1], *(1 for _ in block.shape[copies + 1 :]))
    if action.chart:
        block.add_(action.chart)
    block.div_(vector) if divide else block.mul_(vector)
    if action.chart:
        block.sub_(action.chart)
    return out


def read_block(tensor: torch.Tensor, action: Action, copies: Sequence[str] = ()) -> torch.Tensor:
    """The block of an action as float64 [K, n, m], chart added: copy, acting index, everything else."""
    held = (*copies, action.acting)
    whole = tensor.detach().contiguous()
    block = _block(whole, action, held, tuple(tensor.shape))
    count = 1
    for size in block.shape[: len(copies)]:
        count *= size
    return block.reshape(count, block.shape[len(copies)], -1).to(torch.float64) + action.chart


def apply_generator(
    state: Mapping[str, torch.Tensor], generator: Generator, element: Element
) -> dict[str, torch.Tensor]:
    """Apply an element of a generator to a whole state dict, every action once.

    Args:
        state: canonical parameter name -> tensor; left as it is.
        generator: any generator but a translation or a null direction.
        element: an element of its kind or of a subgroup, with ``generator.count`` copies of its size.

    Returns:
        All entries of ``state``: new float64 tensors for the parameters acted on, the others as they were.

    Raises:
        RegaugeError: the element does not fit, an action is listed twice, a parameter is missing, or an
            action is refused by ``act``.
    """
    if generator.kind in (Kind.TRANSLATION, Kind.NULL) or not is_subgroup(element.kind, generator.kind):
        raise RegaugeError(
            f"the element does not act on generator {generator.id}",
            space=generator.space,
            expected=f"a linear group that contains {element.kind}",
            found=str(generator.kind),
        )
    copies = tuple(name for name, _ in generator.copies)
    result = dict(state)
    seen: set[tuple[object, ...]] = set()
    for action in generator.actions:
        key = (action.parameter, action.parts, action.axis, action.acting)
        if key in seen:
            raise _error(action, "an action is listed twice", "each action exactly once", generator.id)
        seen.add(key)
        if action.parameter not in result:
            raise _error(action, "the state dict lacks a parameter", action.parameter, f"{len(state)} others")
        tensor = result[action.parameter].to(torch.float64)
        result[action.parameter] = act(tensor, action, element, copies)
    return result


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
        _check_element(self.action, self.element, self.copies)

    @property
    def axes(self) -> frozenset[int]:
        """Axes with the acting factor, a copy, or a part that is not the whole axis."""
        return _bound_axes(self.action, (*self.copies, self.action.acting), self.shape)

    @property
    def arithmetic(self) -> bool:
        return _arithmetic(self.action, self.element)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return act(tensor, self.action, self.element, self.copies, shape=self.shape)

    def apply_(self, tensor: torch.Tensor) -> torch.Tensor:
        """``apply`` on a contiguous tensor that may be overwritten."""
        return _act(tensor, self.action, self.element, self.copies, self.shape or tuple(tensor.shape))

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
        return _bound_axes(self.action, (), self.shape)

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.detach().clone(memory_format=torch.contiguous_format)
        _block(out, self.action, (), self.shape or tuple(tensor.shape)).fill_(self.value - self.action.chart)
        return out


@dataclass(frozen=True)
class CenterStep:
    """Subtract the mean along the acting factor of ``action``: ``(I - 1 1ᵀ / n)`` on its block."""

    action: Action
    shape: tuple[int, ...] | None = None

    @property
    def axes(self) -> frozenset[int]:
        return _bound_axes(self.action, (self.action.acting,), self.shape)

    @property
    def arithmetic(self) -> bool:
        return True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        _check_floating(tensor, self.action)
        out = tensor.detach().clone(memory_format=torch.contiguous_format)
        block = _block(out, self.action, (self.action.acting,), self.shape or tuple(tensor.shape))
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
        if tensor.dim() != self.delta.dim() or any(
            size not in (1, full) for size, full in zip(self.delta.shape, tensor.shape, strict=True)
        ):
            raise RegaugeError(
                "the summand does not fit",
                expected=str(tuple(self.delta.shape)),
                found=str(tuple(tensor.shape)),
            )
        return (tensor.detach().to(torch.float64) + self.delta).to(tensor.dtype).contiguous()


def _arithmetic(action: Action, element: Element) -> bool:
    """A permutation commutes with the constant of a chart; a sign does not."""
    return not element.moves_only or (action.chart != 0 and element.kind is not Kind.PERMUTATION)


def _check_floating(tensor: torch.Tensor, action: Action) -> None:
    if not tensor.is_floating_point():
        raise _error(action, "arithmetic on a tensor that is not real", "a floating dtype", str(tensor.dtype))


def _check_element(action: Action, element: Element, copies: tuple[str, ...]) -> None:
    names = [[factor.name for factor in part.factors] for part in action.parts]
    if not action.parts:  # A scalar: its one entry is the acting factor, and there is nothing else.
        names = [[action.acting]]
    if action.through is not None:
        raise _error(action, "a shift through a linear map is no group action", "no 'through'", "one")
    if not 0 <= action.axis < len(names) or names[action.axis].count(action.acting) != 1:
        found = "; ".join(" × ".join(part) or "1" for part in names)
        raise _error(action, "acting factor", f"{action.acting} once on axis {action.axis}", found)
    everywhere = [name for part in names for name in part]
    for name in copies:
        if everywhere.count(name) != 1 or copies.count(name) != 1 or name == action.acting:
            raise _error(action, "a copy must occur exactly once", name, " × ".join(everywhere))
    sizes = {factor.name: factor.size for part in action.parts for factor in part.factors}
    held = action.parts[action.axis].factors if action.parts else ()
    acting = next((f.size for f in held if f.name == action.acting), 1)
    count = 1
    for name in copies:
        count *= sizes[name]
    if (element.count, element.n) != (count, acting):
        found = f"K = {element.count}, n = {element.n}"
        raise _error(action, "the element has another shape", f"K = {count}, n = {acting}", found)


def _bound_axes(action: Action, held: tuple[str, ...], shape: tuple[int, ...] | None) -> frozenset[int]:
    """Axes that must not be cut; ``held``: factors that are acted on or select the element."""
    if shape is None:
        return frozenset(range(len(action.parts)))
    return frozenset(
        axis
        for axis, (part, size) in enumerate(zip(action.parts, shape, strict=True))
        if (held and axis == action.axis)
        or any(factor.name in held[:-1] for factor in part.factors)
        or part.size != size
    )


def _block(
    tensor: torch.Tensor, action: Action, held: tuple[str, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """The block as a view [held…, rest…] of a contiguous tensor, which may be cut along free axes.

    The last of ``held`` is the acting factor, looked for on the axis of the action only.
    """
    if not tensor.dim() == len(shape) == len(action.parts):
        expected = f"{len(action.parts)} axes"
        raise _error(action, "one part per axis", expected, f"{tuple(tensor.shape)} of {shape}")
    if not action.parts:
        return tensor.view(1)
    for axis, part in enumerate(action.parts):
        _check_part(action, axis, part, shape[axis])
    bound = _bound_axes(action, held, shape)
    sizes: list[int] = []
    strides: list[int] = []
    front = [-1] * len(held)
    offset = 0
    for axis, part in enumerate(action.parts):
        step = tensor.stride(axis)
        if axis not in bound:
            sizes.append(tensor.shape[axis])
            strides.append(step)
            continue
        if tensor.shape[axis] != shape[axis]:
            raise _error(action, f"cut along axis {axis}", str(shape), str(tuple(tensor.shape)))
        offset += part.offset * step
        for factor in part.factors:
            if factor.name in held and (factor.name != held[-1] or axis == action.axis):
                front[held.index(factor.name)] = len(sizes)
            sizes.append(factor.size)
            strides.append(factor.stride * step)
    view = torch.as_strided(tensor, sizes, strides, tensor.storage_offset() + offset)
    return view.permute(*front, *(dim for dim in range(len(sizes)) if dim not in front))


def _check_part(action: Action, axis: int, part: Part, size: int) -> None:
    """The positions of a part lie on the axis, and no two of its index combinations meet."""
    reach = 0
    nested = all(factor.size > 0 for factor in part.factors)
    for factor in sorted(part.factors, key=lambda factor: factor.stride):
        if factor.size > 1:
            nested = nested and factor.stride > reach
            reach += (factor.size - 1) * factor.stride
    if not nested or part.offset < 0 or part.offset + reach >= size:
        factors = " × ".join(f"{f.name}[{f.size}]·{f.stride}" for f in part.factors)
        expected = f"distinct positions below {size} on axis {axis}, factors nested by stride"
        raise _error(action, "the part does not lie on the axis", expected, f"{part.offset} + {factors}")


def _error(action: Action, message: str, expected: str, found: str) -> RegaugeError:
    return RegaugeError(message, parameter=action.parameter, expected=expected, found=found)
