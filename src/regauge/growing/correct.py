"""What else must change so that a larger model computes the same: factors on parameters, and eps.

A zero-padded activation of n′ entries has a mean square smaller by n / n′. So y = x / sqrt(mean x² + eps)
comes out larger by sqrt(n′ / n) if eps shrinks by n / n′ too, and its gain takes that back. A product of
queries and keys may be scaled by their size; the keys take that back.
Source: Gesmundo and Maile (arXiv 2308.06103, sections 3.4 and 3.5); they leave eps out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from regauge.errors import Refused, TraceError
from regauge.facts import Law, Pointwise, Remap
from regauge.growing.fit import Fit, replaced
from regauge.growing.reach import Follower, Reach, Side
from regauge.growing.roles import Role, key_product, key_sides, norms
from regauge.growing.same import changed_constants
from regauge.growing.scales import check_scales, factor_of_mean
from regauge.growing.trial import Trial
from regauge.interpret import op_name
from regauge.patches import Patch
from regauge.solve.layout import Layout
from regauge.trace import Trace, module_path

_CLOSE = 1e-12


@dataclass(frozen=True)
class Growing:
    """An index set that grows.

    Attributes:
        reach: where it goes.
        role: what it is for.
        size: its new size.
        silent: parameters that nobody sees on the new indices.
    """

    reach: Reach
    role: Role
    size: int
    silent: tuple[Side, ...]


def corrected(
    trial: Trial, fit: Fit, trace: Trace, layout: Layout, chosen: Sequence[Growing]
) -> tuple[Fit, dict[Side, float]]:
    """The fit with every eps as it must be, and the factors on parts of parameters.

    Raises:
        Refused: a constant changes that nothing takes back, or an eps cannot be set.
    """
    gains: dict[Side, float] = {}
    means: dict[int, float] = {}
    eps: dict[str, float] = {}
    for item in chosen:
        for s in item.reach.sums:
            if factor := factor_of_mean(s, item.reach.size, item.size):
                means[id(s.fact)] = factor
        if item.role is not Role.RESIDUAL:
            continue
        meant = [s.fact for s in norms(item.reach) if id(s.fact) in means]
        for fact in meant:
            eps |= dict.fromkeys(_added(layout, fact), item.reach.size / item.size)
        if meant:
            gains |= dict.fromkeys(item.reach.gains, math.sqrt(item.reach.size / item.size))
    if eps:
        fit = _with_eps(trial, fit, trace, eps)
    constants = {node: ratio for node, ratio in eps.items() if _path(trace, node) in replaced(fit.patches)}
    keys = [item for item in chosen if item.role is Role.KEYS]
    follower = Follower(layout)
    taken_back: dict[Side, float] = {}
    for node, numbers in changed_constants(trace, fit.gauge.trace, replaced(fit.patches)).items():
        if len(numbers) != 1 or not all(numbers[0]):
            raise _changes(node, numbers)
        old, new = (float(number) for number in numbers[0])
        if node in eps:
            constants[node] = new / old
            continue
        effect = _effect(trace, node, old, new)
        mine = [item for item in keys if _scales(trace, node, key_product(item.reach).fact.node)]
        if mine:
            taken_back |= dict.fromkeys(key_sides(follower, mine[0].reach), 1 / effect)
        else:
            constants[node] = effect
    if means or constants:
        parameters = {name: factor for (name, _, _), factor in gains.items()}
        check_scales(layout.facts, parameters, means, constants)
    return fit, {**gains, **taken_back}


def _added(layout: Layout, fact: Any) -> list[str]:
    """Operations that add a constant to what a fact gives, rearranged or not."""
    held: set[int] = {fact.out.id}
    found: list[str] = []
    for later in layout.facts.facts:
        if isinstance(later, Remap) and later.inp.id in held:
            held.add(later.out.id)
        elif isinstance(later, Pointwise) and later.law is Law.SHIFT and later.ins[0].id in held:
            found.append(later.node)
    return found


def _with_eps(trial: Trial, fit: Fit, trace: Trace, eps: Mapping[str, float]) -> Fit:
    """eps ← eps · ratio at these operations and nowhere else: by the configuration, or module by module."""
    inside = replaced(fit.patches)
    ratios = {node: ratio for node, ratio in eps.items() if _path(trace, node) not in inside}
    if not ratios:
        return fit
    nodes = {node.name: node for node in trace.graph.nodes}
    numbers = {name: _number(nodes[name]) for name in ratios}
    before = changed_constants(trace, fit.gauge.trace, inside)
    for config, patches in (
        *_eps_in_config(trial, numbers, ratios),
        *_eps_in_modules(trial, trace, numbers, ratios),
    ):
        changes = {**fit.config, **config}
        try:
            gauge = trial.gauge(changes, (*fit.patches, *patches))
        except (TraceError, Refused):
            continue
        found = changed_constants(trace, gauge.trace, inside)
        right = all(
            len(found.get(name, ())) == 1
            and abs(found[name][0][1] - numbers[name] * ratio) <= _CLOSE * numbers[name]
            for name, ratio in ratios.items()
        )
        if right and found.keys() - ratios.keys() == before.keys() - ratios.keys():
            return replace(fit, config=changes, patches=(*fit.patches, *patches), gauge=gauge)
    raise Refused(
        "eps must shrink with the width, and it cannot be set where it is added",
        node=next(iter(ratios)),
        expected="an entry of the configuration, or a number that the module holds",
        found="none that changes these and nothing else",
    )


def _eps_in_config(
    trial: Trial, numbers: Mapping[str, float], ratios: Mapping[str, float]
) -> Iterable[tuple[dict[str, Any], tuple[Patch, ...]]]:
    values = {(numbers[name], ratios[name]) for name in numbers}
    if trial.config is None or len(values) != 1:
        return
    ((old, ratio),) = values
    for key, value in trial.resolved.items():
        if type(value) is float and value == old:
            yield {key: old * ratio}, ()
        elif isinstance(value, Mapping):
            section: Mapping[str, Any] = {str(name): held for name, held in value.items()}
            for inner in (name for name, held in section.items() if type(held) is float and held == old):
                yield {key: {**(trial.config.get(key) or {}), inner: old * ratio}}, ()


def _eps_in_modules(
    trial: Trial, trace: Trace, numbers: Mapping[str, float], ratios: Mapping[str, float]
) -> Iterable[tuple[dict[str, Any], tuple[Patch, ...]]]:
    model, _ = trial.build({}, ())
    patches: dict[str, Patch] = {}
    for name, number in numbers.items():
        path = _path(trace, name)
        values = {
            attribute: number * ratios[name]
            for attribute, held in vars(model.get_submodule(path)).items()
            if type(held) is float and held == number and not attribute.startswith("_")
        }
        if not values or not path:
            return
        patches[path] = {"path": path, "module": "attributes", "values": values}
    yield {}, tuple(patches.values())


def _number(node: fx.Node) -> float:
    floats = [held for held in (*node.args, *node.kwargs.values()) if isinstance(held, float)]
    if len(floats) != 1:
        raise Refused("it cannot be told which constant is eps", node=node.name, found=str(floats))
    return floats[0]


def _path(trace: Trace, name: str) -> str:
    return module_path(next(node for node in trace.graph.nodes if node.name == name))


def _scales(trace: Trace, name: str, product: str) -> bool:
    """Whether an operation is a product of queries and keys, or multiplies its result by a number."""
    node = next(node for node in trace.graph.nodes if node.name == name)
    inputs = [held.name for held in node.all_input_nodes]
    return name == product or (op_name(node) in ("aten.mul", "aten.div") and inputs == [product])


def _effect(trace: Trace, name: str, old: float, new: float) -> float:
    """The factor on the result of a product or a quotient when a number in it changes."""
    node = next(node for node in trace.graph.nodes if node.name == name)
    kind = op_name(node)
    if kind == "aten.div" and isinstance(node.args[0], fx.Node) and not _constant(trace, node.args[0]):
        return old / new
    if kind == "aten.mul" or kind.startswith("aten.scaled_dot_product"):
        return new / old
    raise _changes(name, [(old, new)])


def _constant(trace: Trace, node: fx.Node) -> bool:
    return node.name in trace.constants


def _changes(node: str, numbers: Sequence[tuple[Any, Any]]) -> Refused:
    return Refused(
        "a constant of the forward pass changes with the size",
        node=node,
        expected="the same numbers, or one that a parameter can take back",
        found=", ".join(f"{a} became {b}" for a, b in numbers) or "a number more or less",
    )
