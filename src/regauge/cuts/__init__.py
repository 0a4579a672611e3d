"""The registry of cuts. To add one: write it in a file here, and list it below."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.cuts.base import Cut, measured
from regauge.cuts.select import SELECT
from regauge.cuts.stack import STACK
from regauge.errors import Refused
from regauge.recipe import Recipe

CUTS: Mapping[str, Cut] = {cut.name: cut for cut in (STACK, SELECT)}


def check_cuts(recipe: Recipe, allowed: bool) -> tuple[str, ...]:
    """The cuts of a recipe, in order.

    Raises:
        Refused: there are some, and they are not allowed.
    """
    names = tuple(spec.name for spec in recipe.moves if spec.name in CUTS)
    if names and not allowed:
        raise Refused(
            f"{names[0]} is a cut: it makes another function",
            expected="moves, which keep the function",
            found=f"it loses {CUTS[names[0]].loses}",
            way_out="allow it with --allow-cuts, or cut=True from Python, on a directory",
        )
    return names


__all__ = ["CUTS", "Cut", "check_cuts", "measured"]
