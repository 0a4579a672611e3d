"""Modules that are an affine map of each channel because their statistics are constants.

Batch normalisation at inference is one; so is every norm that divides by running statistics. What a module is
follows from its operations: each is followed as a constant, or as scale · x + shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from regauge.interpret import op_name
from regauge.moves.base import Scene
from regauge.patches import PLAIN
from regauge.trace import Trace, module_path, module_stack


@dataclass(frozen=True)
class AffineModule:
    """y[…, c, …] = scale[c] · x[…, c, …] + shift[c], in a module of its own.

    Attributes:
        path: of the module.
        source, result: x and y.
        axis: of x that c counts.
        scale, shift: float64.
        own: parameters and buffers of the module by state-dict name, the first floating.
    """

    path: str
    source: fx.Node
    result: fx.Node
    axis: int
    scale: torch.Tensor
    shift: torch.Tensor
    own: tuple[str, ...]


def affine_modules(scene: Scene) -> list[AffineModule]:
    """Every module that computes such a map from parameters and buffers of its own, roots among them."""
    return list(_found(scene))


def _outermost(trace: Trace) -> dict[str, list[fx.Node]]:
    """Path of every module with one path through its code, and in no other such -> its operations."""
    inside: dict[str, list[fx.Node]] = {}
    for node in trace.graph.nodes:
        if node.op != "call_function":
            continue
        for path, kind in module_stack(node):
            if path and (kind in PLAIN or path in trace.straight):
                inside.setdefault(path, []).append(node)
                break
    return inside


def _found(scene: Scene) -> Iterator[AffineModule]:
    trace = scene.trace
    for path, nodes in _outermost(trace).items():
        own = _own(trace, path)
        if own is None or not own:
            continue
        try:
            walk = _Walk(scene, nodes)
            source, result, value = walk.run()
        except _Other:
            continue
        shape = result.meta["val"].shape
        held = (value.scale, value.shift)
        axes = {axis for tensor in held for axis, size in enumerate(tensor.shape) if size > 1}
        if len(axes) != 1 or not walk.roots or shape != source.meta["val"].shape:
            continue
        (axis,) = axes
        scale, shift = (tensor.flatten().expand(shape[axis]).contiguous() for tensor in held)
        yield AffineModule(path, source, result, axis, scale, shift, own)


def _own(trace: Trace, path: str) -> tuple[str, ...] | None:
    """What the module holds, below it too; None if something else shares it or uses it."""
    stored = {**trace.parameters, **trace.buffers}
    names = [name for name in stored.values() if name.startswith(f"{path}.")]
    for node in trace.graph.nodes:
        name = stored.get(node.name) if node.op == "placeholder" else None
        if name not in names:
            continue
        shared = len(trace.aliases.get(name, (name,))) != 1
        if shared or any(not f"{module_path(user)}.".startswith(f"{path}.") for user in node.users):
            return None
    floating = [name for name in names if name in trace.shapes]
    return tuple([*floating, *(name for name in names if name not in floating)]) if floating else ()


@dataclass(frozen=True)
class _Affine:
    """scale · x + shift; both have as many axes as x."""

    scale: torch.Tensor
    shift: torch.Tensor


class _Other(Exception):
    """An operation that is no such map."""


_CONSTANT: dict[str, Callable[..., torch.Tensor]] = {
    "aten.add": torch.add,
    "aten.sub": torch.sub,
    "aten.mul": torch.mul,
    "aten.div": torch.div,
    "aten.rsqrt": torch.rsqrt,
    "aten.sqrt": torch.sqrt,
    "aten.reciprocal": torch.reciprocal,
    "aten.neg": torch.neg,
    "aten.rsub": torch.rsub,
    "aten.pow": torch.pow,
    "aten.view": torch.reshape,
    "aten.reshape": torch.reshape,
    "aten.unsqueeze": torch.unsqueeze,
    "aten.transpose": torch.transpose,
    "aten.permute": torch.permute,
}
"""What is computed from parameters alone."""
_BATCH_NORM = "aten._native_batch_norm_legit_no_training"
_ROOTS = ("aten.rsqrt", "aten.sqrt", "aten.pow", "aten.batch_norm", _BATCH_NORM)
"""What turns a variance into a scale; a module without one is a gain, and no norm."""
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as", "aten.alias", "aten.contiguous", "aten.clone")
_MOVES = {"aten.transpose": torch.transpose, "aten.permute": torch.permute}


class _Walk:
    """The operations of one module, each as a constant or as an affine map of what enters."""

    def __init__(self, scene: Scene, nodes: list[fx.Node]) -> None:
        self.scene, self.nodes, self.inside = scene, nodes, set(nodes)
        self.names = {**scene.trace.parameters, **scene.trace.buffers}
        self.source: fx.Node | None = None
        self.values: dict[fx.Node, Any] = {}
        self.roots = any(op_name(node) in _ROOTS for node in nodes)

    def run(self) -> tuple[fx.Node, fx.Node, _Affine]:
        """What enters, what leaves, and the map between them.

        Raises:
            _Other: it is none.
        """
        leaving: list[fx.Node] = []
        for node in self.nodes:
            self.values[node] = self._do(node)
            if any(user not in self.inside for user in node.users):
                leaving.append(node)
        if len(leaving) != 1 or self.source is None:
            raise _Other
        value = self.values[leaving[0]]
        if not isinstance(value, _Affine) or any(not node.users for node in self.nodes):
            raise _Other
        return self.source, leaving[0], value

    def _value(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        if arg in self.values:
            return self.values[arg]
        if arg.name in self.names:
            return self.scene.read(self.names[arg.name]).to(torch.float64)
        if self.source is not None and arg is not self.source:
            raise _Other
        held = arg.meta["val"]
        if not isinstance(held, torch.Tensor) or not held.is_floating_point():
            raise _Other
        self.source = arg
        one = torch.ones((1,) * held.dim(), dtype=torch.float64)
        return _Affine(one, torch.zeros_like(one))

    def _do(self, node: fx.Node) -> Any:
        name = op_name(node)
        args = [self._value(arg) for arg in node.args]
        if name in _CASTS:
            if not node.meta["val"].is_floating_point():
                raise _Other
            return args[0]
        if node.kwargs:
            raise _Other
        first = args[0] if args else None
        if name == "getitem" and isinstance(first, tuple) and args[1] == 0:
            return first[0]
        if not any(isinstance(arg, _Affine) for arg in args):
            if name not in _CONSTANT or not isinstance(first, torch.Tensor | float | int):
                raise _Other
            return _CONSTANT[name](*args)
        if name in _MOVES and isinstance(first, _Affine):
            return _Affine(*(_MOVES[name](held, *args[1:]) for held in (first.scale, first.shift)))
        if name == "aten.batch_norm" and isinstance(first, _Affine) and not args[5]:
            return _normed(first, *args[1:5], eps=args[7])
        if name == _BATCH_NORM and isinstance(first, _Affine):
            return (_normed(first, *args[1:5], eps=args[6]),)
        return _arithmetic(name, args)


def _normed(x: _Affine, gain: Any, shift: Any, mean: Any, variance: Any, *, eps: float) -> _Affine:
    """(s x + h − m) · g / sqrt(v + eps) + b, channels on axis 1."""
    if mean is None or variance is None:
        raise _Other
    factor = torch.rsqrt(variance + eps) * (1.0 if gain is None else gain)
    offset = -mean * factor + (0.0 if shift is None else shift)
    shape = (1, -1, *(1,) * (x.scale.dim() - 2))
    factor, offset = factor.reshape(shape), offset.reshape(shape)
    return _Affine(x.scale * factor, x.shift * factor + offset)


def _arithmetic(name: str, args: list[Any]) -> _Affine:
    """Sums of affine maps and constants; products and quotients with a constant."""
    if len(args) != 2:
        raise _Other
    a, b = args
    if name in ("aten.add", "aten.sub"):
        sign = 1.0 if name == "aten.add" else -1.0
        left, right = _map(a), _map(b)
        return _Affine(left.scale + sign * right.scale, left.shift + sign * right.shift)
    if name == "aten.mul" and not (isinstance(a, _Affine) and isinstance(b, _Affine)):
        x, c = (a, b) if isinstance(a, _Affine) else (b, a)
        return _Affine(x.scale * c, x.shift * c)
    if name == "aten.div" and isinstance(a, _Affine) and not isinstance(b, _Affine):
        return _Affine(a.scale / b, a.shift / b)
    raise _Other


def _map(value: Any) -> _Affine:
    if isinstance(value, _Affine):
        return value
    held = torch.as_tensor(value, dtype=torch.float64)
    return _Affine(torch.zeros_like(held), held)
