"""Modules whose code takes the same path whatever comes in, so that one trace shows all they do.

A class is judged by its code, never by its name: ``forward``, and the methods of ``self`` that it calls, must
consist of assignments of simple names and one ``return``, in which nothing is called but the tensor methods
and functions listed here and further such methods, and nothing of ``self`` is read but parameters and plain
numbers. The source is only believed if it compiles to the code that runs. What is not understood is refused.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

METHODS = frozenset(
    ("add", "bfloat16", "div", "double", "float", "half", "mean", "mul", "pow", "reciprocal", "rsqrt", "sqrt",
     "square", "to", "type", "type_as")
)  # fmt: skip
"""Methods of tensors that give a tensor, the same way for all values and sizes."""
FUNCTIONS = (
    *(torch.add, torch.div, torch.mean, torch.mul, torch.pow, torch.reciprocal, torch.rsqrt, torch.sqrt),
    *(torch.square, functional.rms_norm, torch.rms_norm),
)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd)
_OWN = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "_slow_forward")


Judged = dict[type[nn.Module], frozenset[str] | None]


class Branches(Exception):
    """Code that may do another thing another time, or that is not understood."""


def straight_modules(model: nn.Module) -> frozenset[str]:
    """Paths of the modules of ``model`` whose code is straight, that have one path and no hooks."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
    judged: Judged = {}
    return frozenset(
        names[0]
        for key, names in paths.items()
        if len(names) == 1 and names[0] and is_straight(modules[key], judged)
    )


def is_straight(
    module: nn.Module, judged: dict[type[nn.Module], frozenset[str] | None] | None = None
) -> bool:
    """Whether this module does the same to whatever it is given: one tensor in, one tensor out.

    Args:
        module: the module.
        judged: what is known of classes; those met are added.
    """
    kind = type(module)
    hooks = [value for name, value in vars(module).items() if name.endswith("_hooks")]
    if any(hooks) or vars(module)["_modules"] or "forward" in vars(module):
        return False
    judged = {} if judged is None else judged
    if kind not in judged:
        judged[kind] = _attributes(kind)
    reads = judged[kind]
    return reads is not None and all(_is_plain(module, name) for name in reads)


def _is_plain(module: nn.Module, name: str) -> bool:
    """A parameter or a number that belongs to the module, whatever its class would say."""
    if inspect.getattr_static(type(module), name, None) is not None:
        return False
    own = vars(module)
    if name in own["_parameters"]:
        return type(own["_parameters"][name]) is nn.Parameter
    return type(own.get(name)) in (int, float)


def _attributes(kind: type[nn.Module]) -> frozenset[str] | None:
    """Attributes of ``self`` that a class reads in ``forward``; None if its code is not straight."""
    if any(inspect.getattr_static(kind, name, None) is not vars(nn.Module).get(name) for name in _OWN):
        return None
    if kind.__getattribute__ is not object.__getattribute__:
        return None
    found: set[str] = set()
    try:
        _method(kind, "forward", found, ())
    except Branches:
        return None
    return frozenset(found)


def _method(kind: type, name: str, reads: set[str], callers: tuple[str, ...]) -> None:
    """Check a method ``(self, one or more tensors)`` of a class, and what it calls."""
    function = inspect.getattr_static(kind, name, None)
    if type(function) is not FunctionType or name in callers or hasattr(function, "__wrapped__"):
        raise Branches(name)
    definition = _definition(function)
    given = definition.args
    rest = (given.vararg, given.kwarg, *given.kwonlyargs, *given.defaults, *given.posonlyargs)
    names = [argument.arg for argument in given.args]
    if any(rest) or len(names) < 2 or (name == "forward" and len(names) != 2):
        raise Branches(f"{name} takes other arguments than tensors")
    _Body(kind, function, names, reads, (*callers, name)).check(definition.body)


