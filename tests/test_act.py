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

from act_cases import (
    CASES,
    D_MODEL,
    FF,
    GROUP,
    HEADS,
    WIDTH,
    R,
    action,
    element_of,
    generator,
    state_of,
    whole,
)
from regauge.act import act, apply_generator
from regauge.atlas import Action, Atlas, Generator, Kind
from regauge.elements import Matrix, compose, identity, random_element
from regauge.errors import RegaugeError

GOLDEN = Path(__file__).parent / "data" / "hadamard_golden.pt"
DIAGONALS = ("sign", "positive", "scale")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_done_in_float64_and_cast_once(dtype: torch.dtype) -> None:
    name = "a gain stored as 1 + w"
    e = element_of(name)
    for a, shape in CASES[name][3]:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        out = act(tensor, a, e)
        assert out.dtype == dtype
        assert torch.equal(out, act(tensor.double(), a, e).to(dtype))


def test_a_permutation_through_a_chart_only_moves() -> None:
    w = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    e = random_element(Kind.PERMUTATION, D_MODEL, 1, torch.Generator().manual_seed(0))
    charted, plain = (act(w, action("w", [R], 0, "r", 1, chart), e) for chart in (0.1, 0.0))
    assert torch.equal(charted, plain)


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
