"""Which norm a module is, read from its operations."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from regauge.errors import Refused, TraceError
from regauge.interpret import op_name
from regauge.nn.base import PlainNorm
from regauge.patches import own_parameter, plain_modules, replaceable
from regauge.trace import Trace, trace

_BATCH = {"aten.batch_norm": (1, 2, 3, 4, 7), "aten._native_batch_norm_legit_no_training": (1, 2, 3, 4, 6)}

_Tensors = dict[str, torch.Tensor]


class _Holder(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def read_norm(norm: nn.Module, size: int | None = None) -> PlainNorm:
    """What a module is, if it is one LayerNorm, RMSNorm or batch norm and nothing else.

    Args:
        norm: a module that takes one tensor; it is left as it is. Classes of any library are read, if their
            code has one path and their operations are known.
        size: entries of the axis that is normalised; needed only for a norm without parameters.

    Raises:
        Refused: it is something else.
    """
    held = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    lengths = [tensor.numel() for tensor in held.values() if tensor.dim() == 1]
    size = size or (lengths[0] if lengths else next(iter(getattr(norm, "normalized_shape", ())), None))
    if size is None:
        raise Refused(
            "a norm without parameters needs its size", found=type(norm).__name__, way_out="give size"
        )
    like = next(iter(held.values()), torch.zeros(()))
    copied = _Holder(copy.deepcopy(norm)).eval().to("meta")
    for shape in ((2, 3, size), (2, size, 3, 3), (2, size, 3), (2, size)):
        try:
            traced = trace(copied, (torch.zeros(shape, dtype=like.dtype, device="meta"),))
        except (TraceError, Refused):
            continue
        found = _plain(traced, held, like, norm) if shape == (2, 3, size) else None
        found = found or _batch(traced, held, like, norm)
        if found is not None:
            return found
    raise Refused(
        "this module is not a plain norm",
        expected="one LayerNorm, RMSNorm or batch norm, with nothing else in its code",
        found=type(norm).__name__,
    )


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
