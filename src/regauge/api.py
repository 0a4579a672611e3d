"""The three verbs from Python: inspect, rewrite, certify; for directories and for plain modules."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regauge.apply import ApplyReport, RewrittenView, apply_rewrite
from regauge.atlas import Atlas
from regauge.certify import Certificate, Function, StoredWeights, certify, certify_modules, compare_functions
from regauge.certify.certificate import software
from regauge.certify.measure import EXACT
from regauge.checkpoint import Checkpoint
from regauge.discover import Gauge, discover
from regauge.errors import BadInput, CheckpointError, NotEquivalent, Refused, RegaugeError
from regauge.jobs import tensor_copies
from regauge.patch import with_rms_norms
from regauge.plan import Rewrite
from regauge.planner import make_plan
from regauge.recipe import Recipe, parse_recipe
from regauge.trace import Trace, trace, untie
from regauge.write import StagedOutput
from regauge.written import Written, check_written

if TYPE_CHECKING:
    from regauge.hf import HFModel

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total); totals are bytes for tensors, steps otherwise."""


@dataclass(frozen=True)
class RewriteResult:
    """What a rewrite did.

    Attributes:
        certificate: evidence that the function stayed.
        report: bytes and tensors written.
        manifest: what ``regauge.json`` in the output says.
        seconds: time by stage.
        rewrite: the plan.
    """

    certificate: Certificate
    report: ApplyReport
    manifest: Mapping[str, Any]
    seconds: Mapping[str, float]
    rewrite: Rewrite = field(repr=False)


def resolve(source: str | Path) -> Path:
    """A directory for any SRC: a directory itself, ``packaged:NAME``, or a GGUF file (converted once).

    Raises:
        BadInput, CheckpointError: it does not exist or cannot be converted.
    """
    if isinstance(source, str) and source.startswith("packaged:"):
        from regauge import packaged

        return packaged.directory(source.removeprefix("packaged:"))
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors":
        from regauge.gguf import open_gguf

        return open_gguf(path)
    if not path.exists():
        raise BadInput(
            "the source does not exist",
            expected="a Hugging Face directory, a GGUF file or packaged:NAME",
            found=str(path),
        )
    return path


def inspect(
    model_or_path: nn.Module | str | Path,
    inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    outputs: Sequence[str] | None = None,
) -> Atlas:
    """Discover the gauge of a model. No weight is read.

    Args:
        model_or_path: a module, or a source as in :func:`resolve`.
        inputs: example inputs of a module: keyword inputs as a mapping, or positional ones.
        outputs: names of the output fields that define the function, see :func:`regauge.trace.trace`.

    Raises:
        TraceError: the model cannot be exported; BadInput: it cannot be opened.
    """
    return discover(_trace_of(model_or_path, inputs, outputs))


def _trace_of(
    model_or_path: nn.Module | str | Path,
    inputs: Mapping[str, Any] | Sequence[Any] | None,
    outputs: Sequence[str] | None,
) -> Trace:
    if isinstance(model_or_path, nn.Module):
        args, kwargs = _inputs(inputs)
        return trace(model_or_path, args, kwargs, outputs=outputs)
    from regauge.hf import load_meta

    held = load_meta(resolve(model_or_path))
    return trace(held.model, (), held.inputs, outputs=outputs)


