"""Laws of growth over the zoo; what training makes of new entries; and that no ingredient can be left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regauge.api import rewrite, rewrite_module
from regauge.errors import NotEquivalent, Refused
from regauge.growing import correct, fit, rebuild
from regauge.moves import grow
from regauge.moves.grow import ROLES
from test_end_to_end import build
from zoo import HOSTILE, distance, move, original, specimen

# --- the zoo ------------------------------------------------------------------------------------------------

GROWS = {
    "norm_after_sum": {"neurons", "heads", "keys", "values"},
    "folded_pixels": {"channels"},
    "pooled_features": set[str](),  # a plain mean of what grows is n / n' of what it was
}
"""Which roles some of them have at least, so that a refusal everywhere is not taken for a law."""


@pytest.mark.parametrize("name", HOSTILE)
def test_every_role_grows_exactly_or_is_refused(name: str) -> None:
    grown: set[str] = set()
    for number, role in enumerate(ROLES):
        for new in ("pairs", "split", "zero")[number % 2 :: 2]:
            spec = {"name": "grow", role.value: "+4", "new": new}
            try:
                moved = move(name, spec)
            except Refused as refusal:
                if not (refusal.found or refusal.node):
                    raise
                continue
            grown.add(role.value)
            assert distance(original(name), moved.output) < 1e-12, spec
            shapes = specimen(name).trace.shapes
            assert all(made.shape != tuple(shapes[key]) for key, made in moved.plan.made.items())
    assert grown >= GROWS.get(name, set())
    assert name != "pooled_features" or not grown


# --- training -----------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention with two heads for keys and values and two queries for each, then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups, self.width = 4, 2, 5
        self.q, self.k, self.v = nn.Linear(7, 20), nn.Linear(7, 10), nn.Linear(7, 10)
        self.o, self.up, self.down = nn.Linear(20, 7), nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (m(x).view(batch, length, self.groups, -1).transpose(1, 2) for m in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
        y = x + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        return self.down(torch.tanh(self.up(y)))


def new_entries(role: str) -> dict[str, tuple[Tensor, int]]:
    """Parameter -> mask of its new entries after two more of a role, and axis on which it has them."""

    def mask(shape: tuple[int, ...], old: tuple[slice, ...], axis: int, width: int) -> tuple[Tensor, int]:
        held = torch.ones(shape, dtype=torch.bool)
        held[old] = False
        held = held.flatten()[:, None].expand(-1, width) if width else held.flatten()
        return (held.T if axis else held), axis

    every = slice(None)
    table: dict[str, dict[str, tuple[Tensor, int]]] = {
        "neurons": {name: mask((11,), (slice(9),), axis, width)
                    for name, axis, width in (("up.weight", 0, 7), ("up.bias", 0, 0), ("down.weight", 1, 3))},
        "heads": {f"{name}.{leaf}": mask(shape, (slice(2),), axis, width)
                  for name, shape in (("q", (4, 2, 5)), ("k", (4, 5)), ("v", (4, 5)), ("o", (4, 2, 5)))
                  for leaf, axis, width in (("weight", int(name == "o"), 7), ("bias", 0, 0))
                  if (name, leaf) != ("o", "bias")},
        "queries": {"q.weight": mask((2, 4, 5), (every, slice(2)), 0, 7),
                    "q.bias": mask((2, 4, 5), (every, slice(2)), 0, 0),
                    "o.weight": mask((2, 4, 5), (every, slice(2)), 1, 7)},
        "values": {"v.weight": mask((2, 7), (every, slice(5)), 0, 7),
                   "v.bias": mask((2, 7), (every, slice(5)), 0, 0),
                   "o.weight": mask((4, 7), (every, slice(5)), 1, 7)},
        "keys": {f"{name}.{leaf}": mask((count, 7), (every, slice(5)), 0, width)
                 for name, count in (("q", 4), ("k", 2)) for leaf, width in (("weight", 7), ("bias", 0))},
    }  # fmt: skip
    return table[role]


SILENT = {"neurons": "down", "heads": "o", "queries": "o", "values": "o", "keys": "k"}


def trained(role: str, **options: Any) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """The grown module in float64, and a step of gradient descent that returns the gradients it took."""
    torch.manual_seed(0)
    model = Attending().double()
    x, y = torch.randn(6, 4, 7, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    spec = {"name": "grow", role: "+2", **options}
    outer, certificate = rewrite_module(nn.Sequential(model), (x,), {"moves": [spec]}, seed=1)
    changed = outer[0]
    assert certificate.evidence.float64.relative < 1e-14
    masks = new_entries(role)
    for name, parameter in model.named_parameters():
        held = changed.get_parameter(name)
        if name not in masks:
            assert held.shape == parameter.shape
        elif options.get("new") != "split" or not name.startswith(SILENT[role]):
            assert torch.equal(held[~masks[name][0]].flatten(), parameter.flatten())

    def step() -> dict[str, Tensor]:
        changed.zero_grad()
        (changed(x) - y).square().mean().backward()
        with torch.no_grad():
            found = {name: p.grad.clone() for name, p in changed.named_parameters() if p.grad is not None}
            for name, gradient in found.items():
                changed.get_parameter(name).sub_(0.1 * gradient)
        return found

    return changed, step


def felt(gradients: Mapping[str, Tensor], role: str) -> dict[str, bool]:
    """Parameter -> whether each of its new entries has a gradient, or none has."""
    found: dict[str, bool] = {}
    for name, (mask, _) in new_entries(role).items():
        size = gradients[name][mask].abs() > 1e-12
        assert bool(size.all()) or not bool(size.any()), name
        found[name] = bool(size.all())
    return found


def shift_of_keys(role: str, name: str) -> bool:
    """A key bias adds the same to all scores of a query: softmax gives it no gradient."""
    return name == "k.bias"


@pytest.mark.parametrize("role", list(SILENT))
@pytest.mark.parametrize("new", ["pairs", "split"])
def test_pairs_and_unequal_shares_learn_at_once(role: str, new: str) -> None:
    changed, step = trained(role, new=new)
    for name, learns in felt(step(), role).items():
        assert learns or shift_of_keys(role, name), name
    parts: dict[str, Tensor] = {}
    for name, (mask, axis) in new_entries(role).items():
        if name == "k.bias":
            continue
        value = changed.get_parameter(name).detach()
        parts[name] = value[mask]
        if role == "neurons" and new == "pairs":
            one, other = value.movedim(axis, 0)[-2:]
            assert not bool(torch.isclose(one.abs(), other.abs(), rtol=1e-9).any()), name
    assert all(len(part.unique()) == part.numel() for part in parts.values())


@pytest.mark.parametrize("role", list(SILENT))
def test_zeros_learn_on_the_silent_side_first(role: str) -> None:
    _, step = trained(role, new="zero")
    first, second = felt(step(), role), felt(step(), role)
    for name in first:
        silent = name.startswith(SILENT[role])
        assert first[name] is (silent and not shift_of_keys(role, name)), name
        assert second[name] or shift_of_keys(role, name), name


@pytest.mark.parametrize(("noise", "alike"), [(0.0, True), (0.5, False)])
def test_copies_with_equal_shares_stay_alike_for_ever(noise: float, alike: bool) -> None:
    """Equal copies have equal gradients, whatever the step: only unequal shares part them."""
    changed, step = trained("neurons", new="split", noise=noise)
    up = changed.get_parameter("up.weight").detach()
    pairs = [(i, j) for j in (9, 10) for i in range(9) if torch.equal(up[i], up[j])]
    assert len(pairs) == 2
    for _ in range(5):
        step()
    down = changed.get_parameter("down.weight").detach()
    for i, j in pairs:
        assert torch.allclose(up[i], up[j], rtol=1e-12, atol=0) is alike
        assert torch.allclose(down[:, i], down[:, j], rtol=1e-12, atol=0) is alike


# --- mutants: each ingredient left out is refused, or makes another function -------------------------------

Patch = pytest.MonkeyPatch
WHOLE = {"residual": "+4", "keys": "+2", "values": "+2"}


def _loud(patch: Patch) -> None:
    patch.setattr(grow, "silent_sides", lambda follower, reach: ())


def _same_eps(patch: Patch) -> None:
    patch.setattr(correct, "_with_eps", lambda trial, held, trace, eps: held)


def _same_gain(patch: Patch) -> None:
    real = rebuild.corrected

    def without(*args: Any) -> Any:
        held, factors = real(*args)
        return held, {side: f for side, f in factors.items() if "norm" not in side[0]}

    patch.setattr(rebuild, "corrected", without)


def _same_keys(patch: Patch) -> None:
    patch.setattr(correct, "key_sides", lambda follower, reach: set())


def _other_table(patch: Patch) -> None:
    patch.setattr(fit, "kept_buffers", lambda *args: ())


def _at_the_end(patch: Patch) -> None:
    real = rebuild.grown_axis

    def appended(*args: Any) -> Any:
        axis = real(*args)
        return replace(axis, old=torch.arange(len(axis.old)))

    patch.setattr(rebuild, "grown_axis", appended)


def _unchecked(patch: Patch) -> None:
    patch.setattr(correct, "check_scales", lambda *args: None)


MUTANTS: dict[str, tuple[Callable[[Patch], None], str, dict[str, str]]] = {
    "silent side": (_loud, "llama", {"neurons": "+4"}),
    "silent stream": (_loud, "llama", {"residual": "+4"}),
    "eps": (_same_eps, "llama", {"residual": "+4"}),
    "gain": (_same_gain, "llama", {"residual": "+4"}),
    "keys": (_same_keys, "llama", {"keys": "+2", "values": "+2"}),
    "frequencies": (_other_table, "llama", {"keys": "+2", "values": "+2"}),
    "place": (_at_the_end, "gpt2", {"heads": "+2"}),
    "place in a head": (_at_the_end, "llama", {"keys": "+2", "values": "+2"}),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_nothing_can_be_left_out(what: str, monkeypatch: Patch) -> None:
    mutant, name, sizes = MUTANTS[what]
    spec = {"name": "grow", "new": "zero", **sizes}
    assert distance(original(name), move(name, spec).output) < 1e-13
    mutant(monkeypatch)
    if what == "eps":
        with pytest.raises(Refused, match="does not cancel"):
            move(name, spec)
        _unchecked(monkeypatch)
    assert distance(original(name), move(name, spec).output) > 1e-6


def test_the_certificate_sees_it(tmp_path: Path, monkeypatch: Patch) -> None:
    build("llama").save_pretrained(tmp_path / "source")
    _same_keys(monkeypatch)
    with pytest.raises(NotEquivalent, match="the certificate failed"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "grow", **WHOLE}]})
    assert not (tmp_path / "out").exists()
