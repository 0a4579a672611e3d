"""Linear maps in widely linear complex form, against complex arithmetic and golden values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from regauge.api import load, rewrite, rewrite_module
from regauge.errors import BadInput, Refused
from regauge.modeling_regauge import ComplexLinear, apply_patches
from regauge.moves.complex import PARTS, real_form, widely_linear
from regauge.patch_schema import check_patches
from test_end_to_end import build
from test_patches import distance, outputs

GOLDEN = Path(__file__).parent / "data" / "fairy2i_golden.pt"


def test_against_the_authors() -> None:
    """U and W of a matrix of 12 by 16."""
    golden = torch.load(GOLDEN, weights_only=True)
    u_re, u_im, w_re, w_im = widely_linear(golden["matrix"].double())
    assert torch.allclose(torch.complex(u_re, u_im), golden["u"].to(torch.complex128), rtol=0, atol=1e-6)
    assert torch.allclose(torch.complex(w_re, w_im), golden["w"].to(torch.complex128), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_is_complex_arithmetic(bias: bool) -> None:
    torch.manual_seed(0)
    old = nn.Linear(6, 10, bias=bias).double()
    u_re, u_im, w_re, w_im = parts = widely_linear(old.weight.detach())
    assert torch.allclose(real_form(*parts), old.weight, rtol=0, atol=1e-15)
    again = widely_linear(real_form(*parts))
    assert all(torch.allclose(x, y, rtol=0, atol=1e-15) for x, y in zip(parts, again, strict=True))
    module = ComplexLinear(6, 10, bias).double()
    state = dict(zip(PARTS, parts, strict=True))
    module.load_state_dict(state | ({"bias": old.bias.detach()} if bias else {}))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    z = torch.complex(x[..., :3], x[..., 3:])
    y = z @ torch.complex(u_re, u_im).T + z.conj() @ torch.complex(w_re, w_im).T
    wanted = torch.cat([y.real, y.imag], -1) + (old.bias if bias else 0)
    assert torch.allclose(module(x), wanted, rtol=0, atol=1e-14)
    assert torch.allclose(module(x), old(x), rtol=0, atol=1e-14)
    assert torch.allclose(module.weight, old.weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "source")
    moves = [*(["fold-scales"] if name == "llama" else []), "complex"]
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": moves})
    assert result.certificate.evidence.exact.relative < 1e-13
    again = load(tmp_path / "out").eval()
    assert sum(isinstance(module, ComplexLinear) for module in again.modules()) == len(result.rewrite.patches)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    assert distance(outputs(model, tmp_path / "source"), outputs(again, tmp_path / "source")) < 1e-5
    place = (tmp_path / "out").rename(tmp_path / f"complex_{name}")
    auto = "AutoModelForSpeechSeq2Seq" if name == "whisper" else "AutoModelForCausalLM"
    remote = getattr(transformers, auto).from_pretrained(place, trust_remote_code=True).eval()
    assert torch.equal(outputs(again, tmp_path / "source"), outputs(remote, tmp_path / "source"))


class Net(nn.Module):
    """One map has an odd size, one weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6)
        self.d.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.d(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def test_only_even_sizes_and_weights_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    changed, certificate = rewrite_module(model, (x,), {"moves": ["complex"]})
    assert certificate.evidence.float64.relative < 1e-14
    kinds = [path for path, module in changed.named_modules() if isinstance(module, ComplexLinear)]
    assert kinds == ["a"]
    with pytest.raises(Refused, match="1 with an odd size"):
        rewrite_module(nn.Sequential(nn.Linear(5, 4)), (torch.randn(2, 5),), {"moves": ["complex"]})


def test_moves_before_and_after() -> None:
    """What a move before it did is in U and W; hidden channels still move afterwards, in pairs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    moves = [{"name": "rescale", "mode": "random"}, "complex", "permute"]
    changed, certificate = rewrite_module(model, (x,), {"moves": moves}, seed=3)
    assert certificate.evidence.float64.relative < 1e-14
    assert torch.allclose(model(x), changed(x), rtol=0, atol=1e-13)
    plain, _ = rewrite_module(model, (x,), {"moves": ["complex"]})
    assert not torch.equal(plain.get_parameter("0.u_re"), changed.get_parameter("0.u_re"))


def test_a_config_with_odd_sizes() -> None:
    patch = {"path": "0", "module": "complex-linear", "inputs": 3, "outputs": 4, "bias": False}
    with pytest.raises(ValueError, match="do not make complex numbers"):
        apply_patches(nn.Sequential(nn.Linear(3, 4)), [patch])
    held = {"format": 1, "stock_type": "gpt2", "patches": [patch | {"inputs": "3"}]}
    with pytest.raises(BadInput):
        check_patches({"model_type": "regauge", "regauge": held})
