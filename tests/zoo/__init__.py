"""The zoo: small networks, chosen to be hard to understand, and small ones of real architectures.

``HOSTILE`` holds hand-written modules with example inputs. None is named like a real architecture, and
many have sizes that agree by accident. ``CONFIGS`` holds configurations of transformers. ``specimen(name)``
traces one once.
"""

from zoo.configs import CONFIGS
from zoo.specimens import (
    HOSTILE,
    NAMES,
    Bench,
    Moved,
    Specimen,
    atlas,
    carry_out,
    distance,
    folded,
    move,
    original,
    specimen,
    weights,
)

__all__ = [
    "CONFIGS",
    "HOSTILE",
    "NAMES",
    "Bench",
    "Moved",
    "Specimen",
    "atlas",
    "carry_out",
    "distance",
    "folded",
    "move",
    "original",
    "specimen",
    "weights",
]
