"""Homogeneous linear equations over the rationals or over GF(2), solved as they arrive."""

from __future__ import annotations

from fractions import Fraction

Expr = dict[int, Fraction]


class LinearSystem:
    """Unknowns are integers; ``binary`` counts coefficients modulo two.

    Every equation eliminates the unknown of highest rank in it (``rank[unknown]``, ties by number),
    so that the free unknowns of the solution are those of lowest rank.
    """

    def __init__(self, binary: bool) -> None:
        self.binary = binary
        self.pivots: dict[int, Expr] = {}
        self.users: dict[int, set[int]] = {}
        self.rank: dict[int, int] = {}

    def variable(self, unknown: int, rank: int) -> Expr:
        self.rank[unknown] = rank
        return {unknown: Fraction(1)}

    def add(self, a: Expr, b: Expr, factor: Fraction = Fraction(1)) -> Expr:
        """a + factor · b."""
        if not b or factor == 0:
            return a
        out = dict(a)
        for unknown, coefficient in b.items():
            value = out.get(unknown, Fraction(0)) + factor * coefficient
            if self.binary:
                value = Fraction(value.numerator % 2) if value.denominator == 1 else value
            if value == 0:
                out.pop(unknown, None)
            else:
                out[unknown] = value
        return out

    def scale(self, a: Expr, factor: Fraction) -> Expr:
        if factor == 1:
            return a
        return self.add({}, a, factor)

    def reduce(self, expr: Expr) -> Expr:
        """The same expression with eliminated unknowns substituted."""
        if not any(unknown in self.pivots for unknown in expr):
            return expr
        out: Expr = {}
        for unknown, coefficient in expr.items():
            if unknown in self.pivots:
                out = self.add(out, self.pivots[unknown], coefficient)
            else:
                out = self.add(out, {unknown: Fraction(1)}, coefficient)
        return out

    def zero(self, expr: Expr) -> bool:
        """Require ``expr = 0``. Returns True if that removed a freedom."""
        expr = self.reduce(expr)
        if not expr:
            return False
        pivot = max(expr, key=lambda unknown: (self.rank[unknown], unknown))
        factor = -1 / expr[pivot]
        body = {u: c * factor for u, c in expr.items() if u != pivot}
        if self.binary:
            body = {u: Fraction(1) for u in body}
        for user in self.users.pop(pivot, set()):
            old = self.pivots[user]
            coefficient = old[pivot]
            rest = {u: c for u, c in old.items() if u != pivot}
            new = self.add(rest, body, coefficient)
            for u in old:
                if u != pivot and u not in new:
                    self.users[u].discard(user)
            for u in new:
                self.users.setdefault(u, set()).add(user)
            self.pivots[user] = new
        self.pivots[pivot] = body
        for u in body:
            self.users.setdefault(u, set()).add(pivot)
        return True

    def basis(self) -> list[Expr]:
        """One vector for each free unknown: its value one, the pivots' values following."""
        vectors: dict[int, Expr] = {u: {u: Fraction(1)} for u in self.rank if u not in self.pivots}
        for pivot, body in self.pivots.items():
            for unknown, coefficient in body.items():
                vectors[unknown][pivot] = coefficient
        return [vectors[u] for u in sorted(vectors)]
