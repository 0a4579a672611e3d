"""Configurations that tie parameters, or leave them apart, found by building the model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from regauge.errors import Refused
from regauge.hf import HFModel, load_meta
from regauge.trace import Trace, trace


def untied_config(config: Mapping[str, Any], before: Trace | None = None) -> dict[str, Any]:
    """Changes to the top level of ``config.json`` after which the model loads with nothing tied.

    Verified by building the model again on the meta device and comparing its parameters and its
    traced operations with the original.

    Args:
        config: content of ``config.json``.
        before: the model of it, traced; None to trace it here.

    Raises:
        Refused: the model stays tied, or unties only by becoming another function.
    """
    changes = _switched(config, False)
    after = load_meta({**config, **changes})
    tied = [names for names in shared_names(after.model) if len(names) > 1]
    if tied:
        raise Refused(
            "this architecture keeps its parameters tied whatever the config says",
            parameter=tied[0][0],
            found="shared with " + ", ".join(tied[0][1:]),
        )
    _check_operations("untying", before or _traced(load_meta(config)), after)
    return changes


def tied_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, ...], ...]]:
    """Changes to the top level of ``config.json`` after which parameters are one, and which those are.

    Verified as for :func:`untied_config`.

    Returns:
        the changes; and groups of state-dict names, each one parameter then and more than one now.

    Raises:
        Refused: the configuration ties nothing, or ties only by becoming another function.
    """
    changes = _switched(config, True)
    before, after = load_meta(config), load_meta({**config, **changes})
    already = set(map(frozenset, shared_names(before.model)))
    groups = tuple(tuple(names) for names in shared_names(after.model) if frozenset(names) not in already)
    if not groups:
        raise Refused(
            "the configuration of this architecture ties nothing that is not tied already",
            expected="parameters that become one when tie_word_embeddings is true",
            found="the same parameters as before",
        )
    _check_operations("tying", _traced(before), after)
    return changes, groups


def shared_names(model: nn.Module) -> list[list[str]]:
    """The state-dict names of every parameter, those of one parameter together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _switched(config: Mapping[str, Any], tie: bool) -> dict[str, Any]:
    changes: dict[str, Any] = {"tie_word_embeddings": tie}
    for key, section in config.items():
        if isinstance(section, Mapping) and "tie_word_embeddings" in section:
            changes[key] = {**section, "tie_word_embeddings": tie}
    return changes


def _traced(held: HFModel) -> Trace:
    return trace(held.model, kwargs=held.inputs)


def _check_operations(what: str, before: Trace, after: HFModel) -> None:
    operations = [
        [
            (str(node.target), tuple(a for a in node.args if isinstance(a, (int, float))))
            for node in traced.graph.nodes
            if node.op == "call_function"
        ]
        for traced in (before, _traced(after))
    ]
    if operations[0] != operations[1]:
        raise Refused(
            f"{what} changes what this architecture computes",
            found=f"{len(operations[0])} operations before, {len(operations[1])} after",
        )
