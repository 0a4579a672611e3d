"""From a PyTorch module to a flat, functional ATen graph with named parameters.

``torch.export`` runs the model on fake or meta tensors: no weight is read. Tied parameters are found
by object identity on the module, never by pointer or by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from regauge.errors import TraceError
from regauge.straight import straight_modules


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        graph: the ATen graph; every parameter, buffer, constant and input is a placeholder.
        parameters: placeholder name -> canonical state-dict name, for parameters and for persistent
            floating-point buffers (statistics of a batch norm are parameters here).
        buffers: placeholder name -> buffer name, for everything else the module stores.
        constants: placeholder name -> tensor lifted out of the forward code.
        inputs: placeholder names of the user inputs, in order; values by name for non-tensors.
        outputs: nodes whose values are the function's result, in order.
        aliases: canonical name -> every state-dict name that is the same tensor (itself included).
        shapes: canonical name -> shape.
        dtypes: canonical name -> dtype in which the module holds it.
        example: the example keyword inputs used, as given.
        straight: paths of modules whose code has one path only, see :mod:`regauge.straight`.
    """

    graph: fx.Graph
    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[fx.Node, ...]
    aliases: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    output_names: tuple[str, ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)
    straight: frozenset[str] = frozenset()

    @property
    def canonical(self) -> dict[str, str]:
        """Every state-dict name (aliases included) -> canonical name."""
        return {alias: name for name, group in self.aliases.items() for alias in group}


def module_path(node: fx.Node) -> str:
    """Dotted path of the module an operation came from, for the reader's eyes only."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return plain_path(next(reversed(stack.values()))[0])


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """Path and qualified class of every module an operation lies in, the model itself first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(plain_path(path), str(kind)) for path, kind in stack.values()]


def plain_path(path: Any) -> str:
    """A path of the exporter as the model has it; empty for the model itself."""
    path = str(path).removeprefix("L['self'].")
    return "" if path == "model_to_trace" else path.removeprefix("model_to_trace.")


def module_class(node: fx.Node) -> str:
    """Qualified name of the class of that module."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[1]) if stack else ""


@contextmanager
def _quiet() -> Generator[None]:
    """Without warnings, and without the line of code of every operation, which costs a third of the time."""
    config: Any = fx.config  # type: ignore[attr-defined]
    before = getattr(config, "do_not_emit_stack_traces", False)
    config.do_not_emit_stack_traces = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.do_not_emit_stack_traces = before


class _RealConstants(TorchFunctionMode):
    """Tensors that forward code makes of Python numbers keep their values when the device is meta:
    they are made on the CPU and then moved, so that the exporter lifts the real one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and args[0].device.type == "meta" and len(args) == 2:
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            args = args[1:]
        if func is torch.Tensor.__getitem__ and not kwargs:
            args = (args[0], _real_index(args[0], args[1]))
        device = kwargs.get("device")
        made = func in (torch.tensor, torch.as_tensor) and device is not None
        if made and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


def _real_index(x: torch.Tensor, index: Any) -> Any:
    """Lists of numbers in an index as tensors made on the CPU."""
    if isinstance(index, tuple):
        return tuple(_real_index(x, item) for item in index)
    if isinstance(index, list) and index and all(type(item) is int for item in index):
        return torch.tensor(index, device="cpu").to(x.device)
    return index


class _Names:
    """Names of the outputs, set while the model runs; the exporter leaves this object alone."""

    found: tuple[str, ...] = ()


class _Select(nn.Module):
    """Runs a model and returns only the tensors that define its function.

    The result may be a tensor, a sequence, a mapping or a dataclass-like output. If it has a field
    ``logits`` that is the function; otherwise every tensor of it is.
    """

    def __init__(self, model: nn.Module, outputs: Sequence[str] | None) -> None:
        super().__init__()
        self.model_to_trace = model
        self.outputs = tuple(outputs) if outputs is not None else None
        self.names = _Names()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        found = dict(named_tensors(self.model_to_trace(*args, **kwargs)))
        if self.outputs is not None:
            missing = [name for name in self.outputs if name not in found]
            if missing:
                raise TraceError(
                    "the model does not return an output of that name",
                    expected=", ".join(missing),
                    found=", ".join(found),
                )
            found = {name: found[name] for name in self.outputs}
        elif "logits" in found:
            found = {"logits": found["logits"]}
        if not found:
            raise TraceError("the model returns no tensor", expected="at least one", found="none")
        self.names.found = tuple(found)
        return tuple(found.values())


