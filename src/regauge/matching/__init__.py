"""Alignment of two models: the element of the gauge that brings one to the other."""

from regauge.matching.alignment import Alignment, Leftover, align_modules, align_sides

__all__ = ["Alignment", "Leftover", "align_modules", "align_sides"]
