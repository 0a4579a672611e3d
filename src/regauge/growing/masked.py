"""Growth by masks: new entries begin unseen, and come in little by little while the model trains.

A mask m is 1 on old indices and c on new ones; c goes from 0 to 1. With m on what reads an index set, and in
the statistics of the norms that read the stream, every new entry may be drawn at random and the function is
the old one at c = 0, LayerNorm included: its mean and variance are those of the old entries. At c = 1 the
model is an ordinary one of the new size. In between it is neither, and at c = 0 no new entry has a gradient.

Source: Yao et al., Masked Structural Growth for 2x Faster Language Model Pre-training (arXiv 2305.02869,
section 3.2). This module needs torch alone; masks are buffers, so that models compile, move and copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from regauge.errors import BadInput
from regauge.modeling_regauge import Norm

MASK = "growth_mask"
New = int | torch.Tensor
"""How many old indices there are, the new ones after them; or bool [n], true for new ones."""


class Mask(nn.Module):
    """y[…, i] = m[i] · x[…, i], m[i] = c for new i, else 1.

    Args:
        new: bool [n]: which indices are new.
        c: value of the mask there.
    """

    def __init__(self, new: torch.Tensor, c: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("new", new.to(torch.bool), persistent=False)
        self.register_buffer("c", torch.tensor(float(c), device=new.device), persistent=False)
        self.new: torch.Tensor
        self.c: torch.Tensor
        self.hook: RemovableHandle | None = None

    def weights(self, dtype: torch.dtype) -> torch.Tensor:
        """m, of shape [n]."""
        return torch.where(self.new, self.c.to(dtype), torch.ones((), dtype=dtype, device=self.new.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights(x.dtype)


class MaskedNorm(nn.Module):
    """y[…, i] = m[i] · (g[i] · z[i] / sqrt(s + eps) + b[i]), all sums over i, M = Σ m[i].

    ======  ======================  =================
    form    z                       s
    ======  ======================  =================
    layer   x − Σ m[i] x[i] / M     Σ m[i] z[i]² / M
    rms     x                       Σ m[i] x[i]² / M
    ======  ======================  =================

    With c = 1 it is the LayerNorm or RMSNorm of n entries, with c = 0 that of the old entries alone.
    """

    def __init__(
        self, form: str, mask: Mask, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        if form not in ("layer", "rms"):
            raise BadInput("no masked form of this norm", expected="layer or rms", found=form)
        self.form, self.eps, self.mask = form, eps, mask
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        m = self.mask.weights(z.dtype)
        total = m.sum()
        if self.form == "layer":
            z = z - (m * z).sum(-1, keepdim=True) / total
        y = (z * torch.rsqrt((m * z.square()).sum(-1, keepdim=True) / total + self.eps)).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y * m.to(y.dtype)

    def plain(self) -> nn.Module:
        """The ordinary norm with the same parameters."""
        n = self.mask.new.numel()
        kept: nn.Module = Norm(self.form, n, self.eps)
        if self.form == "layer" and self.weight is not None:
            kept = nn.LayerNorm(n, self.eps, bias=self.bias is not None)
        elif self.form == "rms" and self.bias is None:
            kept = nn.RMSNorm(n, self.eps, elementwise_affine=self.weight is not None)
        kept.register_parameter("weight", self.weight)
        kept.register_parameter("bias", self.bias)
        return kept


def masked(model: nn.Module, new: Mapping[str, New], c: float = 0.0) -> nn.Module:
    """Put masks into a model, in place; parameters keep their names.

    Args:
        model: with its new parameters, of whatever values.
        new: path of a module -> its new indices: of a LayerNorm or RMSNorm over the last axis, what it takes
            statistics of; of any other module, the last axis of its first argument.
        c: value of the masks.

    Returns:
        the model.

    Raises:
        BadInput: no such module, already masked, or indices that do not fit the norm.
    """
    modules = dict(model.named_modules())
    for path, held in new.items():
        module = modules.get(path)
        if module is None or not path or isinstance(module, MaskedNorm) or hasattr(module, MASK):
            raise BadInput("cannot be masked", found=f"{path}: no such module, or masked already")
        known = _norm(module)
        if known is None:
            if isinstance(held, int):
                size = getattr(module, "in_features", None)
                if size is None:
                    raise BadInput(f"{path}: it is not known how many indices it reads", expected="a mask")
                held = torch.arange(size) >= held
            like = next(module.parameters(), torch.zeros(()))
            mask = Mask(held.to(like.device), c)
            module.register_module(MASK, mask)
            mask.hook = module.register_forward_pre_hook(_mask_input)
            continue
        form, size, eps = known
        held = torch.arange(size) >= held if isinstance(held, int) else held
        if held.shape != (size,):
            raise BadInput(f"{path}: the mask does not fit", expected=str((size,)), found=str(held.shape))
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None:
            held = held.to(weight.device)
        _put(model, path, MaskedNorm(form, Mask(held, c), eps, weight, bias).train(module.training))
    return model


def set_mask(model: nn.Module, c: float) -> None:
    """c ← a number from 0 to 1 in every mask of a model."""
    if not 0 <= c <= 1:
        raise BadInput("a mask lies between 0 and 1", found=str(c))
    for module in model.modules():
        if isinstance(module, Mask):
            module.c.fill_(c)


def unmasked(model: nn.Module) -> nn.Module:
    """Take the masks out of a model, in place, once they are all 1: the function stays.

    Raises:
        BadInput: a mask is not 1.
    """
    masks = [module for module in model.modules() if isinstance(module, Mask)]
    if any(float(mask.c) != 1 for mask in masks):
        raise BadInput("a mask that is not 1 cannot be taken out", way_out="set_mask(model, 1.0)")
    for path, module in list(model.named_modules()):
        if isinstance(module, MaskedNorm):
            _put(model, path, module.plain().train(module.training))
        elif isinstance(mask := getattr(module, MASK, None), Mask) and mask.hook is not None:
            mask.hook.remove()
            delattr(module, MASK)
    return model


class Ramp:
    """c = min(1, t / steps) after step t: call :meth:`step` once before each step of training.

    Args:
        model: with masks.
        steps: how long it takes, at least 1.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        if steps < 1:
            raise BadInput("a ramp takes at least one step", found=str(steps))
        self.model, self.steps, self.taken = model, steps, 0
        set_mask(model, 0.0)

    def step(self) -> float:
        """The new value of the masks."""
        self.taken += 1
        c = min(1.0, self.taken / self.steps)
        set_mask(self.model, c)
        return c


def _mask_input(module: nn.Module, args: Any) -> Any:
    return (getattr(module, MASK)(args[0]), *args[1:])


def _norm(module: nn.Module) -> tuple[str, int, float] | None:
    """Form, size and eps of a norm of torch or of ours over the last axis."""
    if isinstance(module, Norm) and module.form in ("layer", "rms"):
        return module.form, module.size, module.eps
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return "layer" if isinstance(module, nn.LayerNorm) else "rms", module.normalized_shape[0], eps
    return None


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
