"""Slots: biases that are added where a shift arrives and can take it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regauge.facts import Law, Pointwise, Value
from regauge.solve.flow import Flow, Reading, inverse
from regauge.solve.layout import Block, OccurrenceMap
from regauge.solve.path import Form, Path


@dataclass(frozen=True)
class Summand:
    """The k-th input of a sum, at one block of its output."""

    fact: Pointwise
    k: int
    block: Block | None
    mapping: OccurrenceMap


class Slots:
    """Finds slots among the parameters of one walk."""

    def __init__(self, flow: Flow, usable: Sequence[Value]) -> None:
        self.flow = flow
        self.layout = flow.layout
        self.usable = {value.id for value in usable}

    def ahead(self, block: Block) -> bool:
        """The only reader adds a bias: it may take back even what nobody would see."""
        readings = self.flow.readings(block)
        if len(readings) != 1 or readings[0][1] is None:
            return False
        number, out = readings[0]
        fact = self.flow.facts[number]
        if not isinstance(fact, Pointwise):
            return False
        for row, ins in self.layout.pointwise(fact):
            if row is out:
                others = [b for b, _ in ins if b is not None and b is not block]
                return any(self.flow.parameter(b) is not None for b in others)
        return False

    def take_back(
        self,
        path: Path,
        number: int,
        fact: Pointwise,
        out: Block,
        ins: list[tuple[Block | None, OccurrenceMap]],
        hit: int,
        form: Form,
    ) -> bool:
        """Let a bias among the other summands, or in how they were made, take the shift back."""
        others = [k for k in range(len(ins)) if k != hit and fact.law is not Law.PRODUCT]
        for direct in (True, False):
            for k in others:
                summand = Summand(fact, k, *ins[k])
                if self._absorb(path, summand, form, (number, out), direct):
                    return True
        return False

    def _absorb(self, path: Path, summand: Summand, form: Form, event: Reading, direct: bool) -> bool:
        block = summand.block
        if block is None:
            return False
        factor = self.flow.coefficient(summand.fact, summand.k)
        back = inverse(summand.mapping)
        if not factor or back is None:
            return False
        own = form.moved(back, 1 / factor)
        if own is None:
            return False
        found = self.flow.parameter(block)
        if direct or found is not None:
            return direct and found is not None and self._take(path, *found, own, event)
        while (step := self.flow.source(block)) is not None:
            if len(self.flow.readings(block)) != 1 or (own := own.moved(step[2])) is None:
                return False
            block = step[1]
        made = self.flow.made_by_sum(block.value)
        if made is None or len(self.flow.readings(block)) != 1:
            return False
        inner, maker = made
        ins = next(row for out, row in self.layout.pointwise(maker) if out is block)
        return self.take_back(path, inner, maker, block, ins, -1, own)

    def _take(self, path: Path, slot: Block, mapping: OccurrenceMap, form: Form, event: Reading) -> bool:
        own = form.moved(mapping)
        if own is None or slot is path.source or slot.value.id not in self.usable or slot.repeated:
            return False
        key = (slot, own.images, own.scale, None if own.map is None else own.map.block)
        path.absorbed.setdefault(key, []).append(event)
        path.maps[key] = own.map
        return True
