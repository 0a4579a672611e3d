"""Steps of plans: what they change, what they keep, and along which axes they may be cut."""

from __future__ import annotations

import pytest
import torch

from act_cases import CASES, D_MODEL, FF, HEADS, WIDTH, R, action, element_of, heads, whole
from regauge.atlas import Kind
from regauge.elements import identity, random_element
from regauge.errors import RegaugeError
from regauge.plan import Step
from regauge.steps import ActStep, AddStep, CenterStep, FillStep, ScaleStep


def steps_of(name: str) -> list[tuple[Step, tuple[int, ...]]]:
    _, _, copies, actions = CASES[name]
    names = tuple(n for n, _ in copies)
    result: list[tuple[Step, tuple[int, ...]]] = []
    for a, shape in actions:
        result.append((ActStep(a, element_of(name), names, shape), shape))
        result.append((CenterStep(a, shape), shape))
        result.append((FillStep(a, 1.0, shape), shape))
        result.append((AddStep(torch.ones((*shape[:-1], 1), dtype=torch.float64)), shape))
        result.append((ScaleStep(torch.full((*shape[:-1], 1), 2.0, dtype=torch.float64)), shape))
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_cut_along_a_free_axis_changes_nothing(name: str) -> None:
    for step, shape in steps_of(name):
        tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        at_once = step.apply(tensor)
        for axis in set(range(len(shape))) - step.axes:
            for first in {1, shape[axis] - 1} - {0, shape[axis]}:
                pieces = tensor.split((first, shape[axis] - first), dim=axis)
                cut = torch.cat([step.apply(piece) for piece in pieces], dim=axis)
                torch.testing.assert_close(cut, at_once, rtol=0, atol=1e-13 if step.arithmetic else 0)
        for axis in step.axes:
            if shape[axis] > 1:
                with pytest.raises(RegaugeError):
                    step.apply(tensor.narrow(axis, 0, shape[axis] - 1))


def test_axes_that_must_not_be_cut() -> None:
    def axes(name: str, at: int) -> set[int]:
        _, _, copies, actions = CASES[name]
        a, shape = actions[at]
        return set(ActStep(a, element_of(name), tuple(n for n, _ in copies), shape).axes)

    assert axes("residual, one orthogonal map", 0) == {1}
    assert axes("residual, one orthogonal map", 3) == {0}
    assert axes("values in fused q|k|v", 0) == {0}
    assert axes("inside every expert", 0) == {0, 1}
    assert axes("inside every expert", 1) == {0, 2}
    assert axes("the experts themselves", 0) == {0}
    partial = action("w", [(1, [("f", 2, 1)]), R], 1, "r")
    e = identity(Kind.ORTHOGONAL, D_MODEL)
    assert ActStep(partial, e, (), (FF, D_MODEL)).axes == {0, 1}
    assert ActStep(partial, e, ()).axes == {0, 1}
    assert FillStep(partial, 1.0, (FF, D_MODEL)).axes == {0}
    assert CenterStep(partial, (FF, D_MODEL)).axes == {0, 1}
    assert ActStep(action("w", [whole("f", FF), R], 1, "r"), e).axes == {0, 1}, (
        "unknown shape: nothing is free"
    )


def test_a_part_changes_only_itself() -> None:
    tensor = torch.full((FF, D_MODEL), torch.nan, dtype=torch.bfloat16)
    tensor[1:3] = 1.0
    a = action("w", [(1, [("f", 2, 1)]), R], 1, "r")
    for step in (
        ActStep(a, random_element(Kind.ORTHOGONAL, D_MODEL, 1, torch.Generator().manual_seed(0))),
        CenterStep(a),
        FillStep(a, 3.0),
    ):
        out = step.apply(tensor)
        assert out[1:3].isfinite().all()
        assert not torch.equal(out[1:3], tensor[1:3])
        for row in (0, 3):
            assert torch.equal(out[row].view(torch.int16), tensor[row].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_moves_keep_every_bit(dtype: torch.dtype) -> None:
    name = "inside every expert"
    for a, shape in CASES[name][3]:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        step = ActStep(a, element_of(name), ("e",), shape)
        assert not step.arithmetic
        out = step.apply(tensor)
        assert out.dtype == dtype
        assert torch.equal(out.double(), step.apply(tensor.double()))
        back = ActStep(a, element_of(name).inverse(), ("e",), shape).apply(out)
        assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_arithmetic_is_declared() -> None:
    def needs(kind: Kind, chart: float) -> bool:
        e = random_element(kind, D_MODEL, 1, torch.Generator().manual_seed(0))
        return ActStep(action("w", [R], 0, "r", 1, chart), e).arithmetic

    assert not needs(Kind.PERMUTATION, 0.0)
    assert not needs(Kind.PERMUTATION, 1.0), "the constant is the same everywhere and cancels"
    assert not needs(Kind.SIGN, 0.0)
    assert needs(Kind.SIGN, 1.0)
    assert needs(Kind.POSITIVE, 0.0)
    assert needs(Kind.ORTHOGONAL, 0.0)
    assert FillStep(action("w", [R], 0, "r"), 1.0).arithmetic


def test_centring_is_the_projection_beside_the_ones() -> None:
    a = action("w", [heads(WIDTH, 3 * WIDTH), R], 0, "v")
    tensor = torch.randn(3 * HEADS * WIDTH, D_MODEL, dtype=torch.float64)
    out = CenterStep(a).apply(tensor)
    expected = tensor.clone()
    for h in range(HEADS):
        rows = slice(3 * h * WIDTH + WIDTH, 3 * h * WIDTH + 2 * WIDTH)
        expected[rows] -= tensor[rows].sum(0) / WIDTH
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(CenterStep(a).apply(out), out, rtol=0, atol=1e-14)
    gain = torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64)
    charted = CenterStep(action("g", [whole("r", 3)], 0, "r", 1, 1.0)).apply(gain)
    torch.testing.assert_close(charted + 1.0, (gain + 1.0) - (gain + 1.0).mean())


def test_filling_counts_the_chart() -> None:
    gain = torch.randn(D_MODEL, dtype=torch.float64)
    assert FillStep(action("g", [R], 0, "r"), 1.0).apply(gain).tolist() == [1.0] * D_MODEL
    assert FillStep(action("g", [R], 0, "r", 1, 1.0), 1.0).apply(gain).tolist() == [0.0] * D_MODEL


def test_adding() -> None:
    tensor = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    step = AddStep(torch.tensor([[0.5], [-0.5]], dtype=torch.float64))
    assert step.axes == {0}
    assert step.apply(tensor).tolist() == [[0.5, 1.5, 2.5], [2.5, 3.5, 4.5]]
    assert step.apply(tensor).dtype == torch.float16
    for wrong in (torch.zeros(3, 3), torch.zeros(2)):
        with pytest.raises(RegaugeError, match="does not fit"):
            step.apply(wrong)
