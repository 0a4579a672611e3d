"""Laws of the moves, over the registry itself: a move added there is tested here or the suite fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from regauge.errors import Refused
from regauge.moves import MOVES
from regauge.steps import ActStep
from zoo import NAMES, Moved, atlas, carry_out, distance, folded, move, original, specimen, weights

SAME = 1e-10

FOLDS = ("fold-shifts", "fold-scales", "fold-value-bias", "drop-key-bias")
ONCE = (
    "untie",
    "fold-batchnorm",
    "add-bias",
    *FOLDS,
    "fold-layer-scale",
    "fold-embedding-scale",
    "center",
    "strip",
)
"""Moves to a normal form: doing them again changes nothing."""
RANDOM = ("rotate", "permute", "grow")
"""Moves that draw: another seed gives another result."""
OTHERS = ("rescale", "balance-heads", "insert-layers", "tie", "complex", "merge", "upgrade", "collapse")

ELSEWHERE = ("tie",)
"""Moves that need a configuration, which the zoo does not give: see test_tying."""

NOT_CANONICAL = {
    "falcon": "its value width is split as rotary splits the fused projection: two permutations cross",
}

TRACED = {
    "insert-layers": ("llama", "gemma3", "gpt2", "bert", "picture_stack"),
    "merge": ("llama", "gpt2", "whisper", "picture_stack", "gate_rectified"),
    "grow": ("llama-tied", "gpt2", "gemma3", "picture_stack", "gate_rectified"),
    "complex": ("llama", "gpt2", "whisper", "picture_stack", "gate_rectified"),
    "upgrade": ("llama", "gemma3", "gpt2", "bert", "picture_stack"),
    "collapse": ("llama", "gemma3", "gpt2", "whisper", "vit", "picture_stack"),
    "fold-embedding-scale": ("llama", "gemma3", "granite", "opt", "rectified"),
}
"""Moves that trace the model again for every trial, and the members of the zoo they are tried on here."""

FEW = ("llama", "llama-tied", "gpt2", "opt", "bert", "gemma3", "picture_stack", "gate_rectified")


BEFORE = {
    "merge": ({"name": "grow", "neurons": "+3"},),
    "collapse": ({"name": "upgrade", "norm": "magnitude"},),
}
"""What is done before a move that has nothing to do in a model with random weights."""

NEEDED = {"grow": {"neurons": "+3"}}
"""Options without which a move means nothing."""


def variants() -> Iterator[dict[str, Any]]:
    """Every move with its defaults, and with every other choice of every option that has choices."""
    for name, described in MOVES.items():
        plain = {"name": name, **NEEDED.get(name, {})}
        yield plain
        for key, option in described.options.items():
            choices = (False, True) if option.type is bool else option.choices
            yield from ({**plain, key: choice} for choice in choices if choice != option.default)


VARIANTS = tuple(variants())


def members(spec: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if name in TRACED.get(spec["name"], names)]


def attempt(name: str, *moves: Any, **more: Any) -> Moved | Refused:
    names = (held if isinstance(held, str) else held["name"] for held in moves)
    moves = tuple(m for key, held in zip(names, moves, strict=True) for m in (*BEFORE.get(key, ()), held))
    try:
        return move(name, *moves, **more)
    except Refused as refusal:
        return refusal


def prepared(name: str) -> list[Any]:
    """The moves of :func:`zoo.folded`."""
    return [dict(item)["move"] for item in folded(name).plan.recipe]


def test_every_move_is_classified() -> None:
    assert sorted((*ONCE, *RANDOM, *OTHERS)) == sorted(MOVES)


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: ":".join(f"{k}={v}" for k, v in s.items())[5:])
def test_kept_or_refused(spec: dict[str, Any]) -> None:
    """After folding, and with its defaults also as built, on the whole zoo; and somewhere the move exists."""
    done = 0
    bad: list[tuple[Any, ...]] = []
    for name in members(spec, NAMES):
        usual = len(spec) == 1 + len(NEEDED.get(spec["name"], {}))
        plain: tuple[Any, ...] = () if usual else tuple(prepared(name))
        for before in dict.fromkeys((plain, tuple(prepared(name)))):
            found = attempt(name, *before, spec)
            if isinstance(found, Refused):
                reason = _unreasonable(name, found)
                if reason:
                    bad.append((name, before, reason, str(found)))
                continue
            done += 1
            error = distance(original(name), found.output)
            if not error < SAME:
                bad.append((name, before, error))
            if any(item["membership"] > 1e-9 or item["pairing"] > 1e-9 for item in found.plan.used):
                bad.append((name, before, found.plan.used))
    assert not bad
    assert done or spec["name"] in ELSEWHERE


def _unreasonable(name: str, refusal: Refused) -> str:
    """What is wrong with a refusal: it must say what was found, and name nodes that exist."""
    if not (refusal.found or refusal.node):
        return "neither what was found nor an operation"
    nodes = {node.name for node in specimen(name).trace.graph.nodes}
    if refusal.node is not None and refusal.node.split()[0] not in nodes:
        return "no such operation"
    return ""


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: ":".join(f"{k}={v}" for k, v in s.items())[5:])
def test_the_seed_decides(spec: dict[str, Any]) -> None:
    for name in members(spec, FEW):
        before = prepared(name) if spec["name"] not in ("untie", "fold-scales") else []
        first, again, other = (attempt(name, *before, spec, seed=seed) for seed in (1, 1, 2))
        if isinstance(first, Refused):
            assert str(first) == str(again) == str(other)
            continue
        assert isinstance(again, Moved)
        assert isinstance(other, Moved)
        assert _identical(first.weights, again.weights)
        drawn = (spec["name"] in RANDOM and spec.get("mode") != "sorted") or (
            "random" in (spec.get("mode"), spec.get("new")) or spec.get("norm") == "gatednorm"
        )
        assert _identical(first.weights, other.weights) is not drawn, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ONCE)
def test_done_is_done(what: str, name: str) -> None:
    first = attempt(name, *([] if what in ("untie", "fold-scales") else prepared(name)), what)
    if isinstance(first, Refused):
        return
    again = attempt(name, *[dict(item)["move"] for item in first.plan.recipe], what)
    if isinstance(again, Moved):
        assert _apart(first.weights, again.weights) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_sorting_is_canonical(name: str) -> None:
    """Whatever order the units are in, sorting puts them in the same one, bit by bit."""
    plain = attempt(name, {"name": "permute", "mode": "sorted"})
    if isinstance(plain, Refused) or name in NOT_CANONICAL:
        return
    assert _apart(plain.weights, move(name, "permute", {"name": "permute", "mode": "sorted"}).weights) == 0
    twice = move(name, {"name": "permute", "mode": "sorted"}, {"name": "permute", "mode": "sorted"})
    assert _identical(plain.weights, twice.weights)


@pytest.mark.parametrize("spec", [v for v in VARIANTS if v["name"] == "rotate"], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_turning_back(name: str, spec: dict[str, Any]) -> None:
    """The inverse of every element, last step first, restores the weights."""
    start = folded(name)
    try:
        moved = move(name, *prepared(name), spec)
    except Refused:
        return
    offset = {key: len(steps) for key, steps in start.plan.steps.items()}
    restored: dict[str, torch.Tensor] = {}
    for key, value in moved.weights.items():
        for step in reversed(moved.plan.steps.get(key, ())[offset.get(key, 0) :]):
            assert isinstance(step, ActStep)
            value = ActStep(step.action, step.element.inverse(), step.copies, step.shape).apply(value)
        restored[key] = value
    assert _apart(start.weights, moved.weights) > 1e-3
    assert _apart(start.weights, restored) < 1e-12


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda s: ":".join(f"{k}={v}" for k, v in s.items())[5:])
def test_only_rounding_is_left(spec: dict[str, Any]) -> None:
    """Stored in float32 the error is that of float32, in float64 of float64; none if entries only move."""
    for name in members(spec, FEW):
        begin = {key: value.float().double() for key, value in weights(name).items()}
        before = prepared(name) if spec["name"] not in ("untie", "fold-scales") else []
        found = attempt(name, *before, spec, start=begin)
        if isinstance(found, Refused):
            continue
        base = type(found.bench)(specimen(name)).run(begin)
        assert distance(base, found.output) < 1e-13
        rounded = {key: value.float().double() for key, value in found.weights.items()}
        error = distance(base, found.bench.run(rounded))
        assert error < 3e-6
        computed = any(made.build is not None for made in found.plan.made.values())
        if not computed and not any(step.arithmetic for steps in found.plan.steps.values() for step in steps):
            assert error < 1e-14
            held = {key: value.float() for key, value in begin.items()}
            stored = carry_out(held, found.plan, [key for key in found.weights if key in held])
            assert all(torch.equal(value.double(), found.weights[key]) for key, value in stored.items())


@pytest.mark.parametrize("name", FEW)
def test_balance_shrinks(name: str) -> None:
    """Balanced writers and readers have the least sum of squares: it falls, and falls no further."""
    for what in ("rescale", "balance-heads"):
        once = attempt(name, what)
        if isinstance(once, Refused):
            continue
        again = move(name, what, what)
        sizes = [_energy(name, state) for state in (weights(name), once.weights, again.weights)]
        assert sizes[1] < sizes[0], what
        assert sizes[2] <= sizes[1] * (1 + 1e-9), what


def _energy(name: str, state: Mapping[str, torch.Tensor]) -> float:
    """Of the values that act: a gain stored as w counts as 1 + w."""
    added = {a.parameter: a.chart for g in atlas(name).generators for a in g.actions}
    return sum(float((value + added.get(key, 0.0)).square().sum()) for key, value in state.items())


def _identical(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _apart(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry."""
    if a.keys() != b.keys():
        return math.inf
    largest = max(float(value.abs().max()) for value in a.values())
    return max(float((a[key] - b[key]).abs().max()) for key in a) / largest


