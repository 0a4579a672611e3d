"""Statistical equivalence: do two models differ on a text by less than a stated margin?

:func:`equivalence` compares two directories; :func:`decide` judges paired differences measured elsewhere.
"""

from regauge.equivalence.compare import equivalence
from regauge.equivalence.models import Measure
from regauge.equivalence.result import Equivalence, Sample, render, schema
from regauge.equivalence.verdict import Decision, Finding, Need, Terms, decide, decide_accuracy

__all__ = [
    "Decision",
    "Equivalence",
    "Finding",
    "Measure",
    "Need",
    "Sample",
    "Terms",
    "decide",
    "decide_accuracy",
    "equivalence",
    "render",
    "schema",
]
