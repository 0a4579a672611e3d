"""Union-find with parity over the factors of all blocks, with what stops each class."""

from __future__ import annotations

from dataclasses import dataclass, field

from regauge.atlas import Kind
from regauge.facts import Fact
from regauge.solve.layout import Block, Occurrence


@dataclass(frozen=True, slots=True)
class Blame:
    """Why a class is stopped for a kind."""

    fact: Fact
    reason: str


@dataclass(eq=False, slots=True)
class Key:
    """One occurrence of an atom in a block of a value."""

    block: Block
    occurrence: Occurrence
    parent: Key | None = None
    parity: int = 0
    members: list[Key] = field(default_factory=list)
    stops: dict[Kind, Blame] = field(default_factory=dict)
    rotated: bool = False

    @property
    def atom(self) -> int:
        return self.occurrence[1]


class Forest:
    """Union-find with parity."""

    def __init__(self) -> None:
        self.keys: dict[tuple[Block, Occurrence], Key] = {}

    def key(self, block: Block, occurrence: Occurrence) -> Key:
        key = self.keys.get((block, occurrence))
        if key is None:
            key = Key(block, occurrence)
            key.members.append(key)
            self.keys[(block, occurrence)] = key
        return key

    def find(self, key: Key) -> tuple[Key, int]:
        path: list[Key] = []
        while key.parent is not None:
            path.append(key)
            key = key.parent
        parity = 0
        for node in reversed(path):
            parity ^= node.parity
            node.parity, node.parent = parity, key
        return key, (path[0].parity if path else 0)

    def union(self, a: Key, b: Key, parity: int) -> bool:
        """Join; False if both were joined already with the other parity."""
        root_a, p = self.find(a)
        root_b, q = self.find(b)
        if root_a is root_b:
            return p ^ q == parity
        if len(root_a.members) < len(root_b.members):
            root_a, root_b = root_b, root_a
        root_b.parent = root_a
        root_b.parity = p ^ q ^ parity
        root_a.members.extend(root_b.members)
        root_b.members = []
        for kind, blame in root_b.stops.items():
            root_a.stops.setdefault(kind, blame)
        root_a.rotated = root_a.rotated or root_b.rotated
        return True
