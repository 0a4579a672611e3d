"""Structure patches: modules of a traced model that can be replaced, and what replaces them.

A patch is plain data: ``path``, ``module`` (what takes its place, see :mod:`regauge.modeling_regauge`) and
the arguments of that. Which module can be replaced follows from the operations it was traced to: all of them
must be one normalisation or one linear map whose parameters are the module's own and nobody else's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from regauge import norms_regauge
from regauge.errors import BadInput, Refused
from regauge.interpret import op_name
from regauge.modeling_regauge import (
    KEEPS,
    SETTERS,
    Convolution,
    Norm,
    PatchError,
    TransposedLinear,
    apply_patches,
)
from regauge.primitive import gain_of, primitive_norms
from regauge.trace import Trace, module_class, module_path

Patch = Mapping[str, Any]

_KINDS = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, Norm, TransposedLinear, Convolution, nn.Embedding),
)
_NORMS = (
    *("adab2n.AdaB2N1d", "adab2n.AdaB2N2d", "affine.Affine", "powernorm.PowerNorm"),
    *("repbn.RepBN", "repbn.PRepBN", "unified.UnifiedNorm"),
)
PLAIN = frozenset(
    (
        *(f"{kind.__module__}.{kind.__qualname__}" for kind in (*_KINDS, *norms_regauge.MODULES.values())),
        *(f"regauge.nn.{name}" for name in _NORMS),
        "transformers.pytorch_utils.Conv1D",
    )
)
"""Classes whose code is known to do the same whatever comes in. A trace shows one path through a module; a
module of another class may take another path on other inputs, which a replacement would not, unless its code
proves that it has one path only: see :mod:`regauge.straight`."""


@dataclass(frozen=True)
class Replaceable:
    """A module that is nothing but one normalisation, one linear map or one table.

    Attributes:
        path: where it is.
        patch: the replacement that computes the same.
        nodes: names of the operations that do the work, one for each call.
        weight, bias: its parameters by state-dict name, where it has them.
        chart: what the module adds to the stored weight before it multiplies with it. Where it is not 0, or
            the weight has another name than the patch gives it, ``patch`` computes the same only once the
            weight is left out.
    """

    path: str
    patch: Patch
    nodes: tuple[str, ...]
    weight: str | None
    bias: str | None
    chart: float = 0.0


def replaceable(trace: Trace) -> dict[str, Replaceable]:
    """Path -> every module that can be replaced by one of ours, in order of first use."""
    found: dict[str, Replaceable] = {}
    for path, nodes in plain_modules(trace).items():
        for form in (_norm, _linear, _convolution, _embedding, _primitive):
            known = form(trace, path, nodes)
            if known is not None:
                found[path] = known
                break
    return found


def plain_modules(trace: Trace) -> dict[str, list[fx.Node]]:
    """Path of every module with one path through its code -> its operations, in order of first use."""
    inside: dict[str, list[fx.Node]] = {}
    for node in trace.graph.nodes:
        if node.op == "call_function" and (
            module_class(node) in PLAIN or module_path(node) in trace.straight
        ):
            inside.setdefault(module_path(node), []).append(node)
    return {path: nodes for path, nodes in inside.items() if path}


def gain_modules(trace: Trace) -> dict[str, str]:
    """Path of every module that does nothing but multiply by a parameter of its own -> that parameter."""
    found: dict[str, str] = {}
    for path, nodes in plain_modules(trace).items():
        gains = {gain_of(node, lambda value, path=path: own_parameter(trace, path, value)) for node in nodes}
        held = {name for names in trace.aliases.values() for name in names if name.startswith(f"{path}.")}
        if len(gains) == 1 and gains == held:
            found[path] = held.pop()
    return found


def owners(trace: Trace, nodes: Iterable[str]) -> dict[str, Replaceable]:
    """The modules that compute exactly these operations.

    Raises:
        Refused: an operation lies in a module that does more, or a module does it also elsewhere.
    """
    wanted = dict.fromkeys(nodes)
    by_node = {node: module for module in replaceable(trace).values() for node in module.nodes}
    found: dict[str, Replaceable] = {}
    for name in wanted:
        module = by_node.get(name)
        missing = [] if module is None else [node for node in module.nodes if node not in wanted]
        if module is None or missing:
            node = next(node for node in trace.graph.nodes if node.name == name)
            raise Refused(
                "an operation cannot be replaced: it does not make up a module of its own",
                node=f"{name} in {module_path(node) or 'the model'}",
                expected="a LayerNorm of torch that holds its own parameters, shared with nothing",
                found="another class of module, or parameters with two names"
                if module is None
                else f"it is also called as {missing[0]}",
            )
        found[module.path] = module
    return found


def merged(old: Sequence[Patch], new: Sequence[Patch]) -> tuple[Patch, ...]:
    """Patches by path; a later replacement takes the place of an earlier one."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for patch in (*old, *new):
        kind = patch["module"] if patch["module"] in KEEPS else "replaced"
        before = found.get((patch["path"], kind), {})
        found[patch["path"], kind] = dict(patch)
        if kind in SETTERS:
            found[patch["path"], kind]["values"] = {**before.get("values", {}), **patch["values"]}
    return tuple(found.values())


