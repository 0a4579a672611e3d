"""Translations and null directions as changes of tensors: what is added to which block.

These generators have no group element; theirs is a *shift*. For a translation it is a tensor ``t``
with one axis for each copy, in order, and the acting factor last. An action of exponent ``e`` adds
``e · t``, repeated along every factor that ``t`` lacks, or ``e · Σ W t`` if it goes through a linear map.
For a null direction see :func:`random_shift`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from regauge.atlas import Action, Generator, Kind, Part
from regauge.errors import RegaugeError

Weights = Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor]


def random_shift(
    state: Mapping[str, torch.Tensor], generator: Generator, draw: torch.Generator
) -> dict[str, torch.Tensor]:
    """A random element of a translation or of a null direction, applied to a state dict.

    For a null direction every action gets its own random summand: constant along the acting factor
    (exponent 1) or arbitrary (exponent 0).

    Returns:
        All entries of ``state``: new float64 tensors for the parameters changed, the others as they were.
    """
    if generator.kind is Kind.TRANSLATION:
        t = torch.randn(shift_shape(generator), generator=draw, dtype=torch.float64)
        deltas = apply_shift(state, generator, t)
    else:
        deltas = _null_deltas(state, generator, draw)
    result = dict(state)
    for name, delta in deltas.items():
        result[name] = state[name].to(torch.float64) + delta
    return result


def shift_shape(generator: Generator) -> tuple[int, ...]:
    """Shape of the shift of a translation: the copies' sizes, then the size of the acting factor."""
    return (*(size for _, size in generator.copies), generator.size)


