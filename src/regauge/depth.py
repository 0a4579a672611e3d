"""The same model with another number of layers, on the meta device: which configuration gives it.

No key of a configuration means anything here. Every whole number equal to the number of layers is a
candidate, together with the lists of that length; each is tried, and accepted if the model then has the
parameters wanted and computes, layer by layer and around them, what it computed before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from regauge.config_paths import Path, at, changes, leaves
from regauge.errors import Refused, RegaugeError
from regauge.hf import HFModel, load_config, load_meta
from regauge.interpret import interpret
from regauge.layers import Stack, find_stacks
from regauge.modeling_regauge import KEY
from regauge.sameness import Outline, Tokens, outline
from regauge.trace import trace
from regauge.walk import Walk


@dataclass(frozen=True)
class Resized:
    """A model with another number of layers.

    Attributes:
        stack, walk: its layers and its facts.
        config: changes to the top level of ``config.json``.
        takes: parameter -> parameter of the model before whose place it takes, for every parameter of the
            stack; a layer is where the one before it was if nothing came between.
    """

    stack: Stack
    walk: Walk
    config: Mapping[str, Any]
    takes: Mapping[str, str]


def resized(content: Mapping[str, Any], walk: Walk, stack: Stack, sources: Sequence[int]) -> Resized:
    """The model whose layer s computes what layer ``sources[s]`` of this one does.

    Args:
        content: of ``config.json``.
        walk, stack: facts of the traced model that it stands for, and the layers in question.
        sources: one number of a layer for each layer wanted.

    Raises:
        Refused: no change of the configuration gives that model, or several do; layers share parameters
            or hold buffers that differ.
    """
    if KEY in content:
        raise Refused(
            "the structure is changed by patches, which name layers by their number",
            found=f"{len(content[KEY]['patches'])} patches",
            way_out="change the number of layers first",
        )
    trial = _Trial(content, walk, stack, tuple(sources))
    found = list(trial.run())
    if len(found) != 1:
        raise Refused(
            "no configuration gives this model another number of layers"
            if not found
            else "several configurations give this number of layers",
            expected=f"one whole number equal to {len(stack.layers)} that decides how many there are"
            f" in {stack.path}",
            found="; ".join(", ".join(".".join(path) for path in edits) for edits, _ in found)
            or trial.nearest,
        )
    edits, (walk_new, stack_new) = found[0]
    return Resized(stack_new, walk_new, changes(content, edits), trial.takes)


class _Trial:
    def __init__(
        self, content: Mapping[str, Any], walk: Walk, stack: Stack, sources: tuple[int, ...]
    ) -> None:
        self.content, self.walk, self.stack, self.sources = content, walk, stack, sources
        self.before = load_meta(content)
        self.full = _merged(load_config(content).to_dict(), content)
        self.count, self.wanted = len(stack.layers), len(sources)
        self.takes = self._takes()
        self.tokens = Tokens()
        place = {old: sources.index(old) for old in sources}
        self.outline = outline(walk, stack, self.tokens, place)
        self._nearest = (0, "no such number: every one was tried")

    @property
    def nearest(self) -> str:
        """Why the change that came nearest was none."""
        return self._nearest[1]

    def _note(self, rank: int, reason: str) -> None:
        if rank > self._nearest[0]:
            self._nearest = rank, reason

    def _takes(self) -> dict[str, str]:
        """New name -> old name, for every parameter of the stack."""
        canonical = self.walk.trace.canonical
        leaves: dict[int, list[str]] = {}
        for name in self.before.model.state_dict(keep_vars=True):
            place = self.stack.place(name)
            if place is None:
                continue
            if name not in canonical or len(self.walk.trace.aliases[canonical[name]]) != 1:
                raise Refused(
                    "a layer holds what cannot be copied",
                    parameter=name,
                    expected="parameters of its own",
                    found="a stored buffer" if name not in canonical else "shared with another module",
                )
            leaves.setdefault(place[0], []).append(place[1])
        return {
            self.stack.name(new, leaf): self.stack.name(old, leaf)
            for new, old in enumerate(self.sources)
            for leaf in leaves.get(old, ())
        }

    def run(self) -> Iterator[tuple[dict[Path, Any], tuple[Walk, Stack]]]:
        """Every change that gives the model wanted, the smallest of each candidate."""
        numbers = [p for p, v in leaves(self.full) if type(v) is int and v == self.count]
        lists = [p for p, v in leaves(self.full) if isinstance(v, list) and len(v) == self.count]
        longer = {path: [at(self.full, path)[old] for old in self.sources] for path in lists}
        sizes = sorted({1, 2, len(lists)} & set(range(1, len(lists) + 1)))
        anything = False
        for pinned in (False, True):
            for path in numbers:
                pins = {other: self.count for other in numbers if pinned and other != path}
                edits: dict[Path, Any] = {**pins, path: self.wanted}
                matters, found = self._attempt(path, edits)
                several = (subset for n in sizes for subset in combinations(lists, n))
                for subset in () if found is not None or not matters else several:
                    more = {**edits, **{name: longer[name] for name in subset}}
                    _, found = self._attempt(path, more)
                    if found is not None:
                        edits = more
                        break
                if found is not None:
                    anything = True
                    yield edits, found
            if anything:
                return

    def _attempt(self, path: Path, edits: Mapping[Path, Any]) -> tuple[bool, tuple[Walk, Stack] | None]:
        """Whether the change does anything, and the model if it is the one wanted."""
        key = ".".join(path)
        try:
            after = load_meta({**self.content, **changes(self.content, edits)})
            names = _shapes(after)
            if names == _shapes(self.before):
                return False, None
            if names != self._names():
                self._note(2, f"{key} changes other parameters")
                return True, None
            walk = interpret(trace(after.model, (), after.inputs))
            stack = find_stacks(walk)[0].get(self.stack.path)
        except (RegaugeError, RuntimeError, ValueError, TypeError) as error:
            self._note(1, f"{key}: {' '.join(str(error).split())[:160]}")
            return True, None
        if stack is None or len(stack.layers) != self.wanted:
            return True, None
        reason = self._other(outline(walk, stack, self.tokens, None)) or self._buffers(after)
        if reason:
            self._note(3, f"{key} changes {reason}")
        return True, None if reason else (walk, stack)

    def _names(self) -> dict[str, tuple[int, ...]]:
        old = _shapes(self.before)
        kept = {name: shape for name, shape in old.items() if self.stack.place(name) is None}
        return kept | {new: old[name] for new, name in self.takes.items()}

    def _other(self, found: Outline) -> str:
        """What is computed otherwise than before; nothing if all is as wanted."""
        if found.around != self.outline.around:
            return "what is computed around the layers"
        for new, old in enumerate(self.sources):
            if found.layers[new] != self.outline.layers[old]:
                return f"what layer {new} computes: not what layer {old} did"
        return ""

    def _buffers(self, after: HFModel) -> str:
        old, new = self.before.buffers(), after.buffers()
        for name, value in new.items():
            place = self.stack.place(name)
            origin = name if place is None else self.stack.name(self.sources[place[0]], place[1])
            if origin not in old or not torch.equal(old[origin], value):
                return f"the buffer {name}"
        return ""


def _shapes(held: HFModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in held.model.state_dict(keep_vars=True).items()}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The second mapping on top of the first, section by section."""
    result = dict(below)
    for key, value in above.items():
        held = result.get(key)
        both = isinstance(value, Mapping) and isinstance(held, Mapping)
        result[key] = _merged(held, value) if both else value  # type: ignore[arg-type]
    return result
