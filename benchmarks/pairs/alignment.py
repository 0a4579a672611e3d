"""The library's alignment of a pair: the one place here that knows its interface."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import regauge
from pairs.disguise import example
from pairs.families import Family
from pairs.makers import Store
from pairs.recipes import Made


@dataclass(frozen=True)
class Aligned:
    """What alignment found.

    Attributes:
        similarity: one number, 1 for a disguised copy.
        relative: ‖a − b‖ / ‖a‖ of the matrices.
        both: matrices of a and of b, moved to a's gauge; b as it is where shapes differ, empty where it
            has no counterpart.
    """

    similarity: float
    relative: float
    both: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@contextmanager
def _sides(family: Family, store: Store, a: Made, b: Made) -> Iterator[tuple[Any, Any]]:
    from regauge.matching.sides import open_sides, side_of_module
    from regauge.module_model import ModuleModel

    if family.stored:
        with open_sides(store.stored(a), store.stored(b)) as sides:
            yield sides
        return
    x = (example(family),)
    first, second = (side_of_module(ModuleModel.of(store.model(made), x, {})) for made in (a, b))
    yield first, second


def aligned(family: Family, store: Store, a: Made, b: Made) -> Aligned:
    """Align b with a.

    Raises:
        Refused: the models do not do the same with their parameters.
    """
    from regauge.matching import align_sides

    with _sides(family, store, a, b) as (first, second):
        found, pair = align_sides(first, second)
        both = []
        for name, other in found.names.items():
            shape = first.shapes[name]
            if len(shape) < 2:
                continue
            if name in pair.names:
                chunks = list(pair.chunks(name))
                x, y = (
                    torch.cat([chunk[side].reshape(-1) for chunk in chunks]).reshape(shape) for side in (0, 1)
                )
            else:
                x, y = first.read(name), second.read(other)
            if float(x.norm()) > 0:
                both.append((x, y))
        for name, shape in first.shapes.items():
            if name not in found.names and len(shape) > 1:
                both.append((first.read(name), torch.empty(0, 0)))
    return Aligned(found.similarity, found.relative, tuple(both))


def aligned_models(family: Family, store: Store, a: Made, b: Made) -> tuple[nn.Module, nn.Module]:
    """a in its normal form, and b in a's gauge, in the same modules."""
    from regauge.matching import align_sides
    from regauge.matching.normal import normal_recipe
    from regauge.matching.sides import side_of_module
    from regauge.module_model import ModuleModel

    inputs = family.inputs(example(family))
    args, kwargs = ((), dict(inputs)) if family.stored else (inputs, {})
    first, second = (side_of_module(ModuleModel.of(store.model(made), args, kwargs)) for made in (a, b))
    _, pair = align_sides(first, second)
    model = copy.deepcopy(store.model(a))
    with suppress(regauge.Refused):  # It is in its normal form already.
        model = regauge.rewrite_module(model, inputs, normal_recipe(structure=True), seed=0)[0].eval()
    other = copy.deepcopy(model)
    ours, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, other))
    with torch.no_grad():
        for name in pair.names:
            chunks = list(pair.chunks(name))
            for side, held in ((0, ours), (1, theirs)):
                value = torch.cat([chunk[side].reshape(-1) for chunk in chunks])
                held[name].copy_(value.reshape(held[name].shape))
    return model, other
