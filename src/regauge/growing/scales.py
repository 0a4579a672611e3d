"""Whether constants and parameters that change by a factor leave the function as it is.

Every value of the network is followed with the factor by which it differs on its old entries, as a logarithm:
0 if it does not. A mean over a grown index set of a value that is zero on the new indices is smaller by
n / n′; what is not homogeneous must be reached with factor one, and so must the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from regauge.errors import Refused
from regauge.facts import (
    AlignPermutation,
    Center,
    Concat,
    Contract,
    Fact,
    Facts,
    Law,
    Normalise,
    Pointwise,
    Reduce,
    Remap,
    Rotary,
    Stop,
    Value,
)
from regauge.growing.reach import Sum

MEANS = frozenset(("aten.mean", "aten.rms_norm", "aten._fused_rms_norm"))
"""Operations that divide a sum by the number of its terms."""
_CLOSE = 1e-12


def check_scales(
    facts: Facts,
    parameters: Mapping[str, float],
    means: Mapping[int, float],
    constants: Mapping[str, float],
) -> None:
    """Follow the factors through the network.

    Args:
        facts: of the model as it is.
        parameters: parameter -> its factor, where it is not one.
        means: id of a fact -> factor of the mean that it takes.
        constants: operation -> factor of its constant: one that is added, or one that multiplies.

    Raises:
        Refused: somewhere the factors do not cancel.
    """
    known: dict[int, float] = {}
    for value in facts.parameters.values():
        if (name := value.parameter) is not None and name in parameters:
            known[value.id] = math.log(parameters[name])

    adds = {fact.node for fact in facts.facts if isinstance(fact, Pointwise) and fact.law is Law.SHIFT}
    added = {node: math.log(ratio) for node, ratio in constants.items() if node in adds}
    multiplied = {node: math.log(ratio) for node, ratio in constants.items() if node not in adds}
    unknown = constants.keys() - {fact.node for fact in facts.facts}
    if unknown:
        raise Refused(
            "a constant changes with the size where it is not known what that does",
            node=min(unknown),
            found="an operation on tensors that no parameter changes",
        )

    def of(value: Value) -> float:
        return known.get(value.id, 0.0)

    for fact in facts.facts:
        if isinstance(fact, Stop):
            if fact.axes is None:
                _need(of(fact.value), 0.0, fact)
        elif isinstance(fact, AlignPermutation):
            continue
        elif isinstance(fact, Pointwise):
            known[fact.out.id] = _pointwise(fact, [of(v) for v in fact.ins], added, multiplied)
        elif isinstance(fact, Contract):
            more = means.get(id(fact), 0.0) + multiplied.pop(fact.node, 0.0)
            known[fact.out.id] = of(fact.a) + of(fact.b) + more
        elif isinstance(fact, Concat):
            known[fact.out.id] = _same([of(v) for v in fact.ins], fact)
        elif isinstance(fact, Normalise) or (isinstance(fact, Reduce) and fact.law is Law.GENERIC):
            _need(of(fact.inp), 0.0, fact)
        else:
            assert isinstance(fact, (Remap, Reduce, Center, Rotary))
            known[fact.out.id] = of(fact.inp) + means.get(id(fact), 0.0)


def factor_of_mean(total: Sum, before: int, after: int) -> float:
    """log(n / n′) where the sum over the grown index set is divided by its number, else 0."""
    return math.log(before / after) if total.fact.op in MEANS else 0.0


def _pointwise(
    fact: Pointwise, ins: list[float], added: Mapping[str, float], multiplied: Mapping[str, float]
) -> float:
    more = multiplied.get(fact.node, 0.0)
    if fact.law is Law.SUM:
        return _same([s for s, v in zip(ins, fact.ins, strict=True) if not v.zero], fact) + more
    if fact.law is Law.PRODUCT:
        exponents = fact.exponents or (1.0,) * len(ins)
        return sum(e * s for e, s in zip(exponents, ins, strict=True)) + more
    if fact.law is Law.POWER:
        return fact.exponents[0] * ins[0]
    if fact.law is Law.SHIFT:
        _need(ins[0], added.get(fact.node, 0.0), fact)
        return ins[0]
    if fact.law in (Law.HOMOGENEOUS, Law.ABSOLUTE):
        return _same(ins, fact) + more
    for s in ins:
        _need(s, 0.0, fact)
    return 0.0


def _same(ins: Iterable[float], fact: Fact) -> float:
    ins = list(ins)
    for s in ins:
        _need(s, ins[0], fact)
    return ins[0] if ins else 0.0


def _need(found: float, expected: float, fact: Fact) -> None:
    if abs(found - expected) > _CLOSE:
        raise Refused(
            "a factor that growth brings in does not cancel",
            node=f"{fact.node} in {fact.module or 'the model'}",
            expected=f"a factor {math.exp(expected):.6g}",
            found=f"{math.exp(found):.6g} before {fact.op or 'the output'}",
        )
