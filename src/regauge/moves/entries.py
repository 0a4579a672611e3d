"""Rescaling and reordering single entries: neurons, heads, channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from regauge.act import read_block
from regauge.atlas import Generator, Kind
from regauge.elements import Diagonal, Permutation, random_element
from regauge.errors import BadInput, Refused
from regauge.moves.base import Builder, Change, Move, Option, Preserves, Scene, refuse_kinds

PERMUTABLE = (Kind.PERMUTATION, Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR)


def _energy(scene: Scene, generator: Generator) -> dict[int, torch.Tensor]:
    """Sums of squares [K, n] of what scales up (+1) and down (−1) with the element."""
    copies = tuple(name for name, _ in generator.copies)
    zero = torch.zeros(generator.count, generator.size, dtype=torch.float64)
    out = {1: zero, -1: zero.clone()}
    for action in generator.actions:
        block = read_block(scene.read(action.parameter), action, copies)
        out[1 if action.exponent > 0 else -1] += block.square().sum(2)
    return out


def plan_rescale(scene: Scene, options: Mapping[str, Any]) -> Change:
    """writers W[c, …] ← s[c] W, readers W[…, c] ← W / s[c].  balance: s = (‖readers‖ / ‖writers‖)^½.

    Source: Nagel et al., data-free quantization (arXiv 1906.04721, section 4.1), with 2-norms.
    """
    builder = Builder(scene)
    kinds = (Kind.POSITIVE, Kind.SCALE, Kind.GENERAL_LINEAR)
    given = _given(options["vector"]) if options["vector"] else None
    for generator in scene.atlas.generators:
        if generator.kind not in kinds:
            continue
        if options["generator"] and generator.id != options["generator"]:
            continue
        if given is not None:
            vector = _fitting(given, generator)
        elif options["mode"] == "random":
            drawn = random_element(Kind.POSITIVE, generator.size, generator.count, scene.random)
            builder.apply(generator, drawn)
            continue
        else:
            energy = _energy(scene, generator)
            both = (energy[1] > 0) & (energy[-1] > 0)
            ratio = energy[-1] / energy[1].clamp_min(1e-300)
            vector = torch.where(both, ratio.clamp_min(1e-300) ** 0.25, torch.ones_like(ratio))
        builder.apply(generator, Diagonal(vector, Kind.POSITIVE if bool((vector > 0).all()) else Kind.SCALE))
    if not builder.used:
        raise refuse_kinds(scene, (Kind.POSITIVE,), "free scale")
    return builder.change()


def _given(path: str) -> torch.Tensor:
    import numpy as np

    try:
        array = np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            "the vector cannot be read", expected="a .npy file of numbers", found=str(error)
        ) from error
    return torch.from_numpy(array.astype("float64"))


def _fitting(vector: torch.Tensor, generator: Generator) -> torch.Tensor:
    if vector.numel() != generator.size * generator.count:
        raise BadInput(
            "the vector does not fit the generator",
            expected=f"{generator.count} × {generator.size} numbers for {generator.id}",
            found=str(tuple(vector.shape)),
            way_out="name the generator with generator=ID; regauge inspect --json lists them",
        )
    if not bool(torch.isfinite(vector).all()) or bool((vector == 0).any()):
        raise BadInput("a scale must be finite and not zero", found=f"{int((vector == 0).sum())} zeros")
    if generator.kind is Kind.POSITIVE and bool((vector < 0).any()):
        raise Refused("only positive scales pass here", found="negative entries in the vector")
    return vector.reshape(generator.count, generator.size)


def plan_permute(scene: Scene, options: Mapping[str, Any]) -> Change:
    """writers W[c, …] ← W[π(c), …], readers W[…, c] ← W[…, π(c)].  sorted: by falling 2-norm of the writers.

    Source: Git Re-Basin (arXiv 2209.04836, section 2): permutation symmetries of hidden units.
    """
    builder = Builder(scene)
    # Inner spaces first: their norms are read before an outer permutation moves them.
    for generator in sorted(scene.atlas.generators, key=lambda g: -len(g.copies)):
        if generator.kind not in PERMUTABLE:
            continue
        if options["space"] == "hidden" and _is_widest(scene, generator):
            continue
        if options["mode"] == "sorted":
            order = _energy(scene, generator)[1].argsort(dim=1, descending=True, stable=True)
            builder.apply(generator, Permutation(order))
        else:
            element = random_element(Kind.PERMUTATION, generator.size, generator.count, scene.random)
            builder.apply(generator, element)
    if options["signs"]:
        for generator in scene.atlas.of_kind(Kind.SIGN):
            builder.apply(generator, random_element(Kind.SIGN, generator.size, generator.count, scene.random))
    if not builder.used:
        raise refuse_kinds(scene, (Kind.PERMUTATION,), "permutation")
    return builder.change()


def _is_widest(scene: Scene, generator: Generator) -> bool:
    most = max(scene.atlas.generators, key=lambda g: (len(g.actions), g.size))
    return generator.space == most.space


RESCALE = Move(
    "rescale",
    "writers W[c,…] ← s[c] W, readers W[…,c] ← W / s[c]",
    "only homogeneous functions between writers and readers",
    Preserves.OUTPUT,
    plan_rescale,
    {
        "mode": Option(str, "balance", "balance both sides, or random scales", ("balance", "random")),
        "vector": Option(str, "", "a .npy file with the scales instead"),
        "generator": Option(str, "", "only this generator (id from inspect --json)"),
    },
)
PERMUTE = Move(
    "permute",
    "writers W[c,…] ← W[π(c),…], readers W[…,c] ← W[…,π(c)]",
    "the entries are treated alike",
    Preserves.OUTPUT,
    plan_permute,
    {
        "mode": Option(str, "random", "random, or sorted by falling norm (canonical)", ("random", "sorted")),
        "space": Option(str, "all", "all spaces, or hidden: all but the residual stream", ("all", "hidden")),
        "signs": Option(bool, False, "also flip random signs where they are free"),
    },
)
