"""Features that nothing sees, and features that are there twice: they go, and the function stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from regauge.errors import Refused
from regauge.growing.correct import Growing
from regauge.growing.passing import Relation, relations
from regauge.growing.rebuild import rebuilt
from regauge.growing.roles import Role
from regauge.growing.search import Candidate, Search, candidates, level, silent_of
from regauge.growing.shrink import shrunk
from regauge.moves.base import Change, Move, Option, Preserves, Scene, Used
from regauge.plan import Refit
from regauge.solve.layout import Layout

GROUPS = (
    {Role.NEURONS},
    {Role.CHANNELS},
    {Role.HEADS},
    {Role.QUERIES},
    {Role.KEYS, Role.VALUES},
    {Role.RESIDUAL},
)
"""Roles whose sizes an architecture may tie together."""


def plan_merge(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y = Σ_i r[i] f(w[i] · x): an index i with r[i] = 0, or with f(w[i] · x) = 0 since w[i] = 0, goes; of
    two with w[i] = w[j] the second goes, and r[i] ← r[i] + r[j].

    Of each index set of :func:`regauge.moves.grow.plan_grow`: what it calls the silent side is r, everything
    else that is written on these indices (rows, biases, gains, running means) is w. Equal means equal.
    Source: Iterative Feature Merging (Ytchen981/Iterative-Feature-Merging, utils/self_weight_matching.py),
    where its distance is zero, but with the sum on the side that reads, not on the side that writes: then f
    need not be homogeneous, and the readers need not be equal.
    """
    _, layout = scene.gauge.walk(untied=scene.state.untied)
    passed = list(relations(layout))

    every = candidates(layout, passed, lambda reach: reach.named(options["where"]))
    look = partial(_found, scene, layout, passed)
    equal = options["keep"] == "equal"
    found = look(every, set(Role) if equal else set())
    if not found:
        raise Refused(
            "nothing is dead or double",
            expected="an index that no map reads or that all write zero to, or two that are written alike",
            found=f"{sum(item.reach.size for item in every)} indices in {len(every)} index sets",
        )
    if scene.trial is None:
        raise Refused("this model cannot be rebuilt in another size", expected="a directory or a module")
    try:
        return _change(scene, layout, found)
    except Refused as refusal:
        reason = refusal
    best: Change | None = None
    taken: set[Role] = set()
    level_roles: set[Role] = set()
    for group in GROUPS:
        for more in [group] if equal else [set[Role](), group]:
            chosen = [item for item in every if item.role in taken | group]
            found = look(chosen, level_roles | more)
            if not any(item.role in group for item in found):
                break
            try:
                best = _change(scene, layout, found)
            except Refused:
                continue
            taken, level_roles = taken | group, level_roles | more
            break
    if best is None:
        raise reason
    return best


def _found(
    scene: Scene, layout: Layout, passed: Sequence[Relation], chosen: Sequence[Candidate], equal: set[Role]
) -> list[Candidate]:
    """What can go; of the roles in ``equal`` the same number from every index set of one size."""
    for item in chosen:
        item.least = 1
    search = Search(layout, passed, scene.read, chosen)
    while True:
        found = search.run()
        largest = level(chosen)
        uneven = [item for item in found if item.role in equal and len(item.kept) < largest[_kind(item)]]
        if not uneven:
            return found
        for item in chosen:
            if item.role in equal:
                item.least = largest[_kind(item)]


def _kind(item: Candidate) -> tuple[Role, int]:
    return item.role, item.reach.size


def _change(scene: Scene, layout: Layout, found: Sequence[Candidate]) -> Change:
    """The model without the indices that go.

    Raises:
        Refused: it cannot be rebuilt in these sizes, or a constant changes with them.
    """
    assert scene.trial is not None
    shrinking = [Growing(item.reach, item.role, len(item.kept), ()) for item in found]
    new = rebuilt(scene.trial(), scene.trace, layout, shrinking, {})
    goes = {item.reach.atom: item.goes for item in found}
    refits: dict[str, Refit] = {}
    for name, shape in new.shapes.items():
        build = partial(
            shrunk,
            axes=new.axes[name],
            goes=goes,
            silent=silent_of(name, found),
            scales=new.scales(name),
            chart=new.charts[name],
        )
        refits[name] = Refit(shape, build)
    used = tuple(
        Used(f"{item.role}", "merge", len(item.kept), 1, len(item.reach.sides), 0.0, 0.0) for item in found
    )
    return Change(refits=refits, config=dict(new.fit.config), patches=new.fit.patches, used=used)


MERGE = Move(
    "merge",
    "r[i] f(w[i]·x) + r[j] f(w[i]·x) = (r[i] + r[j]) f(w[i]·x), and 0 · f + r · 0 = 0",
    "features that nothing sees, or that are there twice; may change the structure",
    Preserves.OUTPUT,
    plan_merge,
    {
        "keep": Option(str, "each", "each: every layer its own size; equal: as many as every layer can lose",
                       ("each", "equal")),
        "where": Option(str, "", "only index sets with a parameter whose name matches, as layers.3.*"),
    },
)  # fmt: skip
