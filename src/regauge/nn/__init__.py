"""Normalisation layers of the literature, with what they collapse to and what becomes them.

See ``docs/norms.md``. :mod:`regauge.nn.init` holds initialisers, :mod:`regauge.nn.placement` places of norms
around a sublayer, :mod:`regauge.nn.absorb` what merges an affine map into a neighbouring one.
"""

from regauge.nn.adab2n import AdaB2N1d, AdaB2N2d
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation, PlainNorm
from regauge.nn.compander import Compander, compand
from regauge.nn.entry import Entry, Law
from regauge.nn.evonorm import EvoNormB0, EvoNormS0
from regauge.nn.fixup import FixupBlock
from regauge.nn.fused import fused
from regauge.nn.gated import GatedNorm, PreAffine
from regauge.nn.placement import Placement, Residual, placements
from regauge.nn.plain import CRMSNorm, LayerNorm, RMSNorm
from regauge.nn.powernorm import GroupScaling, PowerNorm
from regauge.nn.read import read_norm
from regauge.nn.region import RegionNormB, RegionNormL
from regauge.nn.repbn import PRepBN, RepBN
from regauge.nn.seednorm import SeeDNorm
from regauge.nn.selu import SELU, AlphaDropout
from regauge.nn.style import AdaIN, FixedStyle, GroupColouring
from regauge.nn.tanh import BHyT, DyT
from regauge.nn.unified import UnifiedNorm
from regauge.nn.vectors import BranchedNorm, MagnitudeNorm, ScaledLinear, ScaledNorm

__all__ = [
    "SELU",
    "AdaB2N1d",
    "AdaB2N2d",
    "AdaIN",
    "Affine",
    "AlphaDropout",
    "BHyT",
    "BranchedNorm",
    "CRMSNorm",
    "Compander",
    "DyT",
    "Entry",
    "EvoNormB0",
    "EvoNormS0",
    "FixedStyle",
    "FixupBlock",
    "GatedNorm",
    "GroupColouring",
    "GroupScaling",
    "Law",
    "LayerNorm",
    "MagnitudeNorm",
    "Normalisation",
    "PRepBN",
    "Placement",
    "PlainNorm",
    "PowerNorm",
    "PreAffine",
    "RMSNorm",
    "RegionNormB",
    "RegionNormL",
    "RepBN",
    "Residual",
    "ScaledLinear",
    "ScaledNorm",
    "SeeDNorm",
    "UnifiedNorm",
    "compand",
    "fused",
    "placements",
    "read_norm",
]
