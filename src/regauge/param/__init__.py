"""Parametrisations: what is a multiplier, what initialisation and what learning rate, and how they trade."""

from regauge.param.abc import Abc, Multiplier, shift
from regauge.param.convert import UnitLinear, unit_factor
from regauge.param.mup import MuReadout, Widths, adam_groups, mu_normal_, rescale_, sgd_groups, widths
from regauge.param.residual import (
    StreamScale,
    learning_rate_factor,
    residual,
    stream_scales,
    transformer_tau,
)
from regauge.param.scaling import scale

__all__ = [
    "Abc",
    "MuReadout",
    "Multiplier",
    "StreamScale",
    "UnitLinear",
    "Widths",
    "adam_groups",
    "learning_rate_factor",
    "mu_normal_",
    "rescale_",
    "residual",
    "scale",
    "sgd_groups",
    "shift",
    "stream_scales",
    "transformer_tau",
    "unit_factor",
    "widths",
]
