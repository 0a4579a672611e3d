"""The block of an action: the positions of a parameter it acts on, as a view."""

from __future__ import annotations

import torch

from regauge.atlas import Action, Part
from regauge.elements import Element
from regauge.errors import RegaugeError


def check_floating(tensor: torch.Tensor, action: Action) -> None:
    if not tensor.is_floating_point():
        raise block_error(
            action, "arithmetic on a tensor that is not real", "a floating dtype", str(tensor.dtype)
        )


def check_element(action: Action, element: Element, copies: tuple[str, ...]) -> None:
    names = [[factor.name for factor in part.factors] for part in action.parts]
    if not action.parts:  # A scalar: its one entry is the acting factor, and there is nothing else.
        names = [[action.acting]]
    if action.through is not None:
        raise block_error(action, "a shift through a linear map is no group action", "no 'through'", "one")
    if not 0 <= action.axis < len(names) or names[action.axis].count(action.acting) != 1:
        found = "; ".join(" × ".join(part) or "1" for part in names)
        raise block_error(action, "acting factor", f"{action.acting} once on axis {action.axis}", found)
    everywhere = [name for part in names for name in part]
    for name in copies:
        if everywhere.count(name) != 1 or copies.count(name) != 1 or name == action.acting:
            raise block_error(action, "a copy must occur exactly once", name, " × ".join(everywhere))
    sizes = {factor.name: factor.size for part in action.parts for factor in part.factors}
    held = action.parts[action.axis].factors if action.parts else ()
    acting = next((f.size for f in held if f.name == action.acting), 1)
    count = 1
    for name in copies:
        count *= sizes[name]
    if (element.count, element.n) != (count, acting):
        found = f"K = {element.count}, n = {element.n}"
        raise block_error(action, "the element has another shape", f"K = {count}, n = {acting}", found)


def bound_axes(action: Action, held: tuple[str, ...], shape: tuple[int, ...] | None) -> frozenset[int]:
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


def view_block(
    tensor: torch.Tensor, action: Action, held: tuple[str, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """The block as a view [held…, rest…] of a contiguous tensor, which may be cut along free axes.

    The last of ``held`` is the acting factor, looked for on the axis of the action only.
    """
    if not tensor.dim() == len(shape) == len(action.parts):
        expected = f"{len(action.parts)} axes"
        raise block_error(action, "one part per axis", expected, f"{tuple(tensor.shape)} of {shape}")
    if not action.parts:
        return tensor.view(1)
    for axis, part in enumerate(action.parts):
        _check_part(action, axis, part, shape[axis])
    bound = bound_axes(action, held, shape)
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
            raise block_error(action, f"cut along axis {axis}", str(shape), str(tuple(tensor.shape)))
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
        raise block_error(action, "the part does not lie on the axis", expected, f"{part.offset} + {factors}")


def block_error(action: Action, message: str, expected: str, found: str) -> RegaugeError:
    return RegaugeError(message, parameter=action.parameter, expected=expected, found=found)
