"""Every rule against concrete probing: what it lets pass does pass, the next larger kind does not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from regauge.atlas import Atlas, Kind
from regauge.discover import discover
from regauge.interpret import interpret, op_name
from regauge.probe import LARGER, Prober
from regauge.rules import RULES
from regauge.rules.rotary import find_rotary
from regauge.trace import Trace, trace
from rule_cases_entries import ENTRIES
from rule_cases_places import PLACES
from rule_nets import DIAGONAL, GROUPS, LINEAR, NOTHING, POSITIVE, N, Net, found

CASES = ENTRIES | PLACES


@cache
def traced(name: str) -> Trace:
    case = CASES[name]
    return trace(Net(case.shapes, case.body), (), {"x": case.x})


@cache
def atlas_of(name: str) -> Atlas:
    return discover(traced(name))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_lets_pass_keeps_the_output(name: str) -> None:
    prober = Prober(traced(name), {}, {"x": CASES[name].x}, 3)
    assert all(bool(torch.isfinite(out).all()) for out in prober.base)
    for generator in atlas_of(name).generators:
        assert prober.probe(generator).error < 1e-11, (generator.kind, generator.actions)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_lets_pass_exactly_the_kinds_expected(name: str) -> None:
    for (parameter, axis), kinds in CASES[name].expected.items():
        assert found(atlas_of(name), parameter, axis) == kinds, (parameter, axis)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if any(case.expected.values())])
def test_the_next_larger_kind_changes_the_output(name: str) -> None:
    """Where the expected kinds hold the largest of a space: an element of the next kind must not pass."""
    prober = Prober(traced(name), {}, {"x": CASES[name].x}, 3)
    for generator in atlas_of(name).generators:
        larger = LARGER.get(generator.kind)
        if larger is None or generator.size < 3 or name in SIGNED.get(generator.kind, ()):
            continue
        if generator.kind in DIAGONAL and any(
            other.kind in GROUPS - {Kind.PERMUTATION} and other.acting == generator.acting
            for other in atlas_of(name).generators
        ):
            continue  # contained in a larger group, with another dependence
        assert prober.probe(generator, larger).error > 1e-6, (generator.kind, generator.actions)


SIGNED = {
    Kind.POSITIVE: ("abs", "square", "square by itself", "root", "addcmul", "odd power"),
    Kind.SCALE: ("cube",),
    Kind.PERMUTATION: ("number of nonzeros",),
    Kind.ORTHOGONAL_ONES: ("where of two",),
}
"""Cases in which the next kind passes as well, or has no powers: signs in a generator of their own; a count
of nonzeros that no element changes; a choice between two vectors that is linear in both."""

UNTESTED = {
    "shaped": "random or uninitialised values",
    "assertion": "computes nothing",
}


def test_every_rule_is_exercised() -> None:
    seen = {
        op_name(node) for name in CASES for node in traced(name).graph.nodes if node.op == "call_function"
    }
    rules = {rule.__name__ for op, rule in RULES.items() if op in seen}
    missing = {rule.__name__ for rule in RULES.values()} - rules - set(UNTESTED)
    assert not missing


def test_every_operation_named_by_a_rule_exists() -> None:
    for name in RULES:
        family, _, op = name.partition(".")
        assert family in ("getitem", "_set_grad_enabled") or hasattr(torch.ops.aten, op), name


def test_no_rule_claims_an_operation_that_writes_in_place() -> None:
    for name in RULES:
        packet = (
            getattr(torch.ops.aten, name.removeprefix("aten."), None) if name.startswith("aten.") else None
        )
        if packet is not None:
            schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
            assert any(not schema.is_mutable for schema in schemas), name


def test_in_place_code_is_traced_as_if_it_were_not() -> None:
    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, p["a"])
        h.mul_(2).add_(h.clone())
        h[:, :2] = h[:, :2].relu()
        return F.linear(h, p["b"])

    t = trace(Net({"a": (N, 5), "b": (4, N)}, body), (), {"x": torch.ones(3, 5)})
    for node in t.graph.nodes:
        if node.op == "call_function":
            assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False), node
    atlas = discover(t)
    assert found(atlas, "a", 0) == POSITIVE | LINEAR
    prober = Prober(t, {}, {"x": torch.ones(3, 5)}, 1)
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)


def test_an_unknown_operation_is_counted_and_stops_what_it_touches() -> None:
    atlas = atlas_of("unknown operation")
    assert any("without a rule" in refusal.reason for refusal in atlas.refusals)


def test_a_rule_that_fails_is_a_refusal_that_names_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("no such axis")

    monkeypatch.setitem(RULES, "aten.relu", broken)
    atlas = discover(traced("relu"))
    assert found(atlas, "a", 0) == NOTHING
    assert [r.reason for r in atlas.refusals] == ["aten.relu: its rule failed (IndexError: no such axis)"]


def test_a_rule_that_gives_another_shape_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "aten.relu", lambda walk, node, x: walk.reshape(x, (3, 2, 3)))
    atlas = discover(traced("relu"))
    assert found(atlas, "a", 0) == NOTHING
    assert "rule failed" in atlas.refusals[0].reason


def test_rotary_is_recognised_in_its_spellings_only() -> None:
    for style in ("halves", "pairs", "complex"):
        assert len(find_rotary(traced(f"rotate {style}").graph)) == 2, style
    assert not find_rotary(traced("rotate by two tables").graph)


def test_a_head_that_turns_at_its_own_speed_is_not_exchanged_with_another() -> None:
    angle = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.3, 0.1]))
    speeds = torch.stack([angle, 2 * angle])[:, :, :]

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = (torch.einsum("bti,hei->bhte", x, p[n]) for n in "qk")
        cos, sin = speeds.cos(), speeds.sin()
        q, k = (
            torch.cat([h[..., :3] * cos - h[..., 3:] * sin, h[..., 3:] * cos + h[..., :3] * sin], -1)
            for h in (q, k)
        )
        return torch.einsum("bhte,bhse,oh->bots", q, k, p["o"])

    x = torch.ones(2, 4, 5)
    t = trace(Net({"q": (2, N, 5), "k": (2, N, 5), "o": (3, 2)}, body), (), {"x": x})
    assert len(find_rotary(t.graph)) == 2
    atlas = discover(t)
    assert Kind.COMPLEX in found(atlas, "q", 1)
    assert Kind.PERMUTATION not in found(atlas, "q", 0)
    prober = Prober(t, {}, {"x": torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))}, 1)
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)


def test_numbers_made_in_the_code_keep_their_values_on_meta() -> None:
    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        number = torch.tensor([2.0, 3.0, 4.0], device=x.device)
        return x[:, [1]] * p["a"] * number + x.new_tensor(5.0)

    with torch.device("meta"):
        model = Net({"a": (3,)}, body)
        t = trace(model, (), {"x": torch.empty(2, 3)})
    assert all(value.device.type == "cpu" for value in t.constants.values())
    x = torch.ones(2, 3)
    out = Prober(t, {}, {"x": x}, 1)
    expected = out.state["p.a"] * torch.tensor([2.0, 3.0, 4.0]) + 5
    assert torch.allclose(out.base[0], expected.expand(2, 3))


def test_an_element_may_not_differ_along_an_axis_that_a_contraction_mixes() -> None:
    """Heads are mixed by a square matrix and added to themselves: one element for all heads."""

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("bi,hei->bhe", x, p["a"])
        h = h + torch.einsum("gh,bhe->bge", p["m"], h)
        return torch.einsum("bhe,ohe->bo", h, p["o"])

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    t = trace(Net({"a": (4, N, 5), "m": (4, 4), "o": (2, 4, N)}, body), (), {"x": x})
    atlas = discover(t)
    prober = Prober(t, {}, {"x": x}, 1)
    linear = [g for g in atlas.generators if g.kind is Kind.GENERAL_LINEAR and g.size == N]
    assert [g.copies for g in linear] == [()]
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)


def test_two_lists_of_selected_experts_are_not_one() -> None:
    """A row picks one expert to write and another to read: no scale may differ between experts."""

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        index = F.linear(x, p["r"]).topk(2, -1)[1]
        hidden = torch.einsum("bi,bni->bn", x, p["e"][index[:, 0]])
        return torch.einsum("bn,bon->bo", hidden, p["d"][index[:, 1]])

    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    t = trace(Net({"r": (4, 5), "e": (4, N, 5), "d": (4, 3, N)}, body), (), {"x": x})
    atlas = discover(t)
    prober = Prober(t, {}, {"x": x}, 1)
    assert all(prober.probe(g).error < 1e-11 for g in atlas.generators)
    assert {g.kind for g in atlas.generators if g.copies} <= {Kind.NULL, Kind.TRANSLATION}


def test_the_walk_does_not_depend_on_anything_but_the_graph() -> None:
    first, second = (interpret(traced("layer norm")) for _ in range(2))
    assert [repr(type(f)) + f.node for f in first.result.facts] == [
        repr(type(f)) + f.node for f in second.result.facts
    ]


def test_a_change_that_leaves_the_domain_of_a_root_is_not_called_invisible() -> None:
    """One key: the softmax over it is one whatever the scores are, but not where they are no numbers."""

    def body(p: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.batch_norm(F.linear(x, p["a"]), p["m"], p["v"])
        return (h.softmax(0) * x.sum()).sum(-1)

    x = torch.ones(1, 5)
    t = trace(Net({"a": (N, 5), "m": (N,), "v": (N,)}, body), (), {"x": x})
    nulls = {a.parameter for g in discover(t).generators if g.kind is Kind.NULL for a in g.actions}
    assert "p.v" not in nulls
    assert nulls
