"""One parameter in two roles becomes two, and two equal ones become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.errors import Refused
from regauge.moves.base import Change, Move, Preserves, Scene, State
from regauge.patches import Patch, replaceable


def plan_untie(scene: Scene, options: Mapping[str, Any]) -> Change:
    """E used in two roles becomes E and E′ = E: the function is the same, each role moves alone.

    Where no configuration can say so, y[o] = Σ_c E[o, c] x[c] + b[o] becomes a linear map of its own,
    W[o, c] = E[o, c], by a structure patch; tables that are looked up stay one parameter.

    Source: Press and Wolf, arXiv 1608.05859, section 3, for the tied head.
    """
    tied = scene.gauge.tied
    if not tied or scene.state.untied:
        raise Refused("nothing is tied here", expected="two names for one parameter", found="none")
    try:
        config = {} if scene.untie_config is None else scene.untie_config()
    except Refused as refusal:
        return _own_heads(scene, refusal)
    copies = {alias: names[0] for names in tied for alias in names[1:]}
    return Change(copies=copies, config=config, state=State(True, scene.state.folded))


def _own_heads(scene: Scene, refusal: Refused) -> Change:
    """Linear maps whose parameters are tied, replaced by linear maps with parameters of their own."""
    first = {alias: names[0] for names in scene.gauge.tied for alias in names}
    patches: list[Patch] = []
    copies: dict[str, str] = {}
    for module in replaceable(scene.gauge.untied).values():
        held = [name for name in (module.weight, module.bias) if name in first]
        if module.patch["module"] == "linear" and held and all(first[name] != name for name in held):
            patches.append(module.patch)
            copies |= {name: first[name] for name in held}
    if not patches:
        raise Refused(
            refusal.message,
            parameter=refusal.parameter,
            expected="a configuration that unties, or a tied linear map that is a module of its own",
            found=refusal.found,
        )
    return Change(copies=copies, patches=tuple(patches))


def plan_tie(scene: Scene, options: Mapping[str, Any]) -> Change:
    """E and E′ = E, equal bit for bit as the moves so far leave them, become E used in two roles.

    Source: Press and Wolf, arXiv 1608.05859, section 3, for the tied head.
    """
    if scene.tie_config is None:
        raise Refused(
            "which parameters of a plain module are one is said by its code",
            expected="a model of transformers, whose configuration can tie",
            found="no configuration",
        )
    config, groups = scene.tie_config()
    for kept, *others in groups:
        value = scene.read(kept)
        for other in others:
            found = scene.read(other)
            if value.dtype != found.dtype or not torch.equal(value, found):
                raise Refused(
                    "what the configuration would make one parameter is not equal",
                    parameter=other,
                    expected=f"the values of {kept}, bit for bit",
                    found=_difference(value, found),
                )
    drops = frozenset(name for _, *others in groups for name in others)
    return Change(drops=drops, config=config, state=State(False, scene.state.folded - drops), retrace=True)


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(b.shape)} in {b.dtype}, where the other is {tuple(a.shape)} in {a.dtype}"
    return f"{int((a != b).sum())} of {a.numel()} entries that differ"


UNTIE = Move(
    "untie",
    "E, E (one tensor, two roles) → E, E′ with E′ = E",
    "a parameter with two names, and a configuration that can say so, or a tied linear map that is a"
    " module of its own, which changes the structure",
    Preserves.OUTPUT,
    plan_untie,
    {},
)

TIE = Move(
    "tie",
    "E, E′ with E′ = E bit for bit → E, E (one tensor, two roles)",
    "parameters that are equal, and a configuration that can say that they are one",
    Preserves.OUTPUT,
    plan_tie,
    {},
)
