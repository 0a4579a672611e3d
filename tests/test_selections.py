"""Rows that an index picks may repeat, also where as many are picked as there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from regauge.discover import discover
from regauge.probe import Prober
from regauge.trace import trace
from rule_nets import Net


def centred_rows(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Rows that sum to zero before they are picked, and no longer after."""
    index = (x @ p["r"].t()).topk(2, -1)[1].reshape(-1)
    rows = (p["e"] - p["e"].mean(0, keepdim=True))[index]
    return torch.einsum("rn,r->n", rows, x.sum(-1).repeat_interleave(2) + p["b"])


def picked_weights(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Weights that sum to one before they are picked, and no longer after."""
    scores = x @ p["r"].t()
    weights = scores.softmax(-1).index_select(1, scores.topk(2, -1)[1].reshape(-1))
    values = torch.einsum("bi,ni->bn", x, p["v"]) + p["b"]
    return torch.einsum("br,brn->bn", weights, values[:, None, :].expand(-1, 6, -1)) + p["c"]


@pytest.mark.parametrize("experts", [6, 7])
@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (centred_rows, {"e": 4, "b": 1}),
        (picked_weights, {"v": (4, 5), "b": 4, "c": 4}),
    ],
)
def test_no_claim_about_picked_rows(
    body: Callable[[Mapping[str, Tensor], Tensor], Tensor], shapes: dict[str, object], experts: int
) -> None:
    sizes = {name: size if isinstance(size, tuple) else (size,) for name, size in shapes.items()}
    if "e" in sizes:
        sizes["e"] = (experts, 4)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    traced = trace(Net({"r": (experts, 5), **sizes}, body), (), {"x": x})
    atlas = discover(traced)
    prober = Prober(traced, {}, {"x": x}, 1)
    assert all(prober.probe(generator).error < 1e-10 for generator in atlas.generators)
