"""AdamP and SGDP: the authors' values, the projection from the trace, and what every optimizer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim_laws import check_laws, equal, net, state, train
from regauge.errors import BadInput
from regauge.optim import SGDP, AdamP, View, scale_invariant

DATA = Path(__file__).parent / "data"
ADAMP: dict[str, Any] = torch.load(DATA / "adamp_golden.pt", weights_only=True)
SGD: dict[str, Any] = torch.load(DATA / "sgdp_golden.pt", weights_only=True)


def replay(make: Any, held: dict[str, Any], init: dict[str, Tensor], views: Any, **options: Any) -> float:
    """The largest distance from the authors' parameters, given their gradients step by step. Views are of
    the parameters that are compared."""
    names = init if views == "cosine" else [*views, "bias", "gamma"]
    params = {name: nn.Parameter(init[name].clone()) for name in names}
    optimizer = make(params.items(), **held["config"], views=views, **options)
    worst = 0.0
    for step in held["steps"]:
        for name, param in params.items():
            param.grad = step["grads"][name].clone()
        optimizer.step()
        worst = max(worst, *(float((params[n].detach() - step["params"][n]).abs().max()) for n in params))
    return worst


FOUND = {"conv": View(0, 5), "lin_ln": View(0, 1)}
"""What is invariant in the authors' values; the test by cosine finds the same there."""


def test_the_test_by_cosine_fires_where_nothing_is_invariant() -> None:
    """The last matrix before the loss: its rows are short, and the test is statistical."""
    assert set(ADAMP["wd_nesterov"]["fired"]["lin"]) > {"none"}
    w = nn.Parameter(torch.ones(2, 8))
    for views, fired in (("cosine", True), ({}, False)):
        optimizer = AdamP([w], lr=0.1, weight_decay=1.0, views=views)
        w.grad = torch.zeros(2, 8)
        before = float(w.detach().max())
        optimizer.step()
        assert float(w.detach().max()) / before == pytest.approx(0.99 if fired else 0.9)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("views", ["cosine", FOUND], ids=["cosine", "given"])
@pytest.mark.parametrize("name", ["default", "wd_nesterov"])
def test_adamp_is_the_authors(name: str, views: Any, foreach: bool) -> None:
    held = ADAMP[name]
    assert replay(AdamP, held, held["init"], views, foreach=foreach) < 1e-12


def test_adamp_without_its_projection_or_with_another_is_not() -> None:
    for name in ("default", "wd_nesterov"):
        held = ADAMP[name]
        for wrong in (
            FOUND | {"conv": None},
            FOUND | {"lin_ln": None},
            FOUND | {"conv": View(0, 1)},
            FOUND | {"lin_ln": View(0, 8)},
            FOUND | {"lin": View(0, 1)},
        ):
            assert replay(AdamP, held, held["init"], wrong) > 1e-4


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["plain", "momentum", "nesterov", "dampened"])
def test_sgdp_is_the_authors(name: str, foreach: bool) -> None:
    held = SGD[name]
    aliased = {} if held["config"].get("nesterov") else {"alias": True}
    assert replay(SGDP, held, SGD["init"], "cosine", foreach=foreach, **aliased) < 1e-12
    assert replay(SGDP, held, SGD["init"], FOUND, foreach=foreach, **aliased) < 1e-12
    if "momentum" in held["config"] and aliased:
        assert replay(SGDP, held, SGD["init"], "cosine", foreach=foreach) > 1e-6


