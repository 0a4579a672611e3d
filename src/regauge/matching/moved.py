"""The second model as the elements found so far leave it, under the names of the first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch

from regauge.act import act_in_place
from regauge.atlas import Action, Generator
from regauge.elements import Element
from regauge.matching.sides import Rows, Side, evenly

_KEEP = 24 << 20
"""Entries of either model that are kept in memory: 192 MiB in float64."""


SAMPLE = 1 << 14
"""Rows of a table that are enough to pair units."""

RUN = 1 << 11
"""Rows that are read together."""


class Kept:
    """Latest tensors read, up to a number of entries."""

    def __init__(self, entries: int = _KEEP) -> None:
        self._entries = entries
        self._held: OrderedDict[str, tuple[int, torch.Tensor]] = OrderedDict()
        self._total = 0

    def get(self, name: str, version: int) -> torch.Tensor | None:
        found = self._held.get(name)
        if found is None:
            return None
        if found[0] != version:
            self._total -= self._held.pop(name)[1].numel()
            return None
        self._held.move_to_end(name)
        return found[1]

    def put(self, name: str, version: int, tensor: torch.Tensor) -> None:
        if tensor.numel() * 4 > self._entries:
            return
        self._held[name] = (version, tensor)
        self._total += tensor.numel()
        while self._total > self._entries:
            self._total -= self._held.popitem(last=False)[1][1].numel()


class Pair:
    """Both models, parameter by parameter, the second one moved.

    Attributes:
        a, b: their normal forms.
        names: parameter of a -> parameter of b, of the same shape.
        history: elements that act on b, in order.
    """

    def __init__(self, a: Side, b: Side, names: Mapping[str, str]) -> None:
        self.a, self.b, self.names = a, b, names
        self.history: list[tuple[Generator, Element]] = []
        self._acts: dict[str, list[tuple[Action, Element, tuple[str, ...]]]] = {}
        self._kept_a, self._kept_b = Kept(), Kept()
        self._weights: dict[str, float] = {}

    def weight(self, name: str) -> float:
        """1 / (mean square of a parameter of a, and a hundredth of that of b as given); 0 for zeros.

        Every residual is weighed by it, so that an entry of one parameter counts as much as one of another;
        one that is all but zero in a does not outweigh the others.
        """
        if name not in self._weights:
            total, count = 0.0, 0
            for rows in self.a.chunks(name):
                x = self._whole_a(name) if rows is None else self.a.read(name, rows)
                y = self.b.read(self.names[name], rows)
                total += float(x.square().sum()) + 0.01 * float(y.square().sum())
                count += x.numel()
            self._weights[name] = count / total if total else 0.0
        return self._weights[name]

    def apply(self, generator: Generator, element: Element) -> None:
        """The element acts on b after all others."""
        self.history.append((generator, element))
        self._index(generator, element)

    def replace(self, history: Sequence[tuple[Generator, Element]]) -> None:
        """Another history."""
        self.history = list(history)
        self._acts = {}
        self._kept_b = Kept()
        for generator, element in self.history:
            self._index(generator, element)

    def chunks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(a, b moved) of a parameter, float64, in ranges of rows; not to be overwritten."""
        for rows in self.a.chunks(name):
            if rows is None:
                yield self._whole_a(name), self._whole_b(name)
            else:
                yield self.a.read(name, rows), self.moved(name, rows)

    def ranges(
        self, name: str, rows: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(a, b moved) of a parameter in the ranges of rows given."""
        for held in rows:
            yield self.a.read(name, held), self.moved(name, held)

    def sample(self, action: Action, held: tuple[str, ...]) -> list[tuple[int, int]] | None:
        """Ranges of rows, evenly over a long table of which every row says as much; None: take all of it."""
        shape = self.a.shapes[action.parameter]
        if len(shape) < 2 or shape[0] <= 2 * SAMPLE or _touches_rows(action, held, shape):
            return None
        return evenly(shape[0], RUN, SAMPLE // RUN)

    def moved(self, name: str, rows: Rows = None) -> torch.Tensor:
        """b's counterpart of a's parameter ``name`` as the history leaves it, float64."""
        shape = self.a.shapes[name]
        acts = self._acts.get(name, ())
        free = rows is None or all(not _touches_rows(action, copies, shape) for action, _, copies in acts)
        value = self.b.read(self.names[name], rows if free else None)
        for action, element, copies in acts:
            value = act_in_place(value, action, element, copies, shape)
        return value if free or rows is None else value[rows[0] : rows[1]]

    def _index(self, generator: Generator, element: Element) -> None:
        copies = tuple(name for name, _ in generator.copies)
        for action in generator.actions:
            self._acts.setdefault(action.parameter, []).append((action, element, copies))

    def _whole_a(self, name: str) -> torch.Tensor:
        found = self._kept_a.get(name, 0)
        if found is None:
            found = self.a.read(name)
            self._kept_a.put(name, 0, found)
        return found

    def _whole_b(self, name: str) -> torch.Tensor:
        version = len(self._acts.get(name, ()))
        found = self._kept_b.get(name, version)
        if found is None:
            found = self.moved(name)
            self._kept_b.put(name, version, found)
        return found


def _touches_rows(action: Action, copies: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    part = action.parts[0]
    return action.axis == 0 or part.size != shape[0] or any(factor.name in copies for factor in part.factors)
