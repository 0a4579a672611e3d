"""The decorator that puts a rule into its file's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Table(dict[str, Callable[..., Any]]):
    """Operation name (``aten.add``, any overload) -> rule.

    A rule is called as ``rule(walk, node, *args, **kwargs)`` with abstract values in place of
    tensors. ``even_given`` rules also run when no argument depends on a parameter.
    """

    def op(self, *names: str, even_given: bool = False) -> Callable[[F], F]:
        def add(function: F) -> F:
            if even_given:
                function.even_given = True  # type: ignore[attr-defined]
            for name in names:
                if name in self:
                    raise ValueError(f"two rules for {name}")
                self[name] = function
            return function

        return add
