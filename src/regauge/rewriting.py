"""Rewriting a directory: plan, write, check what was written, certify, and only then let it appear."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regauge import modeling_regauge, norms_regauge
from regauge.apply import ApplyReport, RewrittenView, apply_rewrite
from regauge.certify import Certificate, certify
from regauge.certify.certificate import software
from regauge.checkpoint import Checkpoint
from regauge.cuts import check_cuts, measured
from regauge.errors import NotEquivalent, RegaugeError
from regauge.hf import dtype_config
from regauge.jobs import tensor_copies, tensor_drops, tensor_made
from regauge.model import CheckpointModel
from regauge.modeling_regauge import KEY
from regauge.plan import Rewrite
from regauge.recipe import Recipe, parse_recipe
from regauge.sources import resolve
from regauge.stages import Clock, Progress, silent
from regauge.write import StagedOutput
from regauge.written import Written, check_written


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
    cut: bool = False,
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
        progress: see :data:`regauge.stages.Progress`.
        cut: whether the recipe may hold cuts. With one the certificate says how different the result is.

    Raises:
        Refused: a cut that is not allowed, a move does not exist here, or the result cannot be stored.
        NotEquivalent: the certificate failed; nothing is left at ``out``.
        BadInput, CheckpointError: unusable input; nothing is left at ``out``.
    """
    recipe = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
    cuts = check_cuts(recipe, cut)
    seed = seed if seed is not None else (recipe.seed or 0)
    if dtype is None and recipe.dtype is not None:
        dtype = getattr(torch, recipe.dtype)
    tell = progress or silent
    clock = Clock()
    path, target = resolve(source), Path(out)
    with Checkpoint.open(path) as files:
        tell("tracing", 0, 1)
        model = CheckpointModel.of(path, files)
        clock.lap("trace")
        tell("planning", 0, len(recipe.moves))
        count = iter(range(1, len(recipe.moves) + 1))
        plan, _, _ = model.plan(
            recipe, seed, lambda name: tell(f"planning {name}", next(count), len(recipe.moves))
        )
        clock.lap("plan")
        return carry_out(
            model,
            plan,
            path,
            target,
            key=_files_named(recipe),
            dtype=dtype,
            seed=seed,
            max_memory=max_memory,
            text=text,
            tell=tell,
            clock=clock,
            cuts=cuts,
        )


def carry_out(
    model: CheckpointModel,
    plan: Rewrite,
    path: Path,
    target: Path,
    *,
    key: Sequence[str],
    dtype: torch.dtype | None,
    seed: int,
    max_memory: int | None,
    text: str | Path | None,
    tell: Progress,
    clock: Clock,
    cuts: Sequence[str] = (),
) -> RewriteResult:
    """Write what a plan makes of an open checkpoint, certify it, and only then let it appear at ``target``.

    Args:
        model: the open checkpoint.
        plan: what to do.
        path: its directory.
        target: directory that does not exist yet.
        key: what else decides the result, for resuming.
        dtype, seed, max_memory, text, tell: as :func:`rewrite`.
        clock: measures the stages.
        cuts: the cuts in the plan, if there are any.

    Raises:
        NotEquivalent, Refused, BadInput, CheckpointError: as :func:`rewrite`.
    """
    files, source_config = model.files, model.config
    names = model.names_after(plan)
    view = RewrittenView(files, plan, names)
    config = model.changes(plan)
    if dtype is not None:
        config |= dtype_config(source_config, dtype)
    with StagedOutput(
        target,
        files,
        key=_digest(files.stamp(), plan.recipe, key, seed, str(dtype), max_memory, software()),
        copies=tensor_copies(files, plan, names),
        made=tensor_made(files, plan, names),
        drops=tensor_drops(files, plan, names),
        dtype=dtype,
        config=config,
        files=_code({**source_config, **config}),
    ) as staged:
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
                written = check_written(result, view, plan, names)
            clock.lap("check")
            tell("certifying", 0, 1)
            certificate = certify(
                path,
                staged.directory,
                text=text,
                seed=seed,
                max_memory=max_memory,
                weights_b_exact=view,
            )
            certificate = replace(certificate, b=replace(certificate.b, name=target.name))
            clock.lap("certify")
            if cuts:
                certificate = measured(certificate, cuts)
            elif not certificate.passed:
                raise NotEquivalent(
                    f"the certificate failed: {certificate.reason}",
                    expected="equivalent",
                    found=str(certificate.verdict),
                    way_out="unless the output overflows this is a fault in regauge: report the recipe",
                )
            manifest = _manifest(plan, seed, files, staged, written, certificate, clock.seconds)
            if cuts:
                manifest["cuts"] = list(cuts)
            staged.commit(manifest)
        except RegaugeError:
            staged.discard()
            raise
        clock.lap("commit")
    return RewriteResult(certificate, report, manifest, clock.seconds, plan)


def _code(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that let stock transformers load a changed structure, if it is one."""
    if KEY not in config:
        return {}
    paths = [Path(str(module.__file__)) for module in (modeling_regauge, norms_regauge)]
    return {path.name: path.read_bytes() for path in paths}


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
        "patches": [dict(patch) for patch in plan.patches],
        "parameters": {"made": sorted(plan.made), "dropped": sorted(plan.drops)},
        "written": {"tensors": written.tensors, "worst_ulps": written.worst},
        "certificate": json.loads(certificate.to_json()),
        "software": software(),
        "seconds": dict(seconds),
    }
