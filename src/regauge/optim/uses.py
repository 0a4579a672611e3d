"""What every parameter of a traced model is used for: looked up, multiplied, added, contracted with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx

from regauge.interpret import op_name
from regauge.trace import Trace


class Use(StrEnum):
    """How a value that depends on parameters alone meets one that depends on the inputs."""

    LOOKUP = "looked up"
    MATRIX = "contracted with"
    SCALE = "multiplied entry by entry"
    SHIFT = "added"
    OTHER = "used otherwise"


class Reach(StrEnum):
    """Where a value goes next, through copies, rearrangements, constant factors and added parameters."""

    LINEAR = "a linear map"
    SCORES = "a product of two activations"
    STREAM = "a sum of two activations"
    OUTPUT = "the output"
    OTHER = "another operation"


@dataclass(frozen=True)
class Used:
    use: Use
    node: fx.Node


_CONTRACTS = {"aten.linear", "aten.mm", "aten.matmul", "aten.bmm", "aten.mv", "aten.addmm", "aten.baddbmm",
              "aten.einsum", "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution",
              "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"}  # fmt: skip
_SHIFTS = {"aten.linear": 2, "aten.conv1d": 2, "aten.conv2d": 2, "aten.conv3d": 2, "aten.convolution": 2,
           "aten.conv_transpose1d": 2, "aten.conv_transpose2d": 2, "aten.conv_transpose3d": 2,
           "aten.addmm": 0, "aten.baddbmm": 0, "aten.layer_norm": 3, "aten.native_layer_norm": 3,
           "aten.group_norm": 3, "aten.batch_norm": 2, "aten.instance_norm": 2,
           "aten._native_batch_norm_legit_no_training": 2}  # fmt: skip
_GAINS = {"aten.layer_norm": 2, "aten.native_layer_norm": 2, "aten.rms_norm": 2, "aten._fused_rms_norm": 2,
          "aten.group_norm": 2, "aten.batch_norm": 1, "aten.instance_norm": 1,
          "aten._native_batch_norm_legit_no_training": 1}  # fmt: skip
_LOOKUPS = {"aten.embedding", "aten.index_select", "aten.index", "aten.embedding_bag"}
_PRODUCTS = {"aten.mul", "aten.multiply", "aten.div", "aten.true_divide"}
_SUMS = {"aten.add", "aten.sub", "aten.rsub"}
_CARRIES = {"aten.contiguous", "aten.clone", "aten.alias", "aten.detach", "aten.to", "aten._to_copy",
            "aten.type_as", "aten.dropout", "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten",
            "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.permute", "aten.transpose", "aten.t",
            "aten.mT", "aten.expand", "aten.slice", "aten.select", "aten.split", "aten.split_with_sizes",
            "aten.chunk", "aten.unbind", "aten.neg", "aten.repeat", "getitem"}  # fmt: skip
_ENTRYWISE = {"aten.tanh", "aten.mul", "aten.div", "aten.add", "aten.sub", "aten.clamp"}
_JOINS = {"aten.cat", "aten.stack"}
_NOTHING = {"aten._assert_tensor_metadata", "aten._assert_async"}


class Uses:
    """Uses of the parameters of one trace."""

    def __init__(self, traced: Trace) -> None:
        self.trace = traced
        self._live = _live(traced)
        self._outputs = set(traced.outputs)
        self.found: dict[str, list[Used]] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder" and node.name in traced.parameters:
                self.found.setdefault(traced.parameters[node.name], []).extend(self._of(node))

    def of(self, name: str) -> list[Used]:
        """Uses of a parameter, in the order of the graph."""
        return self.found.get(name, [])

    def _of(self, start: fx.Node) -> list[Used]:
        """Follow values that depend on parameters alone until they meet others."""
        found: dict[tuple[Use, fx.Node], None] = {}
        seen, queue = {start}, [start]
        while queue:
            node = queue.pop(0)
            if node in self._outputs:
                found[Use.OTHER, node] = None
            for user in node.users:
                if user.op != "call_function" or op_name(user) in _NOTHING:
                    continue
                if user in self._live or op_name(user) in _LOOKUPS:
                    found[_use(node, user), user] = None
                elif user not in seen:
                    seen.add(user)
                    queue.append(user)
        return [Used(use, node) for use, node in found]

    def reaches(self, start: fx.Node) -> set[Reach]:
        """Where the result of an operation goes. A sum of rearrangements of it alone, as in a rotary
        embedding, still carries it."""
        found: set[Reach] = set()
        carried = {start}
        for node in self.trace.graph.nodes:
            if node.op != "call_function" or op_name(node) in _NOTHING:
                continue
            if not any(source in carried for source in node.all_input_nodes):
                continue
            reach = self._reach(node, carried)
            if reach is None:
                carried.add(node)
            else:
                found.add(reach)
        if any(node in self._outputs for node in carried):
            found.add(Reach.OUTPUT)
        return found

    def _reach(self, node: fx.Node, carried: set[fx.Node]) -> Reach | None:
        name = op_name(node)
        live = [source for source in node.all_input_nodes if source in self._live]
        others = any(source not in carried for source in live)
        if name in _CONTRACTS:
            return Reach.SCORES if len(live) > 1 else Reach.LINEAR
        if name == "aten.scaled_dot_product_attention":
            return Reach.SCORES
        if name in _SUMS and others:
            return Reach.STREAM
        if name in _CARRIES or (name in _SUMS | _JOINS and not others):
            return None
        return None if name in _PRODUCTS and len(live) == 1 else Reach.OTHER

    def gives_output(self, node: fx.Node) -> bool:
        """Whether the result of an operation is the output, up to entrywise functions of it alone."""
        if node in self._outputs:
            return True
        for user in node.users:
            name = op_name(user) if user.op == "call_function" else ""
            alone = not any(other is not node and other in self._live for other in user.all_input_nodes)
            if name in _CARRIES | _ENTRYWISE and alone and self.gives_output(user):
                return True
        return False

    def embedding(self, name: str) -> bool:
        """Whether a parameter is a table that is looked up, or the matrix that gives the logits."""
        return any(
            used.use is Use.LOOKUP
            or (used.use is Use.MATRIX and len(self.trace.shapes[name]) > 1 and self.gives_output(used.node))
            for used in self.of(name)
        )


def _use(node: fx.Node, user: fx.Node) -> Use:
    name = op_name(user)
    places = [i for i, arg in enumerate(user.args) if arg is node]
    if name in _LOOKUPS:
        return Use.LOOKUP if 0 in places else Use.OTHER
    if _SHIFTS.get(name) in places:
        return Use.SHIFT
    if name in _CONTRACTS:
        return Use.MATRIX
    if _GAINS.get(name) in places or name in _PRODUCTS:
        return Use.SCALE
    return Use.SHIFT if name in _SUMS else Use.OTHER


def _live(traced: Trace) -> set[fx.Node]:
    """Operations that depend on floating-point values which are not parameters or constants alone: on the
    inputs, or on what was looked up."""
    live: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            if node.name in traced.inputs and isinstance(node.meta.get("val"), torch.Tensor):
                live.add(node)
        elif node.op == "call_function" and (
            any(source in live for source in node.all_input_nodes) or op_name(node) in _LOOKUPS
        ):
            live.add(node)
    return live
