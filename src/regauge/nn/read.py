"""Which norm a module is, read from its operations."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import fx, nn

from regauge.discover import Gauge
from regauge.errors import Refused, TraceError
from regauge.interpret import op_name
from regauge.moves.affine import affine_modules
from regauge.moves.base import Scene, State
from regauge.nn.base import PlainNorm
from regauge.patches import own_parameter, plain_modules, replaceable
from regauge.primitive import CASTS, SILENT, primitive_norms
from regauge.trace import Trace, trace

_BATCH = {"aten.batch_norm": (1, 2, 3, 4, 7), "aten._native_batch_norm_legit_no_training": (1, 2, 3, 4, 6)}

_OURS = frozenset(
    f"regauge.nn.{name}"
    for name in ("plain.LayerNorm", "plain.RMSNorm", "vectors.MagnitudeNorm", "vectors.ScaledNorm")
)
"""Classes whose code is known to do the same whatever comes in, as those of :mod:`regauge.patches` are."""
_NORMS = frozenset(("aten.layer_norm", "aten.rms_norm"))

_Tensors = dict[str, torch.Tensor]


class _Holder(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def read_norm(norm: nn.Module, size: int | None = None) -> PlainNorm:
    """What a module is, if it is one LayerNorm, RMSNorm or batch norm and nothing else.

    Gain and shift may be made of several parameters and constants, as in
    :class:`regauge.norms_regauge.ScaledNorm` and :class:`regauge.norms_regauge.MagnitudeNorm`; they are then
    given in float64. An RMSNorm may have a shift. An RMSNorm of torch with ``eps=None`` has an eps that
    depends on the dtype in which it computes: ``torch.finfo(dtype).eps`` of the dtype of the module, and of
    float32 for a narrower one. That is what is read, so it holds for inputs of that dtype; without
    parameters such a norm is refused.

    Args:
        norm: a module that takes one tensor; it is left as it is. Classes of any library are read, if their
            code has one path and their operations are known.
        size: entries of the axis that is normalised; needed only for a norm without parameters.

    Raises:
        Refused: it is something else, or has hooks.
    """
    held = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    lengths = [tensor.numel() for tensor in held.values() if tensor.dim() == 1]
    size = size or (max(lengths) if lengths else next(iter(getattr(norm, "normalized_shape", ())), None))
    if size is None:
        raise Refused(
            "a norm without parameters needs its size", found=type(norm).__name__, way_out="give size"
        )
    if any(value for part in norm.modules() for name, value in vars(part).items() if name.endswith("_hooks")):
        raise Refused(
            "a norm with hooks is not read", expected="no hooks", found="hooks that may change its values"
        )
    like = next(iter(held.values()), torch.zeros(()))
    copied = _Holder(copy.deepcopy(norm)).eval().to("meta")
    for shape in ((2, 3, size), (2, size, 3, 3), (2, size, 3), (2, size)):
        try:
            with _unlogged():
                traced = trace(copied, (torch.zeros(shape, dtype=like.dtype, device="meta"),))
        except (TraceError, Refused):
            continue
        traced = _known(traced, norm)
        if held:
            traced = _with_eps(traced)
        found = None
        if shape == (2, 3, size):
            found = _plain(traced, held, like, norm) or _shifted(traced, held, like, norm)
            found = found or _made(traced, held, like, norm)
        found = found or _batch(traced, held, like, norm)
        if found is not None:
            return found
    raise Refused(
        "this module is not a plain norm",
        expected="one LayerNorm, RMSNorm or batch norm, with nothing else in its code",
        found=type(norm).__name__,
    )


@contextmanager
def _unlogged() -> Generator[None]:
    """No log lines of torch from inputs that turn out not to fit the module."""
    below = (held for name, held in logging.root.manager.loggerDict.items() if name.startswith("torch."))
    loggers = [held for held in below if isinstance(held, logging.Logger) and held.level]
    before = [(logger, logger.level) for logger in (logging.getLogger("torch"), *loggers)]
    for logger, _ in before:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def _known(traced: Trace, norm: nn.Module) -> Trace:
    """The trace, in which a layer of this package has one path through its code."""
    kind = type(norm)
    if f"{kind.__module__}.{kind.__qualname__}" not in _OURS or "forward" in vars(norm):
        return traced
    return replace(traced, straight=traced.straight | {"norm"})


def _with_eps(traced: Trace) -> Trace:
    """The trace, in which every RMSNorm has an eps."""
    for node in traced.graph.nodes:
        if op_name(node) == "aten.rms_norm" and not node.kwargs and [*node.args, None, None][3] is None:
            x: fx.Node = node.args[0]
            dtype = torch.promote_types(x.meta["val"].dtype, torch.float32)
            node.args = (*[*node.args, None][:3], torch.finfo(dtype).eps)
    return traced


def _named(held: _Tensors, name: str | None) -> torch.Tensor | None:
    return None if name is None else held[name.removeprefix("norm.")].detach()


def _plain(
    traced: Trace, held: dict[str, torch.Tensor], like: torch.Tensor, norm: nn.Module
) -> PlainNorm | None:
    known = replaceable(traced).get("norm")
    if known is None or known.patch["module"] != "norm" or len(known.nodes) != 1:
        return None
    gain, shift = _named(held, known.weight), _named(held, known.bias)
    if gain is not None and known.chart:
        gain = gain + known.chart
    form, size, eps = (known.patch[key] for key in ("form", "size", "eps"))
    return PlainNorm(form, size, eps, gain, shift, like, norm.training)


def _shifted(traced: Trace, held: _Tensors, like: torch.Tensor, norm: nn.Module) -> PlainNorm | None:
    """An RMSNorm in primitive operations to which a parameter of its own is added."""
    nodes = [node for node in plain_modules(traced).get("norm", []) if op_name(node) not in SILENT]
    while nodes and op_name(nodes[-1]) in CASTS:
        nodes.pop()
    if not nodes or op_name(nodes[-1]) != "aten.add" or len(nodes[-1].args) != 2 or nodes[-1].kwargs:
        return None
    last = nodes.pop()
    owned = [(arg, own_parameter(traced, "norm", arg)) for arg in last.args]
    shifts = [name for _, name in owned if name is not None]
    found = primitive_norms(nodes, lambda value: own_parameter(traced, "norm", value))
    if len(found) != 1 or len(shifts) != 1 or found[0].node not in [str(arg) for arg, _ in owned]:
        return None
    ((shift,), (known,)) = (shifts, found)
    used = {shift, known.weight} - {None}
    if used != set(traced.aliases) or any(traced.shapes[name] != (known.size,) for name in used if name):
        return None
    gain = _named(held, known.weight)
    gain = gain + known.chart if gain is not None and known.chart else gain
    return PlainNorm("rms", known.size, known.eps, gain, _named(held, shift), like, norm.training)


def _made(traced: Trace, held: _Tensors, like: torch.Tensor, norm: nn.Module) -> PlainNorm | None:
    """A norm whose gain and shift are made of parameters of its own and constants."""

    def value(name: str) -> torch.Tensor:
        return held[name.removeprefix("norm.")].detach()

    scene = Scene(Gauge(traced), State(), value, torch.Generator())
    for found in affine_modules(scene, lambda names: bool(names & _NORMS)):
        if found.path != "norm" or found.norm is None or found.axis not in (None, 2):
            continue
        if found.weight is not None or found.result not in traced.outputs or len(traced.outputs) != 1:
            continue
        form, size, eps = found.norm
        scale, shift = found.along(2)
        gain = None if found.scale.numel() == 1 and bool(found.scale == 1) else scale
        moved = None if found.shift.numel() == 1 and not bool(found.shift) else shift
        return PlainNorm(form, size, eps, gain, moved, like, norm.training)
    return None


def _batch(
    traced: Trace, held: dict[str, torch.Tensor], like: torch.Tensor, norm: nn.Module
) -> PlainNorm | None:
    nodes: list[fx.Node] = [
        node for node in plain_modules(traced).get("norm", []) if op_name(node) != "getitem"
    ]
    if len(nodes) != 1 or op_name(nodes[0]) not in _BATCH or nodes[0].kwargs:
        return None
    *places, eps = _BATCH[op_name(nodes[0])]
    gain, shift, mean, variance = (
        _named(held, own_parameter(traced, "norm", nodes[0].args[place])) for place in places
    )
    if mean is None or variance is None:
        return None
    momentum = getattr(norm, "momentum", None)
    return PlainNorm(
        "batch",
        len(mean),
        float(nodes[0].args[eps]),  # type: ignore[arg-type]
        gain,
        shift,
        like,
        norm.training,
        mean,
        variance,
        None if momentum is None else float(momentum),
    )
