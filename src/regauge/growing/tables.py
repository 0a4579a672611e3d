"""Buffers of a model that grows: every one that is used holds what it held, and rotary frequencies go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.growing.trial import Trial
from regauge.patches import Patch
from regauge.trace import Trace


def longer_buffers(patches: Sequence[Patch], lengths: Mapping[int, int]) -> tuple[Patch, ...]:
    """Patches that set lists of numbers which count something that grows, gone on with."""
    found: list[Patch] = []
    for patch in patches:
        if patch["module"] == "buffers":
            old = {name: torch.tensor(held, dtype=torch.float64) for name, held in patch["values"].items()}
            new = {
                n: _longer(held, lengths[len(held)]) for n, held in old.items() if 1 < len(held) in lengths
            }
            if new:
                values = {name: new.get(name, held).tolist() for name, held in old.items()}
                found.append({**patch, "values": values})
    return tuple(found)


def _longer(held: torch.Tensor, length: int) -> torch.Tensor:
    """More entries, as a geometric sequence goes on (rotary frequencies are one)."""
    ratio = held[-1].double() / held[-2].double()
    more = held[-1].double() * ratio ** torch.arange(1, length - len(held) + 1)
    return torch.cat([held, more.to(held.dtype)])


def kept_buffers(
    first: Trial,
    trial: Trial,
    old: Trace,
    new: Trace,
    config: Mapping[str, Any],
    patches: Sequence[Patch],
    lengths: Mapping[int, int],
) -> tuple[Patch, ...] | None:
    """Patches after which every buffer that is used holds what it held, new entries after the old.

    None if a buffer changed in another way.
    """
    (_, before), (_, after) = first.build({}, ()), trial.build(config, patches)
    values: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys((*old.buffers.values(), *new.buffers.values())):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            return None
        if a.shape == b.shape and torch.equal(a, b):
            continue
        path, _, leaf = name.rpartition(".")
        if a.shape == b.shape and a.dim() == 0 and a.is_floating_point():
            values.setdefault(path, {})[leaf] = [float(a)]
            continue
        if a.dim() != 1 or not a.is_floating_point() or lengths.get(len(a)) != len(b) or len(a) < 2:
            return None
        values.setdefault(path, {})[leaf] = _longer(a, len(b)).tolist()
        for other, held in before.items():  # copies that the module keeps beside it
            if other != name and other.rpartition(".")[0] == path and torch.equal(held, a):
                values[path][other.rpartition(".")[2]] = values[path][leaf]
    return tuple({"path": path, "module": "buffers", "values": held} for path, held in values.items())
