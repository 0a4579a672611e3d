"""The verbs from Python: inspect, rewrite, load; for directories and for plain modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regauge.atlas import Atlas
from regauge.certify import Certificate, certify_modules
from regauge.cuts import check_cuts
from regauge.discover import discover
from regauge.errors import BadInput, NotEquivalent
from regauge.hf import load_config, model_class_of
from regauge.modeling_regauge import KEEPS, PatchError
from regauge.module_model import ModuleModel
from regauge.recipe import Recipe, parse_recipe
from regauge.rewriting import RewriteResult, rewrite
from regauge.sources import resolve
from regauge.stages import Progress
from regauge.trace import Trace, trace

__all__ = ["Progress", "RewriteResult", "inspect", "load", "resolve", "rewrite", "rewrite_module"]


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
        args, kwargs = given_inputs(inputs)
        return trace(model_or_path, args, kwargs, outputs=outputs)
    from regauge.hf import load_meta

    held = load_meta(resolve(model_or_path))
    return trace(held.model, (), held.inputs, outputs=outputs)


def given_inputs(inputs: Mapping[str, Any] | Sequence[Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs is None:
        raise BadInput("a module needs example inputs", expected="inputs={...} or inputs=(...)", found="none")
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


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
    check_cuts(recipe, False)
    args, kwargs = given_inputs(inputs)
    held = ModuleModel.of(model, args, kwargs, outputs)
    plan, _, _ = held.plan(recipe, seed)
    changed = held.rebuilt(plan)
    with torch.no_grad():
        tensors = dict(changed.named_parameters(remove_duplicate=False)) | dict(changed.named_buffers())
        replaced = tuple(f"{patch['path']}." for patch in plan.patches if patch["module"] not in KEEPS)
        for name, parameter in tensors.items():
            if name in plan.steps or name in plan.made or name.startswith(replaced):
                parameter.copy_(held.read(plan, name).to(parameter.dtype))
    certificate = certify_modules(
        model,
        changed,
        args,
        kwargs,
        outputs=outputs,
        weights_b_exact=lambda name: held.read(plan, name),
        seed=seed,
    )
    if not certificate.passed:
        raise NotEquivalent(f"the certificate failed: {certificate.reason}", found=str(certificate.verdict))
    return changed, certificate


def load(directory: str | Path, **options: Any) -> Any:
    """An ordinary transformers model from a directory, whether or not its structure was rewritten.

    Args:
        directory: written by regauge or by transformers.
        options: of ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Returns:
        An instance of the class that ``config.json`` names under ``architectures``, or of a subclass of it
        with the replaced modules in place. No code from the directory is run.

    Raises:
        BadInput: no usable configuration, or a class that transformers does not have.
    """
    config = load_config(Path(directory))
    try:
        return model_class_of(config).from_pretrained(directory, config=config, **options)
    except PatchError as error:
        raise BadInput(
            "config.json replaces modules that this model does not have", found=str(error)
        ) from error