def _definition(function: FunctionType) -> ast.FunctionDef:
    """The source of a function, if it is what the function runs."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise Branches("no source") from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or function.__closure__:
        raise Branches("not a plain function")
    flags = function.__code__.co_flags & _FUTURE
    for imported in ([], [ast.Import([ast.alias(name) for name in sorted(function.__code__.co_names)])]):
        # A call through an imported module compiles to other instructions than one through another name.
        whole = ast.fix_missing_locations(
            ast.Module([*imported[: bool(function.__code__.co_names)], definition], [])
        )
        compiled = compile(whole, "<source>", "exec", flags=flags, dont_inherit=True)
        if any(isinstance(code, CodeType) and _same(code, function.__code__) for code in compiled.co_consts):
            return definition
    raise Branches("the source is not what runs")


_FUTURE = 0x1000000
"""``from __future__ import annotations``."""


def _same(a: CodeType, b: CodeType) -> bool:
    parts = ("co_code", "co_consts", "co_names", "co_varnames", "co_argcount", "co_freevars", "co_cellvars")
    return all(repr(getattr(a, part)) == repr(getattr(b, part)) for part in parts)


class _Body:
    """The statements of one method; tensors, numbers and dtypes are told apart by where they come from."""

    def __init__(
        self, kind: type, function: FunctionType, names: list[str], reads: set[str], callers: tuple[str, ...]
    ) -> None:
        self.kind, self.function, self.reads, self.callers = kind, function, reads, callers
        self.own, *tensors = names
        self.known = set(tensors)

    def check(self, body: list[ast.stmt]) -> None:
        for number, line in enumerate(body):
            if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and number == 0:
                continue
            if isinstance(line, ast.Return) and line.value is not None and number == len(body) - 1:
                self.value(line.value)
                return
            if not (isinstance(line, ast.Assign) and len(line.targets) == 1):
                raise Branches(ast.unparse(line))
            self.value(line.value)
            target = line.targets[0]
            if not isinstance(target, ast.Name) or target.id == self.own:
                raise Branches(ast.unparse(line))
            self.known.add(target.id)
        raise Branches("nothing is returned")

    def value(self, node: ast.expr) -> None:
        if isinstance(node, ast.Constant):
            good = type(node.value) in (int, float, bool)
        elif isinstance(node, ast.Name):
            good = node.id in self.known
        elif isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
            self.value(node.left)
            self.value(node.right)
            good = True
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, _OPERATORS):
            self.value(node.operand)
            good = True
        elif isinstance(node, ast.Attribute):
            good = self.attribute(node)
        elif isinstance(node, (ast.Tuple, ast.List)):
            good = all(_is_number(item) for item in node.elts)
        else:
            good = isinstance(node, ast.Call) and self.call(node)
        if not good:
            raise Branches(ast.unparse(node))

    def attribute(self, node: ast.Attribute) -> bool:
        """``self.weight``, ``x.dtype``, ``torch.float32``; never a size, which differs between inputs."""
        if isinstance(node.value, ast.Name) and node.value.id == self.own:
            self.reads.add(node.attr)
            return True
        found = self.outside(node)
        if found is not None:
            return isinstance(found, torch.dtype)
        self.value(node.value)
        return node.attr == "dtype"

    def call(self, node: ast.Call) -> bool:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.value(argument)
        if any(keyword.arg is None for keyword in node.keywords) or not isinstance(node.func, ast.Attribute):
            return False
        if isinstance(node.func.value, ast.Name) and node.func.value.id == self.own:
            _method(self.kind, node.func.attr, self.reads, self.callers)
            return True
        found = self.outside(node.func)
        if found is not None:
            return any(found is function for function in FUNCTIONS)
        self.value(node.func.value)
        return node.func.attr in METHODS

    def outside(self, node: ast.Attribute) -> Any:
        """What a dotted name that begins with a module of torch stands for; None for any other."""
        parts = list(_dotted(node))
        if not parts or parts[0] in self.known or parts[0] == self.own:
            return None
        found: Any = self.function.__globals__.get(parts[0])
        if not any(found is module for module in (torch, nn, functional)):
            raise Branches(parts[0])
        for part in parts[1:]:
            found = getattr(found, part, None)
        return found


def _dotted(node: ast.expr) -> Iterator[str]:
    """Names of ``a.b.c``, nothing if it is something else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        yield from (node.id, *reversed(names))


def _is_number(node: ast.expr) -> bool:
    node = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    return isinstance(node, ast.Constant) and type(node.value) is int
