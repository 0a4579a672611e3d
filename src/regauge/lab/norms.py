"""The norms a lab model can have, by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput
from regauge.lab.nearest import nearest
from regauge.nn.adab2n import AdaB2N2d
from regauge.nn.evonorm import EvoNormB0, EvoNormS0
from regauge.nn.gated import GatedNorm, PreAffine
from regauge.nn.plain import CRMSNorm
from regauge.nn.powernorm import PowerNorm
from regauge.nn.repbn import PRepBN, RepBN
from regauge.nn.seednorm import SeeDNorm
from regauge.nn.tanh import BHyT, DyT
from regauge.nn.unified import UnifiedNorm
from regauge.nn.vectors import MagnitudeNorm


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of x [batch, positions, c] over batch and positions."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class GroupNorm(nn.GroupNorm):
    """Group norm of x [batch, c, height, width] with ``groups`` groups."""

    def __init__(self, size: int, groups: int = 8, eps: float = 1e-5) -> None:
        super().__init__(groups, size, eps)


TOKENS: Mapping[str, Callable[..., nn.Module]] = {
    "layernorm": nn.LayerNorm,
    "rmsnorm": functools.partial(nn.RMSNorm, eps=1e-6),
    "crmsnorm": CRMSNorm,
    "seednorm": SeeDNorm,
    "gatednorm": GatedNorm,
    "preaffine": PreAffine,
    "magnitude": MagnitudeNorm,
    "dyt": DyT,
    "bhyt": BHyT,
    "powernorm": PowerNorm,
    "unified": UnifiedNorm,
    "repbn": RepBN,
    "prepbn": PRepBN,
    "batch": TokenBatchNorm,
}
"""Name -> norm of x [batch, positions, c], made of its size; ``none`` is known too."""

IMAGES: Mapping[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "evonorm-b0": EvoNormB0,
    "evonorm-s0": EvoNormS0,
    "adab2n": AdaB2N2d,
    "group": GroupNorm,
}
"""Name -> norm of x [batch, c, height, width], made of its size; ``none`` is known too."""


def maker(
    table: Mapping[str, Callable[..., nn.Module]], name: str, size: int, options: Mapping[str, Any]
) -> Callable[[], nn.Module]:
    """A function that makes one norm.

    Args:
        table: :data:`TOKENS` or :data:`IMAGES`.
        name: of the table, or ``none`` for the identity.
        size: entries of c.
        options: the further arguments of the class.

    Raises:
        BadInput: an unknown name, or an option the class does not have.
    """
    if name == "none" and not options:
        return nn.Identity
    if name not in table:
        raise BadInput(
            f"there is no norm {name!r} here{nearest(name, (*table, 'none'))}",
            expected=", ".join((*table, "none")),
            found=repr(name),
        )
    kind = table[name]
    check_options(kind, options, f"the norm {name!r}")
    return lambda: kind(size, **options)


def check_options(kind: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Refuse options that the class and its bases do not have.

    Raises:
        BadInput: one of them.
    """
    known: dict[str, None] = {}
    bases = kind.__mro__ if inspect.isclass(kind) else ()
    for function in [base.__init__ for base in bases if "__init__" in vars(base)] or [kind]:
        parameters = inspect.signature(function).parameters.values()
        known |= dict.fromkeys(
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    names = [
        name
        for name in known
        if name
        not in ("self", "params", "model", "random", "kind", "depth", "sublayers", "size", "device", "dtype")
    ]
    for option in options:
        if option not in names:
            raise BadInput(
                f"{what} has no option {option!r}{nearest(option, names)}",
                expected=", ".join(names),
                found=repr(option),
            )