def apply_shift(weights: Weights, generator: Generator, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a translation by ``t`` adds to every parameter it touches.

    Args:
        weights: the state dict, or a function from canonical parameter name to tensor; asked for the
            linear maps that the shift goes through and for the shapes of the targets.
        generator: a translation.
        t: shape ``shift_shape(generator)``, any floating dtype.

    Returns:
        Parameter name -> float64 tensor of the parameter's shape, zero outside the blocks acted on.

    Raises:
        RegaugeError: not a translation, another shape, or blocks that do not fit the tensors.
    """
    if generator.kind is not Kind.TRANSLATION:
        raise _error(generator, "this is no translation", str(Kind.TRANSLATION), str(generator.kind))
    if tuple(t.shape) != shift_shape(generator):
        expected = str(shift_shape(generator))
        raise _error(generator, "the shift has another shape", expected, str(tuple(t.shape)))
    read = weights if callable(weights) else weights.__getitem__
    names = (*(name for name, _ in generator.copies), generator.acting)
    shift = t.detach().to(torch.float64)
    deltas: dict[str, torch.Tensor] = {}
    for action in generator.actions:
        target = read(action.parameter)
        if action.parameter not in deltas:
            deltas[action.parameter] = torch.zeros(target.shape, dtype=torch.float64)
        summand, labels = shift, names
        if action.through is not None:
            summand, labels = _through(read(action.through.parameter), action, shift, names)
        _add(deltas[action.parameter], action, float(action.exponent) * summand, labels)
    return deltas


def source_shift(tensor: torch.Tensor, generator: Generator, value: float = 0.0) -> torch.Tensor:
    """The shift that sets every entry of the source (the first action's block) to ``value``.

    Returns:
        float64 tensor of shape ``shift_shape(generator)``: ``value - block``.
    """
    action = generator.actions[0]
    names = (*(name for name, _ in generator.copies), generator.acting)
    block, labels = _view(tensor.detach().to(torch.float64).contiguous(), action.parameter, action.parts)
    if sorted(labels) != sorted(names):
        expected, found = " × ".join(names), " × ".join(labels)
        raise _error(generator, "the source is not indexed by the shift", expected, found)
    return value - block.permute([labels.index(name) for name in names]).clone()


def _null_deltas(
    state: Mapping[str, torch.Tensor], generator: Generator, draw: torch.Generator
) -> dict[str, torch.Tensor]:
    if generator.kind is not Kind.NULL:
        raise _error(generator, "this generator has no shift", "translation or null", str(generator.kind))
    deltas: dict[str, torch.Tensor] = {}
    for action in generator.actions:
        name = action.parameter
        if name not in deltas:
            deltas[name] = torch.zeros(state[name].shape, dtype=torch.float64)
        block, _ = _view(deltas[name], name, action.parts)
        shape = list(block.shape)
        if action.exponent:
            before = sum(len(part.factors) for part in action.parts[: action.axis])
            inside = [factor.name for factor in action.parts[action.axis].factors]
            shape[before + inside.index(action.acting)] = 1
        block += torch.randn(shape, generator=draw, dtype=torch.float64)
    return deltas


def _through(
    weight: torch.Tensor, action: Action, shift: torch.Tensor, names: Sequence[str]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Σ W t over the factors of one axis of W, as a tensor over the factors of another."""
    through = action.through
    assert through is not None
    block, labels = _view(weight.detach().to(torch.float64).contiguous(), through.parameter, through.parts)
    axis_of = [axis for axis, part in enumerate(through.parts) for _ in part.factors]
    held = [name for name, axis in zip(labels, axis_of, strict=True) if axis == through.axis]
    if not set(names) <= set(held):
        raise RegaugeError(
            "the linear map does not read the shift",
            parameter=through.parameter,
            expected=" × ".join(names),
            found=" × ".join(held),
        )
    letter = {(through.axis, name): i for i, name in enumerate(held)}
    for axis, name in zip(axis_of, labels, strict=True):
        letter.setdefault((axis, name), len(letter))
    operand = [letter[(axis, name)] for axis, name in zip(axis_of, labels, strict=True)]
    index = [letter[(through.axis, name)] for name in names]
    result = tuple(factor.name for factor in through.parts[through.result].factors)
    kept = [letter[(through.result, name)] for name in result]
    return torch.einsum(block, operand, shift, index, kept), result


def _add(delta: torch.Tensor, action: Action, summand: torch.Tensor, names: Sequence[str]) -> None:
    """Add to the block, repeating along factors that the summand lacks."""
    block, labels = _view(delta, action.parameter, action.parts)
    if any(labels.count(name) != 1 for name in names):
        raise RegaugeError(
            "the shift does not fit its target",
            parameter=action.parameter,
            expected=" × ".join(names) + ", each once",
            found=" × ".join(labels),
        )
    order = sorted(range(len(names)), key=lambda i: labels.index(names[i]))
    moved = summand.permute(order)
    shape = [size if label in names else 1 for label, size in zip(labels, block.shape, strict=True)]
    block += moved.reshape(shape)


def _view(
    tensor: torch.Tensor, parameter: str, parts: Sequence[Part]
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The block as a view of a contiguous tensor with one dimension for each factor, and their names."""
    if tensor.dim() != len(parts):
        raise RegaugeError(
            "one part per axis", parameter=parameter, expected=str(len(parts)), found=str(tuple(tensor.shape))
        )
    sizes: list[int] = []
    strides: list[int] = []
    labels: list[str] = []
    offset = tensor.storage_offset()
    for axis, part in enumerate(parts):
        last = part.offset + sum((factor.size - 1) * factor.stride for factor in part.factors)
        if part.offset < 0 or last >= tensor.shape[axis]:
            raise RegaugeError(
                "the part does not lie on the axis",
                parameter=parameter,
                expected=f"positions below {tensor.shape[axis]} on axis {axis}",
                found=str(last),
            )
        offset += part.offset * tensor.stride(axis)
        for factor in part.factors:
            sizes.append(factor.size)
            strides.append(factor.stride * tensor.stride(axis))
            labels.append(factor.name)
    return torch.as_strided(tensor, sizes, strides, offset), tuple(labels)


def _error(generator: Generator, message: str, expected: str, found: str) -> RegaugeError:
    return RegaugeError(
        f"{message} (generator {generator.id})", space=generator.space, expected=expected, found=found
    )
