"""The parts of growth: where old entries go, what new ones hold, and whether factors cancel."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regauge.atoms import Atom
from regauge.discover import Gauge
from regauge.errors import Refused
from regauge.facts import Law, Pointwise
from regauge.growing.fill import New, fill, grown
from regauge.growing.reach import Follower
from regauge.growing.roles import Role, norms, role_of
from regauge.growing.scales import check_scales, factor_of_mean
from regauge.growing.sizes import grown_axis, positions
from regauge.structure import Structure
from regauge.trace import trace

# --- where entries lie: every position spelled out ----------------------------------------------------------

Label = tuple[tuple[Any, int], ...]


def spelled(structure: Structure, axis: Iterable[Atom], sizes: Mapping[int, int]) -> list[Label]:
    """A label for every position, outermost atom slowest: (atom, index) and (sum, segment)."""
    done: list[Label] = [()]
    for atom in structure.expand(axis):
        labels: list[Label] = []
        if atom.segments is None:
            labels = [((atom.id, i),) for i in range(sizes.get(atom.id, atom.size))]
        else:
            for number, segment in enumerate(atom.segments):
                inner = spelled(structure, segment, sizes)
                labels += [((f"sum {atom.id}", number), *label) for label in inner]
        done = [(*head, *tail) for head, tail in product(done, labels)]
    return done


def drawn_axis(structure: Structure, draw: random.Random, shared: list[Atom], depth: int = 2) -> list[Atom]:
    """A random product of atoms and of sums of such; ``shared`` atoms may occur in several segments."""
    axis: list[Atom] = []
    free = [atom for atom in shared if draw.random() < 0.5]
    for _ in range(draw.randint(1, 3)):
        if depth and draw.random() < 0.4:
            segments = [drawn_axis(structure, draw, shared if not free else [], depth - 1) for _ in range(3)]
            whole = structure.atom(sum(math.prod(a.size for a in segment) for segment in segments))
            whole.segments = segments
            axis.append(whole)
        elif free:
            axis.append(free.pop())
        else:
            axis.append(structure.atom(draw.randint(2, 4)))
    return axis


@pytest.mark.parametrize("seed", range(40))
def test_every_entry_lands_where_its_indices_say(seed: int) -> None:
    draw, structure = random.Random(seed), Structure(lambda reason: None)
    shared = [structure.atom(3), structure.atom(2)]
    axis = drawn_axis(structure, draw, shared)
    while not 1 < math.prod(atom.size for atom in axis) < 150:
        axis = drawn_axis(structure, draw, shared)
    atoms = {a for label in spelled(structure, axis, {}) for a, _ in label if isinstance(a, int)}
    sizes = {a: 5 for a in sorted(atoms) if draw.random() < 0.5}
    before, after = spelled(structure, axis, {}), spelled(structure, axis, sizes)
    found = grown_axis(structure, axis, sizes)
    assert found.size == len(after)
    assert found.old.tolist() == [after.index(label) for label in before]
    assert sorted(p for leaf in found.leaves for p in positions(leaf).tolist()) == list(range(found.size))
    for atom in sizes:
        held = [found.index[key] for key in found.index if key[0] == atom]
        expected = [dict(label).get(atom, -1) for label in after]
        assert torch.stack(held).max(0).values.tolist() == expected
        for (other, offset), index in found.index.items():
            for p in range(found.size) if other == atom else ():
                if 0 <= index[p] < sizes[atom] - 1:
                    following = tuple((a, i + (a == atom)) for a, i in after[p])
                    assert p + found.stride[atom, offset] == after.index(following)


# --- what new entries hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.9])
@pytest.mark.parametrize(("n", "m"), [(3, 4), (3, 5), (4, 13), (1, 8)])
@pytest.mark.parametrize("new", list(New))
def test_what_is_read_adds_up(new: New, n: int, m: int, noise: float) -> None:
    """Σ over the indices that share a source of their weights: one for an old source, zero for a new one."""
    found = fill(new, n, m, noise, torch.Generator().manual_seed(n))
    assert found.source[:n].tolist() == list(range(n))
    total = torch.zeros(m, dtype=torch.float64).index_add_(0, found.source, found.weight)
    assert torch.allclose(total[:n], torch.ones(n, dtype=torch.float64))
    assert torch.allclose(total[n:], torch.zeros(m - n, dtype=torch.float64))
    if new is New.SPLIT:
        assert bool((found.weight > 0).all())
        shares = [found.weight[found.source == i] for i in range(n)]
        equal = all(bool((share == share[0]).all()) for share in shares)
        assert equal is (noise == 0)
    if new is New.PAIRS:
        assert int((found.weight[n:] == 0).sum()) == (m - n) % 2


@pytest.mark.parametrize("new", list(New))
def test_a_hidden_layer_grows_inside_each_of_its_groups(new: New) -> None:
    """y = W2 · tanh(W1 x + b) with hidden = heads × width, and width in the middle of a fused axis."""
    structure = Structure(lambda reason: None)
    heads, width = structure.atom(3), structure.atom(4)
    inputs, outputs = [structure.atom(5)], [structure.atom(6)]
    hidden = [heads, width]
    axes = {axis: grown_axis(structure, atoms, {width.id: 7})
            for axis, atoms in (("h", hidden), ("i", inputs), ("o", outputs))}  # fmt: skip
    held = fill(new, 4, 7, 0.5, torch.Generator().manual_seed(0))
    w1, b, w2 = (torch.randn(s, dtype=torch.float64) for s in ((12, 5), (12,), (6, 12)))
    fills = {width.id: held}
    big1 = grown(w1, (axes["h"], axes["i"]), fills, (), {}, 0.0, 1)
    big_b = grown(b, (axes["h"],), fills, (), {}, 0.0, 2)
    big2 = grown(w2, (axes["o"], axes["h"]), fills, [(1, 0, width.id)], {}, 0.0, 3)
    x = torch.randn(9, 5, dtype=torch.float64)
    one, other = torch.tanh(x @ w1.T + b) @ w2.T, torch.tanh(x @ big1.T + big_b) @ big2.T
    assert big1.shape == (21, 5)
    assert float((one - other).norm() / one.norm()) < 1e-14
    assert torch.equal(big1.reshape(3, 7, 5)[:, :4], w1.reshape(3, 4, 5))
    assert not bool((big1 == 0).any())


def test_a_stored_gain_is_scaled_as_it_acts() -> None:
    """Stored w acts as 1 + w: old entries act r times as much, new ones as the mean does."""
    structure = Structure(lambda reason: None)
    atom = structure.atom(4)
    axis = grown_axis(structure, [atom], {atom.id: 6})
    w = torch.randn(4, dtype=torch.float64)
    found = 1 + grown(w, (axis,), {atom.id: fill(New.ZERO, 4, 6, 0, torch.Generator())}, (),
                      {(0, 0): 0.25}, 1.0, 0)  # fmt: skip
    assert torch.allclose(found[:4], 0.25 * (1 + w))
    assert torch.allclose(found[4:], 0.25 * (1 + w).mean())


# --- whether factors cancel ---------------------------------------------------------------------------------


class Spelled(nn.Module):
    """A map, an RMSNorm written out, a map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)
        self.g = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


