"""A short list of elements with the effect of a long one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.atlas import Generator, Kind
from regauge.elements import DIAGONAL, Diagonal, Element, Matrix, Permutation, compose

Item = tuple[Generator, Element]


def shortened(history: Sequence[Item]) -> list[Item]:
    """The same action: identities dropped, and elements of one generator multiplied wherever all between
    them commute with it."""
    found: list[Item] = []
    for generator, element in history:
        if _is_identity(element):
            continue
        at = next((i for i in range(len(found) - 1, -1, -1) if not _commute(found[i][0], generator)), -1)
        if at >= 0 and found[at][0].id == generator.id:
            product = multiplied(element, found[at][1])
            if product is not None:
                found[at] = (generator, product)
                continue
        found.append((generator, element))
    return [item for item in found if not _is_identity(item[1])]


def multiplied(last: Element, first: Element) -> Element | None:
    """``last · first`` as one element, or None if they are of a form that is not multiplied out."""
    if isinstance(last, Matrix) and isinstance(first, Matrix) and last.kind is first.kind:
        if last.kind in (Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES):
            product = last.values @ first.values
            return Matrix(product, last.kind, product)
        assert last.contragredient is not None
        assert first.contragredient is not None
        dual = last.contragredient @ first.contragredient
        return Matrix(last.values @ first.values, last.kind, dual)
    plain = last.kind in DIAGONAL or isinstance(last, Permutation)
    return compose(last, first) if plain and last.kind is first.kind else None


def _commute(one: Generator, other: Generator) -> bool:
    """Whether they act on different factors, and neither on one that numbers elements of the other, or both
    by diagonals."""
    if one.id == other.id:
        return False
    if one.kind in DIAGONAL and other.kind in DIAGONAL:
        return True
    numbered = {name for g in (one, other) for name, _ in g.copies}
    return one.acting != other.acting and one.acting not in numbered and other.acting not in numbered


def _is_identity(element: Element) -> bool:
    if isinstance(element, Permutation):
        return bool((element.index == torch.arange(element.n)).all())
    if isinstance(element, Diagonal):
        return bool((element.vector == 1).all())
    return isinstance(element, Matrix) and bool((element.values == torch.eye(element.n)).all())
