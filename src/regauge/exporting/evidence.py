"""How far an exported file is from its source, and how far rounding puts the source from itself.

Three functions run on the same inputs: the source as stored, the source in true float64 (every cast to a
narrower dtype lifted) and the file. The distance of the first two is the **floor**: what rounding alone does
to the source. The file must not be much further from the source, for every output, on every input.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from regauge.certify.certificate import Subject
from regauge.certify.figures import Distance, Figures, Held, compare
from regauge.certify.measure import Verdict
from regauge.errors import BadInput, NotEquivalent
from regauge.exporting.program import Dynamic, Runner
from regauge.exporting.subject import Named, Tensors, reason, run, silent

if TYPE_CHECKING:
    from pydantic import TypeAdapter

EXPORT_VERSION = 1
FACTOR = 10.0
"""Floors that count as rounding. Both sides are about a floor away from float64, and another runtime adds in
another order and approximates other functions."""

UNIT = 2.0**-23
"""Least relative error that counts as a floor: the machine epsilon of float32 (or of float64, in float64)."""


@dataclass(frozen=True)
class OutputEvidence:
    """Figures of one output, over all inputs.

    Attributes:
        error: the source as stored against the file.
        floor: the source in float64 against the source as stored.
        float64: the source in float64 against the file.
        worst: the largest ``relative`` of ``error`` on any one set of inputs.
        allowed: ``factor`` floors, a floor being at least ``UNIT``.
    """

    error: Figures
    floor: Figures
    float64: Figures
    worst: float
    allowed: float


@dataclass(frozen=True)
class Probe:
    """One set of inputs.

    Attributes:
        shapes: input name -> shape.
        relative: relative error of the file against the source; the largest over the outputs.
    """

    shapes: dict[str, tuple[int, ...]]
    relative: float


@dataclass(frozen=True)
class ExportCertificate:
    """Evidence that an exported file computes what its source computes, on the inputs named.

    Attributes:
        verdict: ``equivalent`` (the same bits everywhere), ``equivalent within rounding`` or ``different``.
        reason: why, with the figure that decided.
        source: the model.
        format: ``onnx`` or ``pt2``.
        digest: SHA-256 of the file; of the file of weights too, one after the other, if there are two.
        bytes: of both.
        inputs: ``random``, ``text`` or ``given``; seed: of what is random.
        outputs: output name -> figures.
        probes: every set of inputs; the first is the one that was traced.
        dynamic: axes that may vary.
        static: axes that should vary but that the model's code fixes: ``input.axis`` -> size.
        factor: floors that count as rounding.
        software: package -> version.
        version: of this format.
    """

    verdict: Verdict
    reason: str
    source: Subject
    format: str
    digest: str
    bytes: int
    inputs: str
    seed: int
    outputs: dict[str, OutputEvidence]
    probes: tuple[Probe, ...]
    dynamic: tuple[Dynamic, ...]
    static: dict[str, int] = field(default_factory=dict)
    factor: float = FACTOR
    software: dict[str, str] = field(default_factory=dict)
    version: int = EXPORT_VERSION

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "ser_json_inf_nan": "strings"}

    @property
    def passed(self) -> bool:
        return self.verdict is not Verdict.DIFFERENT

    def to_json(self, indent: int | None = 2) -> str:
        """JSON with these fields; infinite figures are the string ``"Infinity"``."""
        return _adapter().dump_json(self, indent=indent).decode()

    @staticmethod
    def from_json(text: str | bytes) -> ExportCertificate:
        """Inverse of ``to_json``. Raises ``ValueError`` if it is none, or of another version."""
        found = _adapter().validate_json(text)
        if found.version != EXPORT_VERSION:
            raise ValueError(f"version {found.version}, expected {EXPORT_VERSION}")
        return found


def _adapter() -> TypeAdapter[ExportCertificate]:
    from pydantic import TypeAdapter

    return TypeAdapter(ExportCertificate)


def measure(
    module: Named, runner: Runner, probes: Sequence[Tensors], factor: float = FACTOR
) -> tuple[dict[str, OutputEvidence], tuple[Probe, ...], bool]:
    """Run all three on every set of inputs.

    Args:
        module: the source.
        runner: runs the file.
        probes: inputs by name, on the CPU.
        factor: floors that count as rounding.

    Returns:
        Figures by output, figures by inputs, and whether file and source gave the same bits everywhere.

    Raises:
        TraceError: the source does not run on some of the inputs.
        NotEquivalent: the file does not, or returns another shape.
    """
    sums: dict[str, tuple[Distance, Distance, Distance]] = {}
    worst: dict[str, float] = {}
    unit: dict[str, float] = {}
    seen: list[Probe] = []
    bits = True
    for inputs in probes:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        stored = run(module, inputs)
        with true_float64():
            exact = run(module, inputs, " in float64")
        try:
            found = runner(inputs)
            largest = 0.0
            for name, a in stored.items():
                logits = name == "logits"
                if name not in sums:
                    sums[name] = (Distance(logits), Distance(logits), Distance(logits))
                    unit[name] = min(torch.finfo(a.dtype).eps, UNIT) if a.is_floating_point() else 0.0
                error, floor, float64 = sums[name]
                here = Distance(False)
                a, b, c = (Held(value.detach()) for value in (a, found[name], exact[name]))
                compare([a], [(error, [b]), (here, [b])])
                compare([c], [(floor, [a]), (float64, [b])])
                bits = bits and here.bits and stored[name].dtype == found[name].dtype
                worst[name] = max(worst.get(name, 0.0), here.figures().relative)
                largest = max(largest, here.figures().relative)
        except (BadInput, RuntimeError, ValueError, KeyError, AssertionError) as failure:
            raise _does_not_run(shapes, failure) from failure
        except Exception as failure:
            if type(failure).__module__.startswith("onnxruntime"):
                raise _does_not_run(shapes, failure) from failure
            raise
        seen.append(Probe(shapes, largest))
    figures = {name: tuple(distance.figures() for distance in three) for name, three in sums.items()}
    evidence = {
        name: OutputEvidence(a, b, c, worst[name], factor * max(b.relative, unit[name]))
        for name, (a, b, c) in figures.items()
    }
    return evidence, tuple(seen), bits


def judge(outputs: Mapping[str, OutputEvidence], bits: bool, factor: float = FACTOR) -> tuple[Verdict, str]:
    """The verdict, and the reason for it in one sentence: see :class:`ExportCertificate`."""
    for name, output in outputs.items():
        if not all(figures.finite for figures in (output.error, output.floor, output.float64)):
            return Verdict.DIFFERENT, f"{name} is NaN, or infinite in one of the two only"
        if not output.worst <= output.allowed:
            return (
                Verdict.DIFFERENT,
                f"relative error {output.worst:.2e} of {name}, more than {output.allowed:.2e} ="
                f" {factor:g} times what rounding does to the source",
            )
    if bits:
        return Verdict.EQUIVALENT, "the outputs are the same bits as the source's"

    def share(item: tuple[str, OutputEvidence]) -> float:
        return item[1].worst / item[1].allowed if item[1].allowed else 0.0

    name, output = max(outputs.items(), key=share)
    times = factor * share((name, output))
    return (
        Verdict.WITHIN_ROUNDING,
        f"relative error of {name} at most {output.worst:.2e} = {times:.2g} times what rounding does to the"
        f" source, at most {factor:g}",
    )


class _WideOperands(TorchFunctionMode):
    """Functions get float64 (complex128) operands: some compare dtypes before they come to an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Wide(TorchDispatchMode):
    """Every operation runs in float64 (complex128), whatever dtypes its operands have or it asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return tree_map(_widened, func(*args, **kwargs))


_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    if isinstance(value, torch.Tensor) and value.dtype in _WIDER:
        return value.to(_WIDER[value.dtype])
    return value


@contextmanager
def true_float64() -> Generator[None]:
    """While open, modules compute in float64: parameters are widened as they are read, casts are lifted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with silent(), torch.backends.mkldnn.flags(enabled=False), torch.no_grad(), _Wide(), _WideOperands():
            yield
    finally:
        torch.set_default_dtype(before)


def _does_not_run(shapes: Mapping[str, tuple[int, ...]], error: Exception) -> NotEquivalent:
    return NotEquivalent(
        "what was exported does not run on inputs that the source takes",
        expected=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
        found=reason(error),
    )