def test_mean_eps_and_gain_cancel_together_and_only_together() -> None:
    n, m = 8, 12
    _, layout = Gauge(trace(Spelled(), (torch.randn(2, 5),))).walk()
    follower = Follower(layout)
    value = next(v for (name, _), v in layout.facts.parameters.items() if name == "g")
    reach = follower.reach(next(o[1] for o in layout.blocks(value)[0].order))
    assert role_of(reach) is Role.RESIDUAL
    (taken,) = norms(reach)
    means = {id(taken.fact): factor_of_mean(taken, n, m)}
    assert next(iter(means.values())) == pytest.approx(math.log(n / m))
    shifts = [f.node for f in layout.facts.facts if isinstance(f, Pointwise) and f.law is Law.SHIFT]
    eps, gain = dict.fromkeys(shifts, n / m), {"g": math.sqrt(n / m)}
    check_scales(layout.facts, gain, means, eps)
    check_scales(layout.facts, {}, {}, {})
    for given in ((gain, means, {}), ({}, means, eps), (gain, {}, eps), (gain, {}, {}), ({}, {}, eps),
                  ({"g": n / m}, means, eps), ({**gain, "a.weight": 2.0}, means, eps)):  # fmt: skip
        with pytest.raises(Refused, match="does not cancel"):
            check_scales(layout.facts, *given)