@pytest.mark.parametrize("foreach", [True, False])
def test_the_buffer_of_sgdp_keeps_what_the_step_loses(foreach: bool) -> None:
    """d is orthogonal to p, b is the plain running sum."""
    random = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(4, 6, generator=random, dtype=torch.float64))
    optimizer = SGDP([w], lr=0.1, momentum=0.9, views={w: View(0, 4)}, eps=0.0, foreach=foreach)
    buffer = torch.zeros_like(w)
    for _ in range(3):
        before = w.detach().clone()
        w.grad = torch.randn(4, 6, generator=random, dtype=torch.float64)
        buffer = 0.9 * buffer + w.grad
        optimizer.step()
        assert torch.allclose(optimizer.state[w]["momentum"], buffer, atol=1e-14)
        assert float(((w.detach() - before) * before).sum(1).abs().max()) < 1e-14
        radial = before * ((buffer * before).sum(1) / before.square().sum(1))[:, None]
        assert torch.allclose(w, before - 0.1 * (buffer - radial), atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("last", [False, True])
def test_the_step_of_adamp_is_orthogonal_to_every_unit(axis: int, last: bool) -> None:
    """Blocks of any axis, in any layout in memory."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(4, 6, 2, 2, generator=random, dtype=torch.float64)
    w = nn.Parameter(w.contiguous(memory_format=torch.channels_last) if last else w)
    optimizer = AdamP([w], lr=0.1, views={w: View(axis, 2)}, eps=1e-300)
    plain = nn.Parameter(w.detach().clone())
    adam = torch.optim.Adam([plain], lr=0.1, eps=1e-300)
    before = w.detach().clone()
    w.grad = torch.randn(w.shape, generator=random, dtype=torch.float64)
    plain.grad = w.grad.clone()
    optimizer.step()
    adam.step()
    moved = (w - before).detach()
    for old, new, other in zip(
        before.chunk(2, axis), moved.chunk(2, axis), (plain - before).chunk(2, axis), strict=True
    ):
        assert abs(float((old * new).sum())) < 1e-12
        rest = other - new
        assert torch.allclose(rest, old * (rest * old).sum() / old.square().sum(), atol=1e-12)


def test_views_from_the_trace_keep_the_length_of_what_is_invariant() -> None:
    model = net()
    views = scale_invariant(model, (torch.zeros(8, 5, dtype=torch.float64),))
    assert {name: view.blocks for name, view in views.items()} == {"0.weight": 1}
    before = float(model[0].weight.detach().norm())
    train(model, AdamP(model.named_parameters(), lr=1e-2, views=views), range(100))
    grown = float(model[0].weight.detach().norm()) / before
    other = net()
    train(other, torch.optim.Adam(other.parameters(), lr=1e-2), range(100))
    assert 1 < grown < float(other[0].weight.detach().norm()) / before


def test_the_decay_of_invariant_parameters_is_smaller() -> None:
    for make in (AdamP, SGDP):
        a, b = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
        optimizer = make([a, b], lr=0.1, weight_decay=0.5, wd_ratio=0.2, views={a: View()})
        a.grad, b.grad = torch.zeros(3, 3), torch.zeros(3, 3)
        optimizer.step()
        assert torch.allclose(a, torch.tensor(1 - 0.1 * 0.5 * 0.2))
        assert torch.allclose(b, torch.tensor(1 - 0.1 * 0.5))


def test_views_that_do_not_fit() -> None:
    w = nn.Parameter(torch.ones(4, 3))
    for views, match in (
        ({"w": View()}, "named"),
        (3, "cosine"),
        ({w: View(0, 3)}, "blocks"),
        ({w: View(2, 1)}, "axis"),
    ):
        with pytest.raises(BadInput, match=match):
            AdamP([w], views=views)
    assert AdamP([("w", w)], views={"w": View(1, 3)}).param_groups[0]["views"] == [(1, 3)]
    own = AdamP([{"params": [w], "views": {w: View(0, 2)}}])
    assert own.param_groups[0]["views"] == [(0, 2)]


def test_numbers_out_of_range() -> None:
    w = nn.Parameter(torch.ones(4, 3))
    for options in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1}, {"weight_decay": float("nan")}):
        with pytest.raises(BadInput, match="range"):
            AdamP([w], **options)
    with pytest.raises(BadInput, match="momentum"):
        SGDP([w], lr=0.1, momentum=1.0)
    with pytest.raises(BadInput, match="alias"):
        SGDP([w], lr=0.1, nesterov=True, alias=True)


@pytest.mark.parametrize("views", ["cosine", {"0.weight": View(0, 7)}], ids=["cosine", "given"])
def test_laws(views: Any) -> None:
    for nesterov in (True, False):
        check_laws(AdamP, lr=1e-2, weight_decay=0.1, views=views, nesterov=nesterov)
        check_laws(SGDP, lr=1e-2, momentum=0.9, weight_decay=0.1, views=views, nesterov=nesterov)
    check_laws(SGDP, lr=1e-2, momentum=0.9, views=views, alias=True)


def test_adamp_on_nothing_invariant_is_adamw() -> None:
    a, b = net(), net()
    train(a, AdamP(a.parameters(), lr=1e-2, weight_decay=0.1, views={}), range(10))
    train(b, torch.optim.AdamW(b.parameters(), lr=1e-2, weight_decay=0.1), range(10))
    assert equal(state(a), state(b), 1e-13)
