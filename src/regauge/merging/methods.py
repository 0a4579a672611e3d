"""The arithmetic of every way to merge, one tensor at a time, in float64, in blocks of its rows.

A method is called once for each tensor. It may look at the blocks beforehand, as often as it needs to, and
gives back what turns one block of every model into the block of the result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from regauge.errors import BadInput

PARALLEL = 1e-9
"""Sine of an angle below which two tensors count as parallel, and the line stands for the arc."""

_BITS = 16
_LOW = (1 << _BITS) - 1


@dataclass(frozen=True)
class Block:
    """The same rows of one tensor in every model, float64.

    Attributes:
        base: of the base model; None where there is none.
        models: of the models to merge.
    """

    base: torch.Tensor | None
    models: tuple[torch.Tensor, ...]

    @property
    def tasks(self) -> tuple[torch.Tensor, ...]:
        """Task vectors: model − base."""
        assert self.base is not None
        return tuple(model - self.base for model in self.models)


Blocks = Callable[[], Iterator[Block]]
Combine = Callable[[Block], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What a merge is asked to do.

    Attributes:
        method: a name of :data:`METHODS`.
        weights: one for each model.
        scale: λ, that multiplies what is added to the base.
        density: share of the entries of a task vector that are kept.
        seed: of what is drawn.
    """

    method: str
    weights: tuple[float, ...]
    scale: float = 1.0
    density: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """One way to merge.

    Attributes:
        identity: what is computed, in one line.
        source: where it is from.
        start: (settings, name of the tensor, blocks) -> what combines one block.
        based: whether it starts from a base model.
        density: default share of entries kept, for methods that drop some.
        models: number of models it takes; None: any.
    """

    identity: str
    source: str
    start: Callable[[Settings, str, Blocks], Combine]
    based: bool = False
    density: float | None = None
    models: int | None = None


def settings_of(
    method: str,
    count: int,
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    density: float | None = None,
    based: bool = False,
    seed: int = 0,
) -> Settings:
    """Checked settings with the defaults filled in.

    Args:
        method: a name of :data:`METHODS`.
        count: number of models.
        weights: one for each model; default 1.
        scale: λ; default 1.
        density: in (0, 1]; default that of the method.
        based: whether a base model is given.
        seed: of what is drawn.

    Raises:
        BadInput: anything that the method cannot do, or an option it does not have.
    """
    if method not in METHODS:
        raise BadInput("no such method", expected=", ".join(METHODS), found=method)
    known = METHODS[method]
    if known.based is not based:
        raise BadInput(
            f"{method} {'needs a base model' if known.based else 'has no base model'}",
            expected="--base" if known.based else "no --base",
            found="none" if known.based else "one",
            way_out="give what the models were fine-tuned from"
            if known.based
            else f"--method {' or '.join(name for name, m in METHODS.items() if m.based)}",
        )
    least = 1 if based else 2
    if count < least or (known.models is not None and count != known.models):
        wanted = str(known.models) if known.models is not None else f"at least {least}"
        raise BadInput(f"{method} merges {wanted} models", expected=wanted, found=str(count))
    for option, value, has in (
        ("--scale", scale, known.based),
        ("--density", density, known.density is not None),
    ):
        if value is not None and not has:
            raise BadInput(f"{option} says nothing to {method}", expected="none", found=f"{value:g}")
    found = tuple(map(float, weights)) if weights is not None else (1.0,) * count
    if len(found) != count or not all(map(math.isfinite, found)):
        raise BadInput("there must be one weight for each model", expected=str(count), found=str(found))
    if not known.based and abs(sum(found)) < 1e-12:
        raise BadInput("the weights add up to zero", expected="another sum", found=str(found))
    if method == "slerp" and min(found) < 0:
        raise BadInput("slerp stays on the arc", expected="weights of 0 and more", found=str(found))
    if scale is not None and not math.isfinite(scale):
        raise BadInput("the scale is not finite", found=str(scale))
    if density is not None and not 0 < density <= 1:
        raise BadInput("density is a share", expected="above 0, at most 1", found=f"{density:g}")
    return Settings(
        method,
        found,
        1.0 if scale is None else scale,
        density if density is not None else known.density if known.density is not None else 1.0,
        seed,
    )


def _linear(settings: Settings, name: str, blocks: Blocks) -> Combine:
    return lambda block: _weighted(block.models, settings.weights) / sum(settings.weights)


