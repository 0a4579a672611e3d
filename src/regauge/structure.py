"""Index structure of axes: atoms, refined by products and sums, unified by operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from regauge.atoms import Atom, Axis, Conflict, Piece, total
from regauge.reshapes import Group, align


class Structure:
    """Owns all atoms of one interpretation; mutated while walking, read afterwards."""

    def __init__(self, on_rigid: Callable[[str], None]) -> None:
        self._next = 0
        self._on_rigid = on_rigid

    def atom(self, size: int, data: bool = False) -> Atom:
        self._next += 1
        return Atom(self._next, size, data)

    def axis(self, size: int, data: bool = False) -> Axis:
        return [] if size == 1 else [self.atom(size, data)]

    # --- reading -------------------------------------------------------------------------------

    def find(self, atom: Atom) -> Atom:
        root = atom
        while root.parent is not None:
            root = root.parent
        while atom.parent is not None:
            atom.parent, atom = root, atom.parent
        return root

    def expand(self, axis: Iterable[Atom]) -> Axis:
        """The same axis with every product written out; roots only."""
        out: Axis = []
        for atom in axis:
            root = self.find(atom)
            if root.factors is not None and not root.data:
                out.extend(self.expand(root.factors))
            else:
                out.append(root)
        return out

    def is_data(self, axis: Iterable[Atom]) -> bool:
        """True if every atom of the axis is data (an axis of size one is)."""
        return all(atom.data for atom in self.expand(axis))

    def pieces(self, axis: Iterable[Atom]) -> list[Piece]:
        """The leaf parts of an axis, by offset."""
        atoms = self.expand(axis)
        done = [Piece(0, ())]
        inner = 1
        for atom in reversed(atoms):
            if atom.segments is not None and not atom.data:
                grown: list[Piece] = []
                start = 0
                for segment in atom.segments:
                    for piece in self.pieces(segment):
                        head = tuple((a, s * inner) for a, s in piece.factors)
                        offset = (start + piece.offset) * inner
                        grown.extend(Piece(offset + tail.offset, head + tail.factors) for tail in done)
                    start += total(segment)
                done = grown
            else:
                done = [Piece(tail.offset, ((atom, inner), *tail.factors)) for tail in done]
            inner *= atom.size
        return sorted(done, key=lambda piece: piece.offset)

    # --- making rigid --------------------------------------------------------------------------

    def rigid(self, axis: Iterable[Atom]) -> None:
        """Turn every atom of the axis into data: nothing may act on it."""
        for atom in axis:
            root = self.find(atom)
            if root.data:
                continue
            root.data = True
            for child in root.factors or ():
                self.rigid([child])
            for segment in root.segments or ():
                self.rigid(segment)

    # --- refining ------------------------------------------------------------------------------

    def split_product(self, atom: Atom, inner: int) -> tuple[Axis, Axis]:
        """Write ``atom`` as outer x inner with ``inner`` positions innermost."""
        atom = self.find(atom)
        if atom.data:
            return self.axis(atom.size // inner, True), self.axis(inner, True)
        if atom.size % inner:
            raise Conflict(f"{atom.size} positions do not divide into blocks of {inner}")
        if atom.factors is not None:
            return self.split_axis(atom.factors, inner)
        if atom.segments is None:
            low = self.axis(inner)
            high = self.axis(atom.size // inner)
            atom.factors = [*high, *low]
            return high, low
        heads: list[Axis] = []
        common: Axis | None = None
        for segment in atom.segments:
            if total(segment) % inner:
                raise Conflict(f"a segment of {total(segment)} does not divide into blocks of {inner}")
            head, tail = self.split_axis(segment, inner)
            heads.append(head)
            if common is None:
                common = tail
            else:
                self.unify(common, tail)
        high = self.atom(atom.size // inner)
        high.segments = heads
        atom.segments = None
        atom.factors = [high, *(common or [])]
        return [high], list(common or [])

    def split_axis(self, axis: Iterable[Atom], inner: int) -> tuple[Axis, Axis]:
        """Split an axis into outer and inner lists so that the inner one has ``inner`` positions."""
        atoms = self.expand(axis)
        low: Axis = []
        need = inner
        while need > 1:
            if not atoms:
                raise Conflict("axis too small to split")
            atom = atoms.pop()
            if need % atom.size == 0:
                low.insert(0, atom)
                need //= atom.size
            elif atom.size % need == 0:
                high, tail = self.split_product(atom, need)
                low[:0] = tail
                atoms.extend(high)
                need = 1
            else:
                raise Conflict(f"{atom.size} positions do not split at {need}")
        return atoms, low

    def cut(self, axis: Iterable[Atom], points: Sequence[int]) -> list[Axis]:
        """Cut an axis at the given interior positions; returns the consecutive pieces."""
        atoms = self.expand(axis)
        size = total(atoms)
        edges = [0, *points, size]
        if not points:
            return [atoms]
        if not atoms or atoms[0].data:
            return [self.axis(b - a, True) for a, b in pairwise(edges)]
        inner = total(atoms[1:])
        if any(point % inner for point in points):
            raise Conflict("a slice cuts through an inner block")
        head = self._cut_atom(atoms[0], [point // inner for point in points])
        return [[*piece, *atoms[1:]] for piece in head]

    def _cut_atom(self, atom: Atom, points: Sequence[int]) -> list[Axis]:
        atom = self.find(atom)
        if atom.factors is not None:
            return self.cut(atom.factors, points)
        edges = [0, *points, atom.size]
        if atom.segments is None:
            atom.segments = [self.axis(b - a) for a, b in pairwise(edges)]
            return [list(segment) for segment in atom.segments]
        refined: list[tuple[int, Axis]] = []
        start = 0
        for segment in atom.segments:
            size = total(segment)
            inside = [point - start for point in points if start < point < start + size]
            position = start
            for piece in self.cut(segment, inside):
                refined.append((position, piece))
                position += total(piece)
            start += size
        if self.find(atom).segments is not None:
            atom.segments = [piece for _, piece in refined]
        out: list[Axis] = []
        for low, high in pairwise(edges):
            inside_pieces = [piece for position, piece in refined if low <= position < high]
            out.append(inside_pieces[0] if len(inside_pieces) == 1 else [self.sum(inside_pieces)])
        return out

    def sum(self, segments: Sequence[Axis]) -> Atom:
        """A new atom that is the concatenation of the given segments."""
        atom = self.atom(sum(total(segment) for segment in segments))
        if any(total(s) > 1 and self.is_data(s) for s in segments):
            for segment in segments:
                self.rigid(segment)
            atom.data = True
        else:
            atom.segments = [list(segment) for segment in segments]
        return atom

    # --- unifying ------------------------------------------------------------------------------

    def unify(self, first: Iterable[Atom], second: Iterable[Atom]) -> None:
        """Align two axes index by index. A structural conflict makes both rigid and is reported."""
        first, second = list(first), list(second)
        try:
            self._unify(first, second)
        except Conflict as conflict:
            self._on_rigid(f"two layouts of the same axis do not match: {conflict}")
            self.rigid(first)
            self.rigid(second)

    def _unify(self, first: Axis, second: Axis) -> None:
        left, right = self.expand(first), self.expand(second)
        if total(left) != total(right):
            raise Conflict(f"sizes {total(left)} and {total(right)}")
        if self.is_data(left) or self.is_data(right):
            self.rigid(left)
            self.rigid(right)
            return
        while left and right:
            a, b = left.pop(), right.pop()
            if a is b:
                continue
            if a.size == b.size:
                self._unify_atoms(a, b)
            elif a.size > b.size:
                high, low = self.split_product(a, b.size) if a.size % b.size == 0 else self._fail(a, b)
                left.extend([*high, *low])
                right.append(b)
            else:
                high, low = self.split_product(b, a.size) if b.size % a.size == 0 else self._fail(a, b)
                right.extend([*high, *low])
                left.append(a)
            left, right = self.expand(left), self.expand(right)

    def _fail(self, a: Atom, b: Atom) -> tuple[Axis, Axis]:
        raise Conflict(f"factors of {a.size} and {b.size} positions")

    def _unify_atoms(self, a: Atom, b: Atom) -> None:
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        if a.data or b.data:
            self.rigid([a])
            self.rigid([b])
            return
        if a.factors is not None or b.factors is not None:
            self._unify([a], [b])
            return
        if a.segments is not None and b.segments is not None:
            points = sorted({*self._edges(a), *self._edges(b)})
            left, right = self.cut([a], points), self.cut([b], points)
            a, b = self.find(a), self.find(b)
            if a is b:
                return
            if a.segments is None or b.segments is None:
                self._unify([a], [b])
                return
            b.parent, b.segments = a, None
            for x, y in zip(left, right, strict=True):
                self._unify(x, y)
            return
        if a.segments is None:
            a, b = b, a
        if b.id < a.id and a.segments is None:
            a, b = b, a
        b.parent = a

    def _edges(self, atom: Atom) -> list[int]:
        edges: list[int] = []
        position = 0
        for segment in (atom.segments or ())[:-1]:
            position += total(segment)
            edges.append(position)
        return edges

    # --- views ---------------------------------------------------------------------------------

    def regroup(self, axes: Sequence[Axis], shape: Sequence[int]) -> tuple[list[Axis], list[Group]]:
        """Reshape: row-major regrouping of ``axes`` into ``shape``. Returns axes and their groups."""
        sizes = [total(axis) for axis in axes]
        groups = align(sizes, shape)
        out: list[Axis] = [[] for _ in shape]
        for group in groups:
            source = [atom for i in group.source for atom in axes[i]]
            try:
                self._regroup(source, group.target, shape, out)
            except Conflict as conflict:
                if not self.is_data(source):
                    self._on_rigid(f"a reshape cuts through an axis: {conflict}")
                self.rigid(source)
                for j in group.target:
                    out[j] = self.axis(shape[j], True)
        return out, groups

    def _regroup(self, source: Axis, target: Sequence[int], shape: Sequence[int], out: list[Axis]) -> None:
        if len(target) == 1:
            out[target[0]] = source
            return
        rest: Axis = source
        for j in reversed(target):
            rest, out[j] = self.split_axis(rest, shape[j])
        if total(rest) != 1:
            raise Conflict("sizes do not match")
