"""What was done to a model that is derived from another: read off what alignment leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from regauge.checkpoint import Checkpoint
from regauge.comparing.comparison import Change
from regauge.comparing.features import pair_features
from regauge.matching import Alignment
from regauge.matching.moved import Pair

LOOKED_AT = 24
"""Matrices that are looked at, evenly over the model."""

LARGEST = 1 << 23
"""Entries of a matrix that is looked at."""


def changes_of(alignment: Alignment, pair: Pair, path_b: Path) -> tuple[Change, ...]:
    """Kinds of change that the leftover shows.

    Args:
        alignment: of the pair.
        pair: both models, b moved.
        path_b: directory of b, to see how its values are stored.
    """
    names = [t.parameter for t in alignment.tensors if len(t.shape) > 1 and t.norm > 0]
    names = _spread([name for name in names if _entries(pair.a.shapes[name]) <= LARGEST])

    def both() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name in names:
            chunks = list(pair.chunks(name))
            yield torch.cat([x for x, _ in chunks]), torch.cat([y for _, y in chunks])

    if not names:
        return ()
    found = pair_features(both(), _stored(path_b))
    return tuple(_named(found, pair))


def _named(found: Mapping[str, float], pair: Pair) -> Iterator[Change]:
    """Rules in order of how sure they are; several may hold."""
    resized = [
        f"{pair.names[n]}: {tuple(pair.b.trace.shapes[pair.names[n]])} for {tuple(pair.a.trace.shapes[n])}"
        for n in pair.names
        if tuple(pair.b.trace.shapes[pair.names[n]]) != tuple(pair.a.trace.shapes[n])
    ]
    residual = f"‖a − b‖ = {found['residual']:.3g} ‖a‖"
    if resized:
        yield Change(
            "units removed or added", f"{len(resized)} parameters have other sizes, such as {resized[0]}"
        )
    elif found["largest zero rows"] >= 0.05:
        yield Change(
            "units set to zero", f"{100 * found['largest zero rows']:.0f} % of the units of a layer are zero"
        )
    if found["levels"] <= 0.5:
        yield Change("quantised", f"{64 * found['levels']:.0f} distinct values in 64 stored ones; {residual}")
    elif found["bfloat16"] >= 0.99 and found["residual"] <= 0.01:
        yield Change("rounded to bfloat16", f"every stored value is one; {residual}")
    elif not resized and found["kurtosis"] <= 2.7 and found["noise"] <= 0.1 and found["flatness"] >= 0.75:
        yield Change(
            "quantised",
            f"what is left is as even as rounding errors (kurtosis {found['kurtosis']:.2f}), of full rank,"
            f" and knows nothing of a; {residual}",
        )
    elif found["slope"] <= 0.75 and found["residual"] >= 0.4:
        yield Change("averaged with another model", f"⟨a, b⟩ = {found['slope']:.2f} ⟨a, a⟩; {residual}")
    elif found["flatness"] <= 0.4 and found["rank"] <= 0.45:
        yield Change(
            "low-rank update", f"{100 * found['rank']:.0f} % of the singular values hold it; {residual}"
        )
    elif found["residual"] > 1e-5 and not resized and found["largest zero rows"] < 0.05:
        yield Change("trained further", f"a dense change that is no rounding; {residual}")


def _stored(path: Path) -> list[torch.Tensor]:
    with Checkpoint.open(path) as files:
        names = [
            n for n in files.names if len(files.shape(n)) > 1 and _entries(tuple(files.shape(n))) <= LARGEST
        ]
        held = [files.read(name) for name in _spread(names)]
    return [tensor.to(torch.float32) for tensor in held if tensor.is_floating_point()]


def _spread(names: list[str]) -> list[str]:
    """At most ``LOOKED_AT`` of the names, evenly."""
    step = max(1, -(-len(names) // LOOKED_AT))
    return names[::step]


def _entries(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
