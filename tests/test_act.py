"""Elements acting on blocks, against a stranger: index loops written from the JSON of the atlas alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regauge.act import act, apply_generator
from regauge.atlas import Action, Atlas, Factor, Generator, Kind, Part, Through
from regauge.elements import (
    Element,
    Matrix,
    compose,
    identity,
    random_element,
)
from regauge.errors import RegaugeError
from regauge.plan import Step
from regauge.steps import ActStep, AddStep, CenterStep, FillStep

GOLDEN = Path(__file__).parent / "data" / "hadamard_golden.pt"
DIAGONALS = ("sign", "positive", "scale")
Axis = tuple[int, list[tuple[str, int, int]]]  # offset, (name, size, stride)…

# Sizes: residual d, heads H of width D, groups G of query heads per key-value head, experts E of width F.
D_MODEL, HEADS, GROUP, WIDTH, EXPERTS, FF, VOCAB = 5, 3, 2, 4, 3, 4, 7


def part(axis: Axis) -> Part:
    return Part(axis[0], tuple(Factor(*factor) for factor in axis[1]))


def action(
    name: str, axes: list[Axis], axis: int, acting: str, exponent: Any = 1, chart: float = 0.0
) -> Action:
    return Action(name, tuple(part(a) for a in axes), axis, acting, Fraction(exponent), chart)


def whole(name: str, size: int) -> Axis:
    return 0, [(name, size, 1)]


def heads(offset: int = 0, stride: int = WIDTH) -> Axis:
    return offset, [("h", HEADS, stride), ("v", WIDTH, 1)]


R = whole("r", D_MODEL)
PAIRS = WIDTH // 2


def half(count: int, group: int = 1) -> Axis:
    """Rotate-half: the pair (i, i + D/2) of each head."""
    return 0, [("h", count, group * WIDTH), ("g", group, WIDTH), ("j", 2, PAIRS), ("p", PAIRS, 1)]


Case = tuple[Kind, str, list[tuple[str, int]], list[tuple[Action, tuple[int, ...]]]]
CASES: dict[str, Case] = {
    "residual, one orthogonal map": (
        Kind.ORTHOGONAL,
        "r",
        [],
        [
            (action("embedding", [whole("t", VOCAB), R], 1, "r"), (VOCAB, D_MODEL)),
            (action("reader", [whole("f", FF), R], 1, "r", -1), (FF, D_MODEL)),
            (action("bias", [R], 0, "r"), (D_MODEL,)),
            (action("square", [R, R], 0, "r"), (D_MODEL, D_MODEL)),
            (action("square", [R, R], 1, "r", -1), (D_MODEL, D_MODEL)),
        ],
    ),
    "the acting factor again on a cut-out of another axis": (
        Kind.ORTHOGONAL,
        "r",
        [],
        [
            (action("w", [R, (D_MODEL, [("r", D_MODEL, 1)])], 0, "r"), (D_MODEL, 2 * D_MODEL)),
            (action("w", [R, (D_MODEL, [("r", D_MODEL, 1)])], 1, "r", -1), (D_MODEL, 2 * D_MODEL)),
        ],
    ),
    "values in fused q|k|v": (
        Kind.GENERAL_LINEAR,
        "v",
        [("h", HEADS)],
        [
            (action("qkv", [heads(2 * HEADS * WIDTH), R], 0, "v"), (3 * HEADS * WIDTH, D_MODEL)),
            (action("qkv.bias", [heads(2 * HEADS * WIDTH)], 0, "v"), (3 * HEADS * WIDTH,)),
            (action("out", [R, heads()], 1, "v", -1), (D_MODEL, HEADS * WIDTH)),
        ],
    ),
    "keys interleaved per head (H, 3, D), stored transposed": (
        Kind.GENERAL_LINEAR,
        "v",
        [("h", HEADS)],
        [
            (action("qkv", [R, heads(0, 3 * WIDTH)], 1, "v"), (D_MODEL, 3 * HEADS * WIDTH)),
            (action("qkv", [R, heads(WIDTH, 3 * WIDTH)], 1, "v", -1), (D_MODEL, 3 * HEADS * WIDTH)),
        ],
    ),
    "grouped values: one map per key-value head": (
        Kind.GENERAL_LINEAR,
        "v",
        [("h", HEADS)],
        [
            (action("v", [heads(), R], 0, "v"), (HEADS * WIDTH, D_MODEL)),
            (
                action(
                    "o",
                    [R, (0, [("h", HEADS, GROUP * WIDTH), ("g", GROUP, WIDTH), ("v", WIDTH, 1)])],
                    1,
                    "v",
                    -1,
                ),
                (D_MODEL, HEADS * GROUP * WIDTH),
            ),
        ],
    ),
    "rotary pairs, halves, copies inside and outside the pair": (
        Kind.COMPLEX,
        "j",
        [("p", PAIRS), ("h", HEADS)],
        [
            (action("q", [half(HEADS, GROUP), R], 0, "j"), (HEADS * GROUP * WIDTH, D_MODEL)),
            (action("k", [half(HEADS), R], 0, "j", -1), (HEADS * WIDTH, D_MODEL)),
        ],
    ),
    "rotary pairs, interleaved, part of the width": (
        Kind.COMPLEX,
        "j",
        [("h", HEADS)],
        [
            (
                action("q", [(1, [("h", HEADS, WIDTH), ("j", 2, 1)]), R], 0, "j"),
                (HEADS * WIDTH, D_MODEL),
            ),
        ],
    ),
    "inside every expert": (
        Kind.PERMUTATION,
        "f",
        [("e", EXPERTS)],
        [
            (
                action("up", [whole("e", EXPERTS), whole("f", FF), R], 1, "f"),
                (EXPERTS, FF, D_MODEL),
            ),
            (
                action("gate", [whole("e", EXPERTS), R, (FF, [("f", FF, 1)])], 2, "f"),
                (EXPERTS, D_MODEL, 2 * FF),
            ),
            (
                action("down", [whole("e", EXPERTS), R, whole("f", FF)], 2, "f", -1),
                (EXPERTS, D_MODEL, FF),
            ),
        ],
    ),
    "experts, matrices with the copy on a later axis": (
        Kind.GENERAL_LINEAR,
        "f",
        [("e", EXPERTS)],
        [(action("up", [whole("f", FF), R, whole("e", EXPERTS)], 0, "f"), (FF, D_MODEL, EXPERTS))],
    ),
    "the experts themselves": (
        Kind.PERMUTATION,
        "e",
        [],
        [
            (action("up", [whole("e", EXPERTS), whole("f", FF), R], 0, "e"), (EXPERTS, FF, D_MODEL)),
            (action("router", [whole("e", EXPERTS), R], 0, "e"), (EXPERTS, D_MODEL)),
        ],
    ),
    "a gain stored as 1 + w": (
        Kind.POSITIVE,
        "r",
        [],
        [
            (action("gain", [R], 0, "r", 1, 1.0), (D_MODEL,)),
            (action("reader", [whole("f", FF), R], 1, "r", -1), (FF, D_MODEL)),
        ],
    ),
    "signs through a chart": (
        Kind.SIGN,
        "r",
        [],
        [(action("gain", [R], 0, "r", 1, 1.0), (D_MODEL,))],
    ),
    "a power of two and a root": (
        Kind.POSITIVE,
        "f",
        [("h", HEADS)],
        [
            (action("up", [(0, [("h", HEADS, FF), ("f", FF, 1)]), R], 0, "f", "1/2"), (HEADS * FF, D_MODEL)),
            (action("down", [R, (0, [("h", HEADS, FF), ("f", FF, 1)])], 1, "f", -2), (D_MODEL, HEADS * FF)),
        ],
    ),
    "channels of a convolution": (
        Kind.SCALE,
        "c",
        [],
        [
            (action("first", [whole("c", FF), R, whole("y", 2), whole("x", 2)], 0, "c"), (FF, D_MODEL, 2, 2)),
            (
                action("second", [R, whole("c", FF), whole("y", 2), whole("x", 2)], 1, "c", -1),
                (D_MODEL, FF, 2, 2),
            ),
        ],
    ),
    "one scale for a whole matrix": (
        Kind.SCALE,
        "one",
        [],
        [(action("w", [(0, [("one", 1, 1), ("f", FF, 1)]), R], 0, "one", -1), (FF, D_MODEL))],
    ),
}


def generator(name: str) -> Generator:
    kind, acting, copies, actions = CASES[name]
    block = actions[0][0].parts[actions[0][0].axis]
    size = next(factor.size for factor in block.factors if factor.name == acting)
    return Generator("g0", kind, acting, size, tuple(copies), tuple(a for a, _ in actions), "s0")


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {a.parameter: shape for a, shape in CASES[name][3]}


def state_of(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    state = {
        key: torch.randn(shape, dtype=torch.float64, generator=source) for key, shape in shapes(name).items()
    }
    return {**state, "bystander": torch.randn(3, dtype=torch.float64, generator=source)}


def element_of(name: str, seed: int = 1) -> Element:
    g = generator(name)
    return random_element(g.kind, g.size, g.count, torch.Generator().manual_seed(seed))


def as_json(g: Generator) -> dict[str, Any]:
    return json.loads(Atlas(spaces=(), generators=(g,)).to_json())["generators"][0]


def stranger(
    state: dict[str, torch.Tensor], g: dict[str, Any], matrices: torch.Tensor
) -> dict[str, np.ndarray]:
    """A generator applied by explicit loops; ``matrices`` [K, n, n], diagonal ones for diagonal kinds."""
    result = {key: value.numpy().copy() for key, value in state.items()}
    for a in g["actions"]:
        w = result[a["parameter"]]
        power = float(Fraction(a["exponent"]))
        factors = [(axis, f) for axis, p in enumerate(a["parts"]) for f in p["factors"]]
        (act_at,) = [
            i for i, (axis, f) in enumerate(factors) if axis == a["axis"] and f["name"] == a["acting"]
        ]
        before = w.copy()
        others = [range(1) if i == act_at else range(f["size"]) for i, (_, f) in enumerate(factors)]
        for index in itertools.product(*others):
            number = 0
            for copy, size in g["copies"]:
                (at,) = [i for i, (_, f) in enumerate(factors) if f["name"] == copy]
                number = number * size + index[at]
            positions = []
            for value in range(g["size"]):
                position = [p["offset"] for p in a["parts"]]
                for i, (axis, f) in enumerate(factors):
                    position[axis] += (value if i == act_at else index[i]) * f["stride"]
                positions.append(tuple(position))
            column = np.array([before[position] for position in positions]) + a["chart"]
            m = matrices[number].numpy()
            if g["kind"] in DIAGONALS:
                column = np.sign(np.diag(m)) ** int(power or 1) * np.abs(np.diag(m)) ** power * column
            elif power == -1:
                column = np.linalg.inv(m).T @ column
            else:
                column = m @ column
            for position, entry in zip(positions, column, strict=True):
                w[position] = entry - a["chart"]
    return result


def difference(found: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> float:
    assert set(found) == set(expected)
    return max(float(np.abs(found[key].numpy() - expected[key]).max()) for key in expected)


@pytest.mark.parametrize("name", CASES)
def test_a_stranger_gets_the_same(name: str) -> None:
    g, e, state = generator(name), element_of(name), state_of(name)
    kept = {key: value.clone() for key, value in state.items()}
    found = apply_generator(state, g, e)
    assert difference(found, stranger(state, as_json(g), e.matrix())) < 1e-12
    assert found["bystander"] is state["bystander"]
    assert all(torch.equal(state[key], kept[key]) for key in state)
    assert all(not torch.equal(found[key], state[key]) for key in g.parameters)


@pytest.mark.parametrize("name", CASES)
def test_inverse_restores_and_composition_is_one_after_the_other(name: str) -> None:
    g, e, other, state = generator(name), element_of(name), element_of(name, 2), state_of(name)
    there = apply_generator(state, g, e)
    back = apply_generator(there, g, e.inverse())
    twice = apply_generator(apply_generator(state, g, other), g, e)
    at_once = apply_generator(state, g, compose(e, other))
    same = apply_generator(state, g, identity(g.kind, g.size, g.count))
    for key in state:
        torch.testing.assert_close(back[key], state[key], rtol=0, atol=1e-12)
        torch.testing.assert_close(at_once[key], twice[key], rtol=0, atol=1e-12)
        torch.testing.assert_close(same[key], state[key], rtol=0, atol=1e-15)


def _offset(a: Action, by: int) -> Action:
    at = next(i for i, p in enumerate(a.parts) if p.offset)
    moved = replace(a.parts[at], offset=a.parts[at].offset - by)
    return replace(a, parts=(*a.parts[:at], moved, *a.parts[at + 1 :]))


def _swapped(a: Action) -> Action:
    """The acting factor exchanged with the factor of the same size on its axis, as a wrong stride would."""
    p = a.parts[a.axis]
    acting = next(f for f in p.factors if f.name == a.acting)
    twin = next(f for f in p.factors if f.name != a.acting and f.size == acting.size)
    swap = {acting.name: twin.stride, twin.name: acting.stride}
    factors = tuple(replace(f, stride=swap.get(f.name, f.stride)) for f in p.factors)
    return replace(a, parts=(*a.parts[: a.axis], replace(p, factors=factors), *a.parts[a.axis + 1 :]))


MUTANTS: dict[str, tuple[str, Callable[[Generator], Generator]]] = {
    "exponent": (
        "values in fused q|k|v",
        lambda g: replace(g, actions=(*g.actions[:-1], replace(g.actions[-1], exponent=Fraction(1)))),
    ),
    "axis": (
        "residual, one orthogonal map",
        lambda g: replace(g, actions=(*g.actions[:-2], replace(g.actions[-2], axis=1))),
    ),
    "offset": (
        "keys interleaved per head (H, 3, D), stored transposed",
        lambda g: replace(g, actions=(g.actions[0], _offset(g.actions[1], 1))),
    ),
    "chart": (
        "a gain stored as 1 + w",
        lambda g: replace(g, actions=(replace(g.actions[0], chart=0.0), *g.actions[1:])),
    ),
    "stride": (
        "rotary pairs, halves, copies inside and outside the pair",
        lambda g: replace(g, actions=(g.actions[0], _swapped(g.actions[1]))),
    ),
    "action": ("values in fused q|k|v", lambda g: replace(g, actions=g.actions[:-1])),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_field_of_an_action_matters(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    g, e, state = generator(name), element_of(name), state_of(name)
    expected = stranger(state, as_json(g), e.matrix())
    assert difference(apply_generator(state, change(g), e), expected) > 0.05


def test_order_of_the_copies_matters_and_is_row_major() -> None:
    name = "rotary pairs, halves, copies inside and outside the pair"
    g, e, state = generator(name), element_of(name), state_of(name)
    swapped = replace(g, copies=g.copies[::-1])
    assert difference(apply_generator(state, swapped, e), stranger(state, as_json(g), e.matrix())) > 0.05
    assert (
        difference(apply_generator(state, swapped, e), stranger(state, as_json(swapped), e.matrix())) < 1e-12
    )


def test_what_the_network_computes_stays() -> None:
    """out_h value_h is the only use of grouped values; here it is summed over query heads by hand."""
    name = "grouped values: one map per key-value head"
    state, rng = state_of(name), torch.Generator().manual_seed(5)
    x = torch.randn(HEADS, GROUP, D_MODEL, dtype=torch.float64, generator=rng)  # attention-averaged inputs

    def output(s: dict[str, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(D_MODEL, dtype=torch.float64)
        for h, g in itertools.product(range(HEADS), range(GROUP)):
            value = s["v"][h * WIDTH : (h + 1) * WIDTH] @ x[h, g]
            start = (h * GROUP + g) * WIDTH
            total += s["o"][:, start : start + WIDTH] @ value
        return total

    moved = apply_generator(state, generator(name), element_of(name))
    torch.testing.assert_close(output(moved), output(state), rtol=0, atol=1e-12)
    assert (moved["v"] - state["v"]).abs().max() > 0.1


def test_published_rotations_are_reproduced() -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    h40 = Matrix((golden["signs"][40].double() / 40**0.5)[None].mT.contiguous(), Kind.ORTHOGONAL)
    for name in ("W", "x"):
        tensor = golden["W_in" if name == "W" else "x"]
        rows = action(name, [whole("o", len(tensor)), whole("i", 40)], 1, "i")
        found = act(tensor, rows, h40)
        torch.testing.assert_close(found, golden[f"{name}_after_R4"], rtol=0, atol=2e-6)
        assert (act(tensor, rows, h40.inverse()) - golden[f"{name}_after_R4"]).abs().max() > 1
    per_head = (0, [("h", 4, 8), ("v", 8, 1)])
    r2 = Matrix(golden["R2"].mT.expand(4, -1, -1).contiguous(), Kind.ORTHOGONAL)
    value = act(golden["v0"], action("v", [per_head, whole("i", 16)], 0, "v"), r2, ["h"])
    out = act(golden["o0"], action("o", [whole("i", 16), per_head], 1, "v", -1), r2, ["h"])
    torch.testing.assert_close(value, golden["v_after_R2"], rtol=0, atol=2e-6)
    torch.testing.assert_close(out, golden["o_after_R2"], rtol=0, atol=2e-6)


# --- steps -----------------------------------------------------------------------------------------------


def steps_of(name: str) -> list[tuple[Step, tuple[int, ...]]]:
    _, _, copies, actions = CASES[name]
    names = tuple(n for n, _ in copies)
    result: list[tuple[Step, tuple[int, ...]]] = []
    for a, shape in actions:
        result.append((ActStep(a, element_of(name), names, shape), shape))
        result.append((CenterStep(a, shape), shape))
        result.append((FillStep(a, 1.0, shape), shape))
        result.append((AddStep(torch.ones((*shape[:-1], 1), dtype=torch.float64)), shape))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_done_in_float64_and_cast_once(dtype: torch.dtype) -> None:
    name = "a gain stored as 1 + w"
    e = element_of(name)
    for a, shape in CASES[name][3]:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        out = act(tensor, a, e)
        assert out.dtype == dtype
        assert torch.equal(out, act(tensor.double(), a, e).to(dtype))


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


def test_a_permutation_through_a_chart_only_moves() -> None:
    w = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    e = random_element(Kind.PERMUTATION, D_MODEL, 1, torch.Generator().manual_seed(0))
    charted, plain = (act(w, action("w", [R], 0, "r", 1, chart), e) for chart in (0.1, 0.0))
    assert torch.equal(charted, plain)


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


def test_parameters_that_require_grad_and_views_are_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(D_MODEL, FF, dtype=torch.float64))
    kept = weight.detach().clone()
    a = action("w", [whole("f", FF), R], 1, "r")
    e = random_element(Kind.ORTHOGONAL, D_MODEL, 1, torch.Generator().manual_seed(0))
    for tensor in (weight.T, weight.T.detach()):
        out = act(tensor, a, e)
        assert out.is_contiguous()
        assert not out.requires_grad
        torch.testing.assert_close(out, kept.T @ e.matrix()[0].T)
    assert torch.equal(weight, kept)


# --- refusals --------------------------------------------------------------------------------------------

PLAIN = action("w", [whole("f", FF), R], 1, "r")
PER_HEAD = action("w", [heads(), R], 0, "v")


@pytest.mark.parametrize(
    ("a", "shape", "copies", "message"),
    [
        (PLAIN, (FF, D_MODEL - 1), (), "does not lie on the axis"),
        (PLAIN, (FF,), (), "one part per axis"),
        (replace(PLAIN, axis=0), (FF, D_MODEL), (), "acting factor"),
        (replace(PLAIN, axis=2), (FF, D_MODEL), (), "acting factor"),
        (replace(PLAIN, acting="z"), (FF, D_MODEL), (), "acting factor"),
        (PLAIN, (FF, D_MODEL), ("z",), "copy must occur exactly once"),
        (PLAIN, (FF, D_MODEL), ("r",), "copy must occur exactly once"),
        (PLAIN, (FF, D_MODEL), ("f",), "another shape"),
        (action("w", [whole("f", FF), whole("f", FF), R], 2, "r"), (FF, FF, D_MODEL), ("f",), "exactly once"),
        (action("w", [(-1, [("f", FF, 1)]), R], 1, "r"), (FF, D_MODEL), (), "does not lie on the axis"),
        (action("w", [(1, [("f", FF, 1)]), R], 1, "r"), (FF, D_MODEL), (), "does not lie on the axis"),
        (action("w", [(0, [("a", 2, 1), ("b", 2, 1)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (action("w", [(0, [("a", 0, 1)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (action("w", [(0, [("a", 2, 0)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (action("w", [(3, [("a", 2, -1)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (replace(PLAIN, exponent=Fraction(2)), (FF, D_MODEL), (), "no power"),
        (replace(PLAIN, through=Through("b", (), 0, 0)), (FF, D_MODEL), (), "through a linear map"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(
    a: Action, shape: tuple[int, ...], copies: tuple[str, ...], message: str
) -> None:
    e = identity(Kind.ORTHOGONAL, D_MODEL)
    with pytest.raises(RegaugeError, match=message):
        act(torch.zeros(shape, dtype=torch.float64), a, e, copies)


def test_an_element_of_another_size_or_count_is_refused() -> None:
    tensor = torch.zeros(HEADS * WIDTH, D_MODEL, dtype=torch.float64)
    for e in (
        identity(Kind.ORTHOGONAL, WIDTH),
        identity(Kind.ORTHOGONAL, WIDTH + 1, HEADS),
        identity(Kind.ORTHOGONAL, WIDTH, HEADS * D_MODEL),
    ):
        with pytest.raises(RegaugeError, match="another shape"):
            act(tensor, PER_HEAD, e, ("h",))
        with pytest.raises(RegaugeError, match="another shape"):
            ActStep(PER_HEAD, e, ("h",))


def test_arithmetic_on_integers_is_refused_and_moves_are_not() -> None:
    tensor = torch.arange(FF * D_MODEL).reshape(FF, D_MODEL)
    with pytest.raises(RegaugeError, match="not real"):
        act(tensor, PLAIN, identity(Kind.ORTHOGONAL, D_MODEL))
    with pytest.raises(RegaugeError, match="not real"):
        CenterStep(PLAIN).apply(tensor)
    assert torch.equal(act(tensor, PLAIN, identity(Kind.PERMUTATION, D_MODEL)), tensor)


def test_generators_are_applied_completely_or_not_at_all() -> None:
    name = "residual, one orthogonal map"
    g, e, state = generator(name), element_of(name), state_of(name)
    with pytest.raises(RegaugeError, match="listed twice"):
        apply_generator(state, replace(g, actions=(*g.actions, g.actions[0])), e)
    with pytest.raises(RegaugeError, match="lacks a parameter"):
        apply_generator({k: v for k, v in state.items() if k != "bias"}, g, e)
    for kind in (Kind.TRANSLATION, Kind.NULL, Kind.PERMUTATION, Kind.ORTHOGONAL_ONES, Kind.POSITIVE):
        with pytest.raises(RegaugeError, match="does not act"):
            apply_generator(state, replace(g, kind=kind), e)
    smaller = random_element(Kind.PERMUTATION, D_MODEL, 1, torch.Generator().manual_seed(0))
    moved = apply_generator(state, g, smaller)
    assert difference(moved, stranger(state, as_json(g), smaller.matrix())) < 1e-12


def test_a_state_in_storage_precision_is_acted_on_in_float64() -> None:
    name = "values in fused q|k|v"
    state = {key: value.to(torch.bfloat16) for key, value in state_of(name).items()}
    found = apply_generator(state, generator(name), element_of(name))
    wide = apply_generator({k: v.double() for k, v in state.items()}, generator(name), element_of(name))
    for key in generator(name).parameters:
        torch.testing.assert_close(found[key], wide[key], rtol=1e-14, atol=1e-14)
    assert found["bystander"].dtype == torch.bfloat16
