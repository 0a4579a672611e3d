"""Which parameter of one model plays the part of which of the other: by what the graphs do with them.

No name is compared. Both graphs are read in the order of execution; each use of a parameter is what the
operation is and which argument the parameter is. The longest common run of uses pairs the parameters.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from torch import fx

from regauge.errors import Refused
from regauge.matching.sides import Side
from regauge.trace import Trace

_TRANSPARENT = frozenset(
    {"_to_copy", "to", "alias", "contiguous", "clone", "detach", "type_as", "float", "t", "transpose"}
)
_LOOKUP = frozenset({"embedding", "index_select", "index", "slice", "select", "gather"})
_ENTRY = frozenset({"add", "sub", "mul", "div"})

Use = tuple[Hashable, str]


@dataclass(frozen=True)
class Correspondence:
    """Pairs of parameters.

    Attributes:
        names: parameter of a -> parameter of b.
        only_a, only_b: parameters without a counterpart.
        idle: pairs of vectors of which one does nothing: zeros, or ones.
    """

    names: Mapping[str, str]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    idle: Mapping[str, str] = field(default_factory=dict)


def correspond(a: Side, b: Side) -> Correspondence:
    """Pair the parameters of two models. Vectors of zeros or ones are left out: they do nothing.

    Raises:
        Refused: hardly any operation on parameters is common to both.
    """
    plain_a, plain_b = a.plain(), b.plain()
    tried: list[tuple[dict[str, str], list[Use], list[Use]]] = []
    for shaped in (True, False):
        uses_a, uses_b = _uses(a.trace, plain_a, shaped), _uses(b.trace, plain_b, shaped)
        tried.append((_paired(uses_a, uses_b), uses_a, uses_b))
    most = max(range(2), key=lambda i: len(tried[i][0]))
    names, uses_a, uses_b = tried[most]
    taken = set(names.values())
    only_a = tuple(name for name in dict.fromkeys(n for _, n in uses_a) if name not in names)
    only_b = tuple(name for name in dict.fromkeys(n for _, n in uses_b) if name not in taken)
    matrices = [n for n in (*only_a, *names) if len(a.shapes[n]) > 1]
    if sum(name in names for name in matrices) * 2 < len(matrices):
        raise Refused(
            "the two models do not do the same operations with their parameters",
            expected=f"{len(matrices)} matrices of {a.name}, in the order they are used",
            found=f"{sum(name in names for name in matrices)} of them in {b.name}",
            way_out="compare models of one family, or compare their functions: regauge certify",
        )
    every = _paired(_uses(a.trace, frozenset(), True), _uses(b.trace, frozenset(), True))
    idle = {n: o for n, o in every.items() if n not in names and o not in taken}
    return Correspondence(names, only_a, only_b, idle)


def paired_by_use(a: Trace, b: Trace) -> dict[str, str]:
    """Parameter of a -> parameter of b, by what the graphs do with them; values are not looked at.

    Matrices first: vectors that only one of them has do not shift what is between two of them, nor do gains
    of a norm pass for the bias of a map.
    """
    uses_a, uses_b = _uses(a, frozenset(), True, exact=True), _uses(b, frozenset(), True, exact=True)
    first = _paired(
        [use for use in uses_a if len(a.shapes[use[1]]) > 1],
        [use for use in uses_b if len(b.shapes[use[1]]) > 1],
    )
    back = {other: name for name, other in first.items()}
    marked_a: list[Use] = [(name if name in first else key, name) for key, name in uses_a]
    marked_b: list[Use] = [(back.get(name, key), name) for key, name in uses_b]
    return _paired(marked_a, marked_b)


def _paired(uses_a: Sequence[Use], uses_b: Sequence[Use]) -> dict[str, str]:
    names: dict[str, str] = {}
    taken: set[str] = set()
    matcher = SequenceMatcher(None, [key for key, _ in uses_a], [key for key, _ in uses_b], autojunk=False)
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            name, other = uses_a[block.a + i][1], uses_b[block.b + i][1]
            if name not in names and other not in taken:
                names[name] = other
                taken.add(other)
    return names


def _uses(trace: Trace, plain: frozenset[str], shaped: bool, *, exact: bool = False) -> list[Use]:
    """((what is done with it, its number of axes or its shape), parameter), in the order of first use.

    With ``exact``, what is done with a vector is the operation, and which argument it is.
    """
    carried: dict[fx.Node, str] = {}
    found: dict[str, Hashable] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder" and node.name in trace.parameters:
            name = trace.parameters[node.name]
            if name not in plain:
                carried[node] = name
        if node.op != "call_function":
            continue
        operation = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        first = node.args[0] if node.args else None
        if operation in _TRANSPARENT and isinstance(first, fx.Node):
            if first in carried:
                carried[node] = carried[first]
            continue
        for place, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument in carried:
                name = carried[argument]
                shape = trace.shapes[name]
                doing = (operation, place) if exact and len(shape) < 2 else _doing(operation)
                found.setdefault(name, (doing, shape if shaped else len(shape)))
    return [(key, name) for name, key in found.items()]


def _doing(operation: str) -> str:
    """Kinds of use that different encodings of one function share."""
    return "lookup" if operation in _LOOKUP else "entry" if operation in _ENTRY else "map"
