"""Evidence that two networks compute the same function.

:func:`certify` compares two directories, :func:`certify_modules` two modules; :func:`compare_functions`
measures, :func:`judge` decides, :mod:`regauge.certify.run` executes a traced graph in true float64.
"""

from regauge.certify.certificate import Certificate, Inputs, Subject, render, schema
from regauge.certify.compare import certify, certify_modules
from regauge.certify.lazy import Weights
from regauge.certify.measure import (
    Figures,
    Function,
    FunctionEvidence,
    Rerounded,
    Verdict,
    compare_functions,
    judge,
)
from regauge.certify.sides import StoredWeights

__all__ = [
    "Certificate",
    "Figures",
    "Function",
    "FunctionEvidence",
    "Inputs",
    "Rerounded",
    "StoredWeights",
    "Subject",
    "Verdict",
    "Weights",
    "certify",
    "certify_modules",
    "compare_functions",
    "judge",
    "render",
    "schema",
]
