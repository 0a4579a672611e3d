"""What is exported: a model in eval mode that takes and returns named tensors, and inputs for it.

Which axes may vary is read off examples: an axis whose size is not the same in all of them.
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regauge.certify.given import text_batches, token_ids
from regauge.certify.sides import ModuleWeights
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError, TraceError
from regauge.inputs import example_inputs
from regauge.trace import named_tensors

Tensors = Mapping[str, torch.Tensor]
Axis = tuple[str, int]
"""Name of an input and index of one of its axes."""

BASE = (3, 17)
"""Batch and length of the example that is traced: no 0 or 1, which ``torch.export`` takes for constants."""

SIZES = ((1, 1), (2, 48), (4, 31))
"""Batches and lengths to compare on besides; none was seen by the exporter."""

EXPERTS = "batched_mm"
"""Implementation of expert layers where the model offers a choice: every runtime and dtype has it."""

MASK, IDS, DECODER = "attention_mask", "input_ids", "decoder_input_ids"


class Named(nn.Module):
    """Runs a model on keyword tensors and returns the tensors that define its function, by name.

    As in :func:`regauge.trace.trace` a field ``logits`` is the function if there is one; otherwise every
    tensor that the model returns is.

    Args:
        model: the model.
        fixed: keyword inputs that are no tensors and stay as they are.
    """

    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.fixed = dict(fixed)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        found = dict(named_tensors(self.model(**inputs, **self.fixed)))
        return {"logits": found["logits"]} if "logits" in found else found


@dataclass(frozen=True)
class Subject:
    """A function to export.

    Attributes:
        name: last part of its path, or the class of a module.
        architecture: class of the model.
        digest: SHA-256 of the weights, as in a certificate.
        module: takes the inputs by keyword, returns name -> tensor.
        example: input name -> tensor on the CPU, for the exporter.
        probes: given the axes that could not be made dynamic, further inputs to compare on, none of them
            of the sizes of ``example``.
        drawn: ``random``, ``text`` or ``given``: where the values of the inputs come from.
    """

    name: str
    architecture: str
    digest: str
    module: Named
    example: Tensors
    probes: Callable[[Collection[Axis]], Sequence[Tensors]]
    drawn: str

    def varying(self) -> dict[Axis, str]:
        """Axes whose sizes differ between the examples, named; axes of the same sizes share a name."""
        everything = (self.example, *self.probes(()))
        axes = [(name, axis) for name, value in self.example.items() for axis in range(value.dim())]
        names: dict[tuple[int, ...], str] = {}
        found: dict[Axis, str] = {}
        for name, axis in sorted(axes, key=lambda item: item[1]):
            sizes = tuple(inputs[name].shape[axis] for inputs in everything)
            if len(set(sizes)) > 1:
                kind = "length" if axis else "batch"
                count = 1 + sum(other.startswith(kind) for other in names.values())
                found[name, axis] = names.setdefault(sizes, kind if count == 1 else f"{kind}_{count}")
        return found


def from_directory(path: Path, text: Path | None, seed: int) -> Subject:
    """A Hugging Face directory, stock or with its structure rewritten, loaded in its stored dtype.

    Raises:
        BadInput, CheckpointError: it cannot be loaded as it is, or the text cannot be used.
        TraceError: an input that the model requires cannot be made.
    """
    from regauge.api import load

    with Checkpoint.open(path) as files, silent():
        digest = files.digest()
        model, report = load(path, output_loading_info=True)
    lacking = sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"]))
    if lacking:
        raise CheckpointError(
            "the checkpoint lacks tensors that the model needs",
            parameter=lacking[0],
            found=f"{len(lacking)} such",
            way_out="save the model again, or correct config.json",
        )
    for config in {id(held): held for m in model.modules() if (held := getattr(m, "config", None))}.values():
        if hasattr(config, "use_cache"):
            config.use_cache = False  # no cache among the outputs
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = EXPERTS

    def make(batch: int, length: int) -> dict[str, torch.Tensor]:
        found = example_inputs(model, model.config, batch=batch, length=length, device="cpu", seed=seed)
        if IDS in found and MASK in inspect.signature(model.forward).parameters:
            mask = torch.ones_like(found[IDS])
            mask[1:, mask.shape[1] // 2 + 1 :] = 0  # all but the first row are padded on the right
            found[MASK] = mask
        if DECODER in found:  # of a length of its own, unless asked for less
            found[DECODER] = found[DECODER][:, :length]
        return found

    base = make(*BASE)
    ids = None if text is None else token_ids(path, text, BASE[0] * BASE[1] + sum(b * n for b, n in SIZES))

    def probe(batch: int, length: int, still: Collection[Axis], skip: int) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        rows = BASE[0] if any(axis == 0 for _, axis in still) else batch
        for name in base:
            fixed = any(other == name and axis > 0 for other, axis in still)
            found[name] = make(rows, BASE[1] if fixed else length)[name]
        if ids is not None:
            shapes = {name: tuple(value.shape) for name, value in found.items() if name != MASK}
            found |= text_batches(ids[skip % len(ids) :] + ids[: skip % len(ids)], shapes, 1)[0]
        return found

    def probes(still: Collection[Axis]) -> list[dict[str, torch.Tensor]]:
        return [probe(b, n, still, 7 * i) for i, (b, n) in enumerate(SIZES)]

    drawn = "random" if ids is None else "text"
    kind = type(model).__name__
    return Subject(path.name, kind, digest, _named(model.eval(), base), base, probes, drawn)


def from_module(module: nn.Module, inputs: Any, probes: Sequence[Any] | None) -> Subject:
    """A plain module, on the inputs given.

    Args:
        module: on the CPU.
        inputs: example inputs: keyword inputs as a mapping, or positional ones.
        probes: further inputs of the same form and of other sizes. Default: the rows of ``inputs``, fewer and
            more of them, if all tensors have equally many and the module takes other numbers.

    Raises:
        BadInput: inputs that are no tensors, or do not fit the signature of ``forward``.
    """
    everything = _keywords(module, inputs)
    example = {name: value for name, value in everything.items() if isinstance(value, torch.Tensor)}
    fixed = {name: value for name, value in everything.items() if name not in example}
    if not example or any(isinstance(value, (Mapping, list, tuple)) for value in fixed.values()):
        raise BadInput(
            "only tensors, and values that stay as they are, can be inputs",
            expected="at least one tensor, and none inside a list or mapping",
            found=", ".join(f"{name}: {type(value).__name__}" for name, value in everything.items())
            or "none",
        )
    named = _named(module, example, fixed)
    given: list[dict[str, torch.Tensor]] = []
    for other in probes or ():
        values = _keywords(module, other)
        given.append({name: values[name] for name in example if name in values})
        if [v.dim() for v in given[-1].values()] != [v.dim() for v in example.values()]:
            raise BadInput("a probe has other inputs, or inputs of another rank, than the example")
    if probes is None:
        given = [other for n in (1, 5) if (other := _rows(example, n)) is not None and _runs(named, other)]

    def kept(still: Collection[Axis]) -> list[dict[str, torch.Tensor]]:
        return [
            other
            for other in given
            if all(other[name].shape[axis] == example[name].shape[axis] for name, axis in still)
        ]

    kind = type(module).__name__
    return Subject(kind, kind, ModuleWeights.of(module).digest(), named, example, kept, "given")


@contextmanager
def silent() -> Generator[None]:
    """No warnings, log lines or progress bars of the libraries used; all as before afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    with warnings.catch_warnings(), ExitStack() as after:
        warnings.simplefilter("ignore")
        for logger in loggers:
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if "transformers" in sys.modules:
            from transformers.utils import logging as hf

            after.callback(hf.set_verbosity, hf.get_verbosity())
            hf.set_verbosity_error()
            if hf.is_progress_bar_enabled():
                after.callback(hf.enable_progress_bar)
                hf.disable_progress_bar()
        yield


