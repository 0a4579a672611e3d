"""The registry of moves. To add one: write it in a file here, and list it below."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.moves.base import Change, Move, Option, Preserves, Scene, State, Used
from regauge.moves.batchnorm import FOLD_BATCHNORM
from regauge.moves.branch import FOLD_LAYER_SCALE
from regauge.moves.collapse import COLLAPSE
from regauge.moves.complex import COMPLEX
from regauge.moves.depth import INSERT_LAYERS
from regauge.moves.embedding import FOLD_EMBEDDING_SCALE
from regauge.moves.entries import PERMUTE, RESCALE
from regauge.moves.fold import DROP_KEY_BIAS, FOLD_SCALES, FOLD_SHIFTS, FOLD_VALUE_BIAS
from regauge.moves.grow import GROW
from regauge.moves.merge import MERGE
from regauge.moves.residual import CENTER
from regauge.moves.rotate import BALANCE_HEADS, ROTATE
from regauge.moves.structure import ADD_BIAS, STRIP
from regauge.moves.tying import TIE, UNTIE
from regauge.moves.upgrade import UPGRADE

_ALL = (
    UNTIE,
    TIE,
    FOLD_BATCHNORM,
    ADD_BIAS,
    FOLD_SHIFTS,
    FOLD_SCALES,
    FOLD_LAYER_SCALE,
    FOLD_EMBEDDING_SCALE,
    FOLD_VALUE_BIAS,
    DROP_KEY_BIAS,
    CENTER,
    STRIP,
    UPGRADE,
    COLLAPSE,
    COMPLEX,
    ROTATE,
    RESCALE,
    PERMUTE,
    BALANCE_HEADS,
    GROW,
    MERGE,
    INSERT_LAYERS,
)

MOVES: Mapping[str, Move] = {move.name: move for move in _ALL}

__all__ = ["MOVES", "Change", "Move", "Option", "Preserves", "Scene", "State", "Used"]
