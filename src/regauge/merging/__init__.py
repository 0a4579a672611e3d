"""Merging of models that share an origin: weights of several, combined after alignment."""

from regauge.merging.barrier import Barrier, Line
from regauge.merging.methods import METHODS, Settings
from regauge.merging.result import Merged
from regauge.merging.run import merge

__all__ = ["METHODS", "Barrier", "Line", "Merged", "Settings", "merge"]
