"""Actions on blocks of every shape that a network has, with elements and states for them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from regauge.atlas import Action, Factor, Generator, Kind, Part
from regauge.elements import Element, random_element

Axis = tuple[int, list[tuple[str, int, int]]]  # offset, (name, size, stride)…

# Sizes: residual d, heads H of width D, groups G of query heads per key-value head, experts E of width F.
D_MODEL, HEADS, GROUP, WIDTH, EXPERTS, FF, VOCAB = 5, 3, 2, 4, 3, 4, 7


def part(axis: Axis) -> Part:
    return Part(axis[0], tuple(Factor(*factor) for factor in axis[1]))


def action(
    name: str, axes: list[Axis], axis: int, acting: str, exponent: Any = 1, chart: float = 0.0
) -> Action:
    return Action(name, tuple(part(a) for a in axes), axis, acting, Fraction(exponent), chart)


def whole(name: str, size: int) -> Axis:
    return 0, [(name, size, 1)]


def heads(offset: int = 0, stride: int = WIDTH) -> Axis:
    return offset, [("h", HEADS, stride), ("v", WIDTH, 1)]


R = whole("r", D_MODEL)
PAIRS = WIDTH // 2


def half(count: int, group: int = 1) -> Axis:
    """Rotate-half: the pair (i, i + D/2) of each head."""
    return 0, [("h", count, group * WIDTH), ("g", group, WIDTH), ("j", 2, PAIRS), ("p", PAIRS, 1)]


Case = tuple[Kind, str, list[tuple[str, int]], list[tuple[Action, tuple[int, ...]]]]
CASES: dict[str, Case] = {
    "residual, one orthogonal map": (
        Kind.ORTHOGONAL,
        "r",
        [],
        [
            (action("embedding", [whole("t", VOCAB), R], 1, "r"), (VOCAB, D_MODEL)),
            (action("reader", [whole("f", FF), R], 1, "r", -1), (FF, D_MODEL)),
            (action("bias", [R], 0, "r"), (D_MODEL,)),
            (action("square", [R, R], 0, "r"), (D_MODEL, D_MODEL)),
            (action("square", [R, R], 1, "r", -1), (D_MODEL, D_MODEL)),
        ],
    ),
    "the acting factor again on a cut-out of another axis": (
        Kind.ORTHOGONAL,
        "r",
        [],
        [
            (action("w", [R, (D_MODEL, [("r", D_MODEL, 1)])], 0, "r"), (D_MODEL, 2 * D_MODEL)),
            (action("w", [R, (D_MODEL, [("r", D_MODEL, 1)])], 1, "r", -1), (D_MODEL, 2 * D_MODEL)),
        ],
    ),
    "values in fused q|k|v": (
        Kind.GENERAL_LINEAR,
        "v",
        [("h", HEADS)],
        [
            (action("qkv", [heads(2 * HEADS * WIDTH), R], 0, "v"), (3 * HEADS * WIDTH, D_MODEL)),
            (action("qkv.bias", [heads(2 * HEADS * WIDTH)], 0, "v"), (3 * HEADS * WIDTH,)),
            (action("out", [R, heads()], 1, "v", -1), (D_MODEL, HEADS * WIDTH)),
        ],
    ),
    "keys interleaved per head (H, 3, D), stored transposed": (
        Kind.GENERAL_LINEAR,
        "v",
        [("h", HEADS)],
        [
            (action("qkv", [R, heads(0, 3 * WIDTH)], 1, "v"), (D_MODEL, 3 * HEADS * WIDTH)),
            (action("qkv", [R, heads(WIDTH, 3 * WIDTH)], 1, "v", -1), (D_MODEL, 3 * HEADS * WIDTH)),
        ],
    ),
    "grouped values: one map per key-value head": (
        Kind.GENERAL_LINEAR,
        "v",
        [("h", HEADS)],
        [
            (action("v", [heads(), R], 0, "v"), (HEADS * WIDTH, D_MODEL)),
            (
                action(
                    "o",
                    [R, (0, [("h", HEADS, GROUP * WIDTH), ("g", GROUP, WIDTH), ("v", WIDTH, 1)])],
                    1,
                    "v",
                    -1,
                ),
                (D_MODEL, HEADS * GROUP * WIDTH),
            ),
        ],
    ),
    "rotary pairs, halves, copies inside and outside the pair": (
        Kind.COMPLEX,
        "j",
        [("p", PAIRS), ("h", HEADS)],
        [
            (action("q", [half(HEADS, GROUP), R], 0, "j"), (HEADS * GROUP * WIDTH, D_MODEL)),
            (action("k", [half(HEADS), R], 0, "j", -1), (HEADS * WIDTH, D_MODEL)),
        ],
    ),
    "rotary pairs, interleaved, part of the width": (
        Kind.COMPLEX,
        "j",
        [("h", HEADS)],
        [
            (
                action("q", [(1, [("h", HEADS, WIDTH), ("j", 2, 1)]), R], 0, "j"),
                (HEADS * WIDTH, D_MODEL),
            ),
        ],
    ),
    "inside every expert": (
        Kind.PERMUTATION,
        "f",
        [("e", EXPERTS)],
        [
            (
                action("up", [whole("e", EXPERTS), whole("f", FF), R], 1, "f"),
                (EXPERTS, FF, D_MODEL),
            ),
            (
                action("gate", [whole("e", EXPERTS), R, (FF, [("f", FF, 1)])], 2, "f"),
                (EXPERTS, D_MODEL, 2 * FF),
            ),
            (
                action("down", [whole("e", EXPERTS), R, whole("f", FF)], 2, "f", -1),
                (EXPERTS, D_MODEL, FF),
            ),
        ],
    ),
    "experts, matrices with the copy on a later axis": (
        Kind.GENERAL_LINEAR,
        "f",
        [("e", EXPERTS)],
        [(action("up", [whole("f", FF), R, whole("e", EXPERTS)], 0, "f"), (FF, D_MODEL, EXPERTS))],
    ),
    "the experts themselves": (
        Kind.PERMUTATION,
        "e",
        [],
        [
            (action("up", [whole("e", EXPERTS), whole("f", FF), R], 0, "e"), (EXPERTS, FF, D_MODEL)),
            (action("router", [whole("e", EXPERTS), R], 0, "e"), (EXPERTS, D_MODEL)),
        ],
    ),
    "a gain stored as 1 + w": (
        Kind.POSITIVE,
        "r",
        [],
        [
            (action("gain", [R], 0, "r", 1, 1.0), (D_MODEL,)),
            (action("reader", [whole("f", FF), R], 1, "r", -1), (FF, D_MODEL)),
        ],
    ),
    "signs through a chart": (
        Kind.SIGN,
        "r",
        [],
        [(action("gain", [R], 0, "r", 1, 1.0), (D_MODEL,))],
    ),
    "a power of two and a root": (
        Kind.POSITIVE,
        "f",
        [("h", HEADS)],
        [
            (action("up", [(0, [("h", HEADS, FF), ("f", FF, 1)]), R], 0, "f", "1/2"), (HEADS * FF, D_MODEL)),
            (action("down", [R, (0, [("h", HEADS, FF), ("f", FF, 1)])], 1, "f", -2), (D_MODEL, HEADS * FF)),
        ],
    ),
    "channels of a convolution": (
        Kind.SCALE,
        "c",
        [],
        [
            (action("first", [whole("c", FF), R, whole("y", 2), whole("x", 2)], 0, "c"), (FF, D_MODEL, 2, 2)),
            (
                action("second", [R, whole("c", FF), whole("y", 2), whole("x", 2)], 1, "c", -1),
                (D_MODEL, FF, 2, 2),
            ),
        ],
    ),
    "one scale for a whole matrix": (
        Kind.SCALE,
        "one",
        [],
        [(action("w", [(0, [("one", 1, 1), ("f", FF, 1)]), R], 0, "one", -1), (FF, D_MODEL))],
    ),
}


def generator(name: str) -> Generator:
    kind, acting, copies, actions = CASES[name]
    block = actions[0][0].parts[actions[0][0].axis]
    size = next(factor.size for factor in block.factors if factor.name == acting)
    return Generator("g0", kind, acting, size, tuple(copies), tuple(a for a, _ in actions), "s0")


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {a.parameter: shape for a, shape in CASES[name][3]}


def state_of(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    state = {
        key: torch.randn(shape, dtype=torch.float64, generator=source) for key, shape in shapes(name).items()
    }
    return {**state, "bystander": torch.randn(3, dtype=torch.float64, generator=source)}


def element_of(name: str, seed: int = 1) -> Element:
    g = generator(name)
    return random_element(g.kind, g.size, g.count, torch.Generator().manual_seed(seed))
