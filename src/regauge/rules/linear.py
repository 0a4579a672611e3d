"""Sums of products over an axis: what transforms the one by g transforms the other by g⁻ᵀ."""

from __future__ import annotations

from typing import Any

from regauge.facts import Law, Link, Value
from regauge.interpret import Walk
from regauge.rules.table import Table

RULES = Table()


def _batch(n: int) -> list[str]:
    return [f"b{i}" for i in range(n)]


@RULES.op("aten.linear")
def linear(walk: Walk, node: Any, x: Value, w: Value, b: Value | None = None) -> Value:
    """y[…, o] = Σ_i x[…, i] w[o, i] + b[o]."""
    lead = _batch(x.rank - 1)
    y = walk.contract(
        x, w, [*lead, "i"], ["o", "i"] if w.rank == 2 else ["i"], [*lead, "o"] if w.rank == 2 else lead
    )
    return y if b is None else walk.pointwise([y, b], Law.SUM)


@RULES.op("aten.mm", "aten.matmul", "aten.bmm", "aten.dot", "aten.mv", "aten.vdot")
def matmul(walk: Walk, node: Any, a: Value, b: Value) -> Value:
    """c[…, i, j] = Σ_k a[…, i, k] b[…, k, j]."""
    la = ["k"] if a.rank == 1 else ["i", "k"]
    lb = ["k"] if b.rank == 1 else ["k", "j"]
    depth = max(a.rank, b.rank, 2) - 2
    names = _batch(depth)
    na, nb = max(a.rank - 2, 0), max(b.rank - 2, 0)
    lo = [*names, *[letter for letter in (*la, *lb) if letter != "k"]]
    return walk.contract(a, b, [*names[depth - na :], *la], [*names[depth - nb :], *lb], lo)


@RULES.op("aten.addmm", "aten.baddbmm")
def addmm(walk: Walk, node: Any, bias: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1) -> Value:
    """y = bias + a b."""
    lead = ["b0"] if a.rank == 3 else []
    y = walk.contract(a, b, [*lead, "i", "k"], [*lead, "k", "j"], [*lead, "i", "j"])
    return y if beta == 0 else walk.pointwise([y, bias], Law.SUM)


@RULES.op("aten.einsum")
def einsum(walk: Walk, node: Any, equation: str, operands: list[Value], **kwargs: Any) -> Value:
    """Two operands; more are contracted from the left if every letter allows it."""
    shape = tuple(int(n) for n in node.meta["val"].shape)
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation:
        return walk.opaque(operands, [shape], "einsum with implicit output or ellipsis")[0]
    left, out = equation.split("->")
    terms = [list(term) for term in left.split(",")]
    if len(terms) == 1:
        x, letters = operands[0], terms[0]
        if len(set(letters)) != len(letters):
            return walk.opaque(operands, [shape], "einsum with a repeated letter")[0]
        over = [i for i, letter in enumerate(letters) if letter not in out]
        y = walk.reduce(x, over, False, Law.SUM) if over else x
        kept = [letter for letter in letters if letter in out]
        return walk.permute(y, [kept.index(letter) for letter in out])
    if any(len(set(term)) != len(term) for term in terms):
        return walk.opaque(operands, [shape], "einsum with a repeated letter")[0]
    result, letters = operands[0], terms[0]
    for k in range(1, len(terms)):
        later = set(out).union(*map(set, terms[k + 1 :])) if k + 1 < len(terms) else set(out)
        union = [*letters, *[letter for letter in terms[k] if letter not in letters]]
        keep = list(out) if k == len(terms) - 1 else [letter for letter in union if letter in later]
        alone = [c for c in union if c not in keep and not (c in letters and c in terms[k])]
        if alone:
            over = [i for i, c in enumerate(letters) if c in alone]
            if over:
                result = walk.reduce(result, over, False, Law.SUM)
                letters = [c for c in letters if c not in alone]
            other = operands[k]
            over = [i for i, c in enumerate(terms[k]) if c in alone]
            if over:
                other = walk.reduce(other, over, False, Law.SUM)
            terms[k] = [c for c in terms[k] if c not in alone]
            result = walk.contract(result, other, letters, terms[k], keep)
        else:
            result = walk.contract(result, operands[k], letters, terms[k], keep)
        letters = keep
    return result


@RULES.op("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.conv_transpose1d",
          "aten.conv_transpose2d", "aten.conv_transpose3d")  # fmt: skip
def convolution(walk: Walk, node: Any, x: Value, w: Value, b: Value | None = None, *rest: Any) -> Value:
    """y[n, o, …] = Σ_{i, k} x[n, i, … + k] w[o, i, k]: a linear map of channels for every offset;
    positions are mixed and therefore stopped. Groups split both channel axes."""
    name = node.target.overloadpacket.__name__
    shape = tuple(int(n) for n in node.meta["val"].shape)
    transposed = "transpose" in name or (name == "convolution" and len(rest) > 3 and bool(rest[3]))
    index = 5 if name == "convolution" else 3
    groups = int(rest[index]) if len(rest) > index else 1
    unbatched = x.rank == w.rank - 1
    if unbatched:
        x = walk.reshape(x, (1, *x.shape))
    spatial = x.rank - 2
    for axis in range(2, 2 + spatial):
        for value, what in ((x, "is mixed along positions by a convolution"), (w, "is a kernel position")):
            if not value.given and not walk.structure.is_data(value.axes[axis]):
                walk.stop(value, what, [axis])
                walk.structure.rigid(value.axes[axis])
    out_shape = (1, *shape) if unbatched else shape
    # Summing over kernel offsets and positions is linear in both; they carry no gauge.
    if not x.given:
        x = walk.reduce(x, range(2, 2 + spatial), False, Law.SUM)
    else:
        x = walk.given(x.shape[:2])
    if not w.given:
        w = walk.reduce(w, range(2, 2 + spatial), False, Law.SUM)
    else:
        w = walk.given(w.shape[:2])
    n, c_out = out_shape[0], out_shape[1]
    c_in = x.shape[1]
    if groups == 1:
        y = walk.contract(x, w, ["n", "i"], ["i", "o"] if transposed else ["o", "i"], ["n", "o"])
    else:
        x = walk.reshape(x, (n, groups, c_in // groups))
        if transposed:
            w = walk.reshape(w, (groups, c_in // groups, c_out // groups))
            y = walk.contract(x, w, ["n", "g", "i"], ["g", "i", "o"], ["n", "g", "o"])
        else:
            w = walk.reshape(w, (groups, c_out // groups, c_in // groups))
            y = walk.contract(x, w, ["n", "g", "i"], ["g", "o", "i"], ["n", "g", "o"])
        y = walk.reshape(y, (n, c_out))
    if b is not None:
        y = walk.pointwise([y, b], Law.SUM)
    y = walk.reshape(y, (n, c_out, *[1] * spatial))
    y = _spread(walk, y, out_shape)
    return walk.reshape(y, shape) if unbatched else y


def _spread(walk: Walk, y: Value, shape: tuple[int, ...]) -> Value:
    """The same channels at every position; positions are data."""
    if y.given:
        return walk.given(shape)
    axes = [*y.axes[:2], *[walk.structure.axis(n, True) for n in shape[2:]]]
    return walk.remap(y, axes, [Link((0,), (0,)), Link((1,), (1,))])
