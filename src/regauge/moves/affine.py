"""Modules that are an affine map of each channel, alone or after a norm or a linear map.

Batch normalisation at inference is one; so is every norm that divides by running statistics. What a module is
follows from its operations: each is followed as a constant, or as scale · x + shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from regauge.interpret import op_name
from regauge.moves.base import Scene
from regauge.moves.forward import readers_of
from regauge.patches import PLAIN
from regauge.primitive import CASTS, SILENT
from regauge.trace import Trace, module_path, module_stack


@dataclass(frozen=True)
class AffineModule:
    """A module of its own that computes y = scale · z + shift.

    Attributes:
        path: of the module.
        source, result: x and y.
        scale, shift: float64, with as many axes as x.
        norm: z is the norm (form, size, eps) of x over its last axis; None: it is x.
        weight: z is W x over its last axis, W [out, in]; None: it is x.
        second: the channels are on axis 1 however many axes there are, as those of a batch norm.
        alone: nothing else reads x, and it does not leave the module as a cast to the dtype it has.
        own: parameters and buffers of the module by state-dict name, the first floating.
    """

    path: str
    source: fx.Node
    result: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor
    norm: tuple[str, int, float] | None
    weight: torch.Tensor | None
    second: bool
    alone: bool
    own: tuple[str, ...]

    @property
    def axes(self) -> frozenset[int]:
        """The axes of x along which scale and shift differ."""
        held = (self.scale, self.shift)
        return frozenset(axis for tensor in held for axis, size in enumerate(tensor.shape) if size > 1)

    @property
    def axis(self) -> int | None:
        """The one axis of x along which scale and shift differ, if it is one."""
        if not self.axes and self.result.meta["val"].shape[1:2] == (1,):
            return 1
        return next(iter(self.axes)) if len(self.axes) == 1 else None

    def along(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift for each entry of y along its only axis, or along ``axis`` where all are alike."""
        size = self.result.meta["val"].shape[axis]
        scale, shift = (tensor.flatten().expand(size).contiguous() for tensor in (self.scale, self.shift))
        return scale, shift


def affine_modules(scene: Scene, wanted: Callable[[frozenset[str]], bool]) -> Iterator[AffineModule]:
    """Every module that computes such a map from parameters and buffers of its own.

    Args:
        wanted: from the names of its operations, whether a module is looked at.
    """
    trace = scene.trace
    for path, nodes in _outermost(trace).items():
        if not wanted(frozenset(map(op_name, nodes))):
            continue
        own = _own(trace, path)
        if not own:
            continue
        try:
            walk = _Walk(scene, nodes)
            source, result, value = walk.run()
        except _Other:
            continue
        held = (value.scale, value.shift, value.norm, value.weight)
        inside = all(user in walk.inside for user in readers_of(source))
        yield AffineModule(path, source, result, *held, walk.second, inside and not walk.passed, own)


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
    """scale · x + shift; both have as many axes as x. With ``norm`` (form, size, eps) x is normalised first,
    with ``weight`` [out, in] it is W x instead of x."""

    scale: torch.Tensor
    shift: torch.Tensor
    norm: tuple[str, int, float] | None = None
    weight: torch.Tensor | None = None

    @property
    def bare(self) -> bool:
        """Of x itself, neither normalised nor mapped."""
        return self.norm is None and self.weight is None

    def times(self, factor: Any) -> _Affine:
        return replace(self, scale=self.scale * factor, shift=self.shift * factor)


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
    "aten.linalg_vector_norm": torch.linalg.vector_norm,
    "aten.t": torch.t,
    "aten.view": torch.reshape,
    "aten.reshape": torch.reshape,
    "aten.unsqueeze": torch.unsqueeze,
    "aten.transpose": torch.transpose,
    "aten.permute": torch.permute,
}
"""What is computed from parameters alone."""
_BATCH_NORM = "aten._native_batch_norm_legit_no_training"
_MOVES = {"aten.transpose": torch.transpose, "aten.permute": torch.permute}


