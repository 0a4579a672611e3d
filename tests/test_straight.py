"""Norms written in primitive operations: which code is believed, what is recognised, what takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regauge.api import load, rewrite, rewrite_module
from regauge.errors import Refused
from regauge.modeling_regauge import Norm
from regauge.patches import replaceable
from regauge.straight import is_straight
from regauge.trace import trace
from test_end_to_end import build

FLIP = False


class Rms(nn.Module):
    """As most models write it."""

    def __init__(self, size: int = 6, eps: float = 1e-2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.sizes = (size,)

    def forward(self, x: Tensor) -> Tensor:
        """A docstring does nothing."""
        kind = x.dtype
        x = x.to(torch.float32)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(kind)


class OnePlus(Rms):
    def unit(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(torch.mean(x * x, -1, True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return (self.unit(x.float()) * (1.0 + self.weight.float())).type_as(x)


class Branch(Rms):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y if x.shape[0] < 5 else 2 * y


class Within(Rms):
    def unit(self, x: Tensor) -> Tensor:
        while x.shape[0] > 5:
            x = x[:5]
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) * self.weight


class Sized(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps * x.shape[0]) * self.weight


class Ranked(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps * x.ndim) * self.weight


class Lazy(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ((FLIP and 1.0) or self.eps)) * self.weight


class Property(Rms):
    @property
    def more(self) -> float:
        return 1e-2 if self.training else 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.more) * self.weight


class Counting(Rms):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * (2 if x.shape[0] > 5 else 1)


class Extra(Rms):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight * scale


class Pair(Rms):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _twice(f: Any) -> Any:
    return lambda self, x: f(self, x) * (2 if x.shape[0] > 5 else 1)


class Decorated(Rms):
    @_twice
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Foreign(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) * self.weight


def _hooked() -> nn.Module:
    module = Rms()
    module.register_forward_hook(lambda m, a, y: y)
    return module


def _replaced() -> nn.Module:
    """As a kernel is put in the place of a module's code."""
    module = Rms()
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def _flagged() -> nn.Module:
    module = Rms()
    module.eps = torch.tensor(1e-2)  # type: ignore[assignment]
    return module


def _parametrised() -> nn.Module:
    module = Rms()
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def _other_source() -> nn.Module:
    """The source on the disk is not what runs."""

    class Edited(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    Edited.forward.__code__ = Branch.forward.__code__.replace(
        co_firstlineno=Edited.forward.__code__.co_firstlineno
    )
    return Edited()


BAD = (Pair, Ranked, Branch, Within, Sized, Lazy, Property, Counting, Extra, Decorated, Foreign, _hooked,
       _replaced, _flagged, _parametrised, _other_source)  # fmt: skip


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__.strip("_"))
def test_code_that_may_do_something_else_is_not_straight(make: Any) -> None:
    assert not is_straight(make())


@pytest.mark.parametrize("make", [Rms, OnePlus])
def test_code_with_one_path_is_straight(make: Any) -> None:
    assert is_straight(make())


def test_norms_of_transformers() -> None:
    """A decorator that offers a kernel leaves the code alone; a test of a dtype is a branch."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    assert is_straight(LlamaRMSNorm(4))
    assert is_straight(Gemma3RMSNorm(4))
    assert not is_straight(T5LayerNorm(4))


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), norm, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


@pytest.mark.parametrize("make", [Rms, OnePlus])
def test_gains_of_primitive_norms_go(make: Any) -> None:
    torch.manual_seed(0)
    model = Net(make()).double()
    with torch.no_grad():
        model.norm.get_parameter("weight").normal_()
    x = torch.randn(5, 4, dtype=torch.float64)
    changed, certificate = rewrite_module(model, (x,), {"moves": ["fold-scales", "strip"]})
    assert certificate.evidence.float64.relative < 1e-13
    norm = changed.get_submodule("norm")
    assert isinstance(norm, Norm)
    assert (norm.form, norm.size, norm.eps, norm.weight) == ("rms", 6, 1e-2, None)
    for size in (1, 9):
        x = torch.randn(size, 4, dtype=torch.float64)
        assert torch.allclose(model(x), changed(x), atol=1e-5)


@pytest.mark.parametrize("make", BAD[1:], ids=lambda make: make.__name__.strip("_"))
def test_other_norms_stay(make: Any) -> None:
    found = replaceable(trace(Net(make()), (torch.randn(3, 4),)))
    assert found.keys() == {"up", "down"}


class Third(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + self.eps) * self.weight


class Wide(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean((0, -1), keepdim=True) + self.eps) * self.weight


class Twice(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight * self.weight


class Root(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Squared(Rms):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return y * y


class Wider(Rms):
    """The result has another dtype than the input in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("make", [Third, Wide, Twice, Root, Squared])
def test_straight_code_that_is_another_function_stays(make: Any) -> None:
    assert is_straight(make())
    assert "norm" not in replaceable(trace(Net(make()), (torch.randn(3, 4),)))


def test_the_dtype_of_the_result_stays() -> None:
    net = nn.Sequential(nn.Linear(4, 6), Wider()).bfloat16()
    assert "1" not in replaceable(trace(net, (torch.randn(3, 4).bfloat16(),)))
    assert "1" in replaceable(trace(net.float(), (torch.randn(3, 4),)))


def test_a_gain_shared_with_another_module_stays() -> None:
    net = nn.Sequential(Rms(), nn.Linear(6, 6), Rms())
    net[2].weight = net[0].weight
    assert replaceable(trace(net, (torch.randn(3, 6),))).keys() == {"1"}


def test_a_gain_that_does_something_is_not_stripped() -> None:
    model = Net(OnePlus())
    with pytest.raises(Refused, match="does something"):
        rewrite_module(model, (torch.randn(3, 4),), {"moves": ["strip"]})


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_models_without_gains(name: str, tmp_path: Path) -> None:
    """Stored in bfloat16 nothing at all changes on the way: gains of one, and the norm in float32."""
    model = build(name).bfloat16()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path / "source")
    moves = [*(["untie"] if tied else []), "fold-scales"]
    rewrite(tmp_path / "source", tmp_path / "folded", {"moves": moves})
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": [*moves, "strip"]})
    assert result.certificate.evidence.exact.relative < 1e-12
    assert len(result.rewrite.drops) == (3 if name == "qwen3" else 5)
    folded, out = load(tmp_path / "folded").eval(), load(tmp_path / "out").eval()
    assert sum(isinstance(module, Norm) for module in out.modules()) == len(result.rewrite.drops)
    ids = torch.randint(4, 37, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(folded(input_ids=ids).logits, out(input_ids=ids).logits)
