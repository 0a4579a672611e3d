"""A constant that multiplies what an embedding gives, and the configuration without it, found by trial.

No key is known by name: each boolean is switched, and each number that equals the constant set to one, one
at a time, and the model is built and traced again. A change is taken if everything else stays as it was: the
graph, the parameters, the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from regauge.errors import Refused, RegaugeError
from regauge.hf import HFModel, load_config, load_meta
from regauge.interpret import op_name
from regauge.trace import Trace, trace

Traced = tuple[HFModel, Trace]


def unscaled_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """y = c · E[token] → y = E′[token]: the configuration that leaves out c, and what E is multiplied by.

    Args:
        config: content of ``config.json``.

    Returns:
        changes to its top level, and parameter -> constant c for every embedding that loses its constant.

    Raises:
        Refused: no constant, a table that is also read elsewhere, or no key or two keys that leave it out.
    """
    before = traced(config)
    old, _ = _scales(before)
    scaled = {name: value for name, value in old.items() if value != 1.0}
    if not scaled:
        raise Refused(
            "no embedding is multiplied by a constant and by nothing else here",
            expected="an embedding whose every use is followed by a product with the same constant",
            found=", ".join(old) or "an embedding that is read in another role too, or none",
            way_out="put untie before it, if the head is tied to the embedding",
        )
    found: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    for key, change in _changes(config, set(scaled.values())):
        try:
            after = traced({**config, **change})
        except (RegaugeError, ArithmeticError, TypeError, ValueError):
            continue
        gone = without_scale(before, after)
        if gone:
            found[key] = change, gone
    if len(found) != 1:
        raise Refused(
            "the configuration cannot leave out the constant that multiplies the embedding",
            parameter=next(iter(scaled)),
            expected="one boolean or number that changes this and nothing else",
            found=" and ".join(found) or f"none; the constant is {next(iter(scaled.values())):g}",
        )
    return next(iter(found.values()))


def traced(config: Mapping[str, Any]) -> Traced:
    held = load_meta(config)
    return held, trace(held.model, (), held.inputs)


def _changes(config: Mapping[str, Any], constants: set[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every boolean switched and every number among ``constants`` set to one, also in sections."""
    for key, value in load_config(config).to_dict().items():
        if isinstance(value, Mapping):
            held = config.get(key)
            section = held if isinstance(held, Mapping) else {}
            for inner, item in value.items():
                for other in _others(item, constants):
                    yield f"{key}.{inner}", {key: {**section, inner: other}}
        else:
            for other in _others(value, constants):
                yield key, {key: other}


def _others(value: Any, constants: set[float]) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    return [type(value)(1)] if isinstance(value, (int, float)) and value in constants else []


def without_scale(before: Traced, after: Traced) -> dict[str, float]:
    """Embeddings that lost their constant, if nothing else is different; else none."""
    (old, erased), (new, erased_after) = _scales(before), _scales(after)
    changed = {name: value for name, value in old.items() if new.get(name) != value}
    if not changed or old.keys() != new.keys() or any(new[name] != 1.0 for name in changed):
        return {}
    a, b = before[0].stored_buffers, after[0].stored_buffers
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    alike = (before[1].aliases, before[1].shapes, before[1].dtypes) == (
        after[1].aliases,
        after[1].shapes,
        after[1].dtypes,
    )
    return changed if same and alike and _form(before[1], erased) == _form(after[1], erased_after) else {}


def _scales(traced: Traced) -> tuple[dict[str, float], set[fx.Node]]:
    """Embedding read in this role alone -> the constant that multiplies it everywhere; and those products."""
    held, graph = traced[0], traced[1].graph
    values: dict[str, set[float]] = {}
    products: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        name = traced[1].parameters.get(node.name)
        if name is None:
            continue
        values.setdefault(name, set())
        for user in node.users:
            if op_name(user) != "aten.embedding" or user.args[0] is not node:
                values[name].add(float("nan"))
                continue
            factors = [(reader, _factor(reader, user, held, traced[1])) for reader in user.users]
            if not all(factor is not None for _, factor in factors):
                values[name].add(1.0)
                continue
            values[name] |= {factor for _, factor in factors if factor is not None}
            products.setdefault(name, set()).update(reader for reader, _ in factors)
    single = {name: next(iter(found)) for name, found in values.items() if len(found) == 1}
    scales = {name: value for name, value in single.items() if value == value}
    return scales, set().union(*(products.get(name, ()) for name in scales))


def _factor(node: fx.Node, source: fx.Node, held: HFModel, traced: Trace) -> float | None:
    """c of an operation c · source; None if it is another."""
    if op_name(node) not in ("aten.mul", "aten.multiply") or node.kwargs or len(node.args) != 2:
        return None
    other: Any = node.args[1] if node.args[0] is source else node.args[0]
    while isinstance(other, fx.Node) and op_name(other) == "aten.to":
        other = other.args[0]
    if isinstance(other, fx.Node):
        value = held.stored_buffers.get(traced.buffers.get(other.name, ""))
        return float(value) if value is not None and value.numel() == 1 else None
    return float(other) if isinstance(other, (int, float)) else None


def _form(traced: Trace, erased: set[fx.Node]) -> list[Any]:
    """The graph without ``erased`` products, as data: equal for equal functions of equal parameters."""
    number: dict[fx.Node, int] = {}
    lines: list[Any] = []

    def data(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return ("node", number[arg])
        if isinstance(arg, (list, tuple)):
            return tuple(data(item) for item in arg)
        if isinstance(arg, Mapping):
            return tuple((str(key), data(item)) for key, item in arg.items())
        return repr(arg)

    for node in traced.graph.nodes:
        if node in erased:
            source = next(arg for arg in node.args if isinstance(arg, fx.Node))
            number[node] = number[source]
            continue
        number[node] = len(lines)
        if node.op == "placeholder":
            constant = traced.constants.get(node.name)
            known = traced.parameters.get(node.name) or traced.buffers.get(node.name) or node.name
            value = None if constant is None or constant.is_meta else repr(constant.tolist())
            lines.append((node.op, known if constant is None else None, value))
        else:
            lines.append((node.op, str(node.target), data(node.args), data(node.kwargs)))
    return lines
