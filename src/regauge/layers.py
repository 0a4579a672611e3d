"""Stacks of layers in a traced model: numbered modules of which each adds to what the one before left.

A stack is found from the trace alone. Its layers are the modules ``PATH.0``, ``PATH.1``, …; layer i reads
the stream x and leaves x + f₁ + f₂ + …, and layer i + 1 reads just that. A layer whose terms f cannot be made
zero by parameters of its own is none, nor is one that leaves a norm of the sum (post-norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from regauge.errors import Refused
from regauge.facts import Value
from regauge.interpret import op_name
from regauge.trace import Trace, module_path, plain_path
from regauge.walk import Walk
from regauge.zeros import State, Zeros, reshaped, sums


@dataclass(frozen=True)
class Layer:
    """One layer of a stack.

    Attributes:
        path: of its module.
        nodes: its operations, in order.
        entering, leaving: the stream before and after it.
        returned: operations of the layer that something outside reads.
        writers: parameter -> what it must hold in every entry so that the layer leaves what entered.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    entering: fx.Node
    leaving: fx.Node
    returned: tuple[fx.Node, ...]
    writers: Mapping[str, float]


@dataclass(frozen=True)
class Stack:
    """Layers in order; ``path`` is that of the list that holds them."""

    path: str
    layers: tuple[Layer, ...]

    def place(self, name: str) -> tuple[int, str] | None:
        """Number of the layer and name within it, of a state-dict name; None if it is in no layer."""
        if not name.startswith(f"{self.path}."):
            return None
        number, _, leaf = name.removeprefix(f"{self.path}.").partition(".")
        return (int(number), leaf) if number.isdigit() else None

    def name(self, number: int, leaf: str) -> str:
        return f"{self.path}.{number}.{leaf}"


def find_stacks(walk: Walk) -> tuple[dict[str, Stack], dict[str, Refused]]:
    """Every outermost stack by path, and why other lists of modules are none."""
    finder = _Finder(walk)
    stacks: dict[str, Stack] = {}
    reasons: dict[str, Refused] = {}
    lists = numbered_modules(walk.trace)
    for path in sorted(lists, key=lambda path: (path.count("."), path)):
        if any(path.startswith(f"{outer}.") for outer in stacks):
            continue
        try:
            stacks[path] = finder.stack(path, lists[path])
        except Refused as refusal:
            reasons[path] = refusal
    return stacks, reasons


def choose_stack(walk: Walk, path: str | None) -> Stack:
    """The stack at a path, or the only one.

    Raises:
        Refused: there is none, or there are several and no path is given.
    """
    stacks, reasons = find_stacks(walk)
    if path is not None:
        if path in stacks:
            return stacks[path]
        if path in reasons:
            raise reasons[path]
    if path is None and len(stacks) == 1:
        return next(iter(stacks.values()))
    if stacks:
        raise Refused(
            "there are several stacks of layers" if path is None else "there is no stack of layers there",
            expected=" or ".join(f"stack={path}" for path in stacks),
            found="no option 'stack'" if path is None else path,
            way_out=f"add the option stack={next(iter(stacks))}",
        )
    if reasons:
        lists = numbered_modules(walk.trace)
        raise reasons[max(reasons, key=lambda path: (sum(map(len, lists[path].values())), path))]
    raise Refused(
        "no repeated layers here",
        expected="modules numbered in a list, each adding to what the one before left",
        found="none",
    )


def numbered_modules(trace: Trace) -> dict[str, dict[int, list[fx.Node]]]:
    """Path of a list of modules -> number -> operations in that module."""
    found: dict[str, dict[int, list[fx.Node]]] = {}
    for node in trace.graph.nodes:
        if node.op != "call_function":
            continue
        for raw, _ in (node.meta.get("nn_module_stack") or {}).values():
            path, _, number = plain_path(raw).rpartition(".")
            if path and number.isdigit():
                held = found.setdefault(path, {}).setdefault(int(number), [])
                if not held or held[-1] is not node:
                    held.append(node)
    return found


