"""A stream of mean zero stored with one coordinate less: CRMSNorm, and its orthonormal chart."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch

from regauge.errors import Refused
from regauge.modeling_regauge import chart
from regauge.moves.base import Builder, Change, Scene
from regauge.patches import Patch, Replaceable, replaceable
from regauge.plan import Refit
from regauge.solve.narrow import Stream
from regauge.trace import module_path

FORMS = ("crms", "chart")


def plan_narrow(scene: Scene, builder: Builder, centred: Set[tuple[str, int]], form: str) -> Change:
    """x[…, d] = −Σ_{j<d} x[…, j] need not be stored: writers and readers of x along the axis of size d,

    - crms: writers W[j, …] ← W[j, …], readers W[…, j] ← W[…, j] − W[…, d], for j < d;
    - chart: writers W ← (Qᵀ W)[:d−1], readers W ← (W Q)[…, :d−1], Q orthogonal, its last column 1/√d;

    and each LayerNorm, without gain and shift, becomes the norm of this form, whose divisor stays d. Source:
    Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers (arXiv 2305.14858, section 3); the chart is the
    rotation of SliceGPT (arXiv 2401.15024, section 3.2) whose last direction is the ones vector.

    Args:
        builder: holds the centring of every writer.
        centred: (parameter, axis) that it centres as a whole.
    """
    modules = replaceable(scene.trace)
    norms = {
        node: path
        for path, module in modules.items()
        if module.patch["module"] == "norm" and module.patch["form"] == "layer"
        for node in module.nodes
    }
    streams, entered = scene.gauge.streams(norms, centred, untied=scene.state.untied)
    tied = {name for names in scene.trace.aliases.values() if len(names) > 1 for name in names}
    chosen = [s for s in streams if s.limit is None and not tied & {n for n, _ in (*s.writers, *s.readers)}]
    if not chosen:
        raise _none(scene, streams, tied)
    patches: list[Patch] = [
        {"path": entered[value], "module": f"{form}-input"} for stream in chosen for value in stream.entrances
    ]
    sides: dict[str, dict[int, bool]] = {}
    for stream in chosen:
        for number, held in enumerate((stream.writers, stream.readers)):
            for name, axis in held:
                sides.setdefault(name, {})[axis] = number == 1
    refits = {name: _refit(scene.shape(name), axes, form) for name, axes in sides.items()}
    patches += _resized(modules, refits)
    drops: set[str] = set()
    for path in dict.fromkeys(norms[node] for stream in chosen for node in stream.norms):
        patches.append(_norm(scene, modules[path], form))
        drops |= {name for name in (modules[path].weight, modules[path].bias) if name is not None}
    return builder.change(refits=refits, drops=frozenset(drops), patches=tuple(patches))


def _refit(shape: tuple[int, ...], axes: Mapping[int, bool], form: str) -> Refit:
    """One entry less along each of the axes; True: a reader."""

    def build(value: torch.Tensor) -> torch.Tensor:
        for axis, reads in axes.items():
            value = narrowed(value, axis, form, reads)
        return value

    return Refit(tuple(n - (i in axes) for i, n in enumerate(shape)), build)


def narrowed(value: torch.Tensor, axis: int, form: str, reads: bool) -> torch.Tensor:
    """A writer or reader of a stream of mean zero, in d − 1 coordinates along ``axis``.

    Q is symmetric here (see :func:`regauge.modeling_regauge.chart`), so the chart turns both alike.
    """
    last = value.movedim(axis, -1)
    if form == "chart":
        last = chart(last)
    else:
        last = last[..., :-1] - last[..., -1:] if reads else last[..., :-1]
    return last.movedim(-1, axis).contiguous()


def _resized(modules: Mapping[str, Replaceable], refits: Mapping[str, Refit]) -> list[Patch]:
    """What holds the parameters of other shapes: modules of ours, or the modules as they are."""
    owner = {m.weight: m for m in modules.values() if m.patch["module"] != "norm" and m.weight is not None}
    biases = {module.bias for module in owner.values()}
    patches: list[Patch] = []
    for name, refit in refits.items():
        module = owner.get(name)
        if module is None:
            if name not in biases:
                patches.append({"path": name, "module": "parameter", "shape": list(refit.shape)})
            continue
        patch, (first, second) = dict(module.patch), refit.shape[:2]
        if patch["module"] == "linear":
            patch["outputs"], patch["inputs"] = (second, first) if patch["transposed"] else (first, second)
        elif patch["module"] == "convolution":
            patch["outputs"], patch["inputs"] = first, second * patch["groups"]
        else:
            patch["rows"], patch["size"] = first, second
        patches.append(patch)
    return patches


def _norm(scene: Scene, module: Replaceable, form: str) -> Patch:
    for name, plain in ((module.weight, 1.0), (module.bias, 0.0)):
        if name is not None and not bool((scene.read(name) == plain).all()):
            late = scene.gauge.tied and not scene.state.untied
            raise Refused(
                f"a norm has a {'gain' if plain else 'shift'}: what it returns does not have mean zero",
                parameter=name,
                expected="gains of one and shifts of zero in every norm that reads the stream",
                found="other values",
                way_out="put fold-shifts and fold-scales before it (add-bias before fold-shifts, where a"
                " reader has no bias)" + (", and untie first" if late else ""),
            )
    return {
        **module.patch,
        "form": form,
        "size": module.patch["size"] - 1,
        "weight": False,
        "bias": False,
    }


def _none(scene: Scene, streams: tuple[Stream, ...], tied: Set[str]) -> Refused:
    """Why no stream can be narrowed: the limit of the one that most parameters share."""
    if not streams:
        return Refused(
            "no stream can be stored with one coordinate less",
            expected="a LayerNorm in a module of its own, whose input has mean zero",
            found="none",
        )
    stream = max(streams, key=lambda s: len(s.writers) + len(s.readers))
    shared = next((name for name, _ in (*stream.writers, *stream.readers) if name in tied), None)
    node, reason = stream.limit or ("", f"{shared} has two names")
    return Refused(
        f"no stream can be stored with one coordinate less: this one has {stream.size}",
        node=f"{node} in {_module(scene, node) or 'the model'}" if node else None,
        parameter=shared,
        expected="linear maps alone that write and read it, behind LayerNorms in modules of their own",
        found=f"something that {reason}" if node else reason,
        way_out="put untie before it" if shared is not None else None,
    )


def _module(scene: Scene, name: str) -> str:
    return next((module_path(node) for node in scene.trace.graph.nodes if node.name == name), "")