def _slerp(settings: Settings, name: str, blocks: Blocks) -> Combine:
    aa = bb = ab = 0.0
    for block in blocks():
        a, b = (model.reshape(-1) for model in block.models)
        aa, bb, ab = aa + float(a @ a), bb + float(b @ b), ab + float(a @ b)
    t = settings.weights[1] / sum(settings.weights)
    first, second = 1 - t, t
    if aa > 0 and bb > 0:
        angle = math.acos(max(-1.0, min(1.0, ab / math.sqrt(aa * bb))))
        if math.sin(angle) > PARALLEL:
            first, second = (math.sin(part * angle) / math.sin(angle) for part in (1 - t, t))
    return lambda block: _weighted(block.models, (first, second))


def _task(settings: Settings, name: str, blocks: Blocks) -> Combine:
    return lambda block: _on_base(block, _weighted(block.tasks, settings.weights), settings)


def _ties(settings: Settings, name: str, blocks: Blocks) -> Combine:
    least = [_threshold(blocks, i, settings.density) for i in range(len(settings.weights))]

    def combine(block: Block) -> torch.Tensor:
        kept = [
            torch.where(task.abs() >= low, task, 0.0) for task, low in zip(block.tasks, least, strict=True)
        ]
        elected = _weighted(kept, settings.weights).sign()
        total, count = torch.zeros_like(elected), torch.zeros_like(elected)
        for task, weight in zip(kept, settings.weights, strict=True):
            agrees = (task.sign() == elected) & (task != 0)
            total += torch.where(agrees, weight * task, 0.0)
            count += torch.where(agrees, weight, 0.0)
        return _on_base(block, torch.where(count != 0, total / count, 0.0), settings)

    return combine


def _dare(settings: Settings, name: str, blocks: Blocks) -> Combine:
    draws = [_generator(settings.seed, name, i) for i in range(len(settings.weights))]

    def combine(block: Block) -> torch.Tensor:
        kept = []
        for task, draw in zip(block.tasks, draws, strict=True):
            chosen = torch.from_numpy(draw.random(task.numel())).reshape(task.shape) < settings.density
            kept.append(torch.where(chosen, task / settings.density, 0.0))
        return _on_base(block, _weighted(kept, settings.weights), settings)

    return combine


def _weighted(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += value * weight
    return total


def _on_base(block: Block, task: torch.Tensor, settings: Settings) -> torch.Tensor:
    assert block.base is not None
    return block.base + settings.scale * task


def _threshold(blocks: Blocks, index: int, density: float) -> float:
    """The least magnitude among the largest ⌈density · n⌉ entries of a task vector.

    By radix: magnitudes of 64 bits are ordered as the integers of the same bits, and each pass over the
    blocks fixes 16 of these.
    """
    prefix, wanted = 0, 0
    for step in range(64 // _BITS):
        shift = 64 - _BITS * (step + 1)
        counts = torch.zeros(_LOW + 1, dtype=torch.int64)
        size = 0
        for block in blocks():
            bits = block.tasks[index].abs().reshape(-1).view(torch.int64)
            size += len(bits)
            inside = bits[(bits >> (shift + _BITS)) == prefix] if step else bits
            counts += torch.bincount((inside >> shift) & _LOW, minlength=_LOW + 1)
        wanted = wanted if step else math.ceil(density * size - 1e-9)
        above = counts.flip(0).cumsum(0).flip(0)  # entries in this bucket and higher ones
        bucket = int((above >= wanted).nonzero()[-1]) if size else 0
        wanted -= int(above[bucket] - counts[bucket])
        prefix = (prefix << _BITS) | bucket
    return float(torch.tensor(prefix, dtype=torch.int64).view(torch.float64))


def _generator(seed: int, name: str, index: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\0{index}\0{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


METHODS: Mapping[str, Method] = {
    "linear": Method("Σ w x / Σ w", "model soups, arXiv 2203.05482", _linear),
    "slerp": Method("the point of the arc from A to B, tensor by tensor", "Shoemake 1985", _slerp, models=2),
    "task": Method("base + λ Σ w (x − base)", "task arithmetic, arXiv 2212.04089", _task, based=True),
    "ties": Method(
        "base + λ · mean of those (x − base), trimmed, that have the elected sign",
        "arXiv 2306.01708",
        _ties,
        based=True,
        density=0.2,
    ),
    "dare": Method(
        "base + λ Σ w · drop(x − base) / density", "arXiv 2311.03099", _dare, based=True, density=0.1
    ),
}
"""Name -> method, by the names of the field."""
