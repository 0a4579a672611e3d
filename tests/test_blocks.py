"""Blocks that make no sense, and elements that do not fit them, are refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from act_cases import D_MODEL, FF, HEADS, WIDTH, R, action, heads, whole
from regauge.act import act
from regauge.atlas import Action, Kind, Through
from regauge.elements import identity
from regauge.errors import RegaugeError
from regauge.steps import ActStep, CenterStep

PLAIN = action("w", [whole("f", FF), R], 1, "r")
PER_HEAD = action("w", [heads(), R], 0, "v")


@pytest.mark.parametrize(
    ("a", "shape", "copies", "message"),
    [
        (PLAIN, (FF, D_MODEL - 1), (), "does not lie on the axis"),
        (PLAIN, (FF,), (), "one part per axis"),
        (replace(PLAIN, axis=0), (FF, D_MODEL), (), "acting factor"),
        (replace(PLAIN, axis=2), (FF, D_MODEL), (), "acting factor"),
        (replace(PLAIN, acting="z"), (FF, D_MODEL), (), "acting factor"),
        (PLAIN, (FF, D_MODEL), ("z",), "copy must occur exactly once"),
        (PLAIN, (FF, D_MODEL), ("r",), "copy must occur exactly once"),
        (PLAIN, (FF, D_MODEL), ("f",), "another shape"),
        (action("w", [whole("f", FF), whole("f", FF), R], 2, "r"), (FF, FF, D_MODEL), ("f",), "exactly once"),
        (action("w", [(-1, [("f", FF, 1)]), R], 1, "r"), (FF, D_MODEL), (), "does not lie on the axis"),
        (action("w", [(1, [("f", FF, 1)]), R], 1, "r"), (FF, D_MODEL), (), "does not lie on the axis"),
        (action("w", [(0, [("a", 2, 1), ("b", 2, 1)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (action("w", [(0, [("a", 0, 1)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (action("w", [(0, [("a", 2, 0)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (action("w", [(3, [("a", 2, -1)]), R], 1, "r"), (FF, D_MODEL), (), "distinct positions"),
        (replace(PLAIN, exponent=Fraction(2)), (FF, D_MODEL), (), "no power"),
        (replace(PLAIN, through=Through("b", (), 0, 0)), (FF, D_MODEL), (), "through a linear map"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(
    a: Action, shape: tuple[int, ...], copies: tuple[str, ...], message: str
) -> None:
    e = identity(Kind.ORTHOGONAL, D_MODEL)
    with pytest.raises(RegaugeError, match=message):
        act(torch.zeros(shape, dtype=torch.float64), a, e, copies)


def test_an_element_of_another_size_or_count_is_refused() -> None:
    tensor = torch.zeros(HEADS * WIDTH, D_MODEL, dtype=torch.float64)
    for e in (
        identity(Kind.ORTHOGONAL, WIDTH),
        identity(Kind.ORTHOGONAL, WIDTH + 1, HEADS),
        identity(Kind.ORTHOGONAL, WIDTH, HEADS * D_MODEL),
    ):
        with pytest.raises(RegaugeError, match="another shape"):
            act(tensor, PER_HEAD, e, ("h",))
        with pytest.raises(RegaugeError, match="another shape"):
            ActStep(PER_HEAD, e, ("h",))


def test_arithmetic_on_integers_is_refused_and_moves_are_not() -> None:
    tensor = torch.arange(FF * D_MODEL).reshape(FF, D_MODEL)
    with pytest.raises(RegaugeError, match="not real"):
        act(tensor, PLAIN, identity(Kind.ORTHOGONAL, D_MODEL))
    with pytest.raises(RegaugeError, match="not real"):
        CenterStep(PLAIN).apply(tensor)
    assert torch.equal(act(tensor, PLAIN, identity(Kind.PERMUTATION, D_MODEL)), tensor)
