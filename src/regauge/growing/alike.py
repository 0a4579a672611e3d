"""What a set of indices does to the network when some of them are zero, equal, or to be added up.

Let an index set have slices in the values of a network, and let each slice be in one of three states:

- zero: at the index i it is 0;
- same: at the indices i and j it is equal;
- adds: it is additive in the parameters that are to be added up, so that v[i] + v[j] is what it becomes.

An index is *dead* if in every sum Σ_i a[i] b[i] over the index set one factor is zero at i. Indices are
*double* if in every sum one factor is the same and the other adds:
a[i] b[i] + a[j] b[j] = a[i] (b[i] + b[j]).

=====================  ==================================  ===================  ===========================
fact                   zero if                             same if              adds if
=====================  ==================================  ===================  ===========================
sum                    every operand is                    every operand is     every operand does
product                a factor with a positive power is   every factor is      one factor of power one
                                                                                does, the others are same
power, odd,            the argument is                     the argument is      never known
homogeneous, f(0) = 0
other curve            never known                         the argument is      never known
contraction            either factor is                    both are             one does, the other is same
sum of entries         the argument is                     the argument is      the argument does
softmax                never                               the argument is      never
rearrangement,         the argument is                     the argument is      the argument does
centring
=====================  ==================================  ===================  ===========================

What does not have the index set is the same at all its indices; as a term of a sum it does not add.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from regauge.facts import Center, Concat, Contract, Law, Normalise, Pointwise, Reduce, Remap, Rotary
from regauge.growing.passing import Relation
from regauge.growing.reach import Reach, Side, Slice
from regauge.growing.roles import Role
from regauge.growing.scales import MEANS

ZERO_AT_ZERO = frozenset(
    f"aten.{name}"
    for name in ("gelu", "silu", "mish", "elu", "selu", "celu", "relu6", "hardswish", "expm1", "log1p")
)
"""Curves without another law for which f(0) = 0."""


class State(StrEnum):
    ZERO = "zero"
    SAME = "same"
    ADDS = "adds"


def is_dead(relations: Iterable[Relation], reach: Reach, role: Role, zero: Iterable[Side]) -> bool:
    """Whether nothing sees an index on which these parameters are zero."""
    start = {part: State.ZERO for side in zero for part in reach.sides[side]}
    states = spread(relations, reach.atom, start)
    return _divides_by_no_count(reach, role) and all(
        State.ZERO in (states.get(s.left), None if s.right is None else states.get(s.right))
        for s in reach.sums
    )


def is_double(relations: Iterable[Relation], reach: Reach, role: Role, silent: Iterable[Side]) -> bool:
    """Whether two indices become one when ``silent`` is added up and all other parameters are equal there."""
    silent = set(silent)
    start = {
        part: State.ADDS if side in silent else State.SAME
        for side, parts in reach.sides.items()
        for part in parts
    }
    states = spread(relations, reach.atom, start)
    wanted = ({State.SAME, State.ADDS}, {State.ADDS})
    return _divides_by_no_count(reach, role) and all(
        {states.get(part) for part in (s.left, s.right) if part is not None} == wanted[s.right is None]
        for s in reach.sums
    )


def _divides_by_no_count(reach: Reach, role: Role) -> bool:
    """A mean changes with the number of its terms; only the stream has norms that take that back."""
    return role is Role.RESIDUAL or not any(s.fact.op in MEANS for s in reach.sums)


def spread(relations: Iterable[Relation], atom: int, start: Mapping[Slice, State]) -> dict[Slice, State]:
    """The states of all slices that follow from those of parameters."""
    known: dict[Slice, State | None] = dict(start)
    for relation in relations:
        if relation.out is None:
            continue
        for target in relation.out.order:
            part = (relation.out, target)
            if target[1] != atom or part in start:
                continue
            found = _state(relation, [_of(known, b, m, target) for b, m in relation.ins])
            known[part] = found if known.get(part, found) is found else None
    return {part: state for part, state in known.items() if state is not None}


_Operand = State | None | bool
"""None: not known; False: it does not have the index set."""


def _of(known: Mapping[Slice, State | None], block: object, mapping: object, target: object) -> _Operand:
    sources = [o for o, t in mapping.items() if t == target]  # type: ignore[attr-defined]
    states = {known.get((block, o)) for o in sources}  # type: ignore[arg-type]
    return False if not sources else states.pop() if len(states) == 1 else None


def _state(relation: Relation, ins: list[_Operand]) -> State | None:
    fact = relation.fact
    same = all(state in (State.SAME, False) for state in ins)
    if isinstance(fact, Pointwise):
        return _pointwise(fact, ins, same)
    if isinstance(fact, Contract):
        return _product(ins, [1.0] * len(ins), same)
    if same:
        return State.SAME
    passes = isinstance(fact, (Remap, Concat, Center, Rotary))
    if passes or (isinstance(fact, Reduce) and fact.law is Law.SUM):
        return ins[0] or None  # type: ignore[return-value]
    if isinstance(fact, Reduce) and fact.law is Law.HOMOGENEOUS and ins[0] is State.ZERO:
        return State.ZERO
    assert isinstance(fact, (Reduce, Normalise)), type(fact)
    return None


def _pointwise(fact: Pointwise, ins: list[_Operand], same: bool) -> State | None:
    if same:
        return State.SAME
    if fact.law is Law.SUM:
        return ins[0] if len(set(ins)) == 1 else None  # type: ignore[return-value]
    if fact.law is Law.PRODUCT:
        return _product(ins, fact.exponents or (1.0,) * len(ins), same)
    if any(state is not State.ZERO for state in ins):
        return None
    keeps = fact.law in (Law.HOMOGENEOUS, Law.ABSOLUTE, Law.ODD) or fact.op in ZERO_AT_ZERO
    return State.ZERO if keeps or (fact.law is Law.POWER and fact.exponents[0] > 0) else None


def _product(ins: list[_Operand], exponents: Iterable[float], same: bool) -> State | None:
    pairs = list(zip(ins, exponents, strict=True))
    if any(state is State.ZERO and e > 0 for state, e in pairs):
        return State.ZERO
    adding = [e for state, e in pairs if state is State.ADDS]
    rest = all(state in (State.SAME, False) for state, _ in pairs if state is not State.ADDS)
    if same:
        return State.SAME
    return State.ADDS if adding == [1.0] and rest else None
