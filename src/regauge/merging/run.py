"""Merge directories: align, combine tensor by tensor, measure, and only then let the result appear."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regauge.certify import Certificate, certify
from regauge.certify.certificate import software
from regauge.checkpoint import Checkpoint, all_finite
from regauge.comparing.calibration import calibration
from regauge.cuts import measured
from regauge.errors import BadInput, CheckpointError, RegaugeError
from regauge.hf import dtype_config, read_config
from regauge.merging.barrier import POINTS, Barrier, line
from regauge.merging.inputs import check_pair, check_values, rows_of
from regauge.merging.losses import TOKENS, Scorer
from regauge.merging.methods import METHODS, Block, Settings, settings_of
from regauge.merging.result import Merged, Source
from regauge.shards import DTYPES
from regauge.sources import resolve
from regauge.stages import Clock, Progress, silent
from regauge.write import StagedOutput, check_free


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    density: float | None = None,
    align: bool = True,
    dtype: torch.dtype | None = None,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    barrier: bool = False,
    seed: int = 0,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Merge models and write the result with the tensors, the files and the configuration of the first.

    Computed in float64 in blocks of rows, rounded once. With a base model everything is moved into the gauge
    of the base, and the result has its files; else into that of the first model.

    Args:
        models: sources, see :func:`regauge.sources.resolve`; never written to.
        out: directory that does not exist yet.
        method: a name of :data:`regauge.merging.METHODS`.
        base: what the models were fine-tuned from, for methods that need it.
        weights: one for each model; default 1.
        scale: λ, default 1.
        density: share of the entries of a task vector that are kept, for methods that drop some.
        align: whether to move the others into the gauge of the first; else tensors are added as they are.
        dtype: storage of floating tensors; None keeps each as the first model stores it.
        text: a UTF-8 file; the result and every model are scored on it, and the result is measured on it.
        tokens: of the text, at least.
        barrier: whether to score the straight line between two models; needs ``text``.
        seed: of what is drawn.
        max_memory: bytes that measuring stays near.
        progress: called with (what is being done, done, total).

    Raises:
        BadInput, CheckpointError: tensors of other names or shapes, NaN, options that say nothing.
        Refused: the models cannot be aligned, or do different things with their tensors.
        NotEquivalent: a model that was aligned is no longer the same function; nothing is kept.
    """
    settings = settings_of(
        method,
        len(models),
        weights=weights,
        scale=scale,
        density=density,
        based=base is not None,
        seed=seed,
    )
    paths, target = [resolve(model) for model in models], Path(out).absolute()
    whole = [resolve(base), *paths] if base is not None else paths
    _check_asked(target, text, barrier, len(models), base is not None)
    scorer = None if text is None else Scorer(whole[0], text, tokens=tokens, seed=seed, max_memory=max_memory)
    job = _Job(settings, whole, base is not None, seed, progress or silent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.regauge-aligned-", dir=target.parent) as folder:
        if align:
            job.align(Path(folder))
        for other in job.used[1:]:
            check_pair(job.used[0], other)
        with ExitStack() as stack:
            files = [stack.enter_context(Checkpoint.open(path)) for path in job.used]
            staged = stack.enter_context(job.stage(target, files, dtype))
            try:
                job.write(staged, files)
                certificate = job.measure(staged.directory, text, max_memory)
                certificate = replace(certificate, b=replace(certificate.b, name=target.name))
                loss = None if scorer is None else job.losses(scorer, staged.directory)
                curve = None if scorer is None or not barrier else job.barrier(scorer, align)
                found = job.result(target, align, certificate, loss, curve)
                staged.commit(_manifest(found, staged))
            except RegaugeError:
                staged.discard()
                raise
    return found


@dataclass
class _Job:
    """One merge under way. ``paths`` as given, the base first; ``used`` what is added, in one gauge."""

    settings: Settings
    paths: list[Path]
    based: bool
    seed: int
    tell: Progress

    def __post_init__(self) -> None:
        self.used = list(self.paths)
        self.similarities: list[float | None] = [None] * len(self.paths)
        self.moved: list[bool | None] = [None] * len(self.paths)
        self.scores: list[float | None] = [None] * len(self.paths)
        self.digests: list[str] = []
        self.clock = Clock()

    def align(self, folder: Path) -> None:
        from regauge.merging.aligning import aligned

        found = aligned(self.paths[0], self.paths[1:], folder, seed=self.seed, tell=self.tell)
        self.used = [found.first, *found.others]
        self.similarities = [None, *found.similarities]
        self.moved = [None, *found.moved]
        self.clock.lap("align")

    def stage(self, target: Path, files: Sequence[Checkpoint], dtype: torch.dtype | None) -> StagedOutput:
        with ExitStack() as stack:
            given = [stack.enter_context(Checkpoint.open(path)) for path in self.paths]
            self.digests = [held.digest() for held in given]
        config: dict[str, Any] = {}
        if dtype is not None:
            config = dtype_config(read_config(self.used[0]), dtype)
        aligned = [similarity is not None for similarity in self.similarities]
        parts = [self.digests, aligned, repr(self.settings), str(dtype), software()]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return StagedOutput(target, files[0], key=key, dtype=dtype, config=config)

    def write(self, staged: StagedOutput, files: Sequence[Checkpoint]) -> None:
        """Every tensor of the result; see :mod:`regauge.merging.methods` for what is computed."""
        combined = set(check_values(files[0], list(files[1:])))
        total, done = staged.size_bytes, 0

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            self.tell("merging", done, total)

        copied: dict[str, str] = {}
        for entry in staged.entries.values():
            if staged.finished(entry.name):
                wrote(entry.nbytes)
            elif entry.name not in combined:
                copied[entry.name] = entry.name
            else:
                staged.write(entry.name, self._blocks(files, entry.name, DTYPES[entry.kind]), 0, wrote)
        staged.copy(copied, wrote)
        for held in files:
            held.check_unchanged()
        self.clock.lap("merge")

    def _blocks(self, files: Sequence[Checkpoint], name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        def blocks() -> Iterator[Block]:
            for values in rows_of(files, name):
                yield Block(values[0] if self.based else None, tuple(values[self.based :]))

        combine = METHODS[self.settings.method].start(self.settings, name, blocks)
        for block in blocks():
            exact = combine(block)
            result = exact.to(dtype)
            if not all_finite(result):
                raise _overflow(name, exact, dtype)
            yield result

    def measure(self, directory: Path, text: str | Path | None, max_memory: int | None) -> Certificate:
        self.tell("measuring", 0, 1)
        found = certify(self.paths[0], directory, text=text, seed=self.seed, max_memory=max_memory)
        self.clock.lap("measure")
        return measured(found, (f"merge:{self.settings.method}",))

    def losses(self, scorer: Scorer, directory: Path) -> float:
        for i, path in enumerate(self.paths):
            self.tell("scoring", i, len(self.paths) + 1)
            scorer.check_tokens(path)
            self.scores[i] = scorer.loss(path)
        loss = scorer.loss(directory)
        self.clock.lap("score")
        return loss

    def barrier(self, scorer: Scorer, align: bool) -> Barrier:
        moved = line(scorer, self.used[0], self.used[1], POINTS, self.tell) if align else None
        plain, without = None, None
        try:
            check_pair(self.used[0], self.paths[1])
            plain = line(scorer, self.used[0], self.paths[1], POINTS, self.tell)
        except RegaugeError as error:
            if not align:
                raise
            without = error.message
        self.clock.lap("barrier")
        places = tuple(i / (POINTS - 1) for i in range(POINTS))
        return Barrier(places, moved, plain, without, scorer.tokens, scorer.documents.digest)

    def result(
        self,
        target: Path,
        align: bool,
        certificate: Certificate,
        loss: float | None,
        curve: Barrier | None,
    ) -> Merged:
        known, settings, method = calibration(), self.settings, METHODS[self.settings.method]
        weights: list[float | None] = [None] * self.based + list(settings.weights)
        sources, warnings = [], []
        for i, path in enumerate(self.paths):
            similarity = self.similarities[i]
            related = None if similarity is None else similarity >= known.threshold
            sources.append(
                Source(
                    path.name, self.digests[i], weights[i], similarity, related, self.moved[i], self.scores[i]
                )
            )
            if related is False:
                warnings.append(
                    f"{path.name} is unrelated to {self.paths[0].name}: similarity {similarity:.3f} after"
                    f" alignment, derived models are above {known.threshold:.3f}; expect a higher loss"
                )
        return Merged(
            out=str(target),
            method=settings.method,
            scale=settings.scale if method.based else None,
            density=settings.density if method.density is not None else None,
            seed=self.seed,
            sources=tuple(sources[self.based :]),
            base=sources[0] if self.based else None,
            aligned=align,
            certificate=certificate,
            loss=loss,
            barrier=curve,
            warnings=tuple(warnings),
            seconds=dict(self.clock.seconds),
        )


def _check_asked(target: Path, text: object, barrier: bool, count: int, based: bool) -> None:
    check_free(target)
    if barrier and (text is None or count != 2 or based):
        raise BadInput(
            "the barrier is that of the line between two models, on a text",
            expected="two models, no base, and a text",
            found=f"{count} models{', a base' if based else ''}{', no text' if text is None else ''}",
        )


def _overflow(name: str, exact: torch.Tensor, dtype: torch.dtype) -> CheckpointError:
    return CheckpointError(
        f"a merged value overflows {str(dtype).removeprefix('torch.')}",
        parameter=name,
        expected=f"magnitudes up to {torch.finfo(dtype).max:g}",
        found=f"{exact.abs().max().item():g}",
        way_out="--dtype float32 or --dtype bfloat16",
    )


def _manifest(found: Merged, staged: StagedOutput) -> dict[str, Any]:
    plain = found.to_dict()
    del plain["out"]
    return {"format": 1, "merge": plain, "output": {"digest": staged.digest()}, "software": software()}