def run(module: nn.Module, inputs: Tensors, where: str = "") -> dict[str, torch.Tensor]:
    """Outputs of the module by name, without gradients.

    Raises:
        TraceError: it does not run on these inputs; ``found`` has the reason.
    """
    try:
        with torch.no_grad(), silent():
            return module(**inputs)
    except Exception as error:
        raise TraceError(
            f"the source does not run{where} on its example inputs",
            expected=", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items()),
            found=reason(error),
        ) from error


def reason(error: BaseException) -> str:
    """Class and first lines of an error of another library."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:4])[:400]}"


def _named(model: nn.Module, inputs: Tensors, fixed: Mapping[str, Any] | None = None) -> Named:
    """:class:`Named` with a signature of its own, which names the inputs of what is exported."""

    def forward(self: Named, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return Named.forward(self, **inputs)

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Exported", (Named,), {"forward": forward})(model, fixed or {})


def _keywords(module: nn.Module, inputs: Any) -> dict[str, Any]:
    if inputs is None:
        raise BadInput("a module needs example inputs", expected="inputs={...} or inputs=(...)", found="none")
    if isinstance(inputs, Mapping):
        return dict(inputs)
    args = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    try:
        bound = inspect.signature(module.forward).bind(*args)
    except TypeError as error:
        raise BadInput("the inputs do not fit the module's forward", found=str(error)) from error
    kinds = {name: inspect.signature(module.forward).parameters[name].kind for name in bound.arguments}
    if any(kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds.values()):
        raise BadInput(
            "the inputs of the module have no names",
            expected="a forward whose parameters can be given by keyword",
            found=", ".join(f"{name}: {kind.description}" for name, kind in kinds.items()),
        )
    return dict(bound.arguments)


def _rows(example: Tensors, count: int) -> dict[str, torch.Tensor] | None:
    """``count`` rows taken from the example in turn, beginning with the last; None if not all are rows."""
    sizes = {value.shape[0] if value.dim() else 0 for value in example.values()}
    if len(sizes) != 1 or sizes & {0, count}:
        return None
    (size,) = sizes
    index = (torch.arange(count) + size - 1) % size
    return {name: value[index] for name, value in example.items()}


def _runs(module: nn.Module, inputs: Tensors) -> bool:
    try:
        run(module, inputs)
    except TraceError:
        return False
    return True
