"""Laws of axes: pieces cover every position once, definitions hold everywhere, sizes decide nothing."""

from __future__ import annotations

import random
from itertools import product
from math import prod

import pytest

from regauge.atoms import Atom, Axis, Conflict, total
from regauge.reshapes import align
from regauge.structure import Structure


def fresh() -> tuple[Structure, list[str]]:
    notes: list[str] = []
    return Structure(notes.append), notes


def positions(structure: Structure, axis: Axis) -> list[int]:
    """Every position that the pieces of an axis name, in no particular order."""
    out: list[int] = []
    for piece in structure.pieces(axis):
        ranges = [range(atom.size) for atom, _ in piece.factors]
        strides = [stride for _, stride in piece.factors]
        out += [
            piece.offset + sum(i * s for i, s in zip(index, strides, strict=True))
            for index in product(*ranges)
        ]
    return out


def layout(structure: Structure, axis: Axis) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    return [(p.offset, tuple((a.id, s) for a, s in p.factors)) for p in structure.pieces(axis)]


def test_an_axis_of_size_one_has_no_atom_and_one_piece() -> None:
    structure, _ = fresh()
    assert structure.axis(1) == []
    assert positions(structure, []) == [0]


def test_a_view_and_its_inverse_give_the_same_atoms() -> None:
    structure, notes = fresh()
    axis = structure.axis(12)
    (heads, width), _ = structure.regroup([axis], (3, 4))
    (back,), _ = structure.regroup([heads, width], (12,))
    assert structure.expand(back) == structure.expand(axis) == [*heads, *width]
    assert not notes


def test_a_split_made_late_holds_for_what_was_aligned_before() -> None:
    structure, _ = fresh()
    first, second = structure.axis(12), structure.axis(12)
    structure.unify(first, second)
    structure.regroup([first], (3, 4))
    assert layout(structure, second) == layout(structure, first)
    assert len(structure.pieces(second)[0].factors) == 2


def test_equal_sizes_do_not_make_axes_equal() -> None:
    structure, _ = fresh()
    first, second = structure.axis(8), structure.axis(8)
    structure.regroup([first], (2, 4))
    assert len(structure.expand(second)) == 1
    assert not set(map(id, structure.expand(first))) & set(map(id, structure.expand(second)))


def test_segments_keep_their_offsets_through_a_split_below() -> None:
    """q | k | v, each then split into heads × width."""
    structure, _ = fresh()
    axis = structure.axis(3 * 8)
    q, k, v = structure.cut(axis, [8, 16])
    for part in (q, k, v):
        structure.regroup([part], (2, 4))
    assert [piece.offset for piece in structure.pieces(axis)] == [0, 8, 16]
    assert sorted(positions(structure, axis)) == list(range(24))
    assert structure.pieces(q)[0].factors == structure.pieces(axis)[0].factors


def test_a_cut_inside_a_product_repeats_in_every_outer_index() -> None:
    """heads × (q | k | v): the layout of a fused projection, head by head."""
    structure, _ = fresh()
    axis = structure.axis(4 * 6)
    (heads, inner), _ = structure.regroup([axis], (4, 6))
    structure.cut(inner, [2, 4])
    pieces = structure.pieces(axis)
    assert [piece.offset for piece in pieces] == [0, 2, 4]
    assert all(piece.factors[0] == (structure.find(heads[0]), 6) for piece in pieces)
    assert sorted(positions(structure, axis)) == list(range(24))


def test_segments_of_two_axes_are_refined_to_a_common_one() -> None:
    structure, notes = fresh()
    first, second = structure.axis(12), structure.axis(12)
    structure.cut(first, [4])
    structure.cut(second, [8])
    structure.unify(first, second)
    assert layout(structure, first) == layout(structure, second)
    assert [piece.offset for piece in structure.pieces(first)] == [0, 4, 8]
    assert not notes


