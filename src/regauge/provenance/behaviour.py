"""What a model does, in 64 numbers: its outputs on fixed inputs, in true float64.

The same function gives the same numbers, however it is stored: tied or not, folded or not, LayerNorm written
as RMSNorm, wider or deeper by an exact expansion.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from regauge.certify.run import run
from regauge.certify.sides import StoredWeights
from regauge.model import CheckpointModel
from regauge.provenance.signs import signs

NUMBERS = 64
BATCH, LENGTH, SEED = 3, 7, 20261121
"""Sizes as in the trace that the gauge is read from, so that one trace is enough."""
STEP = 1e-3
"""Of the digest. The numbers themselves are of size one."""
_CHUNK = 1 << 16


def behaviour(model: CheckpointModel) -> np.ndarray:
    """Signed sums of the outputs on fixed random inputs, over the norm of the outputs.

    The inputs follow from the forward signature and the sizes in the configuration alone. Only logits are
    looked at where the model gives any, else everything that it returns.

    Args:
        model: an open checkpoint.

    Returns:
        float64 [NUMBERS], each about as large as a standard normal variable.

    Raises:
        TraceError, BadInput, CheckpointError: the model cannot be run.
    """
    weights = StoredWeights(model.files, model.names)
    inputs = model.held.real_inputs(batch=BATCH, length=LENGTH, seed=SEED)
    return summary(run(model.gauge.trace, weights, model.held.buffers(), inputs))


def summary(outputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    """Σ ± y / ‖y‖ for NUMBERS fixed choices of signs, over the entries y of all outputs."""
    total = torch.zeros(NUMBERS, dtype=torch.float64)
    square = 0.0
    start = 0
    for output in outputs:
        flat = output.reshape(-1).to(torch.float64)
        for begin in range(0, len(flat), _CHUNK):
            piece = flat[begin : begin + _CHUNK]
            total += piece @ signs(len(piece), NUMBERS, start=start + begin)
            square += float(piece.square().sum())
        start += len(flat)
    return (total / square**0.5 if square else total).numpy()


def digest(numbers: np.ndarray) -> str:
    """16 hexadecimal digits of the numbers rounded to multiples of STEP.

    Equal functions computed in float64 agree to 1e-12, so that a number lies on the border between two
    multiples, and two equal functions get different digests, once in some ten million pairs. After
    rounding to float32 this is about one pair in ten: compare the numbers themselves, with a tolerance.
    """
    rounded = np.round(numbers / STEP).astype("<i4")
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]
