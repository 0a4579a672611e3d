"""The exporters of PyTorch, and what runs their files: ``torch.export`` archives and ONNX.

An axis is asked to be dynamic and may turn out static: the exporter specialises one whose size the model's
own code fixes. That is read off the exported program and reported, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from regauge.errors import BadInput, TraceError
from regauge.exporting.subject import Axis, Subject, Tensors, reason, run, silent

FORMATS = ("onnx", "pt2")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGE = 1_500_000_000
"""Bytes of weights from which ONNX keeps them in a second file: protobuf ends at 2 GiB."""

Runner = Callable[[Tensors], dict[str, torch.Tensor]]
"""Runs a written file: inputs by name -> outputs by name, on the CPU."""


@dataclass(frozen=True)
class Dynamic:
    """An axis of an input that may have other sizes than it had in the example.

    Attributes:
        input, axis: which.
        name: axes of one name have one size.
        least, most: bounds of the exporter, which takes 0 and 1 for special. ``least`` is lower if smaller
            sizes were compared, ``most`` is None if there is no bound.
    """

    input: str
    axis: int
    name: str
    least: int
    most: int | None


@dataclass(frozen=True)
class Program:
    """A traced function that can be written.

    Attributes:
        program: by ``torch.export``.
        outputs: names of the outputs, in order.
        dynamic: axes that may vary.
        static: axes that vary between the examples, but that the model's code fixes -> their size.
    """

    program: ExportedProgram
    outputs: tuple[str, ...]
    dynamic: tuple[Dynamic, ...]
    static: Mapping[Axis, int]

    def admits(self, inputs: Tensors) -> bool:
        """Whether sizes lie within the bounds; 0 and 1 are left out by caution and admitted."""
        return all(
            (axis.least <= 2 or size >= axis.least) and (axis.most is None or size <= axis.most)
            for axis in self.dynamic
            for size in [inputs[axis.input].shape[axis.axis]]
        )


def check_packages(form: str) -> None:
    """Raise ``BadInput`` for an unknown format, or if a package that it needs is not installed."""
    if form not in FORMATS:
        raise BadInput("unknown format", expected=" or ".join(FORMATS), found=repr(form))
    missing = [name for name in PACKAGES if form == "onnx" and find_spec(name) is None]
    if missing:
        raise BadInput(
            "ONNX needs packages that are not installed",
            expected=", ".join(PACKAGES),
            found="no " + ", ".join(missing),
            way_out="pip install 'regauge[export]'",
        )


def export_program(subject: Subject) -> Program:
    """Trace with every axis dynamic that varies between the examples.

    Raises:
        TraceError: the source does not run, or ``torch.export`` refuses; ``found`` carries its reason.
    """
    outputs = tuple(run(subject.module, subject.example))
    if not outputs:
        raise TraceError("the model returns no tensor", expected="at least one", found="none")
    varying = subject.varying()
    shapes: dict[str, dict[int, Any]] = {
        name: {axis: Dim.AUTO for other, axis in varying if other == name} for name in subject.example
    }
    try:
        with torch.no_grad(), silent():
            program = torch.export.export(
                subject.module, (), dict(subject.example), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise TraceError(
            "torch.export cannot trace this model with axes of any size",
            found=reason(error),
            way_out="pass a module with example inputs that avoid data-dependent control flow",
        ) from error
    held = {
        node.name: node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    }
    dynamic: list[Dynamic] = []
    static: dict[Axis, int] = {}
    for (name, axis), label in varying.items():
        size = held[name][axis]
        fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else int(size)
        if fixed is None:
            bounds = program.range_constraints.get(size.node.expr)
            least = 1 if bounds is None else int(bounds.lower)
            most = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
            dynamic.append(Dynamic(name, axis, label, least, most))
        else:
            static[name, axis] = fixed
    return Program(program, outputs, tuple(dynamic), static)


def write(traced: Program, form: str, path: Path) -> None:
    """Write a new file, for ONNX of more than :data:`LARGE` bytes also ``NAME.data`` beside it.

    Raises:
        TraceError: the exporter to ONNX does not know an operation; ``found`` carries its reason.
    """
    if form == "pt2":
        with silent(), path.open("wb") as file:
            torch.export.save(traced.program, file)
        return
    try:
        with torch.no_grad(), silent():
            made = torch.onnx.export(
                traced.program, dynamo=True, output_names=list(traced.outputs), verbose=False, report=False
            )
    except Exception as error:
        raise TraceError(
            "the exporter to ONNX cannot express this model",
            found=reason(error.__cause__ or error),
            way_out="--format pt2",
        ) from error
    if made is None:
        raise TraceError("the exporter to ONNX returned nothing", way_out="--format pt2")
    _name_axes(made.model, traced)
    size = sum(value.nbytes for value in traced.program.state_dict.values())
    with silent():
        made.save(path, external_data=size > LARGE)


def open_runner(form: str, path: Path, outputs: tuple[str, ...]) -> Runner:
    """Load a written file with what its users load it with: ONNX Runtime, or ``torch.export.load``.

    Raises:
        TraceError: it cannot be loaded; ``found`` carries the reason.
    """
    try:
        return _onnx_runner(path, outputs) if form == "onnx" else _archive_runner(path)
    except Exception as error:
        raise TraceError(
            "what was exported cannot be loaded", found=reason(error), way_out=_other(form)
        ) from error


def _other(form: str) -> str:
    return "--format pt2, or store the weights in float32" if form == "onnx" else "--format onnx"


def _archive_runner(path: Path) -> Runner:
    with silent(), path.open("rb") as file:
        module = torch.export.load(file).module()

    def run_archive(inputs: Tensors) -> dict[str, torch.Tensor]:
        with torch.no_grad(), silent():
            return module(**inputs)

    return run_archive


def _onnx_runner(path: Path, outputs: tuple[str, ...]) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}

    def run_onnx(inputs: Tensors) -> dict[str, torch.Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items() if name in wanted}
        found = session.run(list(outputs), arrays)
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return run_onnx


def _name_axes(model: Any, traced: Program) -> None:
    """Symbols of the exporter (``s72``) become names (``batch``), wherever they stand."""
    from onnxscript import ir

    names: dict[str, str] = {}
    for item in traced.dynamic:
        value = next((value for value in model.graph.inputs if value.name == item.input), None)
        if value is not None and isinstance(value.shape[item.axis], ir.SymbolicDim):
            names.setdefault(str(value.shape[item.axis].value), item.name)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values if names else ():
        if value.shape is not None:
            value.shape = ir.Shape(
                ir.SymbolicDim(pattern.sub(lambda match: names[match[1]], str(size.value)))
                if isinstance(size, ir.SymbolicDim) and size.value is not None
                else size
                for size in value.shape
            )
