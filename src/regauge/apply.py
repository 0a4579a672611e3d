"""Apply a planned rewrite to a checkpoint, tensor by tensor and block by block.

A tensor without steps is copied as bytes. A tensor whose steps only move entries stays in its stored
dtype. Everything else is computed in float64 and rounded to the stored dtype once, at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from regauge.chain import Chain, Fetch
from regauge.checkpoint import Checkpoint, all_finite
from regauge.errors import BadInput, CheckpointError, RegaugeError
from regauge.jobs import Job, Names, plan_jobs, stored_as, tensor_copies, tensor_drops, tensor_made
from regauge.plan import Rewrite
from regauge.shards import DTYPES
from regauge.write import StagedOutput

_BLOCK_BYTES = 2 << 20
"""Small enough to stay in the cache while it is read, changed, hashed and written."""
_SLAB_BYTES = 32 << 20
"""Of a tensor cut along another axis than the first: the smaller, the shorter the runs in the file."""
_GATHER_BYTES = 16 << 20


@dataclass(frozen=True)
class ApplyReport:
    """What was done.

    Attributes:
        seconds: wall time.
        bytes_read: source bytes read.
        bytes_written: bytes of tensors written in this run.
        peak_block_bytes: size of the largest block held at once, in the dtype it was worked on.
        copied: tensors copied as bytes.
        moved: tensors whose entries were moved or flipped in the stored dtype.
        computed: tensors computed in float64.
        recast: tensors changed by nothing but the new dtype.
        resumed: tensors taken over from an interrupted run.
        rounding: tensor -> largest absolute error made by the final rounding, for computed tensors.
        digest: contents digest of the result, see :meth:`regauge.checkpoint.Checkpoint.digest`.
        digests: tensor of the result -> hash of its bytes.
    """

    seconds: float
    bytes_read: int
    bytes_written: int
    peak_block_bytes: int
    copied: int
    moved: int
    computed: int
    recast: int
    resumed: int
    rounding: Mapping[str, float]
    digest: str
    digests: Mapping[str, str]


def apply_rewrite(
    source: Checkpoint,
    rewrite: Rewrite,
    out: StagedOutput,
    *,
    names: Names,
    max_memory: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    measure_rounding: bool = False,
) -> ApplyReport:
    """Write every tensor of ``rewrite`` applied to ``source`` into ``out``. Does not commit.

    Args:
        source: the checkpoint read; never written to.
        rewrite: what to do.
        out: made for the same source, with ``copies=tensor_copies(...)`` and the same ``dtype``.
        names: which tensors store which parameter; others are copied.
        max_memory: bytes that blocks may take altogether, roughly; a block gets a sixteenth of
            it, at most 2 MiB (32 MiB where it is not cut along axis 0). A tensor whose steps leave no
            axis to cut along is worked on whole.
        dtype: must be ``out.dtype`` if given.
        progress: called with the number of bytes of the result finished since the last call; they add
            up to ``out.size_bytes``, resumed tensors included.
        measure_rounding: fill ``ApplyReport.rounding`` (one more pass over each block).

    Raises:
        CheckpointError: NaN or infinity in a tensor to be changed, a result that the stored dtype
            cannot hold, an integer tensor with steps, a source that changed while it was read.
    """
    if dtype is not None and dtype != out.dtype:
        raise BadInput("the output was staged for another dtype", expected=str(dtype), found=str(out.dtype))
    if out.copies != tensor_copies(source, rewrite, names):
        raise BadInput("the output was staged for other copies", expected="copies=tensor_copies(...)")
    made = tensor_made(source, rewrite, names)
    if out.made != made or out.drops != tensor_drops(source, rewrite, names):
        raise BadInput("the output was staged for another structure", expected="made=tensor_made(...)")
    view = RewrittenView(source, rewrite, names) if made else None
    parameters = {tensor: new for tensor, new in zip(made, rewrite.made, strict=True)}
    begin = time.perf_counter()
    jobs = plan_jobs(source, rewrite, names)
    _check_repeated(source, jobs, names)
    budget = _SLAB_BYTES if max_memory is None else min(_SLAB_BYTES, max(1 << 16, max_memory // 16))
    count = dict.fromkeys(("copied", "moved", "computed", "recast", "resumed"), 0)
    origins: dict[str, str] = {}
    read = written = peak = 0
    rounding: dict[str, float] = {}
    for entry in out.entries.values():
        if out.finished(entry.name):
            count["resumed"] += 1
            if progress is not None:
                progress(entry.nbytes)
            continue
        if view is not None and entry.name in parameters:
            exact = view.read(parameters[entry.name])
            result = exact.to(DTYPES[entry.kind])
            if not all_finite(result):
                raise _overflow(Job(entry.name, entry.name, ()), exact, result.dtype)
            out.write(entry.name, [result], 0, progress)
            count["computed"] += 1
            written += entry.nbytes
            continue
        job = jobs.get(entry.name) or Job(entry.name, entry.name, ())
        recast = source.entry(job.origin).kind != entry.kind
        if job.steps or recast:
            work = _Work(source, job, DTYPES[entry.kind], budget, measure_rounding)
            out.write(entry.name, work.blocks(), work.axis, progress)
            peak = max(peak, work.block_bytes)
            if measure_rounding and work.rounds:
                rounding[entry.name] = work.error
            count["computed" if job.arithmetic else "moved" if job.steps else "recast"] += 1
        else:
            origins[entry.name] = job.origin
        read += source.entry(job.origin).nbytes
        written += entry.nbytes
    out.copy(origins, progress)
    count["copied"] = len(origins)
    source.check_unchanged()
    seconds = time.perf_counter() - begin
    return ApplyReport(
        seconds,
        read,
        written,
        peak,
        **count,
        rounding=rounding,
        digest=out.digest(),
        digests=dict(out.digests),
    )


class RewrittenView:
    """A checkpoint as a rewrite would leave it, computed when read. Nothing is cached or rounded.

    Tensors are addressed by *parameter* name; tensors that store no parameter by their own name.
    """

    def __init__(self, source: Checkpoint, rewrite: Rewrite, names: Names) -> None:
        self.source = source
        self._rewrite = rewrite
        self._names = names
        self._made: tuple[str, torch.Tensor] | None = None
        self._latest: tuple[Job, Chain] | None = None
        jobs = plan_jobs(source, rewrite, names)
        self._jobs: dict[str, Job] = {}
        stored: set[str] = set()
        for parameter in names:
            held = [tensor for tensor in stored_as(parameter, names) if tensor in source]
            stored.update(held)
            if held and parameter not in rewrite.drops:
                self._jobs[parameter] = jobs.get(held[0]) or Job(parameter, held[0], ())
        for tensor in source.names:
            if tensor not in stored:
                self._jobs[tensor] = jobs.get(tensor) or Job(tensor, tensor, ())
        self._jobs |= {job.parameter: job for job in jobs.values() if job.parameter in rewrite.copies}

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters in the order of the mapping given, then other tensors, then new parameters."""
        return tuple(dict.fromkeys((*self._jobs, *self._rewrite.made)))

    def __contains__(self, name: object) -> bool:
        return name in self._jobs or name in self._rewrite.made

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._rewrite.made:
            return self._rewrite.made[name].shape
        return self.source.shape(self._job(name).origin)

    def dtype(self, name: str) -> torch.dtype:
        """float64 if the rewrite changes it, else the stored dtype."""
        if name in self._rewrite.made:
            return torch.float64
        job = self._job(name)
        return torch.float64 if job.steps else self.source.dtype(job.origin)

    def __call__(self, name: str) -> torch.Tensor:
        return self.read(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in ``dtype(name)``. Raises ``CheckpointError`` if its source is not finite."""
        if name in self._rewrite.made:
            return self._make(name)
        return self._cut(self._job(name), None)

    def read_rows(self, name: str, start: int, stop: int, axis: int = 0) -> torch.Tensor:
        """``read(name)`` cut along ``axis``; only that part is computed if it is one of ``cuts(name)``."""
        if name in self._rewrite.made:
            return self._make(name).narrow(axis, start, stop - start)
        job = self._job(name)
        if axis % max(1, len(self.shape(name))) not in self.cuts(name):
            return self.read(name).narrow(axis, start, stop - start)
        return self._cut(job, (axis, start, stop))

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """``read(name)[index]`` for an int64 vector; neighbours are read together."""
        distinct, place = index.unique(return_inverse=True)
        if 0 not in self.cuts(name) or not len(index):
            return self.read(name)[index]
        breaks = (distinct.diff() != 1).nonzero().flatten() + 1
        if 4 * len(breaks) > len(distinct):
            found = self._gathered(self._job(name), distinct)
            return found if torch.equal(place, torch.arange(len(found))) else found[place]
        runs = distinct.tensor_split(breaks)
        found = torch.cat([self.read_rows(name, int(run[0]), int(run[-1]) + 1) for run in runs])
        return found if torch.equal(place, torch.arange(len(found))) else found[place]

    def _gathered(self, job: Job, index: torch.Tensor) -> torch.Tensor:
        """Rows far from each other, of a parameter whose axis 0 is free."""
        chain = self._chain(job)

        def fetch(axis: int | None, start: int, stop: int) -> torch.Tensor:
            whole = self.source.read(job.origin)
            return whole if axis is None else whole[index[start:stop]]

        if any(take.axis == 0 for take in chain.front):
            return self._cut(job, None)[index]
        block = chain.read(fetch, (0, 0, len(index)))
        if not job.steps:
            return block
        _check_source(self.source, job, block)
        return chain.run(block, torch.float64)

    def cuts(self, name: str) -> tuple[int, ...]:
        """Axes along which a part costs no more than its share."""
        if name in self._rewrite.made:
            return ()
        bound = self._chain(self._job(name)).bound
        return tuple(axis for axis in range(len(self.shape(name))) if axis not in bound)

    def _make(self, name: str) -> torch.Tensor:
        """A made parameter with its steps; the latest is kept."""
        if self._made is None or self._made[0] != name:
            made = self._rewrite.made[name]
            value = made.value(self._original)
            if tuple(value.shape) != made.shape:
                raise RegaugeError(
                    "a parameter was made in another shape than planned",
                    parameter=name,
                    expected=str(made.shape),
                    found=str(tuple(value.shape)),
                )
            for step in self._rewrite.steps.get(name, ()):
                value = step.apply(value)
            self._made = (name, value)
        return self._made[1]

    def _original(self, name: str) -> torch.Tensor:
        return self.source.read(stored_as(name, self._names)[0] if name in self._names else name)

    def _job(self, name: str) -> Job:
        return self._jobs.get(name) or Job(name, self.source.entry(name).name, ())

    def _chain(self, job: Job) -> Chain:
        if self._latest is None or self._latest[0] is not job:
            # Only the latest is kept: small things that stay among large ones that go break up the heap.
            self._latest = (job, Chain.of(job.parameter, job.steps, self.source.shape(job.origin)))
        return self._latest[1]

    def _cut(self, job: Job, cut: tuple[int, int, int] | None) -> torch.Tensor:
        chain = self._chain(job)
        block = chain.read(_fetcher(self.source, job.origin), cut)
        if not job.steps:
            return block
        _check_source(self.source, job, block)
        return chain.run(block, torch.float64)


class _Work:
    """One tensor in blocks: how it is cut, and what came of it."""

    def __init__(self, source: Checkpoint, job: Job, target: torch.dtype, budget: int, measure: bool) -> None:
        stored = source.dtype(job.origin)
        shape = source.shape(job.origin)
        self.source, self.job, self.target, self.measure = source, job, target, measure
        self.chain = Chain.of(job.parameter, job.steps, shape)
        self.fetch = _fetcher(source, job.origin)
        self.rounds = self.chain.arithmetic or target != stored
        working = torch.float64 if job.arithmetic else stored if stored.itemsize > 1 else torch.float32
        total = math.prod(shape) * working.itemsize
        free = [axis for axis in range(len(shape)) if axis not in self.chain.bound and shape[axis]]
        if 0 in free:
            budget = min(budget, _BLOCK_BYTES)
        self.axis, self.rows, self.extent = 0, 1, 1
        if shape:
            self.extent = self.rows = shape[0]
        if free and total > budget:
            fitting = [axis for axis in free if total // shape[axis] <= budget]
            self.axis = fitting[0] if fitting else max(free, key=lambda axis: shape[axis])
            self.extent = shape[self.axis]
            self.rows = max(1, budget // (total // self.extent))
        self.whole = self.rows >= self.extent
        self.block_bytes = total if self.whole else total // self.extent * self.rows
        self.error = 0.0

    def blocks(self) -> Iterator[torch.Tensor]:
        if self.whole:
            yield self._finish(self.chain.read(self.fetch))
            return
        for start in range(0, self.extent, self.rows):
            stop = min(start + self.rows, self.extent)
            yield self._finish(self.chain.read(self.fetch, (self.axis, start, stop)))

    def _finish(self, block: torch.Tensor) -> torch.Tensor:
        _check_source(self.source, self.job, block)
        return self.chain.run(block, self.target, self._check)

    def _check(self, exact: torch.Tensor, result: torch.Tensor) -> None:
        if not all_finite(result):
            raise _overflow(self.job, exact, self.target)
        if self.measure and result.numel():
            self.error = max(self.error, (result.double() - exact.double()).abs().max().item())


def _fetcher(source: Checkpoint, name: str) -> Fetch:
    """Parts of a stored tensor; along axes but the first, never mapping much more than the part."""

    def fetch(axis: int | None, start: int, stop: int) -> torch.Tensor:
        if axis is None:
            return source.read(name)
        if axis == 0:
            return source.read_rows(name, start, stop)
        shape = list(source.shape(name))
        rows = max(1, _GATHER_BYTES * shape[0] // max(1, source.entry(name).nbytes))
        shape[axis] = stop - start
        block = torch.empty(shape, dtype=source.dtype(name))
        for row in range(0, shape[0], rows):
            part = source.read_rows(name, row, min(row + rows, shape[0]))
            block[row : row + rows] = part.narrow(axis, start, stop - start)
        return block

    return fetch


def _check_source(source: Checkpoint, job: Job, block: torch.Tensor) -> None:
    if not block.is_floating_point() or block.dtype is torch.float8_e8m0fnu:
        raise CheckpointError(
            "a tensor to be rewritten does not hold floating-point weights",
            parameter=job.origin,
            expected="float64, float32, float16, bfloat16 or an 8-bit float",
            found=str(block.dtype),
            way_out="dequantise the checkpoint first",
        )
    if not all_finite(block):
        source.check_finite(job.origin)


def _check_repeated(source: Checkpoint, jobs: Mapping[str, Job], names: Names) -> None:
    for parameter in dict.fromkeys(job.parameter for job in jobs.values()):
        stored = stored_as(parameter, names) if parameter in names else ()
        group = [tensor for tensor in stored if tensor in source]
        for other in group[1:]:
            if source.tensor_digest(other) != source.tensor_digest(group[0]):
                raise CheckpointError(
                    "one parameter is stored twice, with different values",
                    parameter=parameter,
                    expected=f"{other} equal to {group[0]}",
                    found="other bytes",
                    way_out="load the model and save it again, so that its tie is kept",
                )


def _overflow(job: Job, exact: torch.Tensor, target: torch.dtype) -> RegaugeError:
    name = str(target).removeprefix("torch.")
    if not all_finite(exact):
        return CheckpointError(
            "the rewritten values are not finite even in float64",
            parameter=job.origin,
            way_out="use a better conditioned element, or leave this parameter out",
        )
    return CheckpointError(
        f"a rewritten value overflows {name}",
        parameter=job.origin,
        expected=f"magnitudes up to {torch.finfo(target).max:g}",
        found=f"{exact.abs().max().item():g}",
        way_out="--dtype float32 or --dtype bfloat16",
    )
