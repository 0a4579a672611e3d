"""Optimizers and laws of training, and what the operations of a model say about its parameters."""

from regauge.optim.adamp import AdamP
from regauge.optim.dog import DoG, LDoG, PolynomialAverage
from regauge.optim.invariant import View, scale_invariant
from regauge.optim.logistic import Separated, logistic_step, separate
from regauge.optim.multinorm import SWAN, MultiNorm, SinkGD, with_adam
from regauge.optim.roles import DECAY, Role, groups, roles, table
from regauge.optim.sgdp import SGDP
from regauge.optim.steplaw import StepLaw, non_embedding, step_law

__all__ = [
    "DECAY",
    "SGDP",
    "SWAN",
    "AdamP",
    "DoG",
    "LDoG",
    "MultiNorm",
    "PolynomialAverage",
    "Role",
    "Separated",
    "SinkGD",
    "StepLaw",
    "View",
    "groups",
    "logistic_step",
    "non_embedding",
    "roles",
    "scale_invariant",
    "separate",
    "step_law",
    "table",
    "with_adam",
]
