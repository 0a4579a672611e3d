"""Reading facts as a graph: who makes a value, who reads a block, with which coefficient."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from torch import fx

from regauge.facts import Fact, Law, Pointwise, Remap, Value
from regauge.interpret import Walk
from regauge.solve.layout import Block, Layout, Occurrence, OccurrenceMap
from regauge.solve.reads import CONVOLUTIONS, UNEVEN, sources

Reading = tuple[int, Block | None]  # (number of the fact, block of its output where facts name one)

AFFINE = ("aten.layer_norm", "aten.native_layer_norm", "aten.group_norm", "aten.native_group_norm",
          "aten.linear", *CONVOLUTIONS)  # fmt: skip
BATCH_NORM = ("aten.batch_norm", "aten.native_batch_norm", "aten._native_batch_norm_legit_no_training",
              "aten.cudnn_batch_norm", "aten.instance_norm")  # fmt: skip


class Flow:
    """An index over the facts of one walk."""

    def __init__(self, walk: Walk, layout: Layout) -> None:
        self.walk = walk
        self.layout = layout
        self.facts = walk.result.facts
        self.consumers: dict[int, list[int]] = {}
        self.producer: dict[int, int] = {}
        self.nodes: dict[str, fx.Node] = {node.name: node for node in walk.trace.graph.nodes}
        for number, fact in enumerate(self.facts):
            for value in sources(fact):
                self.consumers.setdefault(value.id, []).append(number)
            out = getattr(fact, "out", None)
            if isinstance(out, Value):
                self.producer[out.id] = number
        self._readings: dict[Block, list[Reading]] = {}

    def readings(self, block: Block) -> list[Reading]:
        """Every use of a block; facts that only look at other blocks of the value are left out."""
        if block not in self._readings:
            found: list[Reading] = []
            for number in self.consumers.get(block.value.id, ()):
                fact = self.facts[number]
                if isinstance(fact, Pointwise):
                    found += [
                        (number, out)
                        for out, ins in self.layout.pointwise(fact)
                        if any(
                            b is block or (b is None and value is block.value)
                            for value, (b, _) in zip(fact.ins, ins, strict=True)
                        )
                    ]
                elif isinstance(fact, Remap):
                    rows = self.layout.remap(fact)
                    found += [(number, out) for out, b, _ in rows if b is block or b is None]
                else:
                    found.append((number, None))
            self._readings[block] = found
        return self._readings[block]

    def leaves(self, block: Block) -> Iterator[Reading]:
        """Uses of a block seen through rearrangements."""
        for number, out in self.readings(block):
            if isinstance(self.facts[number], Remap) and out is not None:
                yield from self.leaves(out)
            else:
                yield number, out

    def source(self, block: Block) -> tuple[Remap, Block, OccurrenceMap] | None:
        """If a rearrangement made this block: it, its input block, and output occurrence -> input one."""
        fact = self._producer(block.value)
        if not isinstance(fact, Remap) or fact.op in UNEVEN:
            return None
        for out, inp, mapping in self.layout.remap(fact):
            if out is block and inp is not None:
                back = inverse(mapping)
                return None if back is None else (fact, inp, back)
        return None

    def parameter(self, block: Block) -> tuple[Block, OccurrenceMap] | None:
        """The parameter block that this block shows, with occurrence here -> occurrence there."""
        mapping: OccurrenceMap = {o: o for o in block.order}
        while block.value.parameter is None:
            step = self.source(block)
            if step is None or step[0].op in ("aten.embedding", "aten.index", "aten.index_select"):
                return None
            _, block, back = step
            mapping = {here: back[there] for here, there in mapping.items() if there in back}
        return block, mapping

    def made_by_sum(self, value: Value) -> tuple[int, Pointwise] | None:
        number = self.producer.get(value.id)
        fact = None if number is None else self.facts[number]
        if number is None or not isinstance(fact, Pointwise) or fact.law not in (Law.SUM, Law.SHIFT):
            return None
        return number, fact

    def _producer(self, value: Value) -> Fact | None:
        number = self.producer.get(value.id)
        return None if number is None else self.facts[number]

    def averaged(self, value: Value) -> int | None:
        """The axis along which a value is non-negative weights that sum to one, fresh from a softmax."""
        if value.normalised is not None:
            return value.normalised
        fact = self._producer(value)
        if not isinstance(fact, Remap) or fact.op in UNEVEN:
            return None
        axis = self.averaged(fact.inp)
        if axis is None:
            return None
        for link in fact.links:
            whole = len(link.dst) == 1 and fact.out.shape[link.dst[0]] == fact.inp.shape[axis]
            if link.src == (axis,) and whole and link.start == 0 and link.step == 1 and not link.picks:
                return link.dst[0]
        return None

    def coefficient(self, fact: Pointwise, k: int) -> Fraction | None:
        """``c`` if the fact is ``out = c · ins[k] + the rest``, else None: facts of sums record no sign."""
        if fact.law not in (Law.SUM, Law.SHIFT):
            return None
        node = self.nodes.get(fact.node)
        if node is None:
            return None
        name, one = fact.op.rstrip("_"), Fraction(1)
        if fact.op in AFFINE:
            return one
        if fact.op in BATCH_NORM:
            return self._batch_norm(fact, k, node)
        if name in ("aten.addmm", "aten.baddbmm"):
            plain = all(node.kwargs.get(key, 1) == 1 for key in ("alpha", "beta")) and len(node.args) <= 3
            return one if plain else None
        if name in ("aten.mul", "aten.div") and len(fact.ins) == 1 and len(node.args) == 2:
            return _factor(node, name)
        if name == "aten.neg":
            return -one
        return self._sum(fact, k, node, name)

    def _sum(self, fact: Pointwise, k: int, node: fx.Node, name: str) -> Fraction | None:
        if name not in ("aten.add", "aten.sub") or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
            return None
        tensors = [isinstance(arg, fx.Node) for arg in node.args]
        if name == "aten.add" or (tensors == [True, False] and len(fact.ins) == 1):
            return Fraction(1)
        if tensors == [True, True] and len(fact.ins) == 2:
            return Fraction(-1 if k else 1)
        return None

    def _batch_norm(self, fact: Pointwise, k: int, node: fx.Node) -> Fraction | None:
        """x − mean, later + shift: both are arguments, told apart by which parameter they are."""
        if k == 0:
            return Fraction(1)
        if not self.layout.blocks(fact.ins[k]):
            return None
        found = self.parameter(self.layout.blocks(fact.ins[k])[0])
        names = [arg.name if isinstance(arg, fx.Node) else "" for arg in node.args[2:4]]
        shift, mean = (self.walk.trace.parameters.get(name) for name in (*names, "", "")[:2])
        own = None if found is None else found[0].value.parameter
        origin = self.walk.trace.canonical
        if own is None or shift == mean:
            return None
        return {shift: Fraction(1), mean: Fraction(-1)}.get(origin.get(own, own))


def inverse(mapping: OccurrenceMap) -> OccurrenceMap | None:
    back: dict[Occurrence, Occurrence] = {}
    for source, target in mapping.items():
        if target in back:
            return None
        back[target] = source
    return back


def _factor(node: fx.Node, name: str) -> Fraction | None:
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    if len(numbers) != 1 or numbers[0] == 0 or (name == "aten.div" and numbers[0] is not node.args[1]):
        return None
    factor = Fraction(numbers[0])
    return 1 / factor if name == "aten.div" else factor