def named_tensors(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, key if name == "output" else f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{index}")


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] | None = None,
) -> Trace:
    """Trace ``model`` on example inputs.

    Args:
        model: any module ``torch.export`` can trace, on any device (``meta`` reads no weight). It is
            traced in eval mode; its training flags are restored.
        args: example positional inputs.
        kwargs: example keyword inputs.
        outputs: names of the output fields that define the function; default ``logits`` if the
            model returns a field of that name, else every tensor it returns.

    Raises:
        TraceError: ``torch.export`` refused; ``found`` carries its reason.
    """
    kwargs = dict(kwargs or {})
    wrapper = _Select(model, outputs)
    training = {module: module.training for module in model.modules()}
    wrapper.eval()
    try:
        with _quiet(), torch.no_grad():
            with _RealConstants():
                program = torch.export.export(wrapper, args, kwargs, strict=False)
            if _needs_functionalisation(program.graph):
                program = program.run_decompositions({})
    except TraceError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise TraceError(
            "torch.export could not trace this model",
            found=f"{type(error).__name__}: {' '.join(reason[:3])[:400]}",
            way_out="pass example inputs that avoid data-dependent control flow,"
            " or another attention implementation",
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    return _read(program, model, wrapper.names.found, kwargs)


def role(trace: Trace, node: fx.Node, name: str) -> str:
    """Which alias of a tied parameter an operation uses: the one owned by the module that computes."""
    path = module_path(node)
    owners = {alias: alias.rpartition(".")[0] for alias in trace.aliases[name]}
    for alias, owner in owners.items():
        if owner == path:
            return alias
    inside = [a for a, o in owners.items() if o and (path.endswith("." + o) or o.endswith("." + path))]
    return max(inside, key=lambda alias: len(owners[alias]), default=name)


def untie(trace: Trace) -> Trace:
    """The same function with a parameter of its own for every alias of a tied one.

    Returns ``trace`` itself if nothing is tied.
    """
    if all(len(group) == 1 for group in trace.aliases.values()):
        return trace
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(trace.graph, new)
    parameters: dict[str, str] = {}
    for old, node in list(new.items()):
        name = trace.parameters.get(old.name)
        if name is None:
            continue
        parameters[node.name] = name
        made = {name: node}
        for user in old.users:
            alias = role(trace, user, name)
            if alias not in made:
                with graph.inserting_after(node):
                    made[alias] = graph.placeholder(f"{node.name}_{len(made)}")
                made[alias].meta = dict(node.meta)
                parameters[made[alias].name] = alias
            new[user].replace_input_with(node, made[alias])
    origin = {alias: name for name, group in trace.aliases.items() for alias in group}
    outputs = tuple(new[node] for node in trace.outputs)
    graph.output(outputs)
    return replace(
        trace,
        graph=graph,
        parameters=parameters,
        outputs=outputs,
        aliases={alias: (alias,) for alias in origin},
        shapes={alias: trace.shapes[name] for alias, name in origin.items()},
        dtypes={alias: trace.dtypes[name] for alias, name in origin.items()},
    )


def _needs_functionalisation(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        if node.op == "get_attr":
            return True
        if node.op == "call_function":
            if isinstance(node.target, HigherOrderOperator):
                return True
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                return True
    return False


def _read(
    program: torch.export.ExportedProgram, model: nn.Module, names: tuple[str, ...], kwargs: dict[str, Any]
) -> Trace:
    prefix = "model_to_trace."
    by_identity: dict[int, list[str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    persistent = set(model.state_dict(keep_vars=True))
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        tensors[name] = tensor
        by_identity.setdefault(id(tensor), []).append(name)
    canonical = {name: group[0] for group in by_identity.values() for name in group}

    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs: list[str] = []
    for spec in program.graph_signature.input_specs:
        argument = spec.arg.name if hasattr(spec.arg, "name") else ""
        target = (spec.target or "").removeprefix(prefix)
        if spec.kind is InputKind.PARAMETER:
            parameters[argument] = canonical[target]
        elif spec.kind is InputKind.BUFFER:
            tensor = tensors[target]
            if target in persistent and tensor.is_floating_point():
                parameters[argument] = canonical[target]
            else:
                buffers[argument] = target
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constant = program.constants[spec.target or ""]
            if isinstance(constant, torch.Tensor):
                constants[argument] = constant
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(argument)

    output_node = next(iter(reversed(program.graph.nodes)))
    results = output_node.args[0]
    outputs = tuple(
        node
        for spec, node in zip(program.graph_signature.output_specs, results, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(node, fx.Node)
    )
    used = dict.fromkeys(parameters.values())
    aliases = {
        group[0]: tuple(group)
        for group in by_identity.values()
        if group[0] in used or isinstance(tensors[group[0]], nn.Parameter)
    }
    return Trace(
        graph=program.graph,
        parameters=parameters,
        buffers=buffers,
        constants=constants,
        inputs=tuple(inputs),
        outputs=outputs,
        aliases=aliases,
        shapes={name: tuple(tensors[name].shape) for name in aliases},
        dtypes={name: tensors[name].dtype for name in aliases},
        output_names=names,
        example=kwargs,
        straight=straight_modules(model),
    )
