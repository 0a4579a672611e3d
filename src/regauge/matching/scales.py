"""The diagonals and complex numbers that bring b closest to a.

Diagonals that act on one factor are solved at once: a block may be scaled by several, and each may be seen
only in blocks that others scale too. Block j of unit i is scaled by Π_g s_gi^e_gj. The signs follow from the
signs of ⟨a, b⟩, by elimination over GF(2). The sizes minimise Σ_j w_j ‖a_j − Π_g |s_g|^e_gj b_j‖²: from
log‖a‖ = log‖b‖ + Σ_g e_g log|s_g| by least squares, or from one, whichever leaves less, by the method of
Levenberg and Marquardt. Where a and b are less alike than ``_ALIKE``, they count as that much alike, so that
a unit of unrelated models is not scaled down to nothing; nor can it grow, since one is always a choice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from regauge.atlas import Action, Generator, Kind
from regauge.elements import Diagonal, Element, Matrix
from regauge.matching.correlate import diagonals, grams
from regauge.matching.moved import Pair
from regauge.matching.order import View, sizes_of

_STEPS = 60
_ALIKE = 0.5
_LARGEST = 60.0
"""Largest |log| of a power of a size."""


@dataclass(frozen=True)
class _Blocks:
    """What every block shows of every unit.

    Attributes:
        cross, own_a, own_b: ⟨a, b⟩, ⟨a, a⟩, ⟨b, b⟩, weighed, [J, N]: blocks, units of all copies.
        exponents: [J, G].
        features: numbers of entries that a unit has in a block, [J].
    """

    cross: torch.Tensor
    own_a: torch.Tensor
    own_b: torch.Tensor
    exponents: torch.Tensor
    features: torch.Tensor

    @property
    def alike(self) -> torch.Tensor:
        """Cosines [J, N]; 0 where either is zero."""
        scale = (self.own_a * self.own_b).sqrt()
        return torch.where(scale > 0, self.cross / scale.clamp_min(1e-300), 0.0)


class Layout:
    """Which sizes scale which entries: equations and unknowns of one unit, the same for every unit.

    A generator that has further copies has an unknown for each; a block has an equation for each combination
    of the copies of what acts on it. Copies that all generators have number units, as the acting factor does.

    Attributes:
        generators: diagonals on one factor.
        common: copies that all of them have.
        blocks: (first action on the block, copies beside the common ones), in a fixed order.
        table: exponents, [equations, unknowns] float64.
    """

    def __init__(self, generators: Sequence[Generator], views: Sequence[Sequence[View]]) -> None:
        self.generators = generators
        first = dict(generators[0].copies)
        self.common = tuple(n for n in first if all(n in dict(g.copies) for g in generators))
        self.extra = [tuple(item for item in g.copies if item[0] not in self.common) for g in generators]
        self.starts = [0]
        for extra in self.extra:
            self.starts.append(self.starts[-1] + _count(extra))
        held: dict[object, tuple[Action, list[tuple[int, float]]]] = {}
        for g, own in enumerate(views):
            for action in (view.action for view in own):
                key = (action.parameter, action.parts, action.axis)
                held.setdefault(key, (action, []))[1].append((g, float(action.exponent)))
        self.blocks: list[tuple[Action, tuple[str, ...]]] = []
        rows: list[torch.Tensor] = []
        for action, acting in held.values():
            names = dict(item for g, _ in acting for item in self.extra[g])
            self.blocks.append((action, tuple(names)))
            for combination in itertools.product(*(range(size) for size in names.values())):
                at = dict(zip(names, combination, strict=True))
                row = torch.zeros(self.starts[-1], dtype=torch.float64)
                for g, exponent in acting:
                    index = 0
                    for name, size in self.extra[g]:
                        index = index * size + at[name]
                    row[self.starts[g] + index] += exponent
                rows.append(row)
        self.table = torch.stack(rows) if rows else torch.zeros(0, self.starts[-1], dtype=torch.float64)

    @property
    def units(self) -> int:
        sizes = dict(self.generators[0].copies)
        return self.generators[0].size * math.prod(sizes[name] for name in self.common)

    def own(self, g: int) -> slice:
        """Unknowns of a generator."""
        return slice(self.starts[g], self.starts[g + 1])

    def spread(self, g: int, unknowns: torch.Tensor) -> torch.Tensor:
        """[unknowns of the generator, units] -> [K, n] in the order of its copies."""
        generator = self.generators[g]
        sizes = dict(generator.copies)
        names = (*(name for name, _ in self.extra[g]), *self.common)
        full = unknowns.reshape(*(sizes[name] for name in names), generator.size)
        order = [names.index(name) for name, _ in generator.copies]
        return full.permute(*order, len(names)).reshape(generator.count, generator.size).contiguous()


def solve_diagonals(
    pair: Pair, generators: Sequence[Generator], views: Sequence[Sequence[View]]
) -> list[Element]:
    """Elements of generators that act on one factor.

    Args:
        pair: both models.
        generators: signs, positive numbers and scales.
        views: the views that are clear, for each generator.
    """
    layout = Layout(generators, views)
    blocks = _blocks(pair, layout)
    each = [g for g, extra in zip(generators, layout.extra, strict=True) for _ in range(_count(extra))]
    table = layout.table
    signed = torch.tensor([g.kind is not Kind.POSITIVE for g in each])
    odd = ((table.round() == table) & (table.abs() % 2 == 1) & signed).to(torch.int64)
    signs = _signs(blocks, odd)
    parity = 1.0 - 2.0 * ((odd @ (signs < 0).to(torch.int64)) % 2).to(torch.float64)
    sized = torch.tensor([g.kind is not Kind.SIGN for g in each])
    logs = torch.zeros(len(each), layout.units, dtype=torch.float64)
    if bool(sized.any()):
        logs[sized] = _sizes(replace(blocks, cross=blocks.cross * parity, exponents=table[:, sized]))
    found: list[Element] = []
    for g, generator in enumerate(generators):
        sizes, sign = logs[layout.own(g)].exp(), signs[layout.own(g)]
        positive, sign_only = generator.kind is Kind.POSITIVE, generator.kind is Kind.SIGN
        vector = sign if sign_only else sizes if positive else sign * sizes
        found.append(Diagonal(layout.spread(g, vector), generator.kind))
    return found


def _count(copies: Sequence[tuple[str, int]]) -> int:
    return math.prod(size for _, size in copies)


def _blocks(pair: Pair, layout: Layout) -> _Blocks:
    sums: list[list[torch.Tensor]] = [[], [], []]
    features: list[float] = []
    signs = all(generator.kind is Kind.SIGN for generator in layout.generators)
    for action, extra in layout.blocks:
        products = diagonals(pair, action, (*extra, *layout.common), sampled=signs)
        for total, part in zip(sums, products, strict=True):
            total.append(pair.weight(action.parameter) * part.reshape(-1, layout.units))
        rows = sums[0][-1].shape[0]
        features += [math.prod(sizes_of(action).values()) / (rows * layout.units)] * rows
    empty = torch.zeros(0, layout.units, dtype=torch.float64)
    cross, own_a, own_b = (torch.cat([empty, *total]) for total in sums)
    return _Blocks(cross, own_a, own_b, layout.table, torch.tensor(features, dtype=torch.float64))


def complex_number(pair: Pair, generator: Generator, views: Sequence[View]) -> Element:
    """The angle of Σ w m^e ⟨a, b⟩ as complex numbers, and the modulus m as for a scale, in turns."""
    k = generator.count
    real, imaginary, own_a, own_b = [], [], [], []
    for view in views:
        cross, a, b = (pair.weight(view.action.parameter) * x for x in grams(pair, generator, view))
        real.append(cross[:, 0, 0] + cross[:, 1, 1])
        imaginary.append(cross[:, 1, 0] - cross[:, 0, 1])
        own_a.append(a.diagonal(dim1=1, dim2=2).sum(1))
        own_b.append(b.diagonal(dim1=1, dim2=2).sum(1))
    if not views:
        return Matrix(torch.eye(2, dtype=torch.float64).repeat(k, 1, 1), Kind.COMPLEX)
    table = torch.tensor([[float(v.action.exponent)] for v in views], dtype=torch.float64)
    counts = torch.tensor([2.0 * _features(v, generator) for v in views], dtype=torch.float64)
    x, y, a, b = (torch.stack(part) for part in (real, imaginary, own_a, own_b))
    scale = (a * b).sqrt().clamp_min(1e-300)
    angle = torch.atan2((counts[:, None] * y / scale).sum(0), (counts[:, None] * x / scale).sum(0))
    logs = torch.zeros(1, k, dtype=torch.float64)
    for _ in range(4):
        logs = _sizes(_Blocks(x * angle.cos() + y * angle.sin(), a, b, table, counts))
        size = (table @ logs).exp()
        angle = torch.atan2((size * y).sum(0), (size * x).sum(0))
    modulus = logs[0].exp()
    p, q = modulus * angle.cos(), modulus * angle.sin()
    return Matrix(torch.stack([p, -q, q, p], dim=1).view(-1, 2, 2), Kind.COMPLEX)


def _features(view: View, generator: Generator) -> float:
    return math.prod(sizes_of(view.action).values()) / (generator.count * generator.size)


def _signs(blocks: _Blocks, odd: torch.Tensor) -> torch.Tensor:
    """±1, [G, N]: Σ_g odd_jg [s_g < 0] = [⟨a_j, b_j⟩ < 0] over GF(2), the clearest blocks first.

    Blocks that follow from clearer ones are looked at afterwards: a sign is turned where Σ features · cosine
    then grows.
    """
    units = blocks.cross.shape[1]
    negative = torch.zeros(odd.shape[1], units, dtype=torch.int64)
    evidence = blocks.features[:, None].sqrt() * blocks.alike
    order = sorted(range(len(odd)), key=lambda j: (-float(evidence[j].abs().mean()), j))
    rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # pivot -> equation, right-hand side [N]
    for j in order:
        row, right = odd[j].clone(), (blocks.cross[j] < 0).to(torch.int64)
        for pivot, (other, value) in rows.items():
            if int(row[pivot]):
                row, right = row ^ other, right ^ value
        if bool(row.any()):
            pivot = int(row.nonzero()[0, 0])
            for at, (other, value) in rows.items():
                if int(other[pivot]):
                    rows[at] = (other ^ row, value ^ right)
            rows[pivot] = (row, right)
    for pivot, (_, value) in rows.items():  # Signs that nothing determines are plus.
        negative[pivot] = value
    score = blocks.features[:, None] * blocks.alike
    for _ in range(len(negative)):
        parity = 1.0 - 2.0 * ((odd @ negative) % 2).to(torch.float64)
        gain = -2.0 * (odd.to(torch.float64).T @ (parity * score))
        at = gain.argmax(dim=0, keepdim=True) if len(gain) else gain
        if not len(gain) or not bool((gain.max(dim=0).values > 1e-9).any()):
            break
        turn = (gain.gather(0, at) > 1e-9).to(torch.int64)
        negative.scatter_add_(0, at, turn)
        negative %= 2
    return 1.0 - 2.0 * negative.to(torch.float64)


def _sizes(blocks: _Blocks) -> torch.Tensor:
    """log sizes [G, N]."""
    least = _ALIKE * (blocks.own_a * blocks.own_b).sqrt()
    blocks = replace(blocks, cross=torch.maximum(blocks.cross, least))
    start = _by_norms(blocks)
    one = torch.zeros_like(start)
    start = torch.where(_left(blocks, start) <= _left(blocks, one), start, one)
    return _descended(blocks, start)


def _by_norms(blocks: _Blocks) -> torch.Tensor:
    """Least squares of log‖a‖ − log‖b‖ = Σ_g e_g log|s_g|, each weighed by its number of features."""
    seen = (blocks.own_a > 0) & (blocks.own_b > 0)
    ratio = 0.5 * (blocks.own_a.clamp_min(1e-300).log() - blocks.own_b.clamp_min(1e-300).log())
    weights = torch.where(seen, blocks.features[:, None], 0.0)
    normal = torch.einsum("jn,jg,jh->ngh", weights, blocks.exponents, blocks.exponents)
    right = torch.einsum("jn,jg->ng", weights * ratio, blocks.exponents)
    return (torch.linalg.pinv(normal, hermitian=True, rtol=1e-10) @ right[:, :, None])[:, :, 0].T


def _left(blocks: _Blocks, logs: torch.Tensor) -> torch.Tensor:
    """Σ_j ‖a_j − s^e b_j‖², [N]."""
    size = (blocks.exponents @ logs).clamp(-_LARGEST, _LARGEST).exp()
    return (size * size * blocks.own_b - 2 * size * blocks.cross + blocks.own_a).sum(0)


def _descended(blocks: _Blocks, logs: torch.Tensor) -> torch.Tensor:
    """Steps of Levenberg and Marquardt on each unit alone, taken where they leave less."""
    left = _left(blocks, logs)
    floor = 1e-15 * blocks.own_a.sum(0)
    damping = torch.full_like(left, 1e-3)
    table, eye = blocks.exponents, torch.eye(logs.shape[0], dtype=torch.float64)
    for _ in range(_STEPS):
        size = (table @ logs).clamp(-_LARGEST, _LARGEST).exp()
        square = size * size * blocks.own_b
        slope = table.T @ (size * blocks.cross - square)
        bend = torch.einsum("jn,jg,jh->ngh", square, table, table)
        mean = bend.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-300)
        bend = bend + (damping * mean)[:, None, None] * eye
        step = torch.linalg.solve_ex(bend, slope.T[:, :, None])[0][:, :, 0].T.clamp(-2.0, 2.0)
        step = torch.where(step.isfinite(), step, 0.0)
        now = _left(blocks, logs + step)
        better = now < left - floor
        logs = torch.where(better, logs + step, logs)
        left = torch.where(better, now, left)
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e12)
        if not bool((better | (damping < 1e6)).any()):
            break
        if float(step.abs().max()) < 1e-14:
            break
    return logs
