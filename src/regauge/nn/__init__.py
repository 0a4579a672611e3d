"""Normalisation layers of the literature, with what they collapse to and what becomes them."""

from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation, PlainNorm
from regauge.nn.entry import Entry, Law
from regauge.nn.read import read_norm

__all__ = ["Affine", "Entry", "Law", "Normalisation", "PlainNorm", "read_norm"]
