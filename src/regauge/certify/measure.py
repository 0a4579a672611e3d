"""How far apart two functions are, and how far apart rounding alone would put them.

**The rounding floor.** A rewrite that is exact on paper still stores each weight rounded to its dtype. To
say what that costs, the original is run once more with its own weights *re-rounded*: an entry that is a
number of the storage dtype moves to the next one up or down with probability 1/24 each, any other entry is
rounded to the nearest. Either way the error has the mean 0 and the variance ulp²/12 that rounding a generic
number has. The same figures are measured for it, in the same executions, on the same inputs. Of a model of
few weights hardly one moves: then the root mean square over several draws counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch

from regauge.certify.figures import Distance, Figures, Output, compare
from regauge.certify.lazy import BLOCK, Weights
from regauge.certify.run import run_in_parts
from regauge.errors import BadInput
from regauge.trace import Trace

EXACT = 1e-10
"""Relative error in float64 below which two functions count as the same."""

FLOOR_FACTOR = 3.0
"""How many times the rounding floor still counts as rounding: one draw of the noise is an estimate, and a
rewrite rounds other numbers than the original did."""

COARSE = 10.0
"""How many floors of the original a floor of the other model may count for: coordinates that mix entries of
different size round more coarsely, but a model that rounding ruins is no longer the same."""

DRAWN = 1 << 15
"""Entries over which the noise is drawn at least, in at most ``DRAWS`` draws."""

DRAWS = 32

POOL = 1 << 21
"""Random steps drawn once and read by every row of every weight from a place of its own."""


class Verdict(StrEnum):
    EQUIVALENT = "equivalent"
    WITHIN_ROUNDING = "equivalent within rounding"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Function:
    """A traced function with its parameters.

    Attributes:
        trace: the graph.
        weights: canonical name -> tensor; may offer ``rows``, see :mod:`regauge.certify.lazy`.
        buffers: buffer name -> tensor.
        given: what it is run on where it takes other inputs than the reference; default the same.
        pick: what is compared of an output; default all of it.
    """

    trace: Trace
    weights: Weights | Callable[[str], torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    given: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    pick: Callable[[Output], Output] | None = None

    def outputs(self, batch: Mapping[str, Any], dtype: Any, block: int) -> tuple[Output, ...]:
        """See :func:`regauge.certify.run.run_in_parts`."""
        batch = batch if self.given is None else self.given(batch)
        found = run_in_parts(self.trace, self.weights, self.buffers, batch, dtype=dtype, block=block)
        return found if self.pick is None else tuple(map(self.pick, found))


@dataclass(frozen=True)
class FunctionEvidence:
    """What was measured between two functions on the same inputs.

    Attributes:
        exact: a against b before its weights were rounded, in float64; None if not available.
        float64: a against b with the weights as stored, in float64.
        floor: a against a re-rounded, in float64.
        stored: a against b, run in the dtypes the models hold; None if not asked for.
        stored_floor: a against a re-rounded, likewise.
        floor_b: b against b re-rounded, in float64; None unless the floor of a does not explain the error.
        positions: number of positions compared (tokens of a language model).
        bits: whether a and b gave the same bits in float64 everywhere.
    """

    exact: Figures | None
    float64: Figures
    floor: Figures
    stored: Figures | None
    stored_floor: Figures | None
    positions: int
    bits: bool
    floor_b: Figures | None = None

    @property
    def rounding(self) -> float:
        """One rounding floor: that of a, or of b if it is more, at most ``COARSE`` times that of a."""
        floor = self.floor.relative
        return floor if self.floor_b is None else max(floor, min(self.floor_b.relative, COARSE * floor))


def compare_functions(
    a: Function,
    b: Function,
    inputs: Sequence[Mapping[str, Any]],
    *,
    exact: Callable[[str], torch.Tensor] | None = None,
    storage: Callable[[str], torch.dtype] | None = None,
    logits: bool = False,
    stored: bool = True,
    seed: int = 0,
    block: int = BLOCK,
    exact_buffers: Mapping[str, torch.Tensor] | None = None,
    floor_buffers: Mapping[str, torch.Tensor] | None = None,
) -> FunctionEvidence:
    """Run both functions on the same inputs and measure.

    Args:
        a, b: the original and the other; same input names and shapes, same output shapes.
        inputs: example inputs by name, on the CPU, with the traced shapes.
        exact: weights of ``b`` in float64 before rounding, by canonical name.
        storage: canonical name in ``a`` -> dtype that the floor rounds to; default: a's own dtype.
        logits: whether the last axis of the outputs holds log-probabilities up to a constant.
        stored: whether to run also in the dtypes the models hold.
        seed: of the floor's noise.
        block: elements of a weight cast at once.
        exact_buffers: buffers of ``b`` before rounding; default those it has.
        floor_buffers: buffers of ``a`` as rounded to the storage of ``b``; default those it has.

    Raises:
        BadInput: no inputs, or the outputs differ in number or shape.
    """
    rounded = [
        replace(a, weights=Rerounded(a.weights, storage, seed + draw), buffers=floor_buffers or a.buffers)
        for draw in range(_draws(a.trace))
    ]
    unrounded = None if exact is None else replace(b, weights=exact, buffers=exact_buffers or b.buffers)
    sums = {key: Distance(logits) for key in ("exact", "float64", "floor", "stored", "stored_floor")}
    positions = 0
    for batch in inputs:

        def outputs(function: Function, dtype: Any, batch: Any = batch) -> tuple[Output, ...]:
            return function.outputs(batch, dtype, block)

        reference = outputs(a, torch.float64)
        positions += _positions(reference, logits)
        others = [(sums["float64"], outputs(b, torch.float64))]
        others += [(sums["floor"], outputs(again, torch.float64)) for again in rounded]
        if unrounded is not None:
            others.append((sums["exact"], outputs(unrounded, torch.float64)))
        compare(reference, others)
        del reference, others
        if stored:
            others = [(sums["stored"], outputs(b, "stored"))]
            others += [(sums["stored_floor"], outputs(again, "stored")) for again in rounded]
            compare(outputs(a, "stored"), others)
            del others
    if positions == 0:
        raise BadInput("there is nothing to compare on", expected="at least one input")
    floor, error = sums["floor"].figures().relative, sums["float64"].figures().relative
    own = None
    if FLOOR_FACTOR * floor < error <= FLOOR_FACTOR * COARSE * floor:
        own = Distance(logits)
        weights = [b.weights, *(Rerounded(b.weights, None, seed + draw) for draw in range(_draws(b.trace)))]
        for batch in inputs:
            first, *others = (
                replace(b, weights=held).outputs(batch, torch.float64, block) for held in weights
            )
            compare(first, [(own, other) for other in others])
    return FunctionEvidence(
        exact=sums["exact"].figures() if unrounded is not None else None,
        float64=sums["float64"].figures(),
        floor=sums["floor"].figures(),
        stored=sums["stored"].figures() if stored else None,
        stored_floor=sums["stored_floor"].figures() if stored else None,
        positions=positions,
        bits=sums["float64"].bits,
        floor_b=None if own is None else own.figures(),
    )


def _draws(trace: Trace) -> int:
    entries = sum(math.prod(shape) for shape in trace.shapes.values())
    return min(DRAWS, max(1, DRAWN // max(1, entries)))


def judge(
    evidence: FunctionEvidence, *, exact: float = EXACT, factor: float = FLOOR_FACTOR
) -> tuple[Verdict, str]:
    """The verdict, and the reason for it in one sentence.

    - *equivalent*: in float64 the relative error is below ``exact``, for the weights before they were
      rounded if these are available, and then rounding them costs no more than ``factor`` floors.
    - *equivalent within rounding*: in float64 the stored weights differ by at most ``factor`` floors.
      A floor is what re-rounding alone does to a, or to b if that is more, but at most ten times as much.
    - *different*: anything else, and NaN or infinity anywhere.
    """
    everything = (evidence.exact, evidence.float64, evidence.stored, evidence.floor, evidence.stored_floor)
    if not all(figures.finite for figures in everything if figures is not None):
        return Verdict.DIFFERENT, "an output is NaN, or infinite in one of the two only"
    error, floor = evidence.float64.relative, evidence.rounding
    bound = factor * floor
    if evidence.exact is not None and evidence.exact.relative >= exact:
        reason = f"relative error {evidence.exact.relative:.2e} in float64, before any rounding"
        return Verdict.DIFFERENT, f"{reason}, not below {exact:.0e}"
    if evidence.bits:
        return Verdict.EQUIVALENT, "the outputs in float64 are the same bits"
    if error < exact:
        return Verdict.EQUIVALENT, f"relative error {error:.2e} in float64, below {exact:.0e}"
    times = f"{error:.2e} = {error / floor:.2g} rounding floors" if bound else f"{error:.2e}"
    if error > bound:
        return Verdict.DIFFERENT, f"relative error of the stored weights {times}, more than {factor:g}"
    if evidence.exact is not None:
        return (
            Verdict.EQUIVALENT,
            f"relative error {evidence.exact.relative:.2e} in float64 before rounding; stored: {times}",
        )
    return Verdict.WITHIN_ROUNDING, f"relative error of the stored weights {times}, at most {factor:g}"


def _positions(outputs: tuple[Output, ...], logits: bool) -> int:
    if not outputs:
        return 0
    shape = outputs[0].shape
    return math.prod(shape[:-1]) if logits or len(shape) > 2 else math.prod(shape[:1])


@dataclass(frozen=True)
class Rerounded:
    """Weights re-rounded at random; see the top of this file. Pure: the same seed, the same weights.

    Attributes:
        source: the weights.
        storage: canonical name -> dtype to round to; default: the dtype each tensor has.
        seed: of the noise.
    """

    source: Weights | Callable[[str], torch.Tensor]
    storage: Callable[[str], torch.dtype] | None
    seed: int

    def __call__(self, name: str) -> torch.Tensor:
        tensor = self.source(name)
        rows = torch.arange(len(tensor)) if tensor.ndim else torch.zeros(1, dtype=torch.int64)
        return self._noisy(name, tensor.reshape(len(rows), -1), rows).reshape(tensor.shape)

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        if isinstance(self.source, Weights):
            tensor = self.source.rows(name, index)
        else:
            tensor = self.source(name)[index]
        return self._noisy(name, tensor.reshape(len(index), -1), index).reshape(tensor.shape)

    @cached_property
    def _pool(self) -> torch.Tensor:
        return _steps(self.seed, POOL)

    def _noisy(self, name: str, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        dtype = self.storage(name) if self.storage is not None else rows.dtype
        if not (rows.is_floating_point() and dtype.is_floating_point):
            return rows
        salt = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:4], "little")
        width = max(1, rows.shape[1])
        pool = self._pool if 2 * width <= POOL else _steps(self.seed, 2 * width)
        pool = pool.unfold(0, width, 1)
        starts = _mix(index + salt).to(torch.int64).abs() % len(pool)
        out = torch.empty(rows.shape, dtype=dtype)
        count = max(1, (1 << 18) // width)
        for i in range(0, len(rows), count):
            out[i : i + count] = _rerounded(rows[i : i + count], dtype, pool[starts[i : i + count]])
        return out


def _steps(seed: int, size: int) -> torch.Tensor:
    """Random steps as int8: -1 and 1 with probability 1/24 each, else 0."""
    drawn = torch.randint(24, (size,), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return (drawn == 0).to(torch.int8) - (drawn == 1).to(torch.int8)


def _mix(keys: torch.Tensor) -> torch.Tensor:
    """A fixed scrambling of the low 32 bits of integers, as int32 that look random."""
    mixed = keys.to(torch.int32)
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return mixed ^ (mixed >> 16)


def _rerounded(values: torch.Tensor, dtype: torch.dtype, steps: torch.Tensor) -> torch.Tensor:
    """``values`` rounded to ``dtype``; those that are on its grid already move by ``steps`` ulp."""
    rounded = values.to(dtype, copy=True).contiguous()
    if dtype not in _PATTERNS:
        return rounded
    still = rounded == 0
    if dtype != values.dtype:
        still |= rounded != values
    # One ulp away from zero is the next bit pattern, whatever the sign.
    moved = (rounded.view(_PATTERNS[dtype]) + steps.masked_fill(still, 0)).view(dtype)
    low, high = torch.aminmax(rounded) if rounded.numel() else (torch.zeros(()), torch.zeros(()))
    if -torch.finfo(dtype).max < float(low) and float(high) < torch.finfo(dtype).max:
        return moved
    return torch.where(torch.isfinite(moved), moved, rounded)


_PATTERNS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
