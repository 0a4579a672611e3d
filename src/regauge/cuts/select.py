"""A smaller model that starts from some of the weights of a larger one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regauge.cuts.base import Cut
from regauge.depth import resized
from regauge.errors import BadInput, Refused
from regauge.hf import load_config, load_meta
from regauge.interpret import interpret
from regauge.layers import choose_stack
from regauge.moves.base import Change, Option, Scene, State
from regauge.moves.depth import configuration, depth_change, wanted
from regauge.plan import Made


def indices(large: int, small: int) -> torch.Tensor:
    """``small`` of ``large`` positions: every (large / small)-th, or where that is no whole number
    round(i · (large − 1) / (small − 1)) for i = 0 … small − 1, halves to even.

    Returns:
        int64, of length ``small``. It depends on the sizes alone: axes of equal size keep equal positions.
    """
    if large % small == 0:
        return torch.arange(0, large, large // small)
    return torch.linspace(0, large - 1, small).round().to(torch.int64)


def selected(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """y[i, j, …] = x[k(i), l(j), …] for :func:`indices` k, l, … of each axis.

    Raises:
        ValueError: another number of axes, or a size that is none or larger.
    """
    if tensor.dim() != len(shape) or any(not 0 < n <= m for m, n in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"cannot select {shape} of {tuple(tensor.shape)}")
    for axis, (large, small) in enumerate(zip(tensor.shape, shape, strict=True)):
        if large != small:
            tensor = tensor.index_select(axis, indices(large, small))
    return tensor


def plan_select(scene: Scene, options: Mapping[str, Any]) -> Change:
    """Layers 0 … N−1; in every tensor y[i, j, …] = x[k(i), l(j), …], k the same for axes of the same sizes.

    Source: Xu et al., Initializing Models with Larger Ones (arXiv 2311.18823, uniform selection).
    """
    if bool(options["layers"]) == bool(options["config"]):
        raise BadInput(
            "say once how small the result shall be",
            expected="layers=N, or config=PATH of the config.json of a smaller model",
            found="both" if options["layers"] else "neither",
        )
    content = configuration(scene)
    if options["config"]:
        return _like(scene, content, options["config"])
    walk = interpret(scene.trace)
    stack = choose_stack(walk, options["stack"] or None)
    number, count = wanted(options["layers"], len(stack.layers)), len(stack.layers)
    if not 0 < number < count:
        raise BadInput("layers can only be left out", expected=f"fewer than {count}", found=str(number))
    change = depth_change(scene, resized(content, walk, stack, range(number)), {})
    gone = [name for name in scene.trace.canonical if (stack.place(name) or (-1,))[0] >= number]
    return Change(drops=frozenset(gone), config=change.config, state=change.state, retrace=True)


def _like(scene: Scene, content: Mapping[str, Any], path: str) -> Change:
    """The shapes of the model of another configuration, each from the parameter of that name."""
    small_content = _read(Path(path))
    if small_content.get("model_type") != content.get("model_type"):
        raise Refused(
            "weights can be selected for a model of the same type only",
            expected=str(content.get("model_type")),
            found=str(small_content.get("model_type")),
        )
    small = load_meta({**small_content, "architectures": content.get("architectures")})
    groups: dict[int, list[str]] = {}
    for name, tensor in small.model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    shapes = {name: tuple(t.shape) for name, t in small.model.state_dict(keep_vars=True).items()}
    trace = scene.trace
    for names in groups.values():
        if len({trace.canonical.get(name) for name in names}) > 1:
            raise Refused(
                "the smaller model ties what the larger does not",
                parameter=names[0],
                found=" = ".join(names),
                way_out="set the same tie_word_embeddings in both configurations",
            )
    made: dict[str, Made] = {}
    for name, shape in shapes.items():
        canonical = trace.canonical.get(name)
        large = () if canonical is None else tuple(trace.shapes[canonical])
        fits = len(large) == len(shape) and all(n <= m for m, n in zip(large, shape, strict=True))
        if canonical is None or not fits:
            raise Refused(
                "a parameter of the smaller model is no part of one of the larger",
                parameter=name,
                expected=f"at least {shape}",
                found="none" if canonical is None else str(large),
            )
        if large != shape and canonical == name:
            made[name] = Made(shape, name, partial(_cut, scene.read, name, shape))
    gone = frozenset(name for name in trace.canonical if name not in shapes)
    if not made and not gone:
        raise Refused("the model has this size already", found=f"{len(shapes)} parameters of the same shapes")
    kept = {"torch_dtype", "dtype", "architectures", "_name_or_path", "transformers_version"}
    config = {key: value for key, value in small_content.items() if key not in kept}
    return Change(made=made, drops=gone, config=config, state=State(), retrace=True)


def _cut(read: Callable[[str], torch.Tensor], name: str, shape: tuple[int, ...], _: Any) -> torch.Tensor:
    return selected(read(name), shape)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot read the configuration {path}", found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object", found=type(content).__name__)
    load_config(content)
    return content


SELECT = Cut(
    "select",
    "layers 0 … N−1, and of each axis of n entries m at even distances: y[i, j, …] = x[k(i), l(j), …]",
    "the other layers and entries",
    plan_select,
    {
        "layers": Option(str, "", "how many layers to keep, the first ones"),
        "config": Option(str, "", "instead: config.json of a smaller model of the same type"),
        "stack": Option(str, "", "path of the list of layers, where there are several"),
    },
)
