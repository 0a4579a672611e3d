"""From a trace to an atlas: walk, solve each family of groups, keep the maximal generators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from regauge.atlas import Action, Atlas, Factor, Generator, Kind, Limit, Part, Space
from regauge.facts import Law, Pointwise, Value
from regauge.interpret import Walk, interpret
from regauge.solve.diagonal import Diagonal, Unknown
from regauge.solve.groups import Blame, Groups, Key
from regauge.solve.layout import Block, Layout, Occurrence
from regauge.solve.null import null_generators
from regauge.solve.quotient import Quotient, Vector
from regauge.solve.translate import translations
from regauge.trace import Trace

GROUP_ORDER = (Kind.GENERAL_LINEAR, Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES)


def discover(trace: Trace) -> Atlas:
    """The atlas of a traced model, with its form after folding (and untying) as ``atlas.folded``."""
    gauge = Gauge(trace)
    tied = gauge.tied
    atlas = gauge.atlas(untied=False, folded=frozenset())
    folds = gauge.foldable(untied=bool(tied))
    folded = replace(gauge.atlas(untied=bool(tied), folded=frozenset(folds)), folds=folds)
    if not folds and not tied:
        return atlas
    merged = tuple(_with_folded(space, folded, trace) for space in atlas.spaces)
    return replace(atlas, spaces=merged, folded=folded, folds=folds)


def _with_folded(space: Space, folded: Atlas, trace: Trace) -> Space:
    """The same space in the folded atlas is the one that shares most parameter axes with it."""
    own = {(trace.canonical.get(name, name), axis) for name, axis in space.parameters}
    best: Space | None = None
    score = 0
    for other in folded.spaces:
        if other.size != space.size:
            continue
        shared = len(own & {(trace.canonical.get(n, n), a) for n, a in other.parameters})
        if shared > score:
            best, score = other, shared
    if best is None:
        return space
    tied = tuple(
        name for name, _ in best.parameters if name in trace.canonical and trace.canonical[name] != name
    )
    return replace(
        space,
        admits_folded=best.admits,
        limits_folded=best.limits,
        folds=tuple(name for name in folded.folds if any(True for n, _ in space.parameters if n == name)),
        unties=tuple(dict.fromkeys(tied)),
    )


class Gauge:
    """Atlases of one traced model in every state that moves can bring it to, solved once each.

    A state is: whether tied parameters have been given their own copies, and which gains are one.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._walks: dict[bool, tuple[Walk, Layout]] = {}
        self._solvers: dict[tuple[bool, frozenset[str]], _Solver] = {}
        self._atlases: dict[tuple[bool, frozenset[str]], Atlas] = {}

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of state-dict names that are one parameter."""
        return tuple(names for names in self.trace.aliases.values() if len(names) > 1)

    def atlas(self, *, untied: bool = False, folded: frozenset[str] = frozenset()) -> Atlas:
        """The generators available when the gains ``folded`` are one."""
        key = (untied, folded)
        if key not in self._atlases:
            self._atlases[key] = self._solver(*key).atlas(self.trace, ())
        return self._atlases[key]

    def foldable(self, *, untied: bool = False) -> tuple[str, ...]:
        """Every gain that can be set to one, including those that others free when they fold."""
        done: frozenset[str] = frozenset()
        while True:
            more = self._solver(untied, done).foldable() - done
            if not more:
                walk, _ = self._walk(untied)
                return tuple(dict.fromkeys(name for name, _ in walk.result.parameters if name in done))
            done |= more

    def _walk(self, untied: bool) -> tuple[Walk, Layout]:
        if untied not in self._walks:
            walk = interpret(self.trace, untied)
            self._walks[untied] = walk, Layout(walk.structure, walk.result)
        return self._walks[untied]

    def _solver(self, untied: bool, folded: frozenset[str]) -> _Solver:
        key = (untied, folded)
        if key not in self._solvers:
            walk, layout = self._walk(untied)
            ids = {value.id for value in walk.result.parameters.values() if value.parameter in folded}
            self._solvers = {key: _Solver(walk, layout, ids)}
        return self._solvers[key]


@dataclass
class _Namer:
    """Stable names for factors, in order of first use."""

    names: dict[int, str]

    def __call__(self, atom: int) -> str:
        return self.names.setdefault(atom, f"f{len(self.names)}")


class _Solver:
    def __init__(self, walk: Walk, layout: Layout, folded: set[int]) -> None:
        self.walk = walk
        self.layout = layout
        self.folded = set(folded)
        facts = walk.result
        self.groups = Groups(layout, facts, self.folded).solve()
        self.positive = Diagonal(layout, facts, False, self.folded).solve()
        self.signs = Diagonal(layout, facts, True, self.folded).solve()
        self.name = _Namer({})
        self.data_names: dict[tuple[int, int], str] = {}

    # --- folding ---------------------------------------------------------------------------------

    def foldable(self) -> set[str]:
        """Gains that a diagonal generator moves freely, every entry, on their own."""
        gains: dict[int, Value] = {}
        for fact in self.walk.result.facts:
            if isinstance(fact, Pointwise) and fact.law is Law.PRODUCT:
                operands = [v for v in fact.ins if v.id not in self.folded]
                for value in operands:
                    root = self._parameter_of(value)
                    if root is not None and any(self._parameter_of(v) is None for v in operands):
                        gains[root.id] = root
        index = {(u.value.id, u.block.offsets, u.subset): i for i, u in enumerate(self.positive.unknowns)}
        sign_index = {(u.value.id, u.block.offsets, u.subset): i for i, u in enumerate(self.signs.unknowns)}
        vectors = {min(v): v for v in self.positive.basis()}
        by_free = {}
        for vector in vectors.values():
            for unknown in vector:
                if unknown not in self.positive.system.pivots:
                    by_free[unknown] = vector
        out: set[str] = set()
        for value in gains.values():
            blocks = self.layout.blocks(value)
            if all(self._folds(value, block, index, sign_index, by_free, gains) for block in blocks):
                out.add(str(value.parameter))
        return out

    def _parameter_of(self, value: Value) -> Value | None:
        """The parameter a value is, seen through reshapes."""
        from regauge.facts import Remap

        seen = value
        while seen.parameter is None:
            source = next((f.inp for f in self._remaps().get(seen.id, ()) if isinstance(f, Remap)), None)
            if source is None:
                return None
            seen = source
        return seen

    def _remaps(self) -> Mapping[int, list[object]]:
        from regauge.facts import Remap

        cached = getattr(self, "_remap_cache", None)
        if cached is None:
            cached = {}
            for fact in self.walk.result.facts:
                if isinstance(fact, Remap):
                    cached.setdefault(fact.out.id, []).append(fact)
            self._remap_cache = cached
        return cached

    def _folds(
        self,
        value: Value,
        block: Block,
        index: Mapping[tuple[int, tuple[int, ...], frozenset[Occurrence]], int],
        sign_index: Mapping[tuple[int, tuple[int, ...], frozenset[Occurrence]], int],
        by_free: Mapping[int, Mapping[int, Fraction]],
        gains: Mapping[int, Value],
    ) -> bool:
        if not block.order or len({a for _, a in block.order}) != len(block.order):
            return False
        number = index.get((value.id, block.offsets, frozenset(block.order)))
        vector = by_free.get(number) if number is not None else None
        if vector is None:
            return False
        signs: dict[int, Fraction] = {}
        for unknown, coefficient in vector.items():
            u = self.positive.unknowns[unknown]
            if u.value.id in gains and u.value.id != value.id:
                return False
            if coefficient.denominator != 1:
                return False
            if coefficient % 2:
                signs[sign_index[(u.value.id, u.block.offsets, u.subset)]] = Fraction(1)
        return _in_null(self.signs, signs)

    # --- generators ------------------------------------------------------------------------------

    def atlas(self, trace: Trace, folds: tuple[str, ...]) -> Atlas:
        permutation = self._classes(self.groups.permutations)
        linear = self._classes(self.groups.linear)
        spaces = self._spaces(permutation)
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
        generators += self._diagonals(dominating, spaces)
        generators += null_generators(self, spaces)
        generators += translations(self, spaces)
        ordered = tuple(
            replace(g, id=f"g{i}") for i, g in enumerate(sorted(generators, key=self._sort_key(spaces)))
        )
        return Atlas(
            spaces=self._describe(spaces, ordered),
            generators=ordered,
            refusals=tuple(dict.fromkeys(self.walk.refusals)),
            aliases=tuple((name, group) for name, group in trace.aliases.items() if len(group) > 1),
            shapes=tuple(
                (alias, shape) for name, shape in trace.shapes.items() for alias in trace.aliases[name]
            ),
            folds=folds,
        )

    def _sort_key(self, spaces: SpaceTable):  # type: ignore[no-untyped-def]
        order = {space: i for i, space in enumerate(spaces.ids())}
        kinds = list(Kind)
        return lambda g: (order.get(g.space, len(order)), kinds.index(g.kind), -g.size * g.count)

    def _classes(self, forest: object) -> list[list[Key]]:
        """Parameter members of every class, classes and members in parameter order."""
        rank = {value.id: i for i, value in enumerate(self.walk.result.parameters.values())}
        used = self._used()
        out: dict[Key, list[Key]] = {}
        keys = [
            key
            for key in forest.keys.values()  # type: ignore[attr-defined]
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
            root, _ = forest.find(key)  # type: ignore[attr-defined]
            out.setdefault(root, []).append(key)
        return list(out.values())

    def _used(self) -> set[int]:
        """Parameter values that enter some fact and are not folded away."""
        cached = getattr(self, "_used_cache", None)
        if cached is None:
            cached = set()
            for fact in self.walk.result.facts:
                for slot in ("ins", "inp", "a", "b", "value"):
                    item = getattr(fact, slot, ())
                    for value in item if isinstance(item, tuple) else (item,):
                        if isinstance(value, Value):
                            cached.add(value.id)
            cached -= self.folded
            self._used_cache = cached
        return cached

    def _parts(self, block: Block) -> tuple[Part, ...]:
        parts: list[Part] = []
        for axis, piece in enumerate(block.pieces):
            factors: list[Factor] = []
            for atom, stride in piece.factors:
                if (axis, atom.id) in block.occurrences:
                    name = self.name(atom.id)
                else:
                    key = (axis, atom.id)
                    name = self.data_names.setdefault(key, f"d{len(self.data_names)}")
                factors.append(Factor(name, atom.size, stride))
            parts.append(Part(piece.offset, tuple(factors)))
        return tuple(parts)

    def action(self, block: Block, occurrence: Occurrence | None, exponent: Fraction) -> Action:
        parts = self._parts(block)
        value = block.value
        assert value.parameter is not None
        if occurrence is None:
            if not parts:
                return Action(value.parameter, (), 0, "unit", exponent, value.chart)
            first = Part(parts[0].offset, (Factor("unit", 1, 1), *parts[0].factors))
            return Action(value.parameter, (first, *parts[1:]), 0, "unit", exponent, value.chart)
        return Action(value.parameter, parts, occurrence[0], self.name(occurrence[1]), exponent, value.chart)

    def size_of(self, atom: int) -> int:
        return self._sizes()[atom]

    def _sizes(self) -> dict[int, int]:
        cached = getattr(self, "_size_cache", None)
        if cached is None:
            cached = {}
            for value in self.walk.result.parameters.values():
                for block in self.layout.blocks(value):
                    for atom in block.occurrences.values():
                        cached[atom.id] = atom.size
            self._size_cache = cached
        return cached

    def _copies(self, atoms: Iterable[int]) -> tuple[tuple[str, int], ...]:
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
            self._copies(copies),
            tuple(actions),
            spaces.of(members[0]),
        )

    # --- diagonals -------------------------------------------------------------------------------

    def _vector(self, solver: Diagonal, expr: Mapping[int, Fraction]) -> Vector | None:
        entries: dict[tuple[Block, frozenset[Occurrence]], Fraction] = {}
        atoms: frozenset[int] | None = None
        for number, coefficient in expr.items():
            unknown: Unknown = solver.unknowns[number]
            mine = frozenset(atom for _, atom in unknown.subset)
            if atoms is None:
                atoms = mine
            elif atoms != mine:
                return None
            entries[(unknown.block, unknown.subset)] = coefficient
        return None if atoms is None else Vector(atoms, entries)

    def _diagonals(
        self, dominating: list[tuple[Kind, list[Key], list[int]]], spaces: SpaceTable
    ) -> list[Generator]:
        used = self._used()
        positive = [self._vector(self.positive, v) for v in self.positive.basis()]
        signs = [self._vector(self.signs, v) for v in self.signs.basis()]
        for_positive, for_sign = Quotient(False), Quotient(True)
        for kind, members, copies in dominating:
            for quotient in (for_positive, for_sign):
                vector = self._dominated(kind, members, copies, quotient.binary)
                if vector is not None:
                    quotient.cover(vector)
        out: list[Generator] = []
        index = {(u.block, u.subset): i for i, u in enumerate(self.signs.unknowns)}
        for vector in for_positive.maximal(v for v in positive if v is not None and _live(v, used)):
            odd = all(c.denominator == 1 and c % 2 for c in vector.entries.values())
            flips = {index[key]: Fraction(1) for key in vector.entries}
            both = odd and _in_null(self.signs, flips)
            if both:
                for_sign.cover(Vector(vector.atoms, dict.fromkeys(vector.entries, Fraction(1))))
            out.append(self._diagonal(Kind.SCALE if both else Kind.POSITIVE, vector, spaces))
        for vector in for_sign.maximal(v for v in signs if v is not None and _live(v, used)):
            out.append(self._diagonal(Kind.SIGN, vector, spaces))
        return out

    def _dominated(self, kind: Kind, members: list[Key], copies: list[int], binary: bool) -> Vector | None:
        """The diagonal elements contained in a larger group."""
        if kind is Kind.ORTHOGONAL_ONES or (kind is Kind.ORTHOGONAL and not binary):
            return None
        entries: dict[tuple[Block, frozenset[Occurrence]], Fraction] = {}
        own = set(copies) if kind is Kind.COMPLEX else {*copies, members[0].atom}
        for key in members:
            _, parity = self.groups.linear.find(key)
            subset = frozenset(
                o for o in key.block.order if o[1] in own and (o == key.occurrence or o[1] != key.atom)
            )
            entries[(key.block, subset)] = Fraction(1) if binary else Fraction(1 - 2 * parity)
        return Vector(frozenset(own), entries)

    def _diagonal(self, kind: Kind, vector: Vector, spaces: SpaceTable) -> Generator:
        atoms = sorted(vector.atoms, key=lambda a: (self.size_of(a), a))
        rank = {value.id: i for i, value in enumerate(self.walk.result.parameters.values())}
        entries = sorted(vector.entries.items(), key=lambda e: (rank[e[0][0].value.id], e[0][0].offsets))
        flip = entries[0][1] < 0
        acting = atoms[-1] if atoms else None
        actions: list[Action] = []
        first: Key | None = None
        for (block, subset), coefficient in entries:
            occurrence = next((o for o in subset if o[1] == acting), None)
            actions.append(self.action(block, occurrence, -coefficient if flip else coefficient))
            if first is None and occurrence is not None:
                first = self.groups.permutations.keys.get((block, occurrence))
        return Generator(
            "",
            kind,
            self.name(acting) if acting is not None else "unit",
            self.size_of(acting) if acting is not None else 1,
            self._copies(sorted(set(atoms) - {acting})),
            tuple(actions),
            spaces.of(first) if first is not None else "whole tensors",
        )

    # --- spaces ----------------------------------------------------------------------------------

    def _spaces(self, classes: list[list[Key]]) -> SpaceTable:
        table = SpaceTable(self.groups)
        for members in classes:
            table.add(members)
        return table

    def _describe(self, spaces: SpaceTable, generators: Sequence[Generator]) -> tuple[Space, ...]:
        by_space: dict[str, list[Generator]] = {}
        for generator in generators:
            by_space.setdefault(generator.space, []).append(generator)
            for _name, _ in generator.copies:
                pass
        out: list[Space] = []
        for id_, members in spaces.items():
            atom = members[0].atom
            root, _ = self.groups.permutations.find(members[0])
            found = by_space.get(id_, [])
            factor = self.name(atom)
            admits = {g.kind for g in found}
            admits |= {
                g.kind for g in generators if any(n == factor for n, _ in g.copies) and g.kind in _DIAGONAL
            }
            out.append(
                Space(
                    id=id_,
                    factor=factor,
                    size=self.size_of(atom),
                    copies=self._copies(self.groups.copies(root.members)),
                    parameters=tuple(
                        dict.fromkeys((str(k.block.value.parameter), k.occurrence[0]) for k in members)
                    ),
                    admits=tuple(kind for kind in Kind if kind in admits),
                    limits=self._limits(members, admits),
                )
            )
        return tuple(out)

    def _limits(self, members: Sequence[Key], admits: set[Kind]) -> tuple[Limit, ...]:
        limits: list[Limit] = []

        def note(kind: Kind, blame: Blame | None) -> None:
            if blame is not None:
                limits.append(Limit(kind, blame.fact.node, blame.fact.module, blame.reason))

        root, _ = self.groups.permutations.find(members[0])
        roots: dict[Key, int] = {}
        for key in members:
            partner = self.groups.linear.keys.get((key.block, key.occurrence))
            if partner is not None:
                top, _ = self.groups.linear.find(partner)
                roots[top] = roots.get(top, 0) + 1
        main = max(roots, key=lambda r: roots[r]) if roots else None
        if Kind.PERMUTATION in root.stops:
            note(Kind.PERMUTATION, root.stops[Kind.PERMUTATION])
        if not admits & {Kind.POSITIVE, Kind.SCALE, Kind.GENERAL_LINEAR, Kind.COMPLEX}:
            for number, unknown in enumerate(self.positive.unknowns):
                fact = self.positive.blame.get(number)
                if fact is None or len(unknown.subset) != 1:
                    continue
                if any(k.block is unknown.block and k.occurrence in unknown.subset for k in members[:64]):
                    limits.append(
                        Limit(
                            Kind.POSITIVE,
                            fact.node,
                            fact.module,
                            f"{fact.op.removeprefix('aten.')} is not homogeneous",
                        )
                    )
                    break
        if main is not None:
            for kind in (Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR):
                if kind in main.stops and not admits & _AT_LEAST[kind]:
                    note(kind, main.stops[kind])
        return tuple(limits)


_DIAGONAL = {Kind.POSITIVE, Kind.SCALE, Kind.SIGN}
_AT_LEAST = {
    Kind.ORTHOGONAL_ONES: {Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR},
    Kind.ORTHOGONAL: {Kind.ORTHOGONAL, Kind.GENERAL_LINEAR},
    Kind.GENERAL_LINEAR: {Kind.GENERAL_LINEAR},
}


class SpaceTable:
    """Permutation classes of parameter axes, by id."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._ids: dict[Key, str] = {}
        self._members: dict[str, list[Key]] = {}

    def add(self, members: list[Key]) -> None:
        root, _ = self._groups.permutations.find(members[0])
        id_ = f"s{len(self._ids)}"
        self._ids[root] = id_
        self._members[id_] = members

    def of(self, key: Key) -> str:
        partner = self._groups.permutations.keys[(key.block, key.occurrence)]
        root, _ = self._groups.permutations.find(partner)
        return self._ids[root]

    def ids(self) -> Iterable[str]:
        return self._members

    def items(self) -> Iterable[tuple[str, list[Key]]]:
        return self._members.items()


def _live(vector: Vector, used: set[int]) -> bool:
    return all(block.value.id in used for block, _ in vector.entries)


def _in_null(solver: Diagonal, vector: Mapping[int, Fraction]) -> bool:
    """Does a vector solve every equation? Its pivots must follow from its free unknowns."""
    pivots = solver.system.pivots
    expected: dict[int, Fraction] = {}
    for unknown, coefficient in vector.items():
        if unknown in pivots:
            continue
        for user in solver.system.users.get(unknown, ()):
            expected[user] = expected.get(user, Fraction(0)) + coefficient * pivots[user][unknown]
    for unknown in {*expected, *(u for u in vector if u in pivots)}:
        difference = expected.get(unknown, Fraction(0)) - vector.get(unknown, Fraction(0))
        if solver.binary:
            difference = Fraction(difference.numerator % 2) if difference.denominator == 1 else difference
        if difference:
            return False
    return True
