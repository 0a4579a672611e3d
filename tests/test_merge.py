"""Merging features: exact, the way back from growth, and refused where nothing is dead or double."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regauge.api import load, rewrite, rewrite_module
from regauge.checkpoint import Checkpoint
from regauge.errors import NotEquivalent, Refused
from regauge.growing import alike, search
from regauge.growing.roles import Role
from regauge.moves import merge
from regauge.moves.grow import ROLES
from test_end_to_end import build, go, loaded
from test_patches import distance, outputs
from zoo import CONFIGS, HOSTILE, specimen

Patch = pytest.MonkeyPatch
DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "ifm_mlp_golden.pt"


class Layers(nn.Module):
    """Two hidden layers of ten and eight neurons."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.act = act
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def merged(model: nn.Module, x: Tensor, *before: Any, **options: Any) -> nn.Module:
    """The module after merging; the function is the same in float64."""
    found, certificate = rewrite_module(model, (x,), {"moves": [*before, {"name": "merge", **options}]})
    assert certificate.evidence.float64.relative < 1e-14
    fresh = torch.randn(50, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert torch.allclose(
            model(fresh), found(fresh), rtol=0, atol=1e-13 if x.dtype.itemsize == 8 else 1e-5
        )
    return found


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("act", [torch.relu, nn.functional.gelu, nn.functional.silu, torch.sin])
def test_every_reason_to_go(act: Callable[[Tensor], Tensor]) -> None:
    """Rows and biases alike (one of three, readers added), a column of zeros, a row and a bias of zeros."""
    model = Layers(act)
    with torch.no_grad():
        for twin in (3, 7):
            model.a.weight[twin], model.a.bias[twin] = model.a.weight[1], model.a.bias[1]
        model.b.weight[:, 5] = 0
        model.b.weight[4], model.b.bias[4] = 0, 0
    found = merged(model, X)
    assert (found.a.out_features, found.b.out_features) == (7, 7)
    kept = [0, 1, 2, 4, 6, 8, 9]
    assert torch.equal(found.a.weight, model.a.weight[kept])
    added = model.b.weight[:, 1] + model.b.weight[:, 3] + model.b.weight[:, 7]
    rows = [0, 1, 2, 3, 5, 6, 7]
    assert torch.allclose(found.b.weight[:, 1], added[rows], rtol=1e-15, atol=0)
    assert torch.equal(found.c.weight, model.c.weight[:, rows])


@pytest.mark.parametrize("act", [torch.cos, torch.sigmoid, torch.exp])
def test_what_is_not_zero_at_zero_stays(act: Callable[[Tensor], Tensor]) -> None:
    model = Layers(act)
    with torch.no_grad():
        model.a.weight[4], model.a.bias[4] = 0, 0
    with pytest.raises(Refused, match="nothing is dead or double"):
        merged(model, X)


def test_a_bias_or_one_bit_apart_is_apart() -> None:
    model = Layers(torch.relu)
    with torch.no_grad():
        model.a.weight[3] = model.a.weight[1]
        model.b.weight[2], model.b.bias[2] = model.b.weight[6], model.b.bias[6]
        model.b.weight[2, 0] = torch.nextafter(model.b.weight[2, 0], torch.tensor(9.0, dtype=torch.float64))
    with pytest.raises(Refused, match="nothing is dead or double") as caught:
        merged(model, X)
    assert "18 indices in 2 index sets" in str(caught.value)


def test_one_leads_to_the_next_and_the_last_one_stays() -> None:
    """Twins whose readers cancel are dead together; what only they read is dead then; one neuron is left."""
    model = Layers(torch.relu)
    with torch.no_grad():
        model.b.weight[1], model.b.bias[1] = model.b.weight[0], model.b.bias[0]
        model.c.weight[:, 1] = -model.c.weight[:, 0]
        model.b.weight[2:, 4] = 0
    found = merged(model, X)
    assert (found.a.out_features, found.b.out_features) == (9, 6)
    with torch.no_grad():
        model.c.weight.zero_()
    found = merged(model, X)
    assert (found.a.out_features, found.b.out_features) == (1, 1) or found.b.out_features == 1


class Images(nn.Module):
    """Convolution, batch norm, pooling, convolution, a linear map of the positions of all channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.out = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.Linear(6 * 16, 5)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(torch.relu(self.norm(self.one(x))), 2)
        return self.out(torch.relu(self.two(y)).flatten(1))


def test_channels_with_their_batch_norm() -> None:
    model = Images()
    twins = (model.one.weight, model.one.bias, model.norm.weight, model.norm.bias, model.norm.running_mean)
    with torch.no_grad():
        for tensor in twins:
            tensor[4] = tensor[2]
        model.norm.weight[6] = model.norm.bias[6] = 0
        model.out.weight.view(5, 6, 16)[:, 3] = 0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert merged(model, x).one.weight.shape[0] == 7  # the running variances of the twins differ
    with torch.no_grad():
        model.norm.running_var[4] = model.norm.running_var[2]
    found = merged(model, x)
    assert found.one.weight.shape == (6, 3, 3, 3)
    assert found.two.weight.shape == (5, 6, 3, 3)
    assert (found.out.weight.shape, len(found.norm.weight)) == ((5, 80), 6)


def test_a_mean_over_features_counts_them() -> None:
    """A dead feature still counts in a mean: the index set stays."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x)).mean(-1)

    model = Mean()
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0, 0
    with pytest.raises(Refused, match="nothing is dead or double"):
        merged(model, X)


# --- models of transformers ---


def _copy(tensor: Tensor, axis: int, source: slice, target: slice) -> None:
    held = tensor.movedim(axis, 0)
    held[target] = held[source]


def _zero(tensor: Tensor, axis: int, target: slice) -> None:
    tensor.movedim(axis, 0)[target] = 0


def shrunken(model: Any, path: Path, **options: Any) -> tuple[Any, Any]:
    path.mkdir(exist_ok=True)
    source, out, result = go(model, path, [{"name": "merge", **options}])
    exact = result.certificate.evidence.exact
    assert exact is not None
    assert exact.relative < 1e-12
    again = load(out).eval()
    assert distance(outputs(model, source), outputs(again, source)) < 1e-5
    return again, result


def test_gpt2(tmp_path: Path) -> None:
    """Conv1D stores [in, out]; q | k | v are one map; heads of three entries."""
    model = build("gpt2")
    block = model.transformer.h[0]
    count, width = block.attn.num_heads, block.attn.head_dim
    d = count * width
    with torch.no_grad():
        _copy(block.mlp.c_fc.weight, 1, slice(2, 3), slice(9, 10))
        _copy(block.mlp.c_fc.bias, 0, slice(2, 3), slice(9, 10))
        for part in range(3):
            first = part * d
            for name, axis in (("weight", 1), ("bias", 0)):
                tensor = getattr(block.attn.c_attn, name)
                _copy(tensor, axis, slice(first, first + width), slice(first + d - width, first + d))
        _zero(block.attn.c_proj.weight, 0, slice(width, 2 * width))
    before = block.mlp.c_fc.weight.shape[1]
    again, result = shrunken(model, tmp_path)
    block = again.transformer.h[0]
    assert block.attn.c_attn.weight.shape == (d, 3 * (d - 2 * width))
    assert block.mlp.c_fc.weight.shape[1] == before - 1
    assert {patch["module"] for patch in result.rewrite.patches} == {"linear", "attributes"}


def test_llama_gate_and_up_must_agree(tmp_path: Path) -> None:
    model = build("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[7] = mlp.gate_proj.weight[3]
    with pytest.raises(Refused, match="nothing is dead or double"):
        shrunken(model, tmp_path / "one")
    with torch.no_grad():
        mlp.up_proj.weight[7] = mlp.up_proj.weight[3]
        mlp.gate_proj.weight[11] = 0
    again, result = shrunken(model, tmp_path / "two")
    sizes = [layer.mlp.up_proj.out_features for layer in again.model.layers]
    assert sizes == [20, 18]
    assert {patch["path"].split(".")[2] for patch in result.rewrite.patches} == {"1"}
    with pytest.raises(Refused, match="nothing is dead or double"):
        shrunken(model, tmp_path / "three", keep="equal")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 4] = 0
    (tmp_path / "four").mkdir()
    _, out, result = go(model, tmp_path / "four", [{"name": "merge", "keep": "equal"}])
    assert not result.rewrite.patches
    assert result.rewrite.config == {"intermediate_size": 19}
    assert loaded(out, model).model.layers[1].mlp.up_proj.out_features == 19


def test_where_limits_it(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 4] = 0
    again, _ = shrunken(model, tmp_path, where="*.layers.1.*")
    assert [layer.mlp.up_proj.out_features for layer in again.model.layers] == [20, 19]


def test_layers_that_lose_other_numbers_of_heads(tmp_path: Path) -> None:
    """One class, one attribute: the layers lose as many heads as both can, and neurons each its own."""
    import transformers

    config = CONFIGS["gpt2"]()
    config.n_layer = 2
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    blocks = model.transformer.h
    width, d, size = blocks[0].attn.head_dim, config.n_embd, blocks[0].mlp.c_fc.nf
    with torch.no_grad():
        for number, block in enumerate(blocks):
            _zero(block.attn.c_proj.weight, 0, slice(0, (number + 1) * width))
            _zero(block.mlp.c_proj.weight, 0, slice(0, 2 * number + 1))
    again, _ = shrunken(model, tmp_path)
    assert [block.attn.c_proj.weight.shape[0] for block in again.transformer.h] == [d - width] * 2
    assert [len(block.mlp.c_fc.bias) for block in again.transformer.h] == [size - 1, size - 3]


def test_whisper(tmp_path: Path) -> None:
    model = build("whisper")
    encoder, decoder = model.model.encoder.layers[0], model.model.decoder.layers[0]
    with torch.no_grad():
        for layer in (encoder, decoder):
            layer.fc1.weight[5], layer.fc1.bias[5] = layer.fc1.weight[2], layer.fc1.bias[2]
        decoder.fc1.weight[6], decoder.fc1.bias[6] = 0, 0
    again, result = shrunken(model, tmp_path)
    before = encoder.fc1.out_features
    assert again.model.encoder.layers[0].fc1.out_features == before - 1
    assert again.model.decoder.layers[0].fc1.out_features == before - 2
    assert result.rewrite.config == {"encoder_ffn_dim": before - 1, "decoder_ffn_dim": before - 2}


# --- the way back from growth ---

BACK: tuple[tuple[str, dict[str, str], str, bool], ...] = (
    # model, growth, what the new entries are, whether the configuration says it
    ("llama", {"neurons": "29"}, "split", True),
    ("llama", {"heads": "+2"}, "split", True),
    ("llama", {"queries": "+1"}, "pairs", True),
    ("llama", {"residual": "+4", "neurons": "+1"}, "zero", True),
    ("gpt2", {"neurons": "+3", "heads": "+2"}, "split", False),
    ("gpt2", {"keys": "+3", "values": "+3"}, "split", False),
    ("bert", {"keys": "+2", "values": "+2"}, "pairs", False),
    ("whisper", {"neurons": "+4"}, "zero", True),
)


@pytest.mark.parametrize("case", BACK, ids=lambda c: f"{c[0]}-{'-'.join(c[1])}-{c[2]}")
def test_back_from_growth(case: Any, tmp_path: Path) -> None:
    """Every tensor is what it was, bit by bit, and so are the sizes in the configuration."""
    name, sizes, new, config = case
    grow = {"name": "grow", **sizes, "new": new, **({"noise": 0.0} if new == "split" else {})}
    source, out, result = go(build(name), tmp_path, [grow, "merge"])
    exact = result.certificate.evidence.exact
    assert exact is not None
    assert exact.relative < 1e-15
    old, back = Checkpoint.open(source), Checkpoint.open(out)
    assert set(old.names) == set(back.names)
    for key in old.names:
        assert torch.equal(old.read(key), back.read(key)), key
    assert bool(result.rewrite.patches) is not config
    with pytest.raises(Refused, match="nothing is dead or double"):
        rewrite(out, tmp_path / "twice", {"moves": ["merge"]})


TURNED = ("turned_and_shared", "unit_queries")
"""Members all of whose keys are turned by position: pairs of such entries are not looked at."""


@pytest.mark.parametrize("name", HOSTILE)
def test_growth_in_the_zoo_is_undone(name: str) -> None:
    """Whatever grows in the zoo comes back to the size it had, or smaller."""
    torch.manual_seed(0)
    model, args = HOSTILE[name]()
    shapes = specimen(name).trace.shapes
    for number, role in enumerate(role for role in ROLES if role is not Role.KEYS or name not in TURNED):
        new = ("split", "zero", "pairs")[number % 3]
        grow = {"name": "grow", role.value: "+2", "new": new, **({"noise": 0.0} if new == "split" else {})}
        try:
            rewrite_module(model, args, {"moves": [grow]})
        except (Refused, NotEquivalent):
            continue
        found, certificate = rewrite_module(model, args, {"moves": [grow, "merge"]})
        assert certificate.passed
        for key, value in found.state_dict().items():
            if key in shapes:
                assert all(n <= m for n, m in zip(value.shape, shapes[key], strict=True)), (role, key)


# --- the authors' case ---


def net(weights: dict[str, Tensor]) -> nn.Module:
    first, second = weights["fc1.weight"], weights["fc2.weight"]
    model = nn.Sequential(
        nn.Linear(*first.shape[::-1]), nn.ReLU(), nn.Linear(*second.shape[::-1], bias=False)
    )
    with torch.no_grad():
        model[0].weight.copy_(first)
        model[0].bias.copy_(weights["fc1.bias"])
        model[2].weight.copy_(second)
    return model.double()


def test_the_authors_near_copies() -> None:
    """Twelve near copies of six units: nothing is equal, so nothing goes. Made equal, six are left, and the
    function is that of the authors' result up to how far apart the copies were."""
    golden = torch.load(GOLDEN, weights_only=True)
    weights, x = golden["inputs"]["params"], golden["inputs"]["x"].double()
    with pytest.raises(Refused, match="nothing is dead or double"):
        merged(net(weights), x)
    first = torch.cat([weights["fc1.weight"], weights["fc1.bias"][:, None]], 1)
    apart = torch.cdist(first, first)
    twin = [int((row < 0.1 * apart.max()).nonzero()[0]) for row in apart]
    assert len(set(twin)) == 6
    equal = {
        **weights, "fc1.weight": weights["fc1.weight"][twin], "fc1.bias": weights["fc1.bias"][twin],
    }  # fmt: skip
    found = merged(net(equal), x)
    assert found[0].out_features == 6
    theirs = golden["outputs"]["0.1"]
    near = float((found(x).detach() - theirs["y"]).norm() / theirs["y"].norm())
    assert theirs["size"] == 7
    assert near < 0.02


# --- mutants ---


def _blind(patch: Patch) -> None:
    """Biases do not count."""
    real = search.Search._zeros
    patch.setattr(search.Search, "_zeros", lambda self, name, held: [True] * len(held) if "bias" in name
                  else real(self, name, held))  # fmt: skip


def _no_sum(patch: Patch) -> None:
    """The reader of the one that goes is lost."""
    patch.setattr(merge, "silent_of", lambda name, chosen: set())


def _curves(patch: Patch) -> None:
    """exp(0) = 0."""
    patch.setattr(alike, "ZERO_AT_ZERO", frozenset(("aten.exp",)))


def _counts(patch: Patch) -> None:
    patch.setattr(alike, "_divides_by_no_count", lambda reach, role: True)


def _gelu_with_a_zero_row() -> nn.Module:
    model = Layers(nn.functional.gelu)
    with torch.no_grad():
        model.a.weight[4] = 0
    return model


def _twins() -> nn.Module:
    model = Layers(torch.relu)
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3] = model.a.weight[1], model.a.bias[1]
    return model


def _exp_of_zero() -> nn.Module:
    model = Layers(torch.exp)
    with torch.no_grad():
        model.a.weight[4], model.a.bias[4] = 0, 0
    return model


class _Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8).double(), nn.Linear(6, 8).double()
        with torch.no_grad():
            self.a.weight[2], self.a.bias[2] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(self.a(x)) * self.b(x)).mean(-1)


@pytest.mark.parametrize(
    ("mutant", "model", "really"),
    [
        (_blind, _gelu_with_a_zero_row, False),
        (_no_sum, _twins, True),
        (_curves, _exp_of_zero, False),
        (_counts, _Average, False),
    ],
)
def test_mutants(
    mutant: Callable[[Patch], None], model: Callable[[], nn.Module], really: bool, monkeypatch: Patch
) -> None:
    """Without the mutant the model is merged, or refused; with it the certificate fails, or the factor of a
    mean is noticed on the way."""
    if really:
        merged(model(), X)
    else:
        with pytest.raises(Refused, match="nothing is dead or double"):
            merged(model(), X)
    mutant(monkeypatch)
    with pytest.raises((NotEquivalent, Refused), match=r"certificate failed|does not cancel"):
        merged(model(), X)
