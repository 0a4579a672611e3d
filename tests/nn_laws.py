"""Laws that every layer of the table and every converted norm must obey; the files test_nn_* call them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from regauge.nn import Entry

DATA = Path(__file__).parent / "data"
SIZE = 12


def golden(name: str) -> Any:
    return torch.load(DATA / f"{name}_golden.pt", weights_only=True)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).detach().abs().max())


def tokens(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    spread = torch.tensor([[0.1], [1.0], [30.0]], dtype=torch.float64)
    return spread * (torch.randn(2, 3, size, generator=random, dtype=torch.float64) + 0.5)


def norms(form: str) -> list[nn.Module]:
    """Norms of torch and transformers with generic gains, of one form, in training mode."""
    kinds: dict[str, list[Any]] = {
        "rms": [nn.RMSNorm(SIZE, eps=1e-5), LlamaRMSNorm(SIZE, eps=1e-3), Gemma3RMSNorm(SIZE)],
        "layer": [nn.LayerNorm(SIZE, eps=1e-3), nn.LayerNorm(SIZE, bias=False)],
    }
    random = torch.Generator().manual_seed(1)
    for norm in kinds[form]:
        norm.to(torch.float64)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter += 0.5 * torch.randn(SIZE, generator=random, dtype=torch.float64)
    return kinds[form]


def reference(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm in float64 throughout: those of transformers compute in float32."""
    if isinstance(norm, LlamaRMSNorm):
        return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    if isinstance(norm, Gemma3RMSNorm):
        return (1 + norm.weight) * x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    return norm(x)


def gradients(layer: nn.Module, x: torch.Tensor, seed: int = 3) -> dict[str, float]:
    """Largest entry of the gradient of each parameter for a random linear loss."""
    random = torch.Generator().manual_seed(seed)
    layer.zero_grad()
    y = layer(x)
    ys = y if isinstance(y, tuple) else (y,)
    sum((y * torch.randn(y.shape, generator=random, dtype=y.dtype)).sum() for y in ys).backward()
    return {name: float(p.grad.abs().max()) for name, p in layer.named_parameters()}


def laws_hold(entry: Entry) -> None:
    random = torch.Generator().manual_seed(0)
    for make in (entry.make, entry.bare):
        layer, x = make(SIZE, random), tokens()
        before = copy.deepcopy(layer.state_dict())
        for law in entry.laws:
            other, moved, change = law.act(layer, x, random)
            assert distance(other(moved), change(layer(x))) < 1e-12, law.text
            if law.training:
                other.train(), layer.train()
                assert distance(other(moved), change(layer(x))) < 1e-12, law.text
                layer.eval()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def compiles(layer: nn.Module, *args: Any) -> None:
    """One graph, the same function and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, *rest = args
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = compiled(a, *rest), layer(b, *rest)
    pairs = list(zip(y, z, strict=True)) if isinstance(y, tuple) else [(y, z)]
    assert all(torch.allclose(u, v, rtol=1e-12, atol=1e-12) for u, v in pairs)
    sum(u.sum() for u, _ in pairs).backward()
    sum(v.sum() for _, v in pairs).backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def survives_bfloat16(layer: nn.Module, x: torch.Tensor | None = None) -> None:
    """Output dtype = input dtype, under autocast and without, and close to float64.

    The input is large enough for a statistic in float16 to overflow.
    """
    x = 300 * tokens() if x is None else x
    exact = layer.double()(x.double())
    size = exact.detach().abs().max()
    whole = copy.deepcopy(layer).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            y = whole(x.to(dtype))
            assert y.dtype == dtype
            assert float((y - exact).detach().abs().max() / size) < 0.03
    for dtype, held in (
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16,) * 2,
    ):
        y = copy.deepcopy(layer).to(held)(x.to(dtype))
        assert y.dtype == dtype
        assert float((y - exact).detach().abs().max() / size) < 0.03


def round_trips(layer: nn.Module, fresh: nn.Module, x: torch.Tensor) -> None:
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert distance(fresh.to(x.dtype)(x), layer(x)) == 0


def becomes(
    kind: Any, norm: nn.Module, still: Mapping[str, float] | tuple[str, ...] = (), **options: Any
) -> nn.Module:
    """``kind.upgrade_from(norm)`` is the same function with gradients in all parameters but ``still``."""
    before = copy.deepcopy(norm.state_dict())
    x = tokens(4)
    layer = kind.upgrade_from(norm, **options)
    assert layer.training == norm.training
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    y = layer(x)
    for one in y if isinstance(y, tuple) else (y,):
        assert distance(one, reference(norm, x)) < 1e-14 * max(1.0, float(one.detach().abs().max()))
    found = gradients(layer, x)
    assert {name for name, size in found.items() if size == 0} == set(still)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    return layer
