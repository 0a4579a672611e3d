"""Vectors added to what linear maps give, against code that adds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from regauge import steered
from regauge.errors import BadInput, Refused
from test_end_to_end import build


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_a_steering_vector_is_a_bias() -> None:
    """Llama has no biases; the vector goes in after block 0, at every position."""
    model = build("llama").double()
    v = torch.randn(24, dtype=torch.float64)
    inputs = {"input_ids": torch.randint(4, 37, (2, 7)), "use_cache": False}
    changed, certificate = steered(model, inputs, {"model.layers.0.mlp.down_proj": v}, scale=-2.5)
    assert certificate.evidence.float64.relative < 1e-13
    ids = torch.randint(4, 37, (3, 5))
    before = logits(model, ids)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out - 2.5 * v)
    assert torch.allclose(logits(changed, ids), logits(model, ids), rtol=0, atol=1e-12)
    assert not torch.allclose(logits(changed, ids), before, rtol=0, atol=1e-3)


def test_a_shift_of_the_logits() -> None:
    model = build("llama").double()
    v = torch.randn(37, dtype=torch.float64)
    inputs = {"input_ids": torch.randint(4, 37, (2, 7)), "use_cache": False}
    changed, _ = steered(model, inputs, {"lm_head": v})
    ids = torch.randint(4, 37, (3, 5))
    assert torch.allclose(logits(changed, ids), logits(model, ids) + v, rtol=0, atol=1e-13)


class Twice(nn.Module):
    """One map is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 3), nn.LayerNorm(6)
        self.c = nn.Linear(3, 3)
        self.d = nn.Linear(3, 3)
        self.d.weight = self.c.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(torch.tanh(self.a(x))))
        return self.d(torch.tanh(self.c(self.b(self.norm(x)))))


def test_at_every_call_and_with_biases_that_are_there() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 6)
    vectors = {"a": torch.randn(6), "b": torch.randn(3)}
    changed, certificate = steered(model, (x,), vectors, scale=0.3)
    assert certificate.evidence.exact is not None
    assert certificate.evidence.exact.relative < 1e-13
    hidden = torch.tanh(model.a(torch.tanh(model.a(x) + 0.3 * vectors["a"])) + 0.3 * vectors["a"])
    wanted = model.d(torch.tanh(model.c(model.b(model.norm(hidden)) + 0.3 * vectors["b"])))
    assert torch.allclose(changed(x), wanted, rtol=0, atol=1e-6)
    assert isinstance(model.a, nn.Linear)
    assert not torch.equal(model.a.bias, changed.get_parameter("a.bias"))


def test_refused_elsewhere() -> None:
    model, x = Twice(), torch.randn(5, 6)
    for path in ("norm", "c", "nowhere", ""):
        with pytest.raises(Refused, match="what a linear map gives"):
            steered(model, (x,), {path: torch.randn(6)})
    for vector in (torch.randn(5), torch.full((6,), torch.inf)):
        with pytest.raises(BadInput, match="cannot be added"):
            steered(model, (x,), {"a": vector})