def _inputs(inputs: Mapping[str, Any] | Sequence[Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        raise BadInput("a module needs example inputs", expected="inputs={...} or inputs=(...)", found="none")
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


class _Exact:
    """Weights as the plan leaves them, in float64 and not rounded, for the certificate."""

    def __init__(self, view: RewrittenView) -> None:
        self._view = view

    def __call__(self, name: str) -> torch.Tensor:
        return self._view.read(name)

    def rows(self, name: str, index: torch.Tensor) -> torch.Tensor:
        flat = index.reshape(-1)
        unique, back = flat.unique(return_inverse=True)
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(unique):
            stop = start + 1
            while stop < len(unique) and int(unique[stop]) == int(unique[stop - 1]) + 1:
                stop += 1
            parts.append(self._view.read_rows(name, int(unique[start]), int(unique[stop - 1]) + 1))
            start = stop
        rows = torch.cat(parts) if parts else self._view.read_rows(name, 0, 0)
        return rows[back].reshape(*index.shape, *rows.shape[1:])


def rewrite(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    max_memory: int | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> RewriteResult:
    """Move a checkpoint along its gauge, certify it, and only then let it appear at ``out``.

    Args:
        source: see :func:`resolve`; never written to.
        out: directory that does not exist yet.
        recipe: moves in order.
        dtype: storage of floating tensors; None keeps each.
        seed: of everything random; default that of the recipe, else 0.
        max_memory: bytes to stay near.
        text: text file for the certificate; default random inputs.
        progress: see :data:`Progress`.

    Raises:
        Refused: a move does not exist here, or the result cannot be stored.
        NotEquivalent: the certificate failed; nothing is left at ``out``.
        BadInput, CheckpointError: unusable input; nothing is left at ``out``.
    """
    from regauge.hf import checkpoint_names, load_meta, read_config, untied_config

    recipe = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
    seed = seed if seed is not None else (recipe.seed or 0)
    if dtype is None and recipe.dtype is not None:
        dtype = getattr(torch, recipe.dtype)
    tell: Progress = progress or (lambda what, done, total: None)
    clock = _Clock()
    path, target = resolve(source), Path(out)
    with Checkpoint.open(path) as files:
        tell("tracing", 0, 1)
        held = load_meta(path)
        names = checkpoint_names(held, files.names)
        gauge = Gauge(trace(held.model, (), held.inputs))
        _check_shapes(files, names, gauge.trace)
        clock.lap("trace")
        tell("planning", 0, len(recipe.moves))
        count = iter(range(1, len(recipe.moves) + 1))
        plan, state = make_plan(
            gauge,
            recipe,
            seed,
            partial(_reader, files, names),
            lambda: untied_config(read_config(path)),
            lambda name: tell(f"planning {name}", next(count), len(recipe.moves)),
        )
        stored = names
        # A copy that the checkpoint does not store yet is a new tensor of its own name.
        names = {n: t for n, t in names.items() if n not in plan.copies or t != names[plan.copies[n]]}
        if plan.patches:
            tell("certifying", 0, 1)
            view = _Exact(RewrittenView(files, plan, names))
            source_weights = StoredWeights(files, stored)
            function = Function(gauge.trace, source_weights, held.buffers())
            error = _certify_patches(
                plan, untie(gauge.trace) if state.untied else gauge.trace, function, view, held
            )
            if not error < EXACT:
                raise NotEquivalent(
                    "the planned structure is another function", found=f"relative error {error:.1e}"
                )
            _refuse_patches(plan, error)
        clock.lap("plan")
        config = dict(plan.config)
        if dtype is not None:
            old = "torch_dtype" in read_config(path)
            config |= dict.fromkeys(("dtype", "torch_dtype")[: 1 + old], str(dtype).removeprefix("torch."))
        key = _digest(
            files.stamp(), plan.recipe, _files_named(recipe), seed, str(dtype), max_memory, software()
        )
        copies = tensor_copies(files, plan, names)
        with StagedOutput(target, files, key=key, copies=copies, dtype=dtype, config=config) as staged:
            try:
                total = staged.size_bytes
                so_far = 0

                def wrote(n: int) -> None:
                    nonlocal so_far
                    so_far += n
                    tell("writing", so_far, total)

                report = apply_rewrite(
                    files, plan, staged, names=names, max_memory=max_memory, dtype=dtype, progress=wrote
                )
                clock.lap("write")
                tell("checking what was written", 0, 1)
                with Checkpoint.open(staged.directory) as result:
                    written = check_written(result, RewrittenView(files, plan, names), plan, names)
                clock.lap("check")
                tell("certifying", 0, 1)
                certificate = certify(
                    path,
                    staged.directory,
                    text=text,
                    seed=seed,
                    max_memory=max_memory,
                    weights_b_exact=_Exact(RewrittenView(files, plan, names)),
                )
                certificate = replace(certificate, b=replace(certificate.b, name=target.name))
                clock.lap("certify")
                if not certificate.passed:
                    raise NotEquivalent(
                        f"the certificate failed: {certificate.reason}",
                        expected="equivalent",
                        found=str(certificate.verdict),
                        way_out="unless the output overflows this is a fault in regauge: report the recipe",
                    )
                manifest = _manifest(plan, seed, files, staged, written, certificate, clock.seconds)
                staged.commit(manifest)
            except RegaugeError:
                staged.discard()
                raise
            clock.lap("commit")
    return RewriteResult(certificate, report, manifest, clock.seconds, plan)


def _certify_patches(
    plan: Rewrite, traced: Trace, a: Function, exact: Callable[[str], torch.Tensor], held: HFModel
) -> float:
    """Relative error in float64 between the model and the plan with its structural changes."""
    nodes = [node for patch in plan.patches for node in patch["nodes"]]
    b = Function(with_rms_norms(traced, nodes), exact, a.buffers)
    inputs = held.real_inputs(batch=3, length=7, seed=0)
    evidence = compare_functions(a, b, [inputs], stored=False)
    return evidence.float64.relative


def _check_shapes(files: Checkpoint, names: Mapping[str, str], traced: Trace) -> None:
    for name, shape in traced.shapes.items():
        if name in names and tuple(files.shape(names[name])) != tuple(shape):
            raise CheckpointError(
                "a tensor has another shape than the config says",
                parameter=names[name],
                expected=str(tuple(shape)),
                found=str(tuple(files.shape(names[name]))),
                way_out="use the config.json that belongs to these weights",
            )


def _reader(files: Checkpoint, names: Mapping[str, str], plan: Rewrite) -> Callable[[str], torch.Tensor]:
    """Current values by parameter name, as the plan so far leaves them."""
    return RewrittenView(files, plan, names).read


def _refuse_patches(plan: Rewrite, error: float | None = None) -> None:
    if plan.patches:
        count = sum(len(patch["nodes"]) for patch in plan.patches)
        measured = "" if error is None else f"; planned and certified: relative error {error:.1e} in float64"
        raise Refused(
            "the result needs a structure that the source architecture cannot express",
            expected="moves that keep the architecture",
            found=f"{count} LayerNorms to become RMSNorms{measured}",
            way_out="leave out the option norm=rms; storing structural changes is not implemented yet",
        )


def rewrite_module(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    recipe: Recipe | Mapping[str, Any],
    *,
    seed: int | None = None,
    outputs: Sequence[str] | None = None,
) -> tuple[nn.Module, Certificate]:
    """Move a plain module along its gauge. The argument is left as it is.

    Returns:
        a changed deep copy, in the same dtypes, and the certificate.

    Raises:
        Refused, NotEquivalent, TraceError: as :func:`rewrite`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
    seed = seed if seed is not None else (recipe.seed or 0)
    args, kwargs = _inputs(inputs)
    traced = trace(model, args, kwargs, outputs=outputs)
    state = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}

    def read(plan: Rewrite, name: str) -> torch.Tensor:
        value = state[plan.copies.get(name, name)]
        for step in plan.steps.get(name, ()):
            value = step.apply(value.to(torch.float64))
        return value

    plan, _ = make_plan(Gauge(traced), recipe, seed, lambda so_far: lambda name: read(so_far, name))
    _refuse_patches(plan)
    changed = copy.deepcopy(model)
    for name in plan.copies:
        owner, _, leaf = name.rpartition(".")
        setattr(changed.get_submodule(owner), leaf, nn.Parameter(state[name].clone()))
    with torch.no_grad():
        held = dict(changed.named_parameters(remove_duplicate=False)) | dict(changed.named_buffers())
        for name in plan.steps:
            held[name].copy_(read(plan, name).to(held[name].dtype))
    certificate = certify_modules(
        model,
        changed,
        args,
        kwargs,
        outputs=outputs,
        weights_b_exact=lambda name: read(plan, name),
        seed=seed,
    )
    if not certificate.passed:
        raise NotEquivalent(f"the certificate failed: {certificate.reason}", found=str(certificate.verdict))
    return changed, certificate


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


def _files_named(recipe: Recipe) -> list[str]:
    """Contents of the files that options name, so that a changed file is not taken for the same run."""
    paths = [Path(str(value)) for move in recipe.moves for value in move.options.values() if value]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(
    plan: Rewrite,
    seed: int,
    files: Checkpoint,
    staged: StagedOutput,
    written: Written,
    certificate: Certificate,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "format": 1,
        "recipe": [dict(item) for item in plan.recipe],
        "seed": seed,
        "source": {"digest": certificate.a.digest, "bytes": files.size_bytes},
        "output": {"digest": staged.digest()},
        "algebra": [dict(item) for item in plan.used],
        "written": {"tensors": written.tensors, "worst_ulps": written.worst},
        "certificate": json.loads(certificate.to_json()),
        "software": software(),
        "seconds": dict(seconds),
    }
