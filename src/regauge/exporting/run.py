"""The verb: trace, write beside the target, certify what was written, and only then let it appear."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from regauge.certify.certificate import Subject as Source
from regauge.certify.certificate import software
from regauge.errors import BadInput, NotEquivalent
from regauge.exporting.evidence import FACTOR, ExportCertificate, judge, measure
from regauge.exporting.program import PACKAGES, Dynamic, check_packages, export_program, open_runner, write
from regauge.exporting.subject import Subject, Tensors, from_directory, from_module
from regauge.sources import resolve
from regauge.stages import Clock, Progress, silent


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        files: what was written: the file, and the one of its weights if ONNX needed a second.
        certificate: evidence that it computes what the source computes.
        seconds: time by stage.
    """

    files: tuple[Path, ...]
    certificate: ExportCertificate
    seconds: Mapping[str, float]


def export(
    source: str | Path | nn.Module,
    out: str | Path,
    *,
    format: str = "onnx",
    inputs: Any = None,
    probes: Sequence[Any] | None = None,
    text: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a model as ONNX or as a ``torch.export`` archive, and certify what was written.

    The file is loaded again, run on inputs of several sizes, most of them unknown to the exporter, and
    compared with the source as stored. It appears at ``out`` only if they agree within rounding. What is
    exported takes its inputs by the names of the source's ``forward``, and returns ``logits`` if the source
    does, else every tensor that it returns; key-value caches are off.

    Args:
        source: a directory (stock, or with its structure rewritten) or whatever else :func:`regauge.rewrite`
            takes, exported in its stored dtype with ``input_ids``, ``attention_mask``, features … as its
            ``forward`` asks for, batch and length dynamic; or a module on the CPU.
        out: file that does not exist yet.
        format: ``onnx`` (extra ``export``) or ``pt2``.
        inputs: of a module: keyword inputs as a mapping, or positional ones; tensors of any shape and dtype,
            no axis that is to be dynamic of size 0 or 1.
        probes: of a module: further inputs of other sizes. Axes that differ become dynamic, and these are
            compared on besides. Default: the rows of ``inputs``, one and five of them, where that runs.
        text: of a directory: compare on the tokens of this UTF-8 file, not on random ones.
        seed: of random inputs.
        progress: see :data:`regauge.stages.Progress`.

    Raises:
        BadInput: ``out`` exists, an unknown format, a missing package, or unusable inputs.
        CheckpointError: a damaged source, or one that lacks tensors.
        TraceError: an exporter refuses the model; its reason is in ``found``.
        NotEquivalent: the file is not the same function, or does not run. Nothing is left in any case.
    """
    check_packages(format)
    target = Path(out).absolute()
    _check_place(target, format)
    tell = progress or silent
    clock = Clock()
    tell("loading", 0, 1)
    if isinstance(source, nn.Module):
        if text is not None:
            raise BadInput("a module is compared on the inputs given", found="text", way_out="probes=[...]")
        flags = {module: module.training for module in source.modules()}
        make = lambda: from_module(source, inputs, probes)  # noqa: E731
    else:
        if inputs is not None or probes is not None:
            raise BadInput("inputs are for modules; a directory's are made from its config", way_out="text=")
        flags = {}
        path = resolve(source)
        make = lambda: from_directory(path, None if text is None else Path(text), seed)  # noqa: E731
    try:
        for module in flags:
            module.training = False
        return _export(make(), target, format, seed, tell, clock)
    finally:
        for module, flag in flags.items():
            module.training = flag


def _export(
    subject: Subject, target: Path, form: str, seed: int, tell: Progress, clock: Clock
) -> ExportResult:
    clock.lap("load")
    tell("tracing", 0, 1)
    traced = export_program(subject)
    clock.lap("trace")
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.regauge-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        tell("writing", 0, 1)
        try:
            write(traced, form, staging / target.name)
        except OSError as error:
            raise _unwritable(target, error) from error
        clock.lap("write")
        tell("certifying", 0, 1)
        runner = open_runner(form, staging / target.name, traced.outputs)
        others = subject.probes(tuple(traced.static))
        probes = [subject.example, *(one for one in others if traced.admits(one))]
        outputs, seen, bits = measure(subject.module, runner, probes)
        del runner
        verdict, why = judge(outputs, bits)
        clock.lap("certify")
        staged = sorted(staging.iterdir(), key=lambda file: file.name != target.name)
        certificate = ExportCertificate(
            verdict=verdict,
            reason=why,
            source=_source(subject),
            format=form,
            digest=_digest(staged),
            bytes=sum(file.stat().st_size for file in staged),
            inputs=subject.drawn,
            seed=seed,
            outputs=outputs,
            probes=seen,
            dynamic=tuple(_compared(axis, probes) for axis in traced.dynamic),
            static={f"{name}.{axis}": size for (name, axis), size in traced.static.items()},
            factor=FACTOR,
            software=software() | {n: metadata.version(n) for n in PACKAGES if form == "onnx"},
        )
        if not certificate.passed:
            raise NotEquivalent(
                f"what was exported is not the same function: {why}",
                expected="equal to the source within rounding",
                found=", ".join(f"{output.worst:.2e} of {name}" for name, output in outputs.items()),
                way_out="the other format, or report the model",
            )
        _commit(staged, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    clock.lap("commit")
    files = tuple(target.parent / file.name for file in staged)
    return ExportResult(files, certificate, clock.seconds)


def _compared(axis: Dynamic, probes: Sequence[Tensors]) -> Dynamic:
    return replace(axis, least=min(axis.least, *(inputs[axis.input].shape[axis.axis] for inputs in probes)))


def _check_place(target: Path, form: str) -> None:
    for path in (target, target.with_name(target.name + ".data"))[: 1 + (form == "onnx")]:
        if os.path.lexists(path):
            raise BadInput(f"{path} exists already", expected="a path of a new file", way_out="another OUT")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent} is not a directory", way_out="make it first")


def _commit(staged: Sequence[Path], target: Path) -> None:
    """Make the files durable and rename them, the one that others open last."""
    _check_place(target, "onnx" if len(staged) > 1 else "")
    try:
        for file in reversed(staged):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            os.rename(file, target.parent / file.name)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot write {target}", found=error.strerror or str(error), way_out="another OUT")


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _source(subject: Subject) -> Source:
    dtypes = Counter[str]()
    for parameter in subject.module.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return Source(
        subject.name, subject.architecture, subject.digest, sum(dtypes.values()), dict(sorted(dtypes.items()))
    )
