"""regauge: change a neural network's parameters without changing its function, and prove it.

Everything here is loaded on first use, so that ``import regauge`` imports no tensor library.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regauge.api import RewriteResult, inspect, load, rewrite, rewrite_module
    from regauge.atlas import Atlas, Generator, Kind, Space
    from regauge.certify import Certificate, Verdict, certify, certify_modules
    from regauge.comparing import Comparison, Relation, compare
    from regauge.comparing.align import align
    from regauge.errors import (
        BadInput,
        CheckpointError,
        NotEquivalent,
        RecipeError,
        Refused,
        RegaugeError,
        TraceError,
    )
    from regauge.exporting import ExportCertificate, ExportResult, export
    from regauge.recipe import MoveSpec, Recipe, load_recipe, parse_move
    from regauge.report import report
    from regauge.steering import steered

__version__ = metadata.version("regauge")

__all__ = [
    "Atlas",
    "BadInput",
    "Certificate",
    "CheckpointError",
    "Comparison",
    "ExportCertificate",
    "ExportResult",
    "Generator",
    "Kind",
    "MoveSpec",
    "NotEquivalent",
    "Recipe",
    "RecipeError",
    "Refused",
    "RegaugeError",
    "Relation",
    "RewriteResult",
    "Space",
    "TraceError",
    "Verdict",
    "align",
    "certify",
    "certify_modules",
    "compare",
    "export",
    "inspect",
    "load",
    "load_recipe",
    "parse_move",
    "report",
    "rewrite",
    "rewrite_module",
    "steered",
]

_VERBS = ("certify", "report")

_HOME = {
    "regauge.api": ("RewriteResult", "inspect", "load", "rewrite", "rewrite_module"),
    "regauge.atlas": ("Atlas", "Generator", "Kind", "Space"),
    "regauge.comparing": ("Comparison", "Relation", "compare"),
    "regauge.comparing.align": ("align",),
    "regauge.certify": ("Certificate", "Verdict", "certify_modules"),
    "regauge.errors": (
        "BadInput",
        "CheckpointError",
        "NotEquivalent",
        "RecipeError",
        "Refused",
        "RegaugeError",
        "TraceError",
    ),
    "regauge.exporting": ("ExportCertificate", "ExportResult", "export"),
    "regauge.recipe": ("MoveSpec", "Recipe", "load_recipe", "parse_move"),
    "regauge.steering": ("steered",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


class _Verb(ModuleType):
    """A subpackage that can be called like the function of its name inside it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Regauge(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Regauge


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"regauge.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'regauge' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
