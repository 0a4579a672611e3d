"""From a rewrite of parameters to jobs on the tensors of a checkpoint: which tensor comes from which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from regauge.checkpoint import Checkpoint
from regauge.errors import CheckpointError, RegaugeError
from regauge.plan import Rewrite, Step

Names = Mapping[str, str | tuple[str, ...]]
"""Parameter name -> tensor that stores it, or all tensors that do, if one parameter is stored repeatedly."""


@dataclass(frozen=True)
class Job:
    """What becomes one tensor of the result: ``steps`` applied to the source tensor ``origin``."""

    parameter: str
    origin: str
    steps: tuple[Step, ...]

    @property
    def arithmetic(self) -> bool:
        return any(step.arithmetic for step in self.steps)


def tensor_copies(source: Checkpoint, rewrite: Rewrite, names: Names) -> dict[str, str]:
    """``rewrite.copies`` in tensor names: new tensor -> source tensor; for ``StagedOutput(copies=...)``."""
    copies: dict[str, str] = {}
    for new, old in rewrite.copies.items():
        copies[stored_as(new, names)[0] if new in names else new] = _tensors(source, old, names)[0]
    return copies


def tensor_made(source: Checkpoint, rewrite: Rewrite, names: Names) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``rewrite.made`` in tensor names: tensor -> (tensor it is stored beside, shape)."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for new, made in rewrite.made.items():
        like = rewrite.copies.get(made.like, made.like)
        tensor = stored_as(new, names)[0] if new in names else new
        found[tensor] = (_tensors(source, like, names)[0], made.shape)
    return found


def tensor_drops(source: Checkpoint, rewrite: Rewrite, names: Names) -> frozenset[str]:
    """Tensors that the result no longer stores."""
    kept = {tensor for name in names if name not in rewrite.drops for tensor in stored_as(name, names)}
    dropped = {tensor for name in rewrite.drops if name in names for tensor in _tensors(source, name, names)}
    return frozenset(dropped - kept - set(tensor_made(source, rewrite, names)))


def with_new_names(names: Mapping[str, str], rewrite: Rewrite) -> dict[str, str]:
    """The same with parameters of new layers, stored as those of old layers are but for their number.

    A checkpoint may spell a name without the prefix that the model gives it, ``h.3.w`` for ``model.h.3.w``.
    """
    result = dict(names)
    origins = dict(rewrite.copies) | {name: made.like for name, made in rewrite.made.items()}
    for new, old in origins.items():
        parts, before = new.split("."), old.split(".")
        stored = names.get(old, old).split(".")
        differ = [i for i, (x, y) in enumerate(zip(parts, before, strict=False)) if x != y]
        if new in names or len(parts) != len(before) or len(differ) != 1 or not parts[differ[0]].isdigit():
            continue
        place = differ[0] - len(before)
        if len(stored) >= -place and stored[place:] == before[place:]:
            stored[place] = parts[place]
            result[new] = ".".join(stored)
    return result


def plan_jobs(source: Checkpoint, rewrite: Rewrite, names: Names) -> dict[str, Job]:
    """Tensor of the result -> job, for every tensor that is not simply copied.

    Raises:
        CheckpointError: the rewrite changes a parameter that the checkpoint does not hold.
        RegaugeError: two parameters with steps are the same tensor.
    """
    jobs: dict[str, Job] = {}
    for (target, origin), new in zip(
        tensor_copies(source, rewrite, names).items(), rewrite.copies, strict=True
    ):
        jobs[target] = Job(new, origin, tuple(rewrite.steps.get(new, ())))
    untied = set(jobs)
    for parameter, steps in rewrite.steps.items():
        if not steps or any(parameter in held for held in (rewrite.copies, rewrite.made, rewrite.drops)):
            continue
        for tensor in _tensors(source, parameter, names):
            if tensor in untied:
                continue
            if tensor in jobs:
                raise RegaugeError(
                    "two parameters of the rewrite are one tensor of the checkpoint",
                    parameter=parameter,
                    expected="every tensor changed once",
                    found=f"{tensor} is also {jobs[tensor].parameter}",
                )
            jobs[tensor] = Job(parameter, tensor, tuple(steps))
    return jobs


def stored_as(parameter: str, names: Names) -> tuple[str, ...]:
    """The tensors that store a parameter."""
    value = names[parameter]
    return (value,) if isinstance(value, str) else tuple(value)


def _tensors(source: Checkpoint, parameter: str, names: Names) -> tuple[str, ...]:
    if parameter not in names:
        raise CheckpointError(
            "the rewrite needs a parameter that no tensor of the checkpoint stores",
            parameter=parameter,
            found=f"{len(source.names)} tensors in {source.path}",
            way_out="load the checkpoint with the model it was saved from",
        )
    return tuple(source.entry(tensor).name for tensor in stored_as(parameter, names))
