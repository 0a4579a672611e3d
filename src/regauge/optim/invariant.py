"""Which parameters can be multiplied by a positive number without changing the function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from regauge.api import given_inputs
from regauge.interpret import RULE_FAILURES, op_name
from regauge.optim import homogeneity_shapes, homogeneity_sums
from regauge.optim.degrees import Arg, Degrees, Key, Mixed, Tag
from regauge.optim.homogeneity import DEGREE_RULES, Result, note_squares
from regauge.trace import Trace, module_path, trace

_HARMLESS = {"dtype", "device", "layout", "pin_memory", "memory_format", "alpha", "correction", "keepdim",
             "enable_gqa", "scale", "non_blocking", "copy", "dim", "stable"}  # fmt: skip
"""Keyword arguments that the rules need not see; a dtype is checked on the result."""
_RULES = (homogeneity_shapes, homogeneity_sums)  # their rules are in the table once they are imported
_NOTHING = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar")


@dataclass(frozen=True)
class View:
    """A tensor cut into units that are scale-invariant each by itself: f(…, s_u · w[u], …) = f(…, w[u], …).

    Attributes:
        axis: the units are consecutive equal blocks of this axis.
        blocks: how many; 1 is the whole tensor, the size of the axis is every row by itself.
        norms: modules (or operations outside of any) that remove the scale. Each is blind to it up to its
            eps: the invariance is exact as eps goes to zero.
    """

    axis: int = 0
    blocks: int = 1
    norms: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        return self.blocks == 1


def scale_invariant(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    *,
    batch_norm: str = "training",
    outputs: Sequence[str] | None = None,
) -> dict[str, View]:
    """Parameters whose units can be multiplied by positive numbers and leave the output as it is.

    Derived from the operations of the trace; no weight is read. Tied parameters are one parameter. For each,
    the finest cut along its first or second axis that holds is given.

    Args:
        model: any module that ``torch.export`` can trace, on any device.
        inputs: example inputs, by name or in order.
        batch_norm: ``training``: batch norms use the statistics of the batch, as while training;
            ``stored``: they are affine maps with constants, as in evaluation mode.
        outputs: see :func:`regauge.trace.trace`.

    Returns:
        canonical state-dict name -> view, in the order of the model. What is not listed is not proved
        invariant.

    Raises:
        TraceError: the model cannot be exported. BadInput: no inputs.
    """
    args, kwargs = given_inputs(inputs)
    return invariant_in(trace(model, args, kwargs, outputs=outputs), trainable(model), batch_norm=batch_norm)


def trainable(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters, each tensor once."""
    return tuple(name for name, _ in model.named_parameters())


def invariant_in(traced: Trace, names: Sequence[str], *, batch_norm: str = "training") -> dict[str, View]:
    """The same for a model that has been traced, and these parameters."""
    if batch_norm not in ("training", "stored"):
        raise ValueError(f"batch_norm is 'training' or 'stored', not {batch_norm!r}")
    state = walk(traced, names, batch_training=batch_norm == "training")
    found: dict[str, View] = {}
    for (name, axis), roots in state.roots.items():
        if (name, axis) in state.dead:
            continue
        blocks = _blocks(roots)
        if name not in found or blocks > found[name].blocks:
            nodes = dict.fromkeys(module_path(node) or node.name for node in state.gone.get((name, axis), ()))
            found[name] = View(axis, blocks, tuple(nodes))
    return {name: found[name] for name in names if name in found}


def _blocks(roots: torch.Tensor) -> int:
    """Number of consecutive equal blocks, if the joined units are such; else all are taken as one, which is
    a coarser cut and holds as well."""
    count = int(roots.unique().numel())
    if len(roots) % count:
        return 1
    whole = torch.arange(count).repeat_interleave(len(roots) // count) * (len(roots) // count)
    return count if bool((roots == whole).all()) else 1


def walk(traced: Trace, names: Sequence[str], *, batch_training: bool) -> Degrees:
    """Carry the scales of these parameters through the graph."""
    state = Degrees(batch_training=batch_training)
    wanted = set(names)
    env: dict[fx.Node, dict[Key, Result]] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            name = traced.parameters.get(node.name)
            if name in wanted and node.users:
                shape = traced.shapes[name]
                keys = [(name, axis) for axis in range(max(min(len(shape), 2), 1))]
                env[node] = {key: state.start(key, shape) for key in keys}
        elif node.op == "call_function":
            _step(state, node, env)
    for node in traced.outputs:
        for key in env.get(node, {}):
            state.dead.setdefault(key, "scales the output")
    return state


def _step(state: Degrees, node: fx.Node, env: dict[fx.Node, dict[Key, Result]]) -> None:
    name = op_name(node)
    keys = dict.fromkeys(key for source in node.all_input_nodes for key in env.get(source, ()))
    results: dict[Key, Result] = {}
    for key in keys:
        if key in state.dead or name in _NOTHING:
            continue
        try:
            results[key] = _apply(state, node, key, env)
        except Mixed as error:
            state.dead[key] = f"{node.name}: {error}"
        except (*RULE_FAILURES, RuntimeError) as error:
            state.dead[key] = f"{node.name}: the rule of {name} failed ({type(error).__name__})"
    note_squares(state, node)
    for key, result in results.items():
        none = not any(result) if isinstance(result, list) else result is None and name != "getitem"
        if none:
            state.gone.setdefault(key, []).append(node)
    env[node] = {key: result for key, result in results.items() if result is not None}


def _apply(state: Degrees, node: fx.Node, key: Key, env: dict[fx.Node, dict[Key, Result]]) -> Result:
    name = op_name(node)
    if name not in DEGREE_RULES:
        raise Mixed(f"{name} has no rule")

    def seen(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [seen(item) for item in arg]
        if not isinstance(arg, fx.Node):
            return arg
        tag = env.get(arg, {}).get(key)
        if isinstance(tag, list):
            return tag
        value = arg.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return value
        return Arg(arg, tuple(int(n) for n in value.shape), tag)

    args, options = _positional(node)
    options = {option: seen(value) for option, value in options.items()}
    if any(isinstance(value, Arg) and value.tag is not None for value in options.values()):
        raise Mixed("a tensor given by keyword")
    unknown = sorted(option for option, value in options.items() if option not in _HARMLESS and value)
    if unknown:
        raise Mixed(f"the option {unknown[0]} of {name} is not known")
    result = DEGREE_RULES[name](state, node, key, *[seen(arg) for arg in args])
    _check(node, result)
    return result


def _positional(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in the order of the operator's schema; keyword-only ones apart."""
    args, options = list(node.args), dict(node.kwargs)
    schema = getattr(node.target, "_schema", None)
    order = [] if schema is None else [item for item in schema.arguments if not item.kwarg_only]
    last = max((i for i, item in enumerate(order) if item.name in options), default=-1)
    for item in order[len(args) : last + 1]:
        args.append(options.pop(item.name, item.default_value))
    return args, options


def _check(node: fx.Node, result: Result) -> None:
    """Units fit the shape that was traced, and only numbers that are not rounded scale."""
    value = node.meta["val"]
    several = isinstance(value, (list, tuple))
    tags: list[Tag | None] = result if isinstance(result, list) else [result]
    for tag, tensor in zip(tags, value if several else [value], strict=False):
        if tag is not None and (
            tag.units.dim() != tensor.dim()
            or any(n not in (1, size) for n, size in zip(tag.units.shape, tensor.shape, strict=True))
        ):
            raise ValueError("units of another shape than the value")
        if tag is not None and not (tensor.is_floating_point() or tensor.is_complex()):
            raise Mixed("rounded to integers")
