"""What a model gives on text, decided from its trace: a loss per token, a class, or a vector.

Both models run in float32 from their stored weights, whatever these are stored in: the graph is traced in
float32, and weights are read and cast as each operation needs them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from regauge.certify.given import looked_up
from regauge.certify.sides import Side, side_of, trace_function
from regauge.checkpoint import Checkpoint
from regauge.errors import Refused
from regauge.hf import HFModel, load_config, load_meta

IDS, MASK = "input_ids", "attention_mask"
COMPUTED = torch.float32


class Measure(StrEnum):
    """What is compared: b minus a for losses and accuracies; for vectors 1 - cosine of the two."""

    LOSS = "loss"
    ACCURACY = "accuracy"
    DISTANCE = "cosine distance"


@dataclass(frozen=True)
class TextModel:
    """A model with what it gives on text.

    Attributes:
        side: traced in float32, with its weights.
        measure: what its outputs are.
        settings: the configuration it was traced from, as plain data.
    """

    side: Side
    measure: Measure
    settings: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens in a row of one run."""
        rows, length = self.side.model.inputs[IDS].shape
        return int(rows), int(length)


def open_model(
    path: Path, files: Checkpoint, rows: int, length: int, like: TextModel | None = None
) -> TextModel:
    """Trace a model on rows of text.

    Args:
        path, files: directory and its weights.
        rows, length: of one run; fewer tokens if the model has fewer positions.
        like: a model whose trace is taken if the configurations are equal.

    Raises:
        Refused: it does not take text alone, or gives something that is not known how to compare.
    """
    config = load_config(path)
    set_dtype(config)
    settings = config.to_dict()
    if like is not None and settings == like.settings and like.shape == (rows, length):
        model, traced, logits = like.side.model, like.side.trace, like.side.logits
    else:
        model = load_meta(config, batch=rows, length=length, experts="grouped_mm")
        names = set(model.inputs) - {MASK}
        if names != {IDS}:
            raise Refused(
                f"{path.name} does not take text alone",
                expected=IDS,
                found=", ".join(sorted(names)),
                way_out="leave out the margin: `certify` compares such models on random inputs",
            )
        traced, logits = trace_function(model)
        if _measure(path, model, traced, logits) is not Measure.LOSS:
            model = _with_mask(path, model)
            traced, logits = trace_function(model)
    measure = _measure(path, model, traced, logits)
    return TextModel(side_of(path, files, COMPUTED, model, traced, logits), measure, settings)


def set_dtype(config: Any) -> None:
    """The model of a configuration, and all its parts, in float32."""
    config.dtype = COMPUTED
    for key in getattr(config, "sub_configs", None) or {}:
        section = getattr(config, key, None)
        if section is not None and not isinstance(section, Mapping):
            set_dtype(section)


def _measure(path: Path, model: HFModel, traced: Any, logits: bool) -> Measure:
    rows, length = model.inputs[IDS].shape
    shapes = [tuple(int(size) for size in node.meta["val"].shape) for node in traced.outputs]
    ids = torch.zeros((rows, length), dtype=torch.int64)
    vocabulary = {total for _, total in looked_up(traced, [{IDS: ids}]).values()}
    if logits and len(shapes) == 1:
        (shape,) = shapes
        if len(shape) == 3 and shape[:2] == (rows, length) and shape[2] in vocabulary:
            return Measure.LOSS
        if len(shape) == 2 and shape[0] == rows and shape[1] > 1:
            return Measure.ACCURACY
    elif not logits and shapes and shapes[0][0] == rows:
        if len(shapes[0]) == 3 and shapes[0][1] == length and shapes[0][2] > 1:
            return Measure.DISTANCE
        if len(shapes[0]) == 2 and shapes[0][1] > 1:
            return Measure.DISTANCE
    raise Refused(
        f"cannot tell what the outputs of {path.name} mean for a text",
        expected=f"logits over the {', '.join(map(str, sorted(vocabulary))) or 'unknown'} tokens it reads,"
        " logits over classes, or a vector for each token or text",
        found=("logits " if logits else "") + ", ".join("×".join(map(str, shape)) for shape in shapes),
        way_out="leave out the margin: `certify` compares any outputs",
    )


def _with_mask(path: Path, model: HFModel) -> HFModel:
    """The same model given a mask too, so that rows of text may be padded."""
    if MASK in model.inputs:
        return model
    if MASK not in inspect.signature(model.model.forward).parameters:
        raise Refused(
            f"{path.name} takes no mask, so texts of different length cannot share a run",
            expected=MASK,
            found=", ".join(inspect.signature(model.model.forward).parameters),
        )
    ones = torch.ones_like(model.inputs[IDS])
    return dataclasses.replace(model, inputs={**model.inputs, MASK: ones})
