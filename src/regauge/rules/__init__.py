"""One small rule per ATen operation: what it does to the axes of its arguments.

A rule states facts through the primitives of :class:`regauge.interpret.Walk`. To add one, write a
function in the file of its family; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regauge.rules import attention, elementwise, index, linear, norms, reduce, shape

TABLES = (
    attention.RULES,
    elementwise.RULES,
    index.RULES,
    linear.RULES,
    norms.RULES,
    reduce.RULES,
    shape.RULES,
)


def _merge() -> dict[str, Callable[..., Any]]:
    merged: dict[str, Callable[..., Any]] = {}
    for table in TABLES:
        for name, rule in table.items():
            if name in merged:
                raise ValueError(f"two rules for {name}")
            merged[name] = rule
    return merged


RULES = _merge()
