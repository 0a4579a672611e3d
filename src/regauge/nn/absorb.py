"""An affine map per channel, merged exactly into the linear map before or behind it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from regauge.errors import Refused
from regauge.nn.affine import Affine

Convolution = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_Map = TypeVar("_Map", nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Convolution)
_FORMS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def merge_into_previous(linear: _Map, affine: Affine, *, channels_last: bool = False) -> _Map:
    """The linear map g[o] · (W·x + bias)[o] + b[o]: W' = diag(g)·W, bias' = g·bias + b. Exact, padded or not.

    Args:
        linear: nn.Linear or a convolution, whose output nothing else reads; it is left as it is.
        affine: along the channels of its output: the last axis behind nn.Linear, axis 1 behind a convolution.
        channels_last: the output of the convolution has its channels moved to the last axis before
            ``affine``.

    Returns:
        a module of the class of ``linear``, with a bias unless neither has one.

    Raises:
        Refused: another class, hooks, another axis, or other sizes.
    """
    _check(linear, affine, channels_last, linear.weight.shape[0])
    merged = copy.deepcopy(linear)
    gain = _column(affine.weight, merged.weight)
    with torch.no_grad():
        if gain is not None:
            merged.weight.mul_(gain.reshape(-1, *(1,) * (merged.weight.dim() - 1)))
            if merged.bias is not None:
                merged.bias.mul_(gain)
    _add(merged, affine.bias)
    return merged


def merge_into_next(affine: Affine, linear: _Map, *, channels_last: bool = False) -> _Map:
    """The linear map W·(g ⊙ x + b) + bias: W'[o, i] = W[o, i]·g[i], bias'[o] = bias[o] + Σ W[o, i]·b[i].

    Args:
        affine: along the channels of the input: the last axis before nn.Linear, axis 1 before a convolution.
        linear: nn.Linear or a convolution, which alone reads ``affine``; it is left as it is.
        channels_last: the output of ``affine``, whose last axis is c, has c moved to axis 1 before the
            convolution.

    Returns:
        a module of the class of ``linear``, with a bias unless neither has one.

    Raises:
        Refused: another class, hooks, another axis, other sizes, or a shift before a convolution that pads by
            zeros: what is padded has no shift, so no constant bias gives it.
    """
    groups = 1 if isinstance(linear, nn.Linear) else linear.groups
    _check(linear, affine, channels_last, groups * linear.weight.shape[1])
    if affine.bias is not None and bool(affine.bias.any()) and _pads_by_zeros(linear):
        raise Refused(
            "a shift is not merged into a convolution that pads by zeros",
            expected="no padding, padding by values of the input, or no shift",
            found="zeros at the border that the shift does not reach",
            way_out="merge it into what comes before",
        )
    merged = copy.deepcopy(linear)
    weight = linear.weight.detach()
    apart = weight.unflatten(0, (groups, -1))  # [group, output of it, input of it, ...]
    if affine.bias is not None:
        shift = affine.bias.detach().to(weight).reshape(groups, 1, -1)
        _add(
            merged,
            (apart.flatten(3).sum(3) * shift).sum(2).flatten() if weight.dim() > 2 else weight @ shift[0, 0],
        )
    gain = _column(affine.weight, weight)
    if gain is not None:
        with torch.no_grad():
            scale = gain.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))
            merged.weight.copy_((apart * scale).flatten(0, 1))
    return merged


def _column(values: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else values.detach().to(like)


def _add(linear: Convolution, shift: torch.Tensor | None) -> None:
    """bias ← bias + shift, in place."""
    if shift is None:
        return
    shift = shift.detach().to(linear.weight)
    old = linear.bias
    linear.bias = nn.Parameter(shift.clone() if old is None else old.detach() + shift)


def _pads_by_zeros(linear: Convolution) -> bool:
    if isinstance(linear, nn.Linear) or linear.padding_mode != "zeros":
        return False
    if linear.padding == "same":
        return any(length > 1 for length in linear.kernel_size)
    return linear.padding != "valid" and any(linear.padding)


def _check(linear: nn.Module, affine: Affine, channels_last: bool, size: int) -> None:
    # A subclass may compute something else.
    if type(linear) not in _FORMS:
        raise Refused(
            "only a linear map takes in an affine one",
            expected="nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d",
            found=type(linear).__name__,
        )
    if any(getattr(module, f"_forward{kind}hooks") for module in (linear, affine) for kind in ("_", "_pre_")):
        raise Refused(
            "a module with hooks is not merged", expected="no hooks", found="hooks that may change its values"
        )
    last = isinstance(linear, nn.Linear) or channels_last
    if affine.axis != (-1 if last else 1):
        raise Refused(
            "the affine map is along another axis than the channels",
            expected=f"axis={-1 if last else 1}",
            found=f"axis={affine.axis}",
            way_out=None if isinstance(linear, nn.Linear) else "say with channels_last where they are",
        )
    for name in ("weight", "bias"):
        values = getattr(affine, name)
        if values is not None and values.numel() != size:
            raise Refused(
                "the affine map has another size than the channels",
                parameter=name,
                expected=f"{size}",
                found=f"{values.numel()}",
            )
