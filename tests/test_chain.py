"""A chain of steps is the steps one after another, in whatever order and dtype it carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from regauge.atlas import Action, Factor, Kind, Part
from regauge.chain import Chain, Take
from regauge.elements import random_element
from regauge.plan import Step
from regauge.steps import ActStep, AddStep, CenterStep, FillStep

SHAPE = (24, 30)
ROWS = Part(0, (Factor("head", 3, 8), Factor("pair", 2, 4), Factor("unit", 4, 1)))
WHOLE_ROWS = Part(0, (Factor("row", 24, 1),))
COLUMNS = Part(0, (Factor("column", 30, 1),))
GROUPS = Part(0, (Factor("group", 5, 6), Factor("entry", 6, 1)))
SOME = Part(4, (Factor("column", 10, 2),))
LAYOUTS: list[tuple[tuple[Part, Part], int, str, tuple[str, ...]]] = [
    ((WHOLE_ROWS, COLUMNS), 0, "row", ()),
    ((WHOLE_ROWS, COLUMNS), 1, "column", ()),
    ((ROWS, COLUMNS), 0, "unit", ()),
    ((ROWS, COLUMNS), 0, "unit", ("pair", "head")),
    ((ROWS, COLUMNS), 0, "head", ()),
    ((ROWS, GROUPS), 1, "entry", ("group",)),
    ((ROWS, GROUPS), 1, "entry", ("head",)),
    ((WHOLE_ROWS, SOME), 1, "column", ()),
    ((WHOLE_ROWS, SOME), 0, "row", ()),
]
EXACT = (Kind.PERMUTATION, Kind.SIGN)
DIAGONAL = (Kind.SCALE, Kind.POSITIVE)
DENSE = (Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)


def step(layout: int, kind: Kind, seed: int, exponent: int = 1, chart: float = 0.0) -> ActStep:
    parts, axis, acting, copies = LAYOUTS[layout]
    sizes = {factor.name: factor.size for part in parts for factor in part.factors}
    count = 1
    for name in copies:
        count *= sizes[name]
    element = random_element(kind, sizes[acting], count, torch.Generator().manual_seed(seed))
    return ActStep(Action("w", parts, axis, acting, Fraction(exponent), chart), element, copies, SHAPE)


def drawn(kinds: Sequence[Kind], seed: int, length: int = 7) -> list[Step]:
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    return [
        step(pick(len(LAYOUTS)), kinds[pick(len(kinds))], 100 * seed + i, 1 - 2 * pick(2), float(pick(2)))
        for i in range(length)
    ]


def one_by_one(steps: Sequence[Step], weight: torch.Tensor) -> torch.Tensor:
    exact = weight.double()
    for one in steps:
        exact = one.apply(exact)
    return exact


def carried_out(chain: Chain, weight: torch.Tensor, size: int, target: torch.dtype) -> torch.Tensor:
    """In cuts of ``size`` along the first axis that allows it."""

    def fetch(axis: int | None, start: int, stop: int) -> torch.Tensor:
        return weight if axis is None else weight.narrow(axis, start, stop - start)

    axis = next((axis for axis in range(2) if axis not in chain.bound), None)
    if axis is None or size == 0:
        return chain.run(chain.read(fetch), target)
    starts = range(0, weight.shape[axis], size)
    cuts = [(axis, start, min(start + size, weight.shape[axis])) for start in starts]
    return torch.cat([chain.run(chain.read(fetch, cut), target) for cut in cuts], axis)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_movements_and_diagonals_give_the_same_bits(seed: int, dtype: torch.dtype) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = weight.clone()
    steps = drawn((*EXACT, *EXACT, *DIAGONAL), seed)
    chain = Chain.of("w", steps, SHAPE)
    expected = one_by_one(steps, weight)
    for size in (0, 7):
        assert torch.equal(carried_out(chain, weight, size, torch.float64), expected)
        assert torch.equal(carried_out(chain, weight, size, dtype), expected.to(dtype))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("seed", range(20))
def test_matrices_give_the_same_numbers(seed: int) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    steps = drawn((*EXACT, *DIAGONAL, *DENSE), seed)
    chain = Chain.of("w", steps, SHAPE)
    for size in (0, 7):
        found = carried_out(chain, weight, size, torch.float64)
        assert_close(found, one_by_one(steps, weight), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("style", ["default", "hadamard", "householder"])
@pytest.mark.parametrize("layout", [0, 3, 5, 8])
def test_columns_may_be_done_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, layout: int, style: str
) -> None:
    parts, axis, acting, copies = LAYOUTS[layout]
    sizes = {factor.name: factor.size for part in parts for factor in part.factors}
    count = {0: 1, 3: 6, 5: 5, 8: 1}[layout]
    kind = Kind.ORTHOGONAL if style != "hadamard" or sizes[acting] % 4 == 0 else Kind.GENERAL_LINEAR
    style = style if kind is Kind.ORTHOGONAL else "default"
    drawn_element = random_element(kind, sizes[acting], count, torch.Generator().manual_seed(1), style)  # type: ignore[arg-type]
    one = ActStep(Action("w", parts, axis, acting, Fraction(-1)), drawn_element, copies, SHAPE)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = one.apply(weight)
    monkeypatch.setattr("regauge.act._CHUNK_COLUMNS", 3)
    monkeypatch.setattr("regauge.act._CHUNK", 100)
    assert_close(one.apply_(weight.clone()), expected, rtol=1e-13, atol=1e-13)


def test_other_steps_take_part() -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    columns = (Action("w", (WHOLE_ROWS, COLUMNS), 1, "column"), SHAPE)
    steps = [
        step(1, Kind.PERMUTATION, 0),
        CenterStep(*columns),
        step(1, Kind.PERMUTATION, 1),
        AddStep(torch.arange(24.0).double()[:, None]),
        step(0, Kind.PERMUTATION, 2),
        FillStep(Action("w", (WHOLE_ROWS, SOME), 1, "column"), 2.0, SHAPE),
        step(1, Kind.PERMUTATION, 3),
    ]
    found = carried_out(Chain.of("w", steps, SHAPE), weight, 7, torch.float64)
    assert torch.equal(found, one_by_one(steps, weight))


def test_movements_leave_the_float64_part_and_free_the_axes() -> None:
    """Fold, rotate a head, permute both axes: one index per axis, and blocks of rows where they can be."""
    fold, turn = step(1, Kind.SCALE, 0), step(0, Kind.ORTHOGONAL, 1)
    rows, columns = step(0, Kind.PERMUTATION, 2), step(1, Kind.PERMUTATION, 3)
    chain = Chain.of("w", [fold, columns, rows, rows], SHAPE)
    assert [take.axis for take in chain.front] == [0]
    assert chain.middle == (fold,)
    assert [type(late) for late in chain.late] == [Take]
    assert chain.bound == {1}
    chain = Chain.of("w", [fold, turn, columns, rows], SHAPE)
    assert (chain.front, chain.middle, len(chain.late)) == ((), (fold, turn), 2)
    chain = Chain.of("w", [columns, rows, columns], SHAPE)
    assert sorted(take.axis for take in chain.front) == [0, 1]
    assert chain.bound == frozenset()
    assert not chain.arithmetic


def test_a_step_that_follows_another_axis_is_not_taken_for_a_permutation_of_one() -> None:
    assert step(6, Kind.PERMUTATION, 0).order(SHAPE) is None
    assert step(8, Kind.PERMUTATION, 0).order(SHAPE) is None
    found = step(7, Kind.PERMUTATION, 0).order(SHAPE)
    assert found is not None
    axis, index = found
    assert axis == 1
    assert torch.equal(index.sort().values, torch.arange(30))
    assert torch.equal(index[:4], torch.arange(4))
