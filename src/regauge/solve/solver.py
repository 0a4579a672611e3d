"""Solves every family of groups for one walk and gathers the maximal generators into an atlas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from regauge.atlas import Action, Atlas, Factor, Generator, Kind, Part, Refusal
from regauge.facts import used_values
from regauge.interpret import Walk
from regauge.solve.blind import Blind
from regauge.solve.diagonal import Diagonal
from regauge.solve.forest import Forest, Key
from regauge.solve.groups import Groups
from regauge.solve.layout import Block, Layout, Occurrence
from regauge.solve.null import null_generators
from regauge.solve.scales import diagonals
from regauge.solve.spaces import SpaceTable, describe
from regauge.solve.translate import translations, with_limits
from regauge.trace import Trace

GROUP_ORDER = (Kind.GENERAL_LINEAR, Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES)


@dataclass
class _Namer:
    """Stable names for factors, in order of first use."""

    names: dict[int, str]

    def __call__(self, atom: int) -> str:
        return self.names.setdefault(atom, f"f{len(self.names)}")


class Solver:
    """All families of groups of one model in one state, and the atlas they make."""

    def __init__(self, walk: Walk, layout: Layout, folded: Set[int]) -> None:
        self.walk = walk
        self.layout = layout
        self.folded = frozenset(folded)
        facts = walk.result
        self.groups = Groups(layout, facts, self.folded).solve()
        self.positive = Diagonal(layout, facts, False, self.folded, self.groups.read).solve()
        self.signs = Diagonal(layout, facts, True, self.folded, self.groups.read).solve()
        self.name = _Namer({})
        self.data_names: dict[tuple[int, int], str] = {}

    # --- generators ------------------------------------------------------------------------------

    def atlas(self, trace: Trace, folds: tuple[str, ...]) -> Atlas:
        permutation = self._classes(self.groups.permutations)
        linear = self._classes(self.groups.linear)
        spaces = SpaceTable(self.groups, permutation)
        generators: list[Generator] = []
        alive: set[Key] = set()
        dominating: list[tuple[Kind, list[Key], list[int]]] = []
        for members in linear:
            root, _ = self.groups.linear.find(members[0])
            kinds = [kind for kind in GROUP_ORDER if kind not in root.stops][:1]
            if root.rotated and Kind.COMPLEX not in root.stops:
                kinds = [Kind.COMPLEX]
            for kind in kinds:
                copies = self.groups.copies(root.members)
                generators.append(self._group(kind, members, copies, spaces))
                dominating.append((kind, members, copies))
                if kind is not Kind.COMPLEX:
                    alive.update(members)
        covered = {(key.block, key.occurrence) for key in alive}
        for members in permutation:
            root, _ = self.groups.permutations.find(members[0])
            if Kind.PERMUTATION in root.stops:
                continue
            if all((key.block, key.occurrence) in covered for key in members):
                continue
            copies = self.groups.copies(root.members)
            generators.append(self._group(Kind.PERMUTATION, members, copies, spaces))
        generators += diagonals(self, dominating, spaces)
        blind = Blind(self.walk, self.layout, self.folded).solve()
        generators += null_generators(self, spaces, blind)
        moved, stopped = translations(self, spaces, blind)
        generators += moved
        unclear = [g for g in generators if not _clear(g)]
        generators = [g for g in generators if _clear(g)]
        ordered = tuple(
            replace(g, id=f"g{i}") for i, g in enumerate(sorted(generators, key=self._sort_key(spaces)))
        )
        return Atlas(
            spaces=with_limits(describe(self, spaces, ordered), stopped),
            generators=ordered,
            refusals=tuple(dict.fromkeys((*self.walk.refusals, *map(_unclear, unclear)))),
            aliases=tuple((name, group) for name, group in trace.aliases.items() if len(group) > 1),
            shapes=tuple(
                (alias, shape) for name, shape in trace.shapes.items() for alias in trace.aliases[name]
            ),
            folds=folds,
        )

    def _sort_key(self, spaces: SpaceTable) -> Callable[[Generator], tuple[int, int, int]]:
        order = {space: i for i, space in enumerate(spaces.ids())}
        kinds = list(Kind)

        def key(g: Generator) -> tuple[int, int, int]:
            return order.get(g.space, len(order)), kinds.index(g.kind), -g.size * g.count

        return key

    def _classes(self, forest: Forest) -> list[list[Key]]:
        """Parameter members of every class, classes and members in parameter order."""
        rank = self.rank
        used = self.used
        out: dict[Key, list[Key]] = {}
        keys = [
            key
            for key in forest.keys.values()
            if key.block.value.parameter is not None and key.block.value.id in used
        ]
        keys.sort(
            key=lambda key: (
                rank[key.block.value.id],
                key.block.offsets,
                key.occurrence[0],
                key.occurrence[1],
            )
        )
        for key in keys:
            root, _ = forest.find(key)
            out.setdefault(root, []).append(key)
        return list(out.values())

    @cached_property
    def rank(self) -> dict[int, int]:
        """Place of every parameter value in order of first use."""
        return {value.id: i for i, value in enumerate(self.walk.result.parameters.values())}

    @cached_property
    def used(self) -> frozenset[int]:
        """Parameter values that enter some fact and are not folded away."""
        return used_values(self.walk.result) - self.folded

    def parts(self, block: Block, held: Set[Occurrence] = frozenset()) -> tuple[Part, ...]:
        """The parts of a block. A factor that an element depends on at one of its occurrences (``held``)
        has another name where it occurs again."""
        elsewhere = {atom for _, atom in held}
        parts: list[Part] = []
        for axis, piece in enumerate(block.pieces):
            factors: list[Factor] = []
            for atom, stride in piece.factors:
                again = atom.id in elsewhere and (axis, atom.id) not in held
                if (axis, atom.id) in block.occurrences and not again:
                    name = self.name(atom.id)
                else:
                    key = (axis, atom.id)
                    name = self.data_names.setdefault(key, f"d{len(self.data_names)}")
                factors.append(Factor(name, atom.size, stride))
            parts.append(Part(piece.offset, tuple(factors)))
        return tuple(parts)

    def action(
        self,
        block: Block,
        occurrence: Occurrence | None,
        exponent: Fraction,
        held: Set[Occurrence] = frozenset(),
    ) -> Action:
        """How an element acts on a block along ``occurrence``; ``held``: all occurrences it depends on."""
        parts = self.parts(block, held)
        value = block.value
        assert value.parameter is not None
        if occurrence is None:
            if not parts:
                return Action(value.parameter, (), 0, "unit", exponent, value.chart)
            first = Part(parts[0].offset, (Factor("unit", 1, 1), *parts[0].factors))
            return Action(value.parameter, (first, *parts[1:]), 0, "unit", exponent, value.chart)
        return Action(value.parameter, parts, occurrence[0], self.name(occurrence[1]), exponent, value.chart)

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {
            atom.id: atom.size
            for value in self.walk.result.parameters.values()
            for block in self.layout.blocks(value)
            for atom in block.occurrences.values()
        }

    def size_of(self, atom: int) -> int:
        return self._sizes[atom]

    def copies_of(self, atoms: Iterable[int]) -> tuple[tuple[str, int], ...]:
        return tuple((self.name(atom), self.size_of(atom)) for atom in atoms)

    def _group(self, kind: Kind, members: Sequence[Key], copies: list[int], spaces: SpaceTable) -> Generator:
        forest = self.groups.permutations if kind is Kind.PERMUTATION else self.groups.linear
        actions: list[Action] = []
        sign = 0
        for i, key in enumerate(members):
            _, parity = forest.find(key)
            if i == 0:
                sign = parity
            exponent = Fraction(-1) if parity != sign else Fraction(1)
            actions.append(self.action(key.block, key.occurrence, exponent))
        atom = members[0].atom
        return Generator(
            "",
            kind,
            self.name(atom),
            self.size_of(atom),
            self.copies_of(copies),
            tuple(actions),
            spaces.of(members[0]),
        )


def _clear(generator: Generator) -> bool:
    """Every action of a group says without doubt which copy an entry belongs to."""
    if generator.kind in (Kind.TRANSLATION, Kind.NULL):
        return True
    for action in generator.actions:
        names = [factor.name for part in action.parts for factor in part.factors]
        if any(names.count(name) != 1 for name, _ in generator.copies):
            return False
    return True


def _unclear(generator: Generator) -> Refusal:
    action = generator.actions[0]
    reason = f"the {generator.kind} on {generator.acting} is left out: an index of its copies is on two axes"
    return Refusal(action.parameter, action.parameter.rpartition(".")[0], reason)
