"""All layers in one table: what they do not see, what they fold to, what becomes them. Nothing is looked up:
every cell is found by trying, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from regauge.errors import Refused
from regauge.nn import (
    adab2n,
    evonorm,
    gated,
    plain,
    powernorm,
    region,
    repbn,
    seednorm,
    style,
    tanh,
    unified,
    vectors,
)
from regauge.nn.affine import Affine
from regauge.nn.base import Normalisation
from regauge.nn.entry import Entry
from regauge.nn.symmetry import Effect, distance, effects, inward, law_error, output, probe

ENTRIES: tuple[Entry, ...] = tuple(
    entry
    for module in (
        *(plain, seednorm, gated, tanh, vectors, powernorm, unified, repbn, adab2n, evonorm, region, style),
    )
    for entry in module.ENTRIES
)
"""Every layer, in the order of the table."""

EXACT = 1e-12
"""Relative error up to which a fold or an upgrade is exact in float64."""


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        entry: the layer.
        evaluation, training: symmetry -> effect, in each mode.
        gauges: text of each further law that holds.
        fold: what is left at inference; None if it does not collapse.
        upgrades: ``layer``, ``rms``, ``batch`` -> ``exact``, ``training`` or ``evaluation`` where it is exact
            in one mode only, or an empty string.
    """

    entry: Entry
    evaluation: Mapping[str, Effect]
    training: Mapping[str, Effect]
    gauges: tuple[str, ...]
    fold: str | None
    upgrades: Mapping[str, str]


def rows(entries: Sequence[Entry]) -> Iterator[Row]:
    """The rows, computed."""
    for entry in entries:
        yield row(entry)


def row(entry: Entry) -> Row:
    """One row, computed."""
    return Row(
        entry,
        effects(entry),
        effects(entry, training=True),
        tuple(law.text for law in entry.laws if law_error(entry, law) < 1e-10),
        fold_of(entry),
        {form: upgrade_of(entry, form) for form in SOURCES},
    )


def fold_of(entry: Entry, seed: int = 0) -> str | None:
    """What a generic instance folds to, if that computes the same; None if it refuses.

    Raises:
        AssertionError: it folds to another function.
    """
    random = torch.Generator().manual_seed(seed)
    layer = entry.make(12, random)
    assert isinstance(layer, Normalisation)
    try:
        folded = layer.fold()
    except Refused:
        return None
    x = inward(entry, probe(entry, random))
    error = distance(output(folded, x), output(layer, x))
    if error > EXACT:
        raise AssertionError(f"{entry.title} folds to another function: {error:.1e} apart")
    return describe(folded)


def describe(folded: nn.Module) -> str:
    """The parts of what is left, in words."""
    if isinstance(folded, nn.Sequential):
        return " + ".join(describe(part) for part in folded)
    if isinstance(folded, Affine):
        return "affine"
    return type(folded).__name__


def _layer(size: int) -> nn.Module:
    return nn.LayerNorm(size)


def _rms(size: int) -> nn.Module:
    return nn.RMSNorm(size, eps=1e-6)


def _batch(size: int) -> nn.Module:
    return nn.BatchNorm2d(size)


SOURCES: Mapping[str, Callable[[int], nn.Module]] = {"layer": _layer, "rms": _rms, "batch": _batch}
"""Existing norms, with generic parameters, that are tried as sources."""


def upgrade_of(entry: Entry, form: str, seed: int = 0) -> str:
    """Whether, and in which mode, this layer takes over the function of an existing norm exactly."""
    random = torch.Generator().manual_seed(seed)
    norm = SOURCES[form](12).to(torch.float64)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        for buffer in norm.buffers():
            if buffer.is_floating_point():
                buffer += 0.3 * torch.rand(buffer.shape, generator=random, dtype=torch.float64)
    kind = type(entry.make(12, random))
    assert issubclass(kind, Normalisation)
    x = inward(entry, probe(entry, random))
    good: list[str] = []
    for mode in ("evaluation", "training"):
        norm.train(mode == "training")
        try:
            layer = kind.upgrade_from(norm)
        except Refused:
            continue
        if layer.training != norm.training:
            continue
        if distance(output(layer, x), output(norm, x)) < EXACT:
            good.append(mode)
    return "exact" if len(good) == 2 else "".join(good)