class _Finder:
    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.zeros = Zeros(walk)

    def stack(self, path: str, modules: Mapping[int, list[fx.Node]]) -> Stack:
        if sorted(modules) != list(range(len(modules))):
            raise Refused(
                "the modules of a list are not all used, each as one layer",
                expected=f"{path}.0, {path}.1, …",
                found=", ".join(f"{path}.{number}" for number in sorted(modules)),
            )
        layers: list[Layer] = []
        for number in range(len(modules)):
            before = layers[-1].leaving if layers else None
            layers.append(self._layer(f"{path}.{number}", modules[number], before))
        return Stack(path, tuple(layers))

    def _layer(self, path: str, nodes: list[fx.Node], before: fx.Node | None) -> Layer:
        inside = frozenset(nodes)
        names = frozenset(node.name for node in nodes)
        own = frozenset(
            name
            for name, names in self.walk.trace.aliases.items()
            if len(names) == 1 and name.startswith(f"{path}.")
        )
        returned = tuple(node for node in nodes if any(user not in inside for user in node.users))
        for leaving in reversed(returned):
            for entering, branches in self._chains(leaving, inside):
                if before is not None and self.value(entering) is not self.value(before):
                    continue
                if not branches or _shape(entering) != _shape(leaving):
                    continue
                writers: dict[str, float] = {}
                for branch in branches:
                    found = self._writers(branch, own, names)
                    if found is None or any(writers.get(n, held) != held for n, held in found.items()):
                        break
                    writers |= found
                else:
                    return Layer(path, tuple(nodes), entering, leaving, returned, writers)
        last = returned[-1] if returned else nodes[-1]
        raise Refused(
            "a layer cannot be made to do nothing",
            node=f"{last.name} in {module_path(last) or 'the model'}",
            expected=f"{path} to leave what entered it, plus terms that parameters of its own make zero",
            found=f"it leaves the result of {op_name(last)}"
            + (": the norm lies on the stream itself (post-norm)" if "norm" in op_name(last) else ""),
        )

    def value(self, node: fx.Node) -> object:
        return self.walk.results.get(node.name)

    def _writers(
        self, branch: fx.Node, own: frozenset[str], nodes: frozenset[str]
    ) -> dict[str, float] | None:
        value = self.value(branch)
        return self.zeros.writers(value, own, nodes) if isinstance(value, Value) else None

    def _chains(
        self, node: fx.Node, inside: frozenset[fx.Node]
    ) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
        """Ways back from a value of a layer to one outside, through sums alone: (there, the terms added)."""
        if node not in inside:
            yield node, ()
            return
        terms = sums(node)
        if terms is not None:
            for kept, added in (terms, terms[::-1]):
                if _shape(kept) == _shape(node):
                    for there, others in self._chains(kept, inside):
                        yield there, (*others, added)
            return
        source = reshaped(node)
        if source is not None:
            yield from self._chains(source, inside)
            return
        value = self.value(node)
        for source in node.all_input_nodes:
            if isinstance(value, Value) and self.value(source) is value:
                yield from self._chains(source, inside)
                return


def is_identity(walk: Walk, layer: Layer, stored: Mapping[str, float]) -> bool:
    """Whether a layer leaves exactly what entered it, x + 0 = x, when parameters hold these constants.

    Every value of the layer that is read outside must be the one that entered.
    """
    states = Zeros(walk).forward(stored)
    same = {_id(walk, layer.entering)}
    for node in layer.nodes:
        terms, source = sums(node), reshaped(node)
        if source is not None and _id(walk, source) in same:
            same.add(_id(walk, node))
        for kept, added in (terms, terms[::-1]) if terms is not None else ():
            zero = states.get(_id(walk, added)) is State.ZERO
            if zero and _id(walk, kept) in same and _shape(kept) == _shape(node):
                same.add(_id(walk, node))
    return all(_id(walk, node) in same and _shape(node) == _shape(layer.entering) for node in layer.returned)


def _id(walk: Walk, node: fx.Node) -> int:
    value = walk.results.get(node.name)
    return value.id if isinstance(value, Value) else -1


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