_ARGUMENTS = {
    "aten.layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "aten.rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def restructured(model: nn.Module, copies: Iterable[str], patches: Sequence[Patch]) -> nn.Module:
    """A deep copy of a model with a parameter of its own under each name of ``copies``, and patched.

    Raises:
        BadInput: the model cannot be copied; Refused: a module to be replaced has hooks.
    """
    try:
        changed = copy.deepcopy(model)
    except RuntimeError as error:
        raise BadInput(
            "the module cannot be copied",
            found=str(error).splitlines()[0],
            way_out="remove parametrisations of the old kind (torch.nn.utils.remove_weight_norm) first",
        ) from error
    for name in copies:
        owner, _, leaf = name.rpartition(".")
        held = changed.get_submodule(owner)
        setattr(held, leaf, nn.Parameter(getattr(held, leaf).detach().clone()))
    try:
        return apply_patches(changed, patches)
    except PatchError as error:
        raise Refused("a module cannot be replaced", found=str(error)) from error


def _norm(trace: Trace, path: str, nodes: list[fx.Node]) -> Replaceable | None:
    """LayerNorm or RMSNorm over the last axis, gain and shift within the operation or added after it."""
    calls: list[fx.Node] = []
    options: list[dict[str, Any]] = []
    held: set[tuple[str | None, str | None]] = set()
    rest = list(nodes)
    while rest:
        node = rest.pop(0)
        name = op_name(node)
        if name not in _ARGUMENTS:
            return None
        args: dict[str, Any] = dict(zip(_ARGUMENTS[name], node.args, strict=False))
        args.update(node.kwargs)
        shape, eps = args["normalized_shape"], args.get("eps")
        weight, bias = args.get("weight"), args.get("bias")
        if name == "aten.rms_norm" and rest and op_name(rest[0]) == "aten.add" and _adds(rest[0], node):
            bias = rest.pop(0).args[1]
        if len(shape) != 1 or (eps is None and name == "aten.rms_norm"):
            return None
        form = "layer" if name == "aten.layer_norm" else "rms"
        options.append({"form": form, "size": shape[0], "eps": 1e-5 if eps is None else float(eps)})
        held.add((own_parameter(trace, path, weight), own_parameter(trace, path, bias)))
        calls.append(node)
        if (weight is not None and own_parameter(trace, path, weight) is None) or (
            bias is not None and not _is_shift(trace, path, bias, shape)
        ):
            return None
    if not calls or len(held) != 1 or any(option != options[0] for option in options):
        return None
    ((weight, bias),) = held
    has = {"weight": weight is not None, "bias": bias is not None}
    patch = {"path": path, "module": "norm", **options[0], **has}
    return Replaceable(path, patch, tuple(node.name for node in calls), weight, bias)


def _primitive(trace: Trace, path: str, nodes: list[fx.Node]) -> Replaceable | None:
    """An RMSNorm over the last axis written in primitive operations, see :mod:`regauge.primitive`."""
    norms = primitive_norms(nodes, lambda value: own_parameter(trace, path, value))
    weights = {norm.weight for norm in norms}
    held = {name for names in trace.aliases.values() for name in names if name.startswith(f"{path}.")}
    if len({(norm.size, norm.eps, norm.weight, norm.chart) for norm in norms}) != 1 or not held <= weights:
        return None
    norm = norms[0]
    if norm.weight is not None and trace.shapes[trace.canonical[norm.weight]] != (norm.size,):
        return None
    has = {"weight": norm.weight is not None, "bias": False}
    patch = {"path": path, "module": "norm", "form": "rms", "size": norm.size, "eps": norm.eps, **has}
    return Replaceable(path, patch, tuple(norm.node for norm in norms), norm.weight, None, norm.chart)


def _is_shift(trace: Trace, path: str, value: Any, shape: Any) -> bool:
    """A parameter of the module with a number for each entry, under the name that a norm gives it."""
    name = own_parameter(trace, path, value)
    return name is not None and name == f"{path}.bias" and trace.shapes[name] == tuple(shape)


def _adds(node: fx.Node, norm: fx.Node) -> bool:
    return node.args[0] is norm and len(node.args) == 2 and not node.kwargs and len(norm.users) == 1


def _linear(trace: Trace, path: str, nodes: list[fx.Node]) -> Replaceable | None:
    """A linear map: ``linear(x, W, b)``, ``linear(x, Wᵀ, b)`` or a product of a flattened x with W."""
    calls: list[fx.Node] = []
    held: set[tuple[str | None, str | None, bool]] = set()
    for number, node in enumerate(nodes):
        name = op_name(node)
        if name in ("aten.linear", "aten.addmm"):
            args = [*node.args, None]
            weight, bias = (args[1], args[2]) if name == "aten.linear" else (args[2], args[0])
            transposed = name == "aten.addmm"
            if isinstance(weight, fx.Node) and op_name(weight) == "aten.t" and weight in nodes:
                weight, transposed = weight.args[0], not transposed
            own = own_parameter(trace, path, weight), own_parameter(trace, path, bias)
            if node.kwargs or own[0] is None or (bias is not None and own[1] is None):
                return None
            held.add((*own, transposed))
            calls.append(node)
        elif name == "aten.view":
            before = nodes[number - 1] if number else None
            if not (before in calls and node.args[0] is before) and not _flattens(node):
                return None
        elif name != "aten.t" or own_parameter(trace, path, node.args[0]) is None:
            return None
    if not calls or len(held) != 1:
        return None
    ((weight, bias, transposed),) = held
    assert weight is not None
    if len(trace.shapes[trace.canonical[weight]]) != 2:
        return None
    rows, columns = trace.shapes[trace.canonical[weight]]
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    patch = {
        "path": path,
        "module": "linear",
        "inputs": inputs,
        "outputs": outputs,
        "bias": bias is not None,
        "transposed": transposed,
    }
    last = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(last) != len(calls):
        return None
    return Replaceable(path, patch, tuple(node.name for node in calls), weight, bias)


def _convolution(trace: Trace, path: str, nodes: list[fx.Node]) -> Replaceable | None:
    """A convolution over one to three axes of positions, surrounded by zeros."""
    found: set[tuple[Any, ...]] = set()
    for node in nodes:
        name = op_name(node)
        if name not in _CONVOLUTIONS or node.kwargs:
            return None
        count = _CONVOLUTIONS[name]
        args: list[Any] = [*node.args, *[None] * (7 - len(node.args))]
        weight, bias = own_parameter(trace, path, args[1]), own_parameter(trace, path, args[2])
        if weight is None or (args[2] is not None and bias is None) or isinstance(args[4], str):
            return None
        spread = [_each(args[3], 1, count), _each(args[4], 0, count), _each(args[5], 1, count)]
        found.add((weight, bias, *spread, args[6] or 1))
    if len(found) != 1:
        return None
    ((weight, bias, stride, padding, dilation, groups),) = found
    outputs, inputs, *kernel = trace.shapes[trace.canonical[weight]]
    patch = {
        "path": path,
        "module": "convolution",
        "inputs": inputs * groups,
        "outputs": outputs,
        "kernel": kernel,
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
        "bias": bias is not None,
        "pad": False,
    }
    return Replaceable(path, patch, tuple(node.name for node in nodes), weight, bias)


def _embedding(trace: Trace, path: str, nodes: list[fx.Node]) -> Replaceable | None:
    """Rows of a table looked up; the gradient is neither sparse nor scaled."""
    found: set[tuple[Any, ...]] = set()
    for node in nodes:
        if op_name(node) != "aten.embedding" or node.kwargs:
            return None
        args: list[Any] = [*node.args, *(-1, False, False)[len(node.args) - 2 :]]
        found.add((own_parameter(trace, path, args[0]), *args[2:]))
    ((weight, padding, scaled, sparse), *others) = found
    if others or weight is None or scaled or sparse:
        return None
    rows, size = trace.shapes[trace.canonical[weight]]
    patch = {
        "path": path,
        "module": "embedding",
        "rows": rows,
        "size": size,
        "padding": None if padding < 0 else padding,
    }
    return Replaceable(path, patch, tuple(node.name for node in nodes), weight, None)


_CONVOLUTIONS = {"aten.conv1d": 1, "aten.conv2d": 2, "aten.conv3d": 3}


def _each(value: Any, default: int, count: int) -> tuple[int, ...]:
    """One number for each axis of positions."""
    if value is None:
        return (default,) * count
    held = [value] if isinstance(value, int) else list(value)
    return tuple(held if len(held) == count else held * count)


def _flattens(node: fx.Node) -> bool:
    """All axes but the last become one."""
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return len(after) == 2 and before[-1] == after[-1]


def own_parameter(trace: Trace, path: str, value: Any) -> str | None:
    """State-dict name of a parameter that this module holds and that has no other name."""
    if not isinstance(value, fx.Node) or value.name not in trace.parameters:
        return None
    name = trace.parameters[value.name]
    if any(module_path(user) != path for user in value.users):
        return None
    return name if trace.aliases[name] == (name,) and name.rpartition(".")[0] == path else None
