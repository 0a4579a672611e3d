"""Initialisers of the literature, in place as in torch.nn.init, and what they lead to layer by layer."""

from regauge.nn.init.bias import binary_spread, correlation, guesses, guessing_bias
from regauge.nn.init.convaware import conv_aware_, conv_aware_keras
from regauge.nn.init.fixup import fixup_, fixup_scale
from regauge.nn.init.idinit import idi_, idiz_
from regauge.nn.init.mimetic import mimetic_query_, mimetic_ssm_, mimetic_value_
from regauge.nn.init.s4d import log_step_, s4d_, s4d_input, s4d_kernel, s4d_modes, s4d_output_
from regauge.nn.init.selection import select_, select_module_
from regauge.nn.init.simplex import equiangular_, simplex, simplex_, welch_bound
from regauge.nn.init.theory import measure, predict, steps_of
from regauge.nn.init.vi3nr import backward_sigma, gain, vi3nr_

__all__ = [
    "backward_sigma",
    "binary_spread",
    "conv_aware_",
    "conv_aware_keras",
    "correlation",
    "equiangular_",
    "fixup_",
    "fixup_scale",
    "gain",
    "guesses",
    "guessing_bias",
    "idi_",
    "idiz_",
    "log_step_",
    "measure",
    "mimetic_query_",
    "mimetic_ssm_",
    "mimetic_value_",
    "predict",
    "s4d_",
    "s4d_input",
    "s4d_kernel",
    "s4d_modes",
    "s4d_output_",
    "select_",
    "select_module_",
    "simplex",
    "simplex_",
    "steps_of",
    "vi3nr_",
    "welch_bound",
]
