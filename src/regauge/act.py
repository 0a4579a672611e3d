"""How a group element changes one block of one parameter.

The block of an ``Action`` is the product of one ``Part`` per axis. It is viewed as [copies…, acting, rest…],
reshaped to [K, n, m], changed column by column, and written back; the rest of the parameter keeps its bits.
The element of copy indices ``(i, j, …)`` is the one numbered row-major, in the order of ``Generator.copies``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regauge.atlas import Action, Generator, Kind
from regauge.blocks import block_error, check_element, check_floating, view_block
from regauge.elements import Diagonal, Element, Matrix, Product, is_subgroup
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
    check_element(action, element, copies)
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    return act_in_place(out, action, element, copies, tuple(tensor.shape if shape is None else shape))


def act_in_place(
    out: torch.Tensor, action: Action, element: Element, copies: tuple[str, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """``act`` on a contiguous tensor that may be overwritten."""
    block = view_block(out, action, (*copies, action.acting), shape)
    if not needs_arithmetic(action, element):
        y = element.apply(block.reshape(element.count, element.n, -1), action.exponent)
    else:
        check_floating(out, action)
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
    block = view_block(whole, action, held, tuple(tensor.shape))
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
            raise block_error(action, "an action is listed twice", "each action exactly once", generator.id)
        seen.add(key)
        if action.parameter not in result:
            raise block_error(
                action, "the state dict lacks a parameter", action.parameter, f"{len(state)} others"
            )
        tensor = result[action.parameter].to(torch.float64)
        result[action.parameter] = act(tensor, action, element, copies)
    return result


def needs_arithmetic(action: Action, element: Element) -> bool:
    """A permutation commutes with the constant of a chart; a sign does not."""
    return not element.moves_only or (action.chart != 0 and element.kind is not Kind.PERMUTATION)
