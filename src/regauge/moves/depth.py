"""More layers that do nothing yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from regauge.depth import Resized, resized
from regauge.errors import BadInput, Refused
from regauge.interpret import interpret
from regauge.layers import Stack, choose_stack, is_identity
from regauge.moves.base import Change, Move, Option, Preserves, Scene
from regauge.plan import Made


def plan_insert_layers(scene: Scene, options: Mapping[str, Any]) -> Change:
    """x + f₁ + f₂ + … = x: in a new layer every last writer of a term f is zero, for all its entries.

    W[o, i] = 0 and b[o] = 0 for the maps that write to the stream x[…, o]; where a norm with a gain follows,
    g[o] = 0 instead (stored as −1 where it is read as 1 + g). Everything else in the layer is a copy of the
    layer before it, or drawn with its mean and standard deviation, and learns as soon as the writers move.

    Source: Gesmundo and Maile, Composable Function-preserving Expansions (arXiv 2308.06103, layer addition);
    Wu et al., LLaMA Pro (arXiv 2401.02415, block expansion).
    """
    content = configuration(scene)
    walk = interpret(scene.trace)
    stack = choose_stack(walk, options["stack"] or None)
    count = len(stack.layers)
    more = wanted(options["layers"], count) - count
    if more < 1:
        raise Refused(
            "layers can only be added here",
            expected=f"more than {count}, the number there is",
            found=str(options["layers"]),
            way_out="layers=+2",
        )
    places = spread(count, more) if options["place"] == "spread" else [count] * more
    sources, new = order(count, places)
    grown, sources = _grown(partial(resized, content, walk, stack), sources, new, count)
    zeros = {
        stack.name(slot, _leaf(stack, name)): value
        for slot in new
        for name, value in stack.layers[sources[slot]].writers.items()
    }
    for slot in new:
        layer = grown.stack.layers[slot]
        if not is_identity(grown.walk, layer, zeros):
            raise Refused(
                "a new layer does not follow to do nothing",
                node=f"{layer.leaving.name} in {layer.path}",
                expected="the stream as it entered, plus zeros",
                found=f"a value that depends on more, with {len(layer.writers)} parameters zero",
            )
    shapes = grown.walk.trace.shapes
    made = {
        name: Made(shapes[name], grown.takes[name], _filled(shapes[name], v)) for name, v in zeros.items()
    }
    if options["new"] == "random":
        seed = int(torch.randint(1 << 62, (), generator=scene.random))
        drawn = [n for n in grown.takes if (stack.place(n) or (-1,))[0] in new and n not in zeros]
        for number, name in enumerate(drawn):
            value = scene.read(grown.takes[name]).to(torch.float64)
            spread_of = (float(value.mean()), float(value.std(correction=0)))
            build = partial(_drawn, shapes[name], spread_of, (seed + number) % (1 << 63))
            made[name] = Made(shapes[name], grown.takes[name], build)
    return depth_change(scene, grown, made)


def depth_change(scene: Scene, grown: Resized, made: Mapping[str, Made]) -> Change:
    """The change to a model with other layers; gains that were one still are, if they are not made anew."""
    takes = {new: old for new, old in grown.takes.items() if new != old}
    names = grown.walk.trace.shapes
    folded = {n for n in names if grown.takes.get(n, n) in scene.state.folded and n not in made}
    state = replace(scene.state, folded=frozenset(folded))
    return Change(takes=takes, made=made, config=grown.config, state=state, retrace=True)


def configuration(scene: Scene) -> Mapping[str, Any]:
    """Content of ``config.json``. Raises ``Refused`` for a plain module."""
    if scene.config is None:
        raise Refused(
            "the number of layers of a plain module cannot be changed",
            expected="a model whose configuration says how many layers it has",
            found="code that makes them",
            way_out="build the larger module, and save it as a directory of transformers",
        )
    return scene.config()


def wanted(text: str, count: int) -> int:
    """``20`` or ``+2`` as the number of layers there shall be."""
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 7):
        raise BadInput(
            "cannot read the number of layers",
            expected="a number such as 20, or +2 for two more",
            found=repr(text),
        )
    return int(digits) + (count if text.startswith("+") else 0)


def spread(count: int, more: int) -> list[int]:
    """After how many old layers each new one comes: evenly, the last after the last."""
    return [-(-number * count // more) for number in range(1, more + 1)]


def order(count: int, places: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each layer of the result the old layer it is made from, and which of them are new."""
    sources: list[int] = []
    new: list[int] = []
    for number in range(count):
        sources.append(number)
        for _ in range(list(places).count(number + 1)):
            new.append(len(sources))
            sources.append(number)
    return sources, new


def _grown(resize: Any, sources: list[int], new: Sequence[int], count: int) -> tuple[Resized, list[int]]:
    """With copies of the layer before or, where only these are alike, of the layer after."""
    try:
        return resize(sources), sources
    except Refused:
        after = [min(old + 1, count - 1) if slot in new else old for slot, old in enumerate(sources)]
        if after == sources:
            raise
        try:
            return resize(after), after
        except Refused:
            pass
        raise


def _leaf(stack: Stack, name: str) -> str:
    place = stack.place(name)
    assert place is not None
    return place[1]


def _filled(shape: tuple[int, ...], value: float) -> Any:
    return None if value == 0 else partial(_constant, shape, value)


def _constant(shape: tuple[int, ...], value: float, _: Any) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float64)


def _drawn(shape: tuple[int, ...], of: tuple[float, float], seed: int, _: Any) -> torch.Tensor:
    """Normal with a mean and a standard deviation; the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * of[1] + of[0]


INSERT_LAYERS = Move(
    "insert-layers",
    "x + f₁ + f₂ + … = x: a new layer, every last writer of f zero: W[o, i] = 0, b[o] = 0 or gain g[o] = 0",
    "layers that add to a stream (pre-norm), and a configuration that says how many there are",
    Preserves.OUTPUT,
    plan_insert_layers,
    {
        "layers": Option(str, "+1", "how many there shall be, or + how many more"),
        "place": Option(
            str,
            "spread",
            "spread: evenly, each after the layer it copies; end: all at the end",
            ("spread", "end"),
        ),
        "new": Option(
            str,
            "copy",
            "the rest of a new layer: a copy of that layer, or random as large",
            ("copy", "random"),
        ),
        "stack": Option(str, "", "path of the list of layers, where there are several"),
    },
)
