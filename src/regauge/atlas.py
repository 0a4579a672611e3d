"""The atlas of a model: its spaces, their generators, and what limits them. Frozen plain data.

The JSON form (``Atlas.to_json``) is complete: a random element of any generator can be applied to a
state dict from it alone. ``docs/atlas.md`` documents it field by field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Any

ATLAS_VERSION = 1


class Kind(StrEnum):
    """Families of groups, from small to large; see ``docs/concepts.md`` for what each may be."""

    PERMUTATION = "permutation"
    SIGN = "sign"
    POSITIVE = "positive"
    SCALE = "scale"
    COMPLEX = "complex"
    ORTHOGONAL_ONES = "orthogonal-fixing-ones"
    ORTHOGONAL = "orthogonal"
    GENERAL_LINEAR = "general-linear"
    TRANSLATION = "translation"
    NULL = "null"


@dataclass(frozen=True)
class Factor:
    """One factor of the part of an axis: index ``i`` contributes ``i * stride`` to the position.

    Attributes:
        name: the same name in two places means the same index set.
        size: number of index values.
        stride: step along the axis, in elements of that axis.
    """

    name: str
    size: int
    stride: int


@dataclass(frozen=True)
class Part:
    """Part of one axis: positions ``offset + sum_f i_f * stride_f`` over all factors ``f``."""

    offset: int
    factors: tuple[Factor, ...]

    @property
    def size(self) -> int:
        total = 1
        for factor in self.factors:
            total *= factor.size
        return total


@dataclass(frozen=True)
class Action:
    """How an element of a generator acts on one block of one parameter.

    The block is the product of one ``Part`` per axis of the parameter. The element acts along the
    factor named ``acting``; which element acts may depend on the factors named in the generator's
    ``copies``, each of which occurs exactly once in the block.

    Attributes:
        parameter: canonical state-dict name.
        parts: one part for each axis of the parameter.
        axis: the axis that holds the acting factor.
        acting: name of the acting factor in ``parts[axis]``.
        exponent: for diagonals the power of the scale; for groups +1 forward, -1 inverse transpose.
        chart: the constant added before acting and subtracted after (Gemma stores w for a gain 1+w).
        through: for translations: see ``docs/atlas.md``.
    """

    parameter: str
    parts: tuple[Part, ...]
    axis: int
    acting: str
    exponent: Fraction = Fraction(1)
    chart: float = 0.0
    through: Through | None = None


@dataclass(frozen=True)
class Through:
    """A shift that reaches its parameter through a linear map: ``delta = exponent * sum W * t``.

    ``W`` is the block of ``parameter`` given by ``parts``. Its factors named like factors of the
    shift ``t`` (acting and copies) are contracted with ``t``; every other factor along ``axis`` is
    summed over with ``t`` repeated; the factors of axis ``result`` index the target.
    """

    parameter: str
    parts: tuple[Part, ...]
    axis: int
    result: int


@dataclass(frozen=True)
class Generator:
    """One kind of group acting on one space.

    Attributes:
        id: short identifier, unique in the atlas and stable for the same model.
        kind: the family of groups.
        acting: name of the factor it acts on.
        size: size of that factor (2 for ``complex``: the pair).
        copies: (name, size) of the factors the element may depend on; the element is one group
            element for each combination of their indices.
        actions: every parameter block it changes; all of them must be applied, each exactly once.
        space: id of the space it belongs to.
    """

    id: str
    kind: Kind
    acting: str
    size: int
    copies: tuple[tuple[str, int], ...]
    actions: tuple[Action, ...]
    space: str

    @property
    def count(self) -> int:
        """Number of independent elements (product of the copies' sizes)."""
        total = 1
        for _, size in self.copies:
            total *= size
        return total

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(action.parameter for action in self.actions))


@dataclass(frozen=True)
class Limit:
    """Why a space admits no more: the first fact that stopped a kind of group.

    Attributes:
        kind: the kind that was stopped.
        node: the operation of the graph.
        module: path of the module it came from, for the reader.
        reason: plain words.
    """

    kind: Kind
    node: str
    module: str
    reason: str