# --- moves in other orders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied_head", "layers_share", "llama-tied", "gpt2", "t5", "whisper", "bert"])
def test_untying_late_takes_over_what_was_done(name: str) -> None:
    """The second copy starts as the tensor is by then, and each goes its own way afterwards."""
    moved = move(name, "permute", "untie", "permute", "permute")
    assert moved.plan.copies
    assert distance(original(name), moved.output) < SAME


# --- gains of zero, negative gains, given vectors -----------------------------------------------------------


def _with(name: str, parameter: str, entries: list[float]) -> dict[str, torch.Tensor]:
    state = {key: value.clone() for key, value in weights(name).items()}
    state[parameter][: len(entries)] = torch.tensor(entries, dtype=torch.float64)
    return state


def test_a_gain_of_zero_or_less_is_folded() -> None:
    gain = "model.layers.0.input_layernorm.weight"
    begin = _with("llama", gain, [0.0, -2.0])
    moved = move("llama", "fold-scales", start=begin)
    base = type(moved.bench)(specimen("llama")).run(begin)
    assert distance(base, moved.output) < 1e-13
    assert bool((moved.weights[gain] == 1).all())


def test_a_gain_of_zero_under_a_shift_needs_the_shift_folded_first() -> None:
    begin = _with("gpt2", "transformer.h.0.ln_1.weight", [0.0])
    with pytest.raises(Refused, match="fold-shifts before"):
        move("gpt2", "untie", "fold-scales", start=begin)
    moved = move("gpt2", "untie", "fold-shifts", "fold-scales", start=begin)
    base = type(moved.bench)(specimen("gpt2")).run(begin)
    assert distance(base, moved.output) < 1e-13
