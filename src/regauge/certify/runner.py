"""Executes the nodes of a traced graph in order; weights and values are held only while needed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from regauge.certify.lazy import LazyWeight, apply_lazily, grouped
from regauge.certify.parts import Product
from regauge.errors import BadInput, TraceError
from regauge.trace import Trace, module_path


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Generator[None]:
    """The dtype of what Python numbers and integer divisions become; as before afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Runner:
    trace: Trace
    weights: Any
    buffers: Mapping[str, torch.Tensor]
    inputs: Mapping[str, Any]
    lift: torch.dtype | None
    block: int

    def mode(self) -> AbstractContextManager[None]:
        return _default_dtype(self.lift)

    def tensor(self, value: Any) -> torch.Tensor:
        return self._whole(value).detach()

    def run(self, tails: Mapping[fx.Node, tuple[fx.Node, ...]]) -> dict[fx.Node, Any]:
        """The values of the outputs; those that end in a key of ``tails`` may be left as a ``Product``."""
        inputs = self._bind_inputs()
        last = _last_uses(self.trace)
        values: dict[fx.Node, Any] = {}
        apart: dict[fx.Node, Product] = {}
        for node in self.trace.graph.nodes:
            if node.op == "output":
                break
            if node in tails:
                product = self._apart(node, tails[node], values)
                if product is not None:
                    apart.update(dict.fromkeys((node, *tails[node]), product))
            if not _skipped(node) and node not in apart:
                if node.op == "placeholder":
                    if node.users:
                        values[node] = self._placeholder(node, inputs)
                elif node.op == "call_function":
                    values[node] = self._call(node, values)
                else:
                    raise TraceError("the graph is not flat", node=node.name, found=node.op)
            for dead in last.get(node, ()):
                values.pop(dead, None)
        return {node: apart[node] if node in apart else values[node] for node in self.trace.outputs}

    # -- what the graph is given -------------------------------------------------------------------

    def _bind_inputs(self) -> dict[str, Any]:
        names = self.trace.inputs
        if set(names) <= set(self.inputs):
            return {name: self.inputs[name] for name in names}
        leaves = tree_leaves(dict(self.inputs))
        if len(leaves) != len(names):
            raise BadInput(
                "these are not the inputs that were traced",
                expected=", ".join(names),
                found=", ".join(self.inputs) or "none",
            )
        return dict(zip(names, leaves, strict=True))

    def _placeholder(self, node: fx.Node, inputs: Mapping[str, Any]) -> Any:
        name = node.name
        if name in self.trace.parameters:
            return self._weight(self.trace.parameters[name])
        if name in self.trace.buffers:
            buffer = self.trace.buffers[name]
            if buffer not in self.buffers:
                raise BadInput("the value of a buffer is needed", parameter=buffer, node=name)
            return self._given(self.buffers[buffer], node)
        if name in self.trace.constants:
            return self._given(self.trace.constants[name], node)
        if name in inputs:
            return self._given(inputs[name], node)
        raise TraceError("the graph has a placeholder of unknown sort", node=name)

    def _given(self, value: Any, node: fx.Node) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == "meta":
            raise BadInput(
                "a tensor without values was given", node=node.name, expected="a tensor on the CPU"
            )
        expected = node.meta.get("val")
        if isinstance(expected, torch.Tensor) and tuple(expected.shape) != tuple(value.shape):
            raise BadInput(
                f"'{node.name}' has another shape than was traced",
                expected=str(tuple(expected.shape)),
                found=str(tuple(value.shape)),
            )
        value = value.detach().cpu()
        if self.lift is not None:
            return value.to(_lifted_dtype(value.dtype))
        if isinstance(expected, torch.Tensor) and value.is_floating_point() and expected.is_floating_point():
            return value.to(expected.dtype)
        return value

    def _weight(self, name: str) -> Any:
        held = self.lift or self.trace.dtypes[name]
        return LazyWeight(name, self.trace.shapes[name], self.weights, held)

    # -- operations --------------------------------------------------------------------------------

    def _apart(
        self, head: fx.Node, chain: tuple[fx.Node, ...], values: Mapping[fx.Node, Any]
    ) -> Product | None:
        """The product of ``head`` and what follows it, not computed; None if its weight is not divisible."""
        args, kwargs = map_arg((head.args, head.kwargs), values.__getitem__)
        x: Any = args[0]
        weight: Any = args[1]
        bias: Any = self._small(args[2] if len(args) > 2 else kwargs.get("bias"))
        along = (0, 1) if str(head.target) == "aten.linear.default" else (1, 0)
        if not isinstance(weight, LazyWeight) or weight.numel <= self.block or weight.order != along:
            return None
        if not isinstance(x, torch.Tensor) or isinstance(bias, LazyWeight):
            return None

        def then(part: torch.Tensor) -> torch.Tensor:
            with self.mode():
                for node in chain:
                    part = self._call(node, {node.all_input_nodes[0]: part})
                return part

        shape = tuple(int(size) for size in head.meta["val"].shape)
        return Product(shape, x, weight, bias, then, self.block)

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        name = str(target)
        if name in _DROPOUT:
            return args[0]
        if self.lift is not None and name == "aten.view.dtype":
            raise TraceError("a bit pattern cannot be lifted to float64", node=node.name, found=name)
        try:
            if any(isinstance(leaf, LazyWeight) for leaf in tree_leaves((args, kwargs))):
                args, kwargs = tree_map(self._small, (args, kwargs))
            if any(isinstance(leaf, LazyWeight) for leaf in tree_leaves((args, kwargs))):
                done, result = apply_lazily(name, args, kwargs, self.block, exact=self.lift is not None)
                if done:
                    return result
                args, kwargs = tree_map(self._whole, (args, kwargs))
            result = self._plain(target, name, *self._placed(args, kwargs))
        except (BadInput, TraceError):
            raise
        except Exception as error:
            raise TraceError(
                "an operation of the traced graph cannot be run",
                node=f"{node.name} ({name}) in {module_path(node) or 'the model'}",
                found=f"{type(error).__name__}: {str(error)[:300]}",
            ) from error
        if self.lift is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.dtype != _lifted_dtype(leaf.dtype):
                    raise TraceError(
                        "an operation cannot be lifted to float64",
                        node=f"{node.name} ({name})",
                        found=str(leaf.dtype),
                    )
        return result

    def _placed(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Devices become the CPU and, when lifting, floating dtypes become float64."""

        def change(value: Any) -> Any:
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if isinstance(value, torch.dtype) and self.lift is not None:
                return _lifted_dtype(value)
            return value

        return tree_map(change, args), tree_map(change, kwargs)

    @staticmethod
    def _plain(target: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "aten.histc.default" and not args[0].is_floating_point():
            # Counting integers is exact in float64, and the CPU has no integer version.
            return target(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        if name == "aten._grouped_mm.default" and args[0].dtype is torch.float64:
            x, weight, ends = args
            return grouped(x, ends, weight.shape[2], lambda group: weight[group])
        return target(*args, **kwargs)

    def _small(self, value: Any) -> Any:
        return value.whole() if isinstance(value, LazyWeight) and value.numel <= self.block else value

    @staticmethod
    def _whole(value: Any) -> Any:
        return value.whole() if isinstance(value, LazyWeight) else value


_DROPOUT = frozenset(
    {
        "aten.dropout.default",
        "aten.feature_dropout.default",
        "aten.alpha_dropout.default",
        "aten.dropout_.default",
    }
)


def _skipped(node: fx.Node) -> bool:
    """Assertions about metadata and switches of autograd: no value depends on them."""
    name = str(node.target)
    return node.op == "call_function" and (
        name.startswith(("aten._assert", "aten.sym_constrain_range"))
        or getattr(node.target, "__name__", "") == "_set_grad_enabled"
    )


def _lifted_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _last_uses(trace: Trace) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nobody needs once it has been run."""
    kept = set(trace.outputs)
    seen: set[fx.Node] = set()
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(trace.graph.nodes):
        for value in (node, *node.all_input_nodes):
            if node.op != "output" and value not in seen and value not in kept:
                seen.add(value)
                result.setdefault(node, []).append(value)
    return result
