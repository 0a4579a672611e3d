"""Which streams can be stored with one coordinate less: d vectors of mean zero span d - 1 dimensions.

A stream is followed from value to value along one axis. What passes linearly keeps its place in it; what is
contracted with it reads it, and is a covector where the stream is a vector. Vectors are stored as ``D x``,
covectors as ``P^T w``, with ``P D x = x`` for every x of mean zero, so that ``w . x`` stays. Anything else
that touches the axis fixes its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from regauge.facts import (
    Center,
    Concat,
    Contract,
    Fact,
    Law,
    Normalise,
    Pointwise,
    Reduce,
    Remap,
    Rotary,
    Stop,
    Value,
)
from regauge.interpret import Walk
from regauge.solve.reads import UNEVEN, sources

Key = tuple[int, int, bool]
"""Value, axis, and whether it is the value as read behind an entrance."""


@dataclass(frozen=True)
class Stream:
    """Values that share one axis, some of them read by a LayerNorm.

    Attributes:
        size: d.
        norms: LayerNorm operations that read it.
        writers, readers: (parameter, axis) of vectors and of covectors.
        entrances: values that come in from outside, by id.
        limit: (operation, reason) of what fixes its width, if anything does.
    """

    size: int
    norms: tuple[str, ...]
    writers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]
    entrances: tuple[int, ...]
    limit: tuple[str, str] | None


def streams(
    walk: Walk, norms: Mapping[str, str], centred: Set[tuple[str, int]], taken: Mapping[int, int]
) -> tuple[Stream, ...]:
    """Every stream that one of the norms reads, in order of first use.

    Args:
        walk: of the model.
        norms: LayerNorm operation without gain and shift whose input has mean zero -> the module it is; its
            output goes on in the stream.
        centred: (parameter, axis) whose mean along the axis is zero for every other index.
        taken: id of a value -> axis along which a module makes it a vector of the stream before reading it.
    """
    classes = _Classes(walk, taken)
    inputs: dict[str, Key] = {}
    first: dict[str, Key] = {}
    for node in walk.trace.graph.nodes:
        inp = walk.results.get(node.args[0].name) if node.name in norms else None
        if not isinstance(inp, Value) or inp.shape[-1] < 2:
            continue
        out = walk.results[node.name]
        inputs[node.name] = key = classes.read(inp, inp.rank - 1)
        classes.join(key, classes.made(out, out.rank - 1), node.name)
        classes.join(first.setdefault(norms[node.name], key), key, node.name)
        for axis in range(inp.rank - 1):
            classes.join(classes.read(inp, axis), classes.made(out, axis), node.name)
    for fact in walk.result.facts:
        if fact.node not in inputs or isinstance(fact, Stop):
            classes.visit(fact)
    for value_id, axis in taken.items():
        classes.fix((value_id, axis, False), "", "is written by something that cannot be centred")
    return tuple(_collect(walk, classes, inputs, centred))


def _collect(
    walk: Walk, classes: _Classes, inputs: Mapping[str, Key], centred: Set[tuple[str, int]]
) -> Iterable[Stream]:
    norms: dict[Key, list[str]] = {}
    turned: dict[Key, bool] = {}
    for name, key in inputs.items():
        root, parity = classes.find(key)
        norms.setdefault(root, []).append(name)
        if turned.setdefault(root, parity) is not parity:
            classes.fix(key, name, "is read where something else is written")
    writers: dict[Key, list[tuple[str, int]]] = {root: [] for root in norms}
    readers: dict[Key, list[tuple[str, int]]] = {root: [] for root in norms}
    for (name, chart), value in walk.result.parameters.items():
        for axis in range(value.rank):
            root, parity = classes.find((value.id, axis, False))
            if root not in norms:
                continue
            if chart:
                classes.fix(root, "", f"{name} is used with a constant added")
            side = writers if parity is turned[root] else readers
            side[root].append((name, axis))
            if side is writers and (name, axis) not in centred:
                classes.fix(root, "", f"{name} cannot be centred along axis {axis}: its mean is seen")
    entrances: dict[Key, list[int]] = {}
    for value_id, axis in classes.taken.items():
        entrances.setdefault(classes.find((value_id, axis, True))[0], []).append(value_id)
    limits = classes.limits()
    for root, names in norms.items():
        size = walk.result.values[root[0]].shape[root[1]]
        held = tuple(writers[root]), tuple(readers[root])
        yield Stream(size, tuple(names), *held, tuple(entrances.get(root, ())), limits.get(root))


@dataclass
class _Classes:
    """Axes of values joined with a parity: alike (False), or vector and covector (True)."""

    walk: Walk
    taken: Mapping[int, int]
    parents: dict[Key, tuple[Key, bool]] = field(default_factory=dict)
    fixed: list[tuple[Key, str, str]] = field(default_factory=list)

    def read(self, value: Value, axis: int) -> Key:
        return value.id, axis, self.taken.get(value.id) == axis

    def made(self, value: Value, axis: int) -> Key:
        return value.id, axis, False

    def find(self, key: Key) -> tuple[Key, bool]:
        path: list[Key] = []
        at, parity = key, False
        while at in self.parents:
            path.append(at)
            at, turn = self.parents[at]
            parity ^= turn
        whole = parity
        for step in path:
            _, turn = self.parents[step]
            self.parents[step] = (at, whole)
            whole ^= turn
        return at, parity

    def join(self, a: Key, b: Key, node: str, dual: bool = False) -> None:
        (first, p), (second, q) = self.find(a), self.find(b)
        if first == second:
            if p ^ q ^ dual:
                self.fix(a, node, "is read as well as written with the same numbers")
        else:
            self.parents[second] = (first, p ^ q ^ dual)

    def fix(self, key: Key, node: str, reason: str) -> None:
        self.fixed.append((key, node, reason))

    def limits(self) -> dict[Key, tuple[str, str]]:
        found: dict[Key, tuple[str, str]] = {}
        for key, node, reason in self.fixed:
            found.setdefault(self.find(key)[0], (node, reason))
        return found

    def visit(self, fact: Fact) -> None:
        if isinstance(fact, Pointwise):
            self._pointwise(fact)
        elif isinstance(fact, Remap):
            self._remap(fact)
        elif isinstance(fact, Contract):
            self._contract(fact)
        elif isinstance(fact, Reduce):
            over = range(fact.inp.rank) if fact.law is not Law.SUM else fact.over
            self._block(fact, fact.inp, over, "is reduced over the stream, or not linearly")
            self._same(fact, fact.inp, fact.out, fact.keep)
        elif isinstance(fact, Center):
            self._block(fact, fact.inp, fact.over, "takes the mean of the stream")
            self._same(fact, fact.inp, fact.out, ((i, i) for i in range(fact.inp.rank)))
        elif isinstance(fact, Concat):
            for value in fact.ins:
                self._block(fact, value, (fact.axis,), "joins the stream with something else")
                self._same(fact, value, fact.out, ((i, i) for i in range(value.rank) if i != fact.axis))
            self._block_made(fact, fact.out, (fact.axis,), "joins the stream with something else")
        elif isinstance(fact, Stop):
            axes = range(fact.value.rank) if fact.axes is None else fact.axes
            self._block(fact, fact.value, axes, fact.reason)
        elif isinstance(fact, (Normalise, Rotary)):
            self._block(fact, fact.inp, range(fact.inp.rank), "is not linear")
            self._block_made(fact, fact.out, range(fact.out.rank), "is not linear")
        else:
            for value in sources(fact):
                self._block(fact, value, range(value.rank), f"meets {fact.op or 'another operation'}")

    # --- facts -----------------------------------------------------------------------------------

    def _block(self, fact: Fact, value: Value, axes: Iterable[int], reason: str) -> None:
        for axis in axes:
            if value.shape[axis] > 1:
                self.fix(self.read(value, axis), fact.node, reason)

    def _block_made(self, fact: Fact, value: Value, axes: Iterable[int], reason: str) -> None:
        for axis in axes:
            if value.shape[axis] > 1:
                self.fix(self.made(value, axis), fact.node, reason)

    def _same(self, fact: Fact, inp: Value, out: Value, pairs: Iterable[tuple[int, int]]) -> None:
        for i, j in pairs:
            if inp.shape[i] == out.shape[j] > 1:
                self.join(self.read(inp, i), self.made(out, j), fact.node)
            else:
                self._block(fact, inp, (i,), "keeps a part of it")
                self._block_made(fact, out, (j,), "repeats it")

    def _pointwise(self, fact: Pointwise) -> None:
        linear = fact.law in (Law.SUM, Law.PRODUCT)
        for j in range(fact.out.rank):
            if fact.out.shape[j] == 1:
                continue
            spans = [(v, m[j]) for v, m in zip(fact.ins, fact.maps, strict=True)]
            live = [(value, axis) for value, axis in spans if axis is not None]
            passes = linear and j not in fact.fixed
            if fact.law is Law.SUM:
                passes = passes and len(live) == len(spans)
            else:
                powers = [e for (_, axis), e in zip(spans, fact.exponents, strict=False) if axis is not None]
                passes = passes and len(live) == 1 and powers == [1.0]
            if passes:
                for value, axis in live:
                    self._same(fact, value, fact.out, ((axis, j),))
                continue
            what = "is passed entry by entry" if len(fact.ins) == 1 else "meets a number of its own per entry"
            for value, axis in live:
                self._block(fact, value, (axis,), what)
            self._block_made(fact, fact.out, (j,), what)

    def _remap(self, fact: Remap) -> None:
        whole = {
            link.src[0]: link.dst[0]
            for link in fact.links
            if len(link.src) == len(link.dst) == 1
            and not link.picks
            and (link.start, link.step) == (0, 1)
            # What a pad puts around a stream is not known to have mean zero.
            and fact.op not in UNEVEN
        }
        self._same(fact, fact.inp, fact.out, whole.items())
        rest = [axis for axis in range(fact.inp.rank) if axis not in whole]
        self._block(fact, fact.inp, rest, "splits it, or picks from it")
        rest = [axis for axis in range(fact.out.rank) if axis not in whole.values()]
        self._block_made(fact, fact.out, rest, "repeats or picks entries")

    def _contract(self, fact: Contract) -> None:
        a = dict(zip(fact.la, range(fact.a.rank), strict=True))
        b = dict(zip(fact.lb, range(fact.b.rank), strict=True))
        out = dict(zip(fact.lo, range(fact.out.rank), strict=True))
        for letter in dict.fromkeys((*fact.la, *fact.lb)):
            i, j = a.get(letter), b.get(letter)
            if i is not None and j is not None:
                if letter not in out and fact.a.shape[i] == fact.b.shape[j] > 1:
                    self.join(self.read(fact.a, i), self.read(fact.b, j), fact.node, dual=True)
                    continue
            elif letter in out:
                value, axis = (fact.a, i) if i is not None else (fact.b, j)
                assert axis is not None
                self._same(fact, value, fact.out, ((axis, out[letter]),))
                continue
            for value, axis in ((fact.a, i), (fact.b, j)):
                if axis is not None:
                    self._block(fact, value, (axis,), "is multiplied entry by entry")
            if letter in out:
                self._block_made(fact, fact.out, (out[letter],), "is multiplied entry by entry")
