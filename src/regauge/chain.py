"""How the steps of one tensor are carried out: movements together, arithmetic in place, one cast.

A step treats all positions along its free axes alike, so a permutation of a free axis may be done before it
or after it. Movements are therefore brought to the front, or else to the end, merged, and done in the dtype
that is stored there; in between, everything happens in one float64 buffer. No value changes by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch

from regauge.errors import RegaugeError
from regauge.plan import Step
from regauge.steps import ActStep


@runtime_checkable
class InPlace(Protocol):
    """A step that can change a tensor nobody else holds."""

    def apply_(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``apply``, for a contiguous tensor that may be overwritten; returns it or a new one."""
        ...


@dataclass(frozen=True, eq=False)
class Take:
    """Entries along one axis in another order: ``y[…, i, …] = x[…, index[i], …]``; index int64."""

    axis: int
    index: torch.Tensor

    @property
    def axes(self) -> frozenset[int]:
        return frozenset({self.axis})

    @property
    def arithmetic(self) -> bool:
        return False

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(self.axis, self.index)


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which they are carried out; the same function as the steps given.

    Attributes:
        parameter: whose steps, for messages.
        front: first of all, at most one for each axis.
        early: then, entries only moved or flipped, in the stored dtype.
        middle: in float64, if there is arithmetic.
        late: entries only moved or flipped, in the dtype of the result.
        rank: number of axes of the tensor.
    """

    parameter: str
    front: tuple[Take, ...]
    early: tuple[Step, ...]
    middle: tuple[Step, ...]
    late: tuple[Step, ...]
    rank: int

    @staticmethod
    def of(parameter: str, steps: Sequence[Step], shape: tuple[int, ...]) -> Chain:
        ordered = _ordered(steps, shape)
        takes = 0
        while takes < len(ordered) and isinstance(ordered[takes], Take):
            takes += 1
        front, rest = ordered[:takes], ordered[takes:]
        busy = [place for place, step in enumerate(rest) if step.arithmetic]
        first, last = (busy[0], busy[-1] + 1) if busy else (len(rest), len(rest))
        return Chain(
            parameter,
            tuple(step for step in front if isinstance(step, Take)),
            tuple(rest[:first]),
            tuple(rest[first:last]),
            tuple(rest[last:]),
            len(shape),
        )

    @property
    def arithmetic(self) -> bool:
        return bool(self.middle)

    @cached_property
    def bound(self) -> frozenset[int]:
        """Axes along which the tensor must not be cut."""
        rest = (*self.early, *self.middle, *self.late)
        return (
            frozenset(axis % self.rank for step in rest for axis in step.axes) if self.rank else frozenset()
        )

    def read(self, fetch: Fetch, cut: tuple[int, int, int] | None = None) -> torch.Tensor:
        """The source with ``front`` done, in its stored dtype.

        Args:
            fetch: ``(axis, start, stop) -> `` that part of the source; None as axis for all of it.
            cut: (axis, start, stop) of the result; the axis must not be in ``bound``.
        """
        takes = {take.axis: take.index for take in self.front}
        if cut is None:
            block = fetch(None, 0, 0)
        elif cut[0] in takes:
            axis, start, stop = cut
            block = _take(fetch(None, 0, 0), axis, takes.pop(axis)[start:stop])
        else:
            block = fetch(*cut)
        for axis, index in takes.items():
            block = _take(block, axis, index)
        return block

    def run(self, block: torch.Tensor, target: torch.dtype, check: Check | None = None) -> torch.Tensor:
        """The rest of the steps on what ``read`` returned; cast to ``target`` once.

        Args:
            block: left as it is.
            target: dtype of the result.
            check: called with the values before and after the cast, if there is arithmetic or another dtype.
        """
        stored = block.dtype
        narrow = stored.itemsize == 1 or target.itemsize == 1  # 8-bit floats: nothing but casts works on them
        if narrow:
            block = block.to(torch.float32)
        block = self._steps(self.early, block)
        if self.middle:
            block = block.to(torch.float64, copy=True).contiguous()
            for step in self.middle:
                block = self._same(
                    step, block, step.apply_(block) if isinstance(step, InPlace) else step.apply(block)
                )
        if narrow:
            block = self._steps(self.late, block)
        result = block.to(target)
        if check is not None and (self.middle or target != stored):
            check(block, result)
        return result if narrow else self._steps(self.late, result)

    def _steps(self, steps: Sequence[Step], block: torch.Tensor) -> torch.Tensor:
        for step in steps:
            block = self._same(step, block, step.apply(block))
        return block

    def _same(self, step: Step, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        if after.shape != before.shape or after.dtype != before.dtype:
            raise RegaugeError(
                f"a step ({type(step).__name__}) changed the form of its tensor",
                parameter=self.parameter,
                expected=f"{list(before.shape)} {before.dtype}",
                found=f"{list(after.shape)} {after.dtype}",
            )
        return after


Fetch = Callable[[int | None, int, int], torch.Tensor]
Check = Callable[[torch.Tensor, torch.Tensor], None]


def _ordered(steps: Sequence[Step], shape: tuple[int, ...]) -> list[Step]:
    """The steps with permutations of one axis merged and brought to the front, or else to the end."""
    done: list[Step] = []
    for step in steps:
        take = _as_take(step, shape)
        if take is None:
            done.append(step)
            continue
        place = len(done)
        while place and _passes(take, done[place - 1], len(shape)):
            place -= 1
        before = done[place - 1] if place else None
        if isinstance(before, Take):
            done[place - 1] = Take(take.axis, before.index[take.index])
        elif place == 0:
            done.insert(0, take)
        else:
            done.append(take)
    fixed = 0
    while fixed < len(done) and isinstance(done[fixed], Take):
        fixed += 1
    for start in reversed(range(fixed, len(done))):
        take, place = done[start], start
        while isinstance(take, Take) and place + 1 < len(done) and _passes(take, done[place + 1], len(shape)):
            done[place] = done[place + 1]
            place += 1
            done[place] = take
    return done


def _passes(take: Take, other: Step, rank: int) -> bool:
    return take.axis not in {axis % rank for axis in other.axes}


def _as_take(step: Step, shape: tuple[int, ...]) -> Take | None:
    if isinstance(step, Take):
        return step
    index = step.order(shape) if isinstance(step, ActStep) else None
    return None if index is None else Take(*index)


def _take(block: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
    if block.is_floating_point() and block.itemsize == 1:
        return block.view(torch.uint8).index_select(axis, index).view(block.dtype)
    return block.index_select(axis, index)