@dataclass(frozen=True)
class Space:
    """A class of factors that transform together.

    Attributes:
        id: identifier, e.g. ``s0``.
        factor: name of its acting factor.
        size: its size.
        copies: (name, size) of the factors on which an element of it may depend.
        parameters: (name, axis) of every parameter axis that has it: its writers and readers.
        admits: kinds it admits as the model stands.
        limits: for kinds it does not admit, why.
        admits_folded, limits_folded: the same after every foldable gain has been folded.
        folds: gains that must be folded first for ``admits_folded`` to hold.
        unties: names that must be untied for ``admits_folded`` to hold.
    """

    id: str
    factor: str
    size: int
    copies: tuple[tuple[str, int], ...]
    parameters: tuple[tuple[str, int], ...]
    admits: tuple[Kind, ...]
    limits: tuple[Limit, ...]
    admits_folded: tuple[Kind, ...] = ()
    limits_folded: tuple[Limit, ...] = ()
    folds: tuple[str, ...] = ()
    unties: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Something the discovery did not understand, and therefore left rigid."""

    node: str
    module: str
    reason: str


@dataclass(frozen=True)
class Atlas:
    """Everything ``inspect`` knows about a model.

    Attributes:
        spaces: all spaces that touch a parameter.
        generators: maximal generators of the model as it stands.
        refusals: unknown operations and broken structures, each left rigid.
        aliases: canonical parameter name -> all its state-dict names, for tied parameters.
        shapes: canonical parameter name -> shape.
        folded: the atlas after folding every foldable gain, or None if nothing folds.
        folds: gains set to one in ``folded``.
    """

    spaces: tuple[Space, ...]
    generators: tuple[Generator, ...]
    refusals: tuple[Refusal, ...] = ()
    aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    folds: tuple[str, ...] = ()
    folded: Atlas | None = None
    notes: tuple[str, ...] = ()
    version: int = field(default=ATLAS_VERSION)

    def of_kind(self, kind: Kind) -> Iterator[Generator]:
        return (generator for generator in self.generators if generator.kind is kind)

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(_plain(self), indent=indent)

    @staticmethod
    def from_json(text: str) -> Atlas:
        """Inverse of ``to_json``. Raises ``ValueError`` on another version."""
        return _atlas(json.loads(text))


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else str(value)
    if isinstance(value, StrEnum):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _pairs(items: Any) -> tuple[tuple[Any, Any], ...]:
    return tuple((a, b) for a, b in items)


def _parts(items: Any) -> tuple[Part, ...]:
    return tuple(Part(p["offset"], tuple(Factor(**f) for f in p["factors"])) for p in items)


def _action(d: dict[str, Any]) -> Action:
    through = d["through"]
    return Action(
        d["parameter"],
        _parts(d["parts"]),
        d["axis"],
        d["acting"],
        Fraction(d["exponent"]),
        d["chart"],
        None
        if through is None
        else Through(through["parameter"], _parts(through["parts"]), through["axis"], through["result"]),
    )


def _limits(items: Any) -> tuple[Limit, ...]:
    return tuple(Limit(Kind(d["kind"]), d["node"], d["module"], d["reason"]) for d in items)


def _atlas(d: dict[str, Any]) -> Atlas:
    if d.get("version") != ATLAS_VERSION:
        raise ValueError(f"atlas version {d.get('version')}, this library reads {ATLAS_VERSION}")
    return Atlas(
        spaces=tuple(
            Space(
                s["id"],
                s["factor"],
                s["size"],
                _pairs(s["copies"]),
                _pairs(s["parameters"]),
                tuple(Kind(k) for k in s["admits"]),
                _limits(s["limits"]),
                tuple(Kind(k) for k in s["admits_folded"]),
                _limits(s["limits_folded"]),
                tuple(s["folds"]),
                tuple(s["unties"]),
            )
            for s in d["spaces"]
        ),
        generators=tuple(
            Generator(
                g["id"],
                Kind(g["kind"]),
                g["acting"],
                g["size"],
                _pairs(g["copies"]),
                tuple(_action(a) for a in g["actions"]),
                g["space"],
            )
            for g in d["generators"]
        ),
        refusals=tuple(Refusal(**r) for r in d["refusals"]),
        aliases=tuple((name, tuple(group)) for name, group in d["aliases"]),
        shapes=tuple((name, tuple(shape)) for name, shape in d["shapes"]),
        folds=tuple(d["folds"]),
        folded=None if d["folded"] is None else _atlas(d["folded"]),
        notes=tuple(d["notes"]),
    )
