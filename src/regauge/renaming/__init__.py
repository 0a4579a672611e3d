"""Tensors whose names say nothing, named again by what they hold, with a model of known names beside them."""

from regauge.renaming.copy import Renamed, named_again

__all__ = ["Renamed", "named_again"]
