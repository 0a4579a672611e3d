"""Growth by masks: statistics against the authors' values; nothing is seen at 0, an ordinary model at 1."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from regauge.errors import BadInput
from regauge.growing.masked import MASK, Mask, MaskedNorm, Ramp, masked, set_mask, unmasked
from regauge.modeling_regauge import Norm

GOLDEN = Path(__file__).parent / "data" / "msg_layernorm_golden.pt"
VOCABULARY, LENGTH, WIDTH = 13, 6, 4


@pytest.mark.parametrize("c", ["0.0", "0.3", "1.0"])
def test_statistics_are_those_of_the_authors(c: str) -> None:
    """Values of their LayerNorm, before its output is multiplied by the mask."""
    golden = torch.load(GOLDEN, weights_only=True)
    config, held = golden["config"], golden["inputs"]
    new = torch.arange(config["new_dim"]) >= config["old_dim"]
    mask = Mask(new, float(c))
    weight, bias = nn.Parameter(held["weight"]), nn.Parameter(held["bias"])
    found = MaskedNorm("layer", mask, config["eps"], weight, bias)(held["x"])
    expected = golden["outputs"][c] * mask.weights(torch.float32)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["layer", "rms"])
def test_a_masked_norm_is_the_norm_of_the_old_entries_and_then_of_all(form: str) -> None:
    x, weight = torch.randn(5, 9, dtype=torch.float64) + 1, torch.rand(9, dtype=torch.float64)
    norm = MaskedNorm(form, Mask(torch.arange(9) >= 6), 1e-2, nn.Parameter(weight), None)
    plain = Norm(form, 6, 1e-2).double()
    assert torch.allclose(norm(x)[:, :6], plain(x[:, :6]) * weight[:6], rtol=1e-12)
    assert not bool(norm(x)[:, 6:].any())
    norm.mask.c.fill_(1.0)
    assert torch.allclose(norm(x), norm.plain()(x), rtol=1e-12)
    assert torch.allclose(norm(x), Norm(form, 9, 1e-2)(x) * weight, rtol=1e-12)


# --- a small GPT-2, grown in every direction ----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, size: int, heads: int, neurons: int) -> None:
        super().__init__()
        self.heads = heads
        self.a, self.b = nn.LayerNorm(size), nn.LayerNorm(size)
        self.q, self.k, self.v = (nn.Linear(size, heads * WIDTH) for _ in range(3))
        self.o = nn.Linear(heads * WIDTH, size)
        self.up, self.down = nn.Linear(size, neurons), nn.Linear(neurons, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, WIDTH)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.b(x))))


class Small(nn.Module):
    def __init__(self, size: int, heads: int, neurons: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, size), nn.Parameter(torch.randn(LENGTH, size))
        self.blocks = nn.Sequential(*(Block(size, heads, neurons) for _ in range(2)))
        self.last, self.head = nn.LayerNorm(size), nn.Linear(size, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.embed(ids) + self.place)))


def pair() -> tuple[Small, Small, Tensor]:
    """A model, a larger one with the same entries in front and any others behind, and tokens."""
    torch.manual_seed(0)
    small, large = Small(12, 2, 20).double(), Small(17, 3, 27).double()
    with torch.no_grad():
        for p in (*small.parameters(), *large.parameters()):
            p.add_(0.3 * torch.randn_like(p))
        for old, new in zip(small.parameters(), large.parameters(), strict=True):
            new[tuple(slice(n) for n in old.shape)] = old
    ids = torch.randint(VOCABULARY, (3, LENGTH))
    norms = {f"blocks.{i}.{leaf}": 12 for i in range(2) for leaf in "ab"}
    readers = {f"blocks.{i}.{leaf}": n for i in range(2) for leaf, n in (("o", 2 * WIDTH), ("down", 20))}
    return small, masked(large, {**norms, **readers, "last": 12}), ids


def test_nothing_new_is_seen_at_zero_and_everything_at_one() -> None:
    small, large, ids = pair()
    assert torch.allclose(large(ids), small(ids), rtol=0, atol=1e-12)
    ramp = Ramp(large, 4)
    outputs = [large(ids).detach()]
    for _ in range(5):
        ramp.step()
        outputs.append(large(ids).detach())
    steps = [float((b - a).norm() / a.norm()) for a, b in pairwise(outputs)]
    assert all(step > 1e-3 for step in steps[:-1])
    assert steps[-1] == 0
    plain = Small(17, 3, 27).double()
    plain.load_state_dict(large.state_dict())
    assert torch.allclose(outputs[-1], plain(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("missing", ["blocks.0.a", "blocks.1.b", "last", "blocks.0.o", "blocks.1.down"])
def test_no_mask_can_be_left_out(missing: str) -> None:
    small, large, ids = pair()
    module = large.get_submodule(missing)
    mask = module.mask if isinstance(module, MaskedNorm) else module.get_submodule(MASK)
    mask.c.fill_(1.0)
    with torch.no_grad():
        assert float((large(ids) - small(ids)).norm() / small(ids).norm()) > 1e-3


def test_training_begins_with_the_first_step_of_the_ramp() -> None:
    small, large, ids = pair()

    def gradients() -> dict[str, Tensor]:
        large.zero_grad()
        nn.functional.cross_entropy(large(ids).flatten(0, 1), ids.flatten()).backward()
        found: dict[str, Tensor] = {}
        for (name, old), new in zip(small.named_parameters(), large.parameters(), strict=True):
            fresh = torch.ones_like(new, dtype=torch.bool)
            fresh[tuple(slice(n) for n in old.shape)] = False
            used = torch.ones_like(new, dtype=torch.bool)
            if name == "embed.weight":
                used[[i for i in range(VOCABULARY) if i not in ids]] = False
            if not name.endswith("k.bias"):
                found[name] = new.grad[fresh & used]
        return found

    assert not any(bool(g.any()) for g in gradients().values())
    Ramp(large, 100).step()
    assert all(bool((g != 0).all()) for g in gradients().values())


def test_masks_come_out_again_and_leave_an_ordinary_model() -> None:
    _, large, ids = pair()
    names = list(large.state_dict())
    assert names == list(Small(17, 3, 27).state_dict())
    with pytest.raises(BadInput, match="not 1"):
        unmasked(large)
    set_mask(large, 1.0)
    before = large(ids)
    again = unmasked(copy.deepcopy(large))
    assert {type(m) for m in again.modules()} == {type(m) for m in Small(17, 3, 27).modules()}
    assert torch.allclose(again(ids), before, rtol=0, atol=1e-12)
    assert list(again.state_dict()) == names


def test_compiled_once_for_every_value() -> None:
    small, large, ids = pair()
    torch._dynamo.reset()
    counts = CompileCounter()
    compiled = torch.compile(large, backend=counts, fullgraph=True)
    for c in (0.0, 0.3, 1.0):
        set_mask(large, c)
        assert torch.allclose(compiled(ids), large(ids), rtol=0, atol=1e-12)
        assert c or torch.allclose(compiled(ids), small(ids), rtol=0, atol=1e-12)
    assert counts.frame_count == 1


def test_what_cannot_be_masked_is_refused() -> None:
    large = Small(17, 3, 27)
    for wrong in ({"nowhere": 3}, {"": 3}, {"last": torch.ones(5, dtype=torch.bool)}, {"embed": 3}):
        with pytest.raises(BadInput):
            masked(large, wrong)
    masked(large, {"last": 3, "head": 3})
    for again in ("last", "head"):
        with pytest.raises(BadInput, match="already"):
            masked(large, {again: 3})
    with pytest.raises(BadInput):
        set_mask(large, 1.5)
    with pytest.raises(BadInput):
        MaskedNorm("crms", Mask(torch.ones(3)), 1e-5, None, None)
