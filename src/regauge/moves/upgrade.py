"""Norms become layers that compute the same and can learn more."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from regauge.errors import Refused
from regauge.interpret import interpret, op_name
from regauge.layers import find_stacks
from regauge.moves.base import Change, Move, Option, Preserves, Scene
from regauge.patches import Patch, Replaceable, replaceable
from regauge.plan import Made, Step
from regauge.primitive import CASTS
from regauge.steps import ScaleStep
from regauge.trace import module_path


@dataclass
class _Work:
    """What is collected for a change."""

    scene: Scene
    options: Mapping[str, Any]
    by_node: Mapping[str, Replaceable]
    steps: dict[str, list[Step]] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    drops: set[str] = field(default_factory=set)
    patches: list[Patch] = field(default_factory=list)

    @cached_property
    def stream(self) -> dict[str, int]:
        """Path of each module of a layer that reads the stream as it is -> number of the layer, from 1."""
        stacks, _ = find_stacks(interpret(self.scene.trace))
        found: dict[str, int] = {}
        for stack in stacks.values():
            for number, layer in enumerate(stack.layers, start=1):
                held = {layer.entering}
                for node in layer.nodes:
                    reads = any(arg in held for arg in node.all_input_nodes)
                    if reads and (op_name(node) == "aten.add" or op_name(node) in CASTS):
                        held.add(node)
                    if reads and module_path(node).startswith(f"{layer.path}."):
                        found[module_path(node)] = number
        return found

    def make(self, name: str, value: torch.Tensor, like: str) -> None:
        self.made[name] = Made(tuple(value.shape), like, lambda _: value)

    def scale(self, name: str | None, factor: float) -> None:
        if name is not None and factor != 1:
            self.steps.setdefault(name, []).append(ScaleStep(torch.full((1,), factor, dtype=torch.float64)))

    def norm(self, module: Replaceable, kind: str, factor: float = 1.0, **more: Any) -> None:
        """A patch that keeps gain and shift, both times ``factor``; a norm without a gain gets one for it."""
        self.scale(module.weight, factor)
        self.scale(module.bias, factor)
        plain = {key: module.patch[key] for key in ("form", "size", "eps", "weight", "bias")}
        if module.weight is None and factor != 1:
            plain["weight"] = True
            size = module.patch["size"]
            ones = torch.ones(size, dtype=torch.float64)
            self.make(f"{module.path}.weight", ones * factor, self.like(module))
        offset = module.chart * factor
        self.patches.append({"path": module.path, "module": kind, **plain, "offset": offset, **more})

    def like(self, module: Replaceable) -> str:
        """A parameter whose dtype what is made takes, and beside which it is stored."""
        trace = self.scene.trace
        return module.weight or module.bias or next(n for n in trace.parameters.values() if n in trace.shapes)

    def gain(self, module: Replaceable) -> torch.Tensor:
        """The gain as it acts, [size], float64; it is no longer stored."""
        if module.weight is None:
            return torch.ones(module.patch["size"], dtype=torch.float64)
        self.drops.add(module.weight)
        return self.scene.read(module.weight).to(torch.float64) + module.chart

    def ones(self, module: Replaceable, leaf: str, value: float) -> None:
        size = module.patch["size"]
        self.make(f"{module.path}.{leaf}", torch.full((size,), value, dtype=torch.float64), self.like(module))


def _seed(work: _Work, module: Replaceable) -> None:
    """(g + α tanh(Σ x β)) ⊙ x̂ with β = 0, α = 1."""
    work.norm(module, "seed-norm", heads=1, scale=1.0, dropout=0.0)
    work.ones(module, "rescale", 1.0)
    work.ones(module, "probe", 0.0)


def _gated(work: _Work, module: Replaceable) -> None:
    """sigmoid(U silu(D z)) ⊙ z with U = 0: the gate is 1/2, and z = 2 (g ⊙ x̂ + b)."""
    rank, size = work.options["rank"], module.patch["size"]
    if rank < 1:
        raise Refused("a gate needs a rank", expected="1 or more", found=str(rank))
    work.norm(module, "gated-norm", 2.0, rank=rank)
    down = torch.randn((rank, size), generator=work.scene.random, dtype=torch.float64) / size**0.5
    work.make(f"{module.path}.down", down, work.like(module))
    work.make(f"{module.path}.up", torch.zeros((size, rank), dtype=torch.float64), work.like(module))


def _pre_affine(work: _Work, module: Replaceable) -> None:
    """g ⊙ norm(λ ⊙ x) with λ = 1."""
    work.norm(module, "pre-affine-norm")
    work.ones(module, "scale", 1.0)


def _magnitude(work: _Work, module: Replaceable) -> None:
    """m v / ‖v‖ ⊙ x̂ with v = g, m = ‖g‖."""
    gain = work.gain(module)
    if not bool(gain.any()):
        raise Refused(
            "a gain of zeros has no direction",
            parameter=module.weight,
            found="zeros",
            way_out="where=... leaves it out",
        )
    work.make(f"{module.path}.direction", gain, work.like(module))
    work.make(f"{module.path}.magnitude", gain.norm()[None], work.like(module))
    plain = {key: module.patch[key] for key in ("form", "size", "eps", "bias")}
    work.patches.append({"path": module.path, "module": "magnitude-norm", **plain})


def _scaled(work: _Work, module: Replaceable) -> None:
    """(√ℓ g ⊙ x̂ + √ℓ b) / √ℓ in layer ℓ = 1, 2, … for norms of the stream; others stay."""
    number = work.stream.get(module.path)
    if number is not None:
        work.norm(module, "scaled-norm", number**0.5, scale=number**-0.5)


def _branched(work: _Work, module: Replaceable) -> None:
    """W_k (g ⊙ x̂) = η ⊙ (W_k (γ_k ⊙ x̂)) with γ_k = g for each map k that reads the norm, and η = 1."""
    if module.bias is not None:
        raise Refused(
            "a norm with a shift cannot give its gain to its readers",
            parameter=module.bias,
            expected="a norm without a shift",
            found=f"a shift of {module.patch['size']} entries",
            way_out="put fold-shifts and strip before it",
        )
    gain = work.gain(module)
    work.patches.append({**module.patch, "weight": False})
    for node in module.nodes:
        for reader in _readers(work, node):
            assert reader.weight is not None
            work.patches.append({**reader.patch, "module": "scaled-linear"})
            ones = torch.ones(reader.patch["outputs"], dtype=torch.float64)
            work.make(f"{reader.path}.inside", gain, reader.weight)
            work.make(f"{reader.path}.outside", ones, reader.weight)


def _readers(work: _Work, name: str) -> list[Replaceable]:
    """The linear maps that alone read a value."""
    pending = [node for node in work.scene.trace.graph.nodes if node.name == name]
    found: list[Replaceable] = []
    while pending:
        node = pending.pop()
        for user in node.users:
            same = op_name(user) == "aten.view" and user.meta["val"].shape[-1] == node.meta["val"].shape[-1]
            if same or op_name(user) in CASTS:
                pending.append(user)
                continue
            reader = work.by_node.get(user.name)
            if reader is None or reader.patch["module"] != "linear" or len(reader.nodes) != 1:
                raise _elsewhere(node, user)
            found.append(reader)
    return found


def _elsewhere(node: fx.Node, user: fx.Node) -> Refused:
    return Refused(
        "a norm cannot give its gain to its readers: one of them is no linear map of its own",
        node=f"{user.name} in {module_path(user) or 'the model'}",
        expected="modules that are one linear map each, whose parameters are their own",
        found=op_name(user),
        way_out="where=... leaves this norm out, untie a tied head",
    )


KINDS: Mapping[str, Callable[[_Work, Replaceable], None]] = {
    "seednorm": _seed,
    "gatednorm": _gated,
    "preaffine": _pre_affine,
    "magnitude": _magnitude,
    "branched": _branched,
    "lns": _scaled,
}


def plan_upgrade(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y = g ⊙ x̂ + b stays what it is, written as a layer with more parameters:

    - ``seednorm``: (g + α tanh(Σ_c x β)) ⊙ x̂ + b, β[c] = 0, α[c] = 1 (arXiv 2510.22777);
    - ``gatednorm``: sigmoid(U silu(D z)) ⊙ z, z = 2 g ⊙ x̂ + 2 b, U[c, r] = 0 (arXiv 2601.22966);
    - ``preaffine``: g ⊙ norm(λ ⊙ x) + b, λ[c] = 1 (arXiv 2601.22966);
    - ``magnitude``: m v / ‖v‖ ⊙ x̂ + b, v = g, m = ‖g‖ (arXiv 2605.26895);
    - ``branched``: x̂, and η ⊙ W (γ ⊙ ·) for each map W that reads it, γ = g, η = 1 (arXiv 2605.26895);
    - ``lns``: (√ℓ g ⊙ x̂ + √ℓ b) / √ℓ in layer ℓ (LayerNorm Scaling, arXiv 2502.05795).
    """
    modules = replaceable(scene.trace)
    norms = {path: module for path, module in modules.items() if module.patch["module"] == "norm"}
    norms = {path: module for path, module in norms.items() if module.patch["form"] in ("rms", "layer")}
    pattern = str(options["where"])
    chosen = {path: norms[path] for path in norms if not pattern or fnmatch.fnmatchcase(path, pattern)}
    if not pattern:
        _check_all(scene, norms)
    work = _Work(scene, options, {node: m for m in modules.values() for node in m.nodes})
    for module in chosen.values():
        if module.weight not in (None, f"{module.path}.weight"):
            raise Refused(
                "the gain of a norm has a name that its replacement does not give it",
                parameter=module.weight,
                expected=f"{module.path}.weight",
            )
        KINDS[options["norm"]](work, module)
    if not work.patches:
        place = "in a layer of a stack" if options["norm"] == "lns" else "in a module of its own"
        raise Refused(
            "there is no norm to upgrade here",
            expected=f"a LayerNorm or RMSNorm {place}{pattern and f' like {pattern}'}",
            found=", ".join(norms) or "none",
        )
    return Change(
        {name: tuple(steps) for name, steps in work.steps.items()},
        made=work.made,
        drops=frozenset(work.drops),
        patches=tuple(work.patches),
    )


def _check_all(scene: Scene, norms: Mapping[str, Replaceable]) -> None:
    """Refuse if an operation that is a norm is in none of the modules."""
    inside = {node for module in norms.values() for node in module.nodes}
    for node in scene.trace.graph.nodes:
        if op_name(node) in ("aten.layer_norm", "aten.rms_norm") and node.name not in inside:
            raise Refused(
                "a norm here is not a module of its own, and would stay what it is",
                node=f"{node.name} in {module_path(node) or 'the model'}",
                way_out="where=... names the norms that are to change",
            )


UPGRADE = Move(
    "upgrade",
    "g ⊙ x̂ + b, as a layer with more parameters that starts as the same function",
    "LayerNorms and RMSNorms that are modules of their own; changes the structure",
    Preserves.OUTPUT,
    plan_upgrade,
    {
        "norm": Option(str, "seednorm", "what every norm becomes", tuple(KINDS)),
        "where": Option(str, "", "only the modules whose path matches, as *.layers.3.*"),
        "rank": Option(int, 16, "gatednorm: rows of the map to the gate"),
    },
)
