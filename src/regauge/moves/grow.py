"""Growth in width: index sets get more indices, and nothing sees the new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from regauge.errors import RecipeError, Refused
from regauge.growing.correct import Growing
from regauge.growing.fill import Fill, New, fill, grown
from regauge.growing.reach import Follower, Reach
from regauge.growing.rebuild import rebuilt
from regauge.growing.roles import Role, key_product, role_of, silent_sides
from regauge.moves.base import Change, Move, Option, Preserves, Scene, Used
from regauge.plan import Refit
from regauge.solve.layout import Layout

LARGEST = 1 << 24
"""No index set becomes larger: what is asked for beyond it is a slip of the hand."""
ROLES = {
    Role.CHANNELS: "channels between two convolutions",
    Role.NEURONS: "neurons of every feed-forward layer",
    Role.HEADS: "heads of keys and values, each with its query heads",
    Role.QUERIES: "query heads for every head of keys and values, where they are shared",
    Role.KEYS: "entries of a key and a query, per head",
    Role.VALUES: "entries of a value, per head",
    Role.RESIDUAL: "width of the residual stream, where RMSNorms read it",
}


def plan_grow(scene: Scene, options: Mapping[str, Any]) -> Change:
    """y = Σ_i r[i] f(w[i] · x): more indices i, with r[i] = 0, or r[i] f(w[i] · x) in pairs that cancel,
    or old ones split into shares; the sum is the same.

    ========  ===========================  =============================
    index     written by (any new rows)    silent on the new indices
    ========  ===========================  =============================
    neurons   W1[i, :], gate[i, :], b[i]   W2[:, i]
    channels  W1[i, …], norm[i], b[i]      W2[:, i, …]
    heads     q, k, v [h, :, :], biases    o[:, h, :]
    queries   q [h, g, :, :], biases       o[:, h, g, :]
    values    v [h, e, :], biases          o[:, h, e]
    keys      q [h, e, :], biases          k [h, e, :], its bias
    residual  (readers, gains: any)        every writer of the stream
    ========  ===========================  =============================

    Source: Gesmundo and Maile, Composable Function-preserving Expansions (arXiv 2308.06103), expansions 1-5.
    """
    if scene.trial is None:
        raise Refused("this model cannot be rebuilt in another size", expected="a directory or a module")
    new = New(options["new"])
    if not 0 <= options["noise"] < 1:
        raise RecipeError("bad noise", expected="0 to below 1", found=str(options["noise"]))
    _, layout = scene.gauge.walk(untied=scene.state.untied)
    follower = Follower(layout)
    chosen = _chosen(follower, layout, options)
    lengths = {item.reach.size: item.size for item in chosen if item.reach.turned}
    found = rebuilt(scene.trial(), scene.trace, layout, chosen, lengths)
    fills: dict[int, Fill] = {}
    for item in chosen:
        alone = item.role is Role.RESIDUAL or item.reach.turned  # turned pairs differ in frequency
        kind = New.ZERO if alone else new
        fills[item.reach.atom] = fill(kind, item.reach.size, item.size, options["noise"], scene.random)
    refits: dict[str, Refit] = {}
    for name, shape in found.shapes.items():
        silent = [
            (axis, offset, item.reach.atom)
            for item in chosen
            for held, axis, offset in item.silent
            if held == name
        ]
        seed = int(torch.randint(1 << 62, (), generator=scene.random))
        build = partial(
            grown,
            axes=found.axes[name],
            fills=fills,
            silent=silent,
            scales=found.scales(name),
            chart=found.charts[name],
            seed=seed,
        )
        refits[name] = Refit(shape, build)
    used = tuple(
        Used(f"{item.role}", "growth", item.size, 1, len(item.reach.sides), 0.0, 0.0) for item in chosen
    )
    return Change(refits=refits, config=dict(found.fit.config), patches=found.fit.patches, used=used)


def _chosen(follower: Follower, layout: Layout, options: Mapping[str, Any]) -> list[Growing]:
    """Every index set with a role whose size was asked for."""
    wanted = {role: str(options[role]) for role in ROLES if options[role]}
    if not wanted:
        raise RecipeError("nothing is to grow", expected=" or ".join(ROLES), found="no size")
    atoms = dict.fromkeys(
        o[1]
        for value in layout.facts.parameters.values()
        for block in layout.blocks(value)
        for o in block.order
    )
    found: dict[Role, list[Reach]] = {role: [] for role in wanted}
    refusals: list[Refused] = []
    for atom in atoms:
        try:
            reach = follower.reach(atom)
        except Refused as refusal:
            refusals.append(refusal)
            continue
        role = role_of(reach)
        if role in wanted and reach.named(options["where"]):
            found[role].append(reach)
    chosen: list[Growing] = []
    for role, held in found.items():
        if not held:
            reason = _reason(role, refusals)
            raise Refused(
                f"there are no {role} here that can grow",
                expected=ROLES[role],
                found="no such index set" if reason is None else reason.message,
                node=None if reason is None else reason.node,
                way_out=None if reason is None else reason.way_out,
            )
        for reach, size in _sizes(wanted[role], role, held):
            chosen.append(Growing(reach, role, size, silent_sides(follower, reach)))
    return chosen


def _reason(role: Role, refusals: Sequence[Refused]) -> Refused | None:
    """What most likely kept an index set of this role from growing: a mean, for the residual stream."""
    means = [refusal for refusal in refusals if refusal.way_out is not None]
    return next(iter((*(means if role is Role.RESIDUAL else ()), *refusals)), None)


def _sizes(text: str, role: Role, held: list[Reach]) -> list[tuple[Reach, int]]:
    """New sizes. A key may be partly turned by rotary embedding: then its other part grows, else pairs do."""
    if role is not Role.KEYS:
        return [(reach, _size(text, reach.size, role)) for reach in held]
    products: dict[str, list[Reach]] = {}
    for reach in held:
        products.setdefault(key_product(reach).fact.node, []).append(reach)
    chosen: list[tuple[Reach, int]] = []
    for node, parts in products.items():
        block, (axis, _) = key_product(parts[0]).left
        before = block.value.shape[axis]
        more = _size(text, before, role) - before
        reach = next((reach for reach in parts if not reach.turned), parts[0])
        if reach.turned and more % 2:
            raise Refused(
                "entries of a key that rotary embedding turns come in pairs",
                node=node,
                expected=f"{before} and an even number",
                found=str(before + more),
            )
        chosen.append((reach, reach.size + more // (1 + reach.turned)))
    return chosen


def _size(text: str, old: int, role: Role) -> int:
    try:
        size = old + int(text) if text.startswith("+") else int(text)
    except ValueError:
        raise RecipeError(
            f"cannot read the number of {role}", expected="a number, or +N for N more", found=text
        ) from None
    if size <= old:
        raise RecipeError(f"growth makes larger: {role}", expected=f"more than {old}", found=str(size))
    if size > LARGEST:
        raise RecipeError(f"too many {role}", expected=f"at most {LARGEST}", found=str(size))
    return size


GROW = Move(
    "grow",
    "Σ_i r[i] f(w[i]·x): more indices i, none of which is seen",
    "index sets that are treated entry by entry and summed over; may change the structure",
    Preserves.OUTPUT,
    plan_grow,
    {
        **{role.value: Option(str, "", f"{text}: a number, or +N") for role, text in ROLES.items()},
        "where": Option(str, "", "only index sets with a parameter whose name matches, as layers.3.*"),
        "new": Option(str, "pairs", "what the new entries hold", tuple(New)),
        "noise": Option(float, 0.5, "split: how unequal the shares are, 0 to below 1"),
    },
)