class _Walk:
    """The operations of one module, each as a constant or as an affine map of what enters."""

    def __init__(self, scene: Scene, nodes: list[fx.Node]) -> None:
        self.scene, self.nodes, self.inside = scene, nodes, set(nodes)
        self.names = {**scene.trace.parameters, **scene.trace.buffers}
        self.source: fx.Node | None = None
        self.values: dict[fx.Node, Any] = {}
        self.second = self.passed = False

    def run(self) -> tuple[fx.Node, fx.Node, _Affine]:
        """What enters, what leaves, and the map between them.

        Raises:
            _Other: it is none.
        """
        leaving: list[fx.Node] = []
        for node in self.nodes:
            if op_name(node) in SILENT or not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
                continue
            self.values[node] = self._do(node)
            if any(user not in self.inside for user in node.users):
                if self._is_source(node):
                    self.passed = True
                else:
                    leaving.append(node)
        if len(leaving) != 1 or self.source is None:
            raise _Other
        value = self.values[leaving[0]]
        if not isinstance(value, _Affine) or any(not node.users for node in self.values):
            raise _Other
        return self.source, leaving[0], value

    def _is_source(self, node: fx.Node) -> bool:
        """A cast of what enters to the dtype it has."""
        same = op_name(node) in CASTS and node.args[0] is self.source
        return same and node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]

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
        if name in (*CASTS, "aten.contiguous", "aten.clone"):
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
            scale, shift = (_MOVES[name](held, *args[1:]) for held in (first.scale, first.shift))
            if not first.bare:
                raise _Other
            return _Affine(scale, shift)
        if name in ("aten.reshape", "aten.view") and isinstance(first, _Affine):
            self.second = True
            return _flattened(first, node.args[0].meta["val"].shape, node.meta["val"].shape)  # type: ignore[union-attr]
        self.second = self.second or name in ("aten.batch_norm", _BATCH_NORM)
        if name == "aten.batch_norm" and isinstance(first, _Affine) and not args[5]:
            return _normed(first, *args[1:5], eps=args[7])
        if name == _BATCH_NORM and isinstance(first, _Affine):
            return (_normed(first, *args[1:5], eps=args[6]),)
        if name in ("aten.layer_norm", "aten.rms_norm") and isinstance(first, _Affine):
            return _normalised(name, first, *args[1:])
        if name == "aten.linear" and isinstance(first, _Affine):
            return _mapped(first, *args[1:])
        return _arithmetic(name, args)


def _flattened(x: _Affine, before: torch.Size, after: torch.Size) -> _Affine:
    """Positions, all axes behind the second, in other axes; nothing differs along them."""
    apart = any(size != 1 for tensor in (x.scale, x.shift) for size in tensor.shape[2:])
    if apart or before[:2] != after[:2] or len(after) < 2 or not x.bare:
        raise _Other
    ones = (1,) * (len(after) - 2)
    scale, shift = (tensor.reshape(*tensor.shape[:2], *ones) for tensor in (x.scale, x.shift))
    return replace(x, scale=scale, shift=shift)


def _normed(x: _Affine, gain: Any, shift: Any, mean: Any, variance: Any, *, eps: float) -> _Affine:
    """(s x + h − m) · g / sqrt(v + eps) + b, channels on axis 1."""
    if mean is None or variance is None or not x.bare:
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
        if isinstance(a, _Affine) and isinstance(b, _Affine):
            if not (a.bare and b.bare):
                raise _Other
            return _Affine(a.scale + sign * b.scale, a.shift + sign * b.shift)
        if isinstance(a, _Affine):
            return replace(a, shift=a.shift + sign * b)
        return replace(b.times(sign), shift=a + sign * b.shift)
    if name == "aten.mul" and not (isinstance(a, _Affine) and isinstance(b, _Affine)):
        x, c = (a, b) if isinstance(a, _Affine) else (b, a)
        return x.times(c)
    if name == "aten.div" and isinstance(a, _Affine) and not isinstance(b, _Affine):
        return a.times(1.0 / b)
    raise _Other


def _normalised(name: str, x: _Affine, shape: Any, *given: Any) -> _Affine:
    """A norm over the last axis of what enters, as it enters."""
    if bool((x.scale != 1).any()) or bool((x.shift != 0).any()) or not x.bare:
        raise _Other
    layer = name == "aten.layer_norm"
    gain, shift, eps = (*given, *(None, None, 1e-5)[len(given) :])[:3] if layer else _rms(given)
    if len(shape) != 1 or eps is None:
        raise _Other
    one = torch.ones((1,) * x.scale.dim(), dtype=torch.float64)
    form = "layer" if layer else "rms"
    scale = one if gain is None else one * gain
    return _Affine(scale, one * 0.0 if shift is None else one * shift, (form, int(shape[0]), float(eps)))


def _rms(rest: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    gain, eps = (*rest, *(None, None)[len(rest) :])
    return gain, None, eps


def _mapped(x: _Affine, weight: Any, bias: Any = None) -> _Affine:
    """W (s ⊙ x + h) + b = (W diag(s)) x + (W h + b)."""
    if not x.bare or getattr(weight, "ndim", 0) != 2:
        raise _Other
    before = [tensor.reshape(-1).expand(weight.shape[1]) for tensor in (x.scale, x.shift)]
    if any(size != 1 for tensor in (x.scale, x.shift) for size in tensor.shape[:-1]):
        raise _Other
    shift = weight @ before[1] + (0.0 if bias is None else bias)
    one = torch.ones((1,) * x.scale.dim(), dtype=torch.float64)
    return _Affine(one, one * shift, None, weight * before[0])
