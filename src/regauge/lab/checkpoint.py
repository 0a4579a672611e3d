"""The state of a run in one file, written so that there is always a whole one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from regauge.errors import CheckpointError


def write(path: Path, state: dict[str, Any]) -> None:
    """Write to a file beside it, then rename: whoever is killed leaves the old state or the new one."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_text(path: Path, text: str) -> None:
    """The same for a text."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote. Nothing but tensors and plain data is read.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint of a run",
            found=str(error)[:200],
            way_out="remove it to start the run anew",
        ) from error
