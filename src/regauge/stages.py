"""Long work in stages: who is told of it, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total); totals are bytes for tensors, steps otherwise."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that nobody is told of."""


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The stage of this name ends now, and the next one begins."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now