def test_layouts_that_do_not_fit_become_data_and_are_reported() -> None:
    structure, notes = fresh()
    first, second = structure.axis(12), structure.axis(12)
    structure.regroup([first], (3, 4))
    structure.cut(second, [5])
    structure.unify(first, second)
    assert notes
    assert structure.is_data(first)
    assert structure.is_data(second)


def test_a_view_that_cuts_through_a_segment_is_reported() -> None:
    structure, notes = fresh()
    axis = structure.axis(12)
    structure.cut(axis, [5])
    structure.regroup([axis], (3, 4))
    assert notes
    assert structure.is_data(axis)


def test_a_slice_through_an_inner_block_is_a_conflict() -> None:
    structure, _ = fresh()
    axis = structure.axis(12)
    structure.regroup([axis], (3, 4))
    with pytest.raises(Conflict):
        structure.cut(axis, [6])


def test_data_is_contagious_by_alignment_and_by_concatenation() -> None:
    structure, _ = fresh()
    axis, data = structure.axis(6), structure.axis(6, True)
    structure.regroup([axis], (2, 3))
    structure.unify(axis, data)
    assert structure.is_data(axis)
    other = structure.axis(4)
    joined = structure.sum([other, structure.axis(2, True)])
    assert joined.data
    assert structure.is_data(other)


def test_a_rigid_product_makes_its_factors_rigid_wherever_they_occur() -> None:
    structure, _ = fresh()
    axis = structure.axis(6)
    (outer, inner), _ = structure.regroup([axis], (2, 3))
    structure.rigid(axis)
    assert structure.is_data(outer)
    assert structure.is_data(inner)


def test_groups_of_a_reshape_hold_equally_many_positions() -> None:
    groups = align((2, 1, 6, 5), (3, 4, 1, 5))
    assert [(g.source, g.target) for g in groups] == [((0, 2), (0, 1)), ((3,), (3,))]


@pytest.mark.parametrize("seed", range(60))
def test_pieces_cover_every_position_once_whatever_happened(seed: int) -> None:
    """Random views, cuts, joins and alignments of axes of 12, 24 or 48 positions."""
    draw = random.Random(seed)
    structure, _notes = fresh()
    axes = [structure.axis(size) for size in (12, 24, 24, 48, 12)]
    aligned: list[tuple[Axis, Axis]] = []
    for _ in range(12):
        axis = draw.choice(axes)
        size = total(axis)
        action = draw.choice(("view", "cut", "join", "unify", "unify"))
        if action == "view":
            inner = draw.choice([n for n in (2, 3, 4, 6, 12) if size % n == 0] or [1])
            parts, _ = structure.regroup([axis], (size // inner, inner))
            axes += [part for part in parts if total(part) > 1]
        elif action == "cut" and size > 3:
            try:
                axes += [
                    p for p in structure.cut(axis, [draw.choice([n for n in range(2, size, 2)])]) if len(p)
                ]
            except Conflict:
                structure.rigid(axis)
        elif action == "join":
            axes.append([structure.sum([axis, draw.choice(axes)])])
        elif action == "unify":
            same = [other for other in axes if total(other) == size and other is not axis]
            if same:
                other = draw.choice(same)
                structure.unify(axis, other)
                aligned.append((axis, other))
    for axis in axes:
        assert sorted(positions(structure, axis)) == list(range(total(axis)))
    for first, second in aligned:
        if not structure.is_data(first) or not structure.is_data(second):
            assert _live(structure, first) == _live(structure, second)


def _live(structure: Structure, axis: Axis) -> list[tuple[int, list[tuple[int, int]]]]:
    """Pieces with their atoms that are not data."""
    return [(p.offset, [(a.id, s) for a, s in p.factors if not a.data]) for p in structure.pieces(axis)]


def test_atoms_of_a_piece_multiply_to_its_length() -> None:
    structure, _ = fresh()
    axis = structure.axis(30)
    structure.cut(axis, [10])
    assert [prod(atom.size for atom, _ in p.factors) for p in structure.pieces(axis)] == [10, 20]
    assert isinstance(structure.pieces(axis)[0].factors[0][0], Atom)
