"""What an index set is for, told from where it goes; and which parameters are to be zero when it grows."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from regauge.errors import Refused
from regauge.growing.reach import Follower, Reach, Side, Sum


class Role(StrEnum):
    """Index sets of a network that people speak of."""

    CHANNELS = "channels"  # read by a convolution
    NEURONS = "neurons"  # written by maps, read by a map, everything between entry by entry
    HEADS = "heads"  # of keys and values, with the queries that read them
    QUERIES = "queries"  # query heads for each head of keys and values
    KEYS = "keys"  # entries of a key: summed over in a product of two activations
    VALUES = "values"  # entries of a value: in one factor of a product of two activations
    RESIDUAL = "residual"  # what norms take the length of


def role_of(reach: Reach) -> Role:
    """The role of an index set, by the operations that it goes through."""
    between = [s for s in reach.sums if s.right is not None and not _normed(s) and not _readers(reach, s)]
    if between:
        return Role.KEYS
    if any(_normed(s) for s in reach.sums):
        return Role.RESIDUAL
    if reach.paired:
        both = all(reach.writers(a) and reach.writers(b) for a, b in reach.paired)
        return Role.HEADS if both else Role.QUERIES
    if reach.mixed:
        return Role.VALUES
    convolved = any(s.fact.op.startswith("aten.conv") for s in reach.sums)
    return Role.CHANNELS if convolved else Role.NEURONS


def silent_sides(follower: Follower, reach: Reach) -> tuple[Side, ...]:
    """Parameters that are to be zero on the new indices, so that nothing sees them.

    Σ_new a·b = 0 wherever the index set is summed over: the map that reads it is zero there; where two
    activations are multiplied (q·k), what writes the second one (k); where only norms and readers see it
    (the residual stream), everything that writes it.

    Raises:
        Refused: no such choice is known, or with it a new index could never come to matter.
    """
    role = role_of(reach)
    chosen: list[Side] = []
    for s in reach.sums:
        if role is Role.RESIDUAL:
            found = reach.writers(s.left) - reach.gains
        else:
            found = _readers(reach, s) or reach.writers(s.right or s.left)
        chosen += [side for side in sorted(found) if side not in chosen]
    zero = follower.zero(reach, chosen)
    for s in reach.sums:
        if s.left not in zero and s.right not in zero:
            raise _unsilenced(s, "both factors may be anything on the new indices")
        if role is not Role.RESIDUAL and s.left in zero and s.right in zero:
            raise _unsilenced(s, "both factors would have to be zero there, and would stay zero in training")
        twice = set(chosen) & _writers(reach, s)
        if role is not Role.RESIDUAL and twice:
            raise _unsilenced(s, f"{sorted(twice)[0][0]} is both factors")
    return tuple(chosen)


def key_product(reach: Reach) -> Sum:
    """The product of two activations that sums over the entries of a key."""
    return next(s for s in reach.sums if s.right is not None and not _normed(s) and not _readers(reach, s))


def norms(reach: Reach) -> list[Sum]:
    """Where the squared length of an activation is taken over the index set."""
    return [s for s in reach.sums if _normed(s)]


def key_sides(follower: Follower, reach: Reach) -> set[Side]:
    """Everything that writes the key, whichever of its entries."""
    product = key_product(reach)
    assert product.right is not None
    block, _ = product.right
    sides: set[Side] = set()
    for other in follower.layout.blocks(block.value):
        for o in other.order:
            try:
                sides |= follower.reach(o[1]).writers((other, o))
            except Refused:
                continue
    return sides


def _normed(s: Sum) -> bool:
    """The squared length of one activation."""
    return s.right is not None and s.left[0].value is s.right[0].value


def _readers(reach: Reach, s: Sum) -> set[Side]:
    """Parameters that are a factor of the sum as they are stored, or rearranged."""
    sides = (reach.stored(part) for part in (s.left, s.right) if part is not None)
    return {side for side in sides if side is not None}


def _writers(reach: Reach, s: Sum) -> set[Side]:
    """What writes both factors of a sum."""
    return reach.writers(s.left) & reach.writers(s.right) if s.right is not None else set()


def _unsilenced(s: Sum, why: str) -> Refused:
    return Refused(
        f"an index set cannot grow unseen: {why}",
        node=f"{s.fact.node} in {s.fact.module or 'the model'}",
        expected="a sum one of whose factors alone can be zero on the new indices",
        found=s.fact.op,
    )


def growable(follower: Follower, atoms: Iterable[int]) -> dict[int, Reach]:
    """Atom -> where it goes, for every index set of a parameter that can grow in some way."""
    found: dict[int, Reach] = {}
    for atom in atoms:
        try:
            found[atom] = follower.reach(atom)
        except Refused:
            continue
    return found
