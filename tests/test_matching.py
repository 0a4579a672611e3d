"""Alignment: what a random element of every generator hides is found, and nothing else is."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regauge.api import rewrite_module
from regauge.atlas import Kind
from regauge.errors import Refused
from regauge.matching import align_modules, align_sides
from regauge.matching.alignment import leftovers
from regauge.matching.correspondence import correspond
from regauge.matching.history import shortened
from regauge.matching.moved import Pair
from regauge.matching.order import LINEAR
from regauge.matching.sides import Side
from regauge.matching.solver import bundles, refine, run
from regauge.recipe import parse_recipe
from zoo.drawn import drawn, elements_of, moved, side

SAME = 1e-9
MODELS = ("llama", "qwen3", "phi3", "gemma3", "gpt2", "neox", "bert", "whisper", "t5", "resnet")


@cache
def known(name: str, **fields: Any) -> Side:
    return side(*drawn(name, **fields))


@pytest.mark.parametrize("name", MODELS)
def test_random_elements_of_every_generator_are_undone(name: str) -> None:
    a = known(name)
    found, pair = align_sides(a, moved(a, elements_of(a, 1)))
    assert max(t.relative for t in found.tensors) < SAME
    assert found.different == 0
    assert not found.unsolved
    read = {
        a.trace.parameters[n.name] for n in a.trace.graph.nodes if n.name in a.trace.parameters and n.users
    }
    assert len(pair.names) + len(a.plain() & read) == len(read)


def test_what_stands_before_does_not_hide_what_is_done() -> None:
    a = known("gpt2")
    plain = sum(float((a.read(n) - moved(a, elements_of(a, 1)).read(n)).norm()) for n in a.shapes)
    assert plain > 10


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_same_bytes_each_time(name: str) -> None:
    a = known(name)
    b = moved(a, elements_of(a, 1))
    one, two = align_sides(a, b)[0], align_sides(a, b)[0]
    assert one.tensors == two.tensors


ENCODINGS = {
    "untied": ["untie"],
    "folded": ["untie", "fold-shifts", "fold-scales", "fold-value-bias", "drop-key-bias"],
    "moved": [
        "untie", "fold-shifts", "fold-scales", "center",
        {"name": "rotate", "space": "all"}, {"name": "rescale", "mode": "random"},
        {"name": "permute", "signs": True},
    ],
    "rms": [
        "untie", "fold-shifts", "fold-scales", {"name": "center", "norm": "rms"}, "strip",
        {"name": "rotate", "space": "all"}, {"name": "permute", "signs": True},
    ],
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_other_encodings_of_the_function(name: str, encoding: str) -> None:
    model, inputs = drawn(name)
    steps = [{"name": step} if isinstance(step, str) else step for step in ENCODINGS[encoding]]
    recipe = parse_recipe({"moves": [{**step, "optional": True} for step in steps]})
    try:
        other = rewrite_module(model, inputs, recipe, seed=3)[0]
    except Refused:
        pytest.skip("the model has no other such encoding")
    found, _ = align_sides(known(name), side(other, inputs))
    assert max(t.relative for t in found.tensors) < SAME
    assert not found.only_a
    assert not found.only_b


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "resnet"])
def test_unrelated_models_stay_far(name: str) -> None:
    found, _ = align_sides(known(name), known(name, seed=5))
    assert found.relative > 0.8
    assert found.similarity < 0.7
    assert max(t.relative for t in found.tensors if len(t.shape) > 1) < 3


def test_a_wrong_pairing_of_parameters_does_not_fit() -> None:
    model, inputs = drawn("llama")
    other = copy.deepcopy(model)
    layers: Any = other.get_submodule("model.layers")
    kept = [copy.deepcopy(layer.state_dict()) for layer in layers]
    layers[0].load_state_dict(kept[1])
    layers[1].load_state_dict(kept[0])
    assert align_sides(known("llama"), side(other, inputs))[0].relative > 0.5


def test_other_operations_are_refused() -> None:
    with pytest.raises(Refused):
        align_sides(known("llama"), known("resnet"))


@pytest.mark.parametrize("vocabulary", [17])
def test_a_vocabulary_smaller_than_the_width(vocabulary: int) -> None:
    a = known("llama", vocab_size=vocabulary)
    found, _ = align_sides(a, moved(a, elements_of(a, 2)))
    assert max(t.relative for t in found.tensors) < SAME


def net(hidden: int = 12, activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, hidden), activation(), nn.Linear(hidden, 10), activation(), nn.Linear(10, 4)
    )
    for value in model.double().parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return model.eval()


X = (torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)


def test_dead_units_are_padding() -> None:
    a: Any = net(12)
    b: Any = net(15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i, axes in ((0, (0,)), (2, (1,))):
            big, small = b[i].weight, a[i].weight
            wide = torch.zeros_like(big)
            wide[tuple(slice(0, n) for n in small.shape)] = small
            big.copy_(wide.index_select(axes[0], order))
        b[0].bias.copy_(torch.cat([a[0].bias, torch.zeros(3).double()])[order])
        b[2].bias.copy_(a[2].bias)
        b[4].load_state_dict(a[4].state_dict())
    for one, two in ((a, b), (b, a)):
        assert max(t.relative for t in align_modules(one, two, X).tensors) < SAME


def blended(a: nn.Module, b: nn.Module) -> nn.Module:
    out = copy.deepcopy(a)
    with torch.no_grad():
        for value, other in zip(out.parameters(), b.parameters(), strict=True):
            value.add_(other).div_(2)
    return out


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_half_of_an_unrelated_model(seed: int) -> None:
    found = align_modules(net(40), blended(net(40), net(40, seed=seed)), X)
    assert found.similarity > 0.68
    assert found.relative < 0.8


def test_units_that_are_nearly_dead_are_not_blown_up() -> None:
    a: Any = net(12)
    b: Any = net(12, seed=1)
    with torch.no_grad():
        a[0].weight[3:6] *= 1e-7
        a[0].bias[3:6] *= 1e-7
        b[2].weight[:, :2] *= 1e-9
    assert max(t.relative for t in align_modules(a, b, X).tensors) < 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "whisper", "bert", "resnet"])
def test_no_sweep_leaves_more(name: str) -> None:
    pair, solved = _once(known(name), known(name, seed=5))

    def left() -> float:
        total = 0.0
        for parameter in pair.names:
            for x, y in pair.chunks(parameter):
                total += pair.weight(parameter) * float((x - y).square().sum())
        return total

    steps = [left()]
    for _ in range(3):
        refine(pair, solved)
        pair.replace(shortened(pair.history))
        steps.append(left())
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(steps))
    assert steps[-1] < steps[0]


def _once(a: Side, b: Side) -> tuple[Pair, Any]:
    pair = Pair(a, b, correspond(a, b).names)
    kept = [
        replace(g, actions=tuple(x for x in g.actions if x.parameter in pair.names))
        for g in a.atlas.generators
        if g.kind in LINEAR
    ]
    return pair, run(pair, [g for g in kept if g.actions])


def test_a_shortened_history_does_the_same() -> None:
    a = known("qwen3")
    pair = Pair(a, a, {name: name for name in a.shapes})
    generators = {g.id: g for g in a.atlas.generators}
    for seed in range(3):
        for key, element in elements_of(a, seed).items():
            pair.apply(generators[key], element)
    before = {name: pair.moved(name) for name in pair.names}
    short = shortened(pair.history)
    assert len(short) < len(pair.history)
    pair.replace(short)
    for name, value in before.items():
        torch.testing.assert_close(pair.moved(name), value, rtol=1e-12, atol=1e-12)
    inverse = [(g, e.inverse()) for g, e in reversed(short) if g.kind is not Kind.GENERAL_LINEAR]
    assert len(shortened([*inverse, *[(g, e) for g, e in short if g.kind is Kind.SIGN]])) <= len(inverse) + 1


def test_diagonals_on_one_factor_are_one_bundle() -> None:
    generators = [g for g in known("bert").atlas.generators if g.kind in LINEAR]
    held = [bundle for bundle in bundles(generators) if bundle[0].kind is Kind.SIGN]
    assert len(held) == 1
    assert len(held[0]) > 1


class Layers(nn.Module):
    """The network of the golden case, with an activation that no scale passes."""

    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.maps = nn.ModuleList()
        for i in range(4):
            kernel, bias = (params[f"Dense_{i}/{part}"].double() for part in ("kernel", "bias"))
            layer = nn.Linear(kernel.shape[0], kernel.shape[1]).double()
            layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
            self.maps.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.maps[:-1]:
            x = nn.functional.gelu(layer(x))
        return self.maps[-1](x)


@cache
def golden() -> dict[str, Any]:
    path = Path(__file__).parent / "data" / "git_rebasin_mlp_golden.pt"
    return torch.load(path, weights_only=True)


def _golden(case: str) -> tuple[Any, float]:
    given = golden()
    a, b = Layers(given["inputs"]["params_a"]), Layers(given["outputs"][case]["params_b"])
    x = (torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64),)
    found = align_modules(a.eval(), b.eval(), x)
    return found, sum(t.difference**2 for t in found.tensors)


@pytest.mark.parametrize("case", ["permuted", "permuted_noisy"])
def test_git_rebasin_permutations_are_found(case: str) -> None:
    found, distance = _golden(case)
    expected = golden()["outputs"][case]
    assert distance == pytest.approx(expected["dist2_after"], rel=1e-6, abs=1e-9)
    orders = {tuple(expected["perm"][key].tolist()) for key in ("P_0", "P_1", "P_2")}
    solved = {tuple(e.index[0].tolist()) for g, e in found.elements if g.kind is Kind.PERMUTATION}
    assert solved == orders


def test_git_rebasin_independent_nets_come_as_near() -> None:
    _, distance = _golden("independent")
    assert distance <= golden()["outputs"]["independent"]["dist2_after"]


def test_what_positions_show_of_a_stream_comes_before_its_heads() -> None:
    """A table of positions is a small share of all that reads a stream, and enough to number its channels."""
    a = known("whisper", max_source_positions=100, encoder_layers=4)
    pair, solved = _once(a, moved(a, elements_of(a, 1)))
    rows = next(n for n, shape in a.shapes.items() if shape[0] == 100)
    width = a.shapes[rows][1]
    order = [bundle[0] for bundle in solved.order if bundle[0].kind is Kind.PERMUTATION]
    stream = next(i for i, g in enumerate(order) if rows in g.parameters and g.size == width)
    inside = [
        i for i, g in enumerate(order) if i != stream and set(g.parameters) & set(order[stream].parameters)
    ]
    assert len(inside) > 4
    assert stream < min(inside)
    assert pair.names


@pytest.mark.parametrize("seed", [1, 2])
def test_signs_that_no_gain_shows_do_not_spoil_the_sizes(seed: int) -> None:
    """Where the gain of a branch is zero its sign is seen once its units are known; their sizes come then."""
    a = known("gemma3")
    held = {name: a.read(name) for name in a.shapes}
    gains = {action.parameter for g in a.atlas.generators for action in g.actions if action.chart}
    for name in gains:
        held[name][2:12] = -1.0
    a = replace(a, values=lambda name, rows=None: held[name] if rows is None else held[name][slice(*rows)])
    assert gains
    pair, _ = _once(a, moved(a, elements_of(a, seed)))
    assert max(t.relative for t in leftovers(pair)) < SAME
