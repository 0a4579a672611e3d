"""Norms of a checkpoint become layers that compute the same and can learn more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from regauge.api import load, rewrite, rewrite_module
from regauge.cli import app
from regauge.errors import NotEquivalent, Refused
from regauge.moves import upgrade
from test_end_to_end import build
from test_grow import outputs
from zoo import distance

FOLDED = [{"name": name, "optional": True} for name in ("untie", "add-bias", "fold-shifts", "strip")]
NEW = {
    "seednorm": {"rescale", "probe"},
    "gatednorm": {"down", "up"},
    "preaffine": {"scale"},
    "magnitude": {"magnitude", "direction"},
    "branched": {"inside", "outside"},
    "lns": set(),
}
LATER = {"seednorm": {"rescale"}, "gatednorm": {"down"}}
"""What has no gradient while its partner is zero, and one after the first step."""


def loss(model: Any) -> torch.Tensor:
    """Of a fixed batch."""
    torch.manual_seed(7)
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        frames = 2 * model.config.max_source_positions
        features = torch.randn(2, model.config.num_mel_bins, frames)
        return model(input_features=features, labels=torch.randint(30, (2, 6))).loss
    ids = torch.randint(30, (2, 9))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("name", ["llama", "gemma3", "whisper", "gpt2", "bert"])
def test_same_function_and_more_to_learn(name: str, kind: str, tmp_path: Path) -> None:
    model = build(name).eval()
    model.save_pretrained(tmp_path / "source")
    moves: list[Any] = [{"name": "upgrade", "norm": kind}]
    where = {}
    if kind == "branched":
        if name in ("bert", "whisper"):
            pytest.skip("norms that others read too")
        where = {"gemma3": {"where": "*.input_layernorm"}, "llama": {"where": "*layers*"}}.get(name, {})
        moves = [*(FOLDED if name == "gpt2" else []), {**moves[0], **where}]
    if (name, kind) == ("bert", "lns"):
        with pytest.raises(Refused, match="no norm to upgrade"):
            rewrite(tmp_path / "source", tmp_path / "out", {"moves": moves})
        return
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": moves})
    evidence = result.certificate.evidence
    assert (evidence.exact or evidence.float64).relative < 1e-14

    again = load(tmp_path / "out").eval()
    found = outputs(again, tmp_path / "source")
    assert distance(outputs(model, tmp_path / "source"), found) < 2e-6
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(load(tmp_path / "saved").eval(), tmp_path / "source"), found)

    old = set(dict(model.named_parameters()))
    made = {n: p for n, p in again.named_parameters() if n not in old and n.rpartition(".")[2] != "bias"}
    if kind not in ("branched", "lns"):
        assert {n.rpartition(".")[2] for n in made} >= NEW[kind]
    if name == "bert":
        return
    optimizer = torch.optim.SGD(again.parameters(), lr=0.05)
    first = loss(again)
    first.backward()
    for n, p in made.items():
        assert p.grad is not None
        assert bool(p.grad.any()) != (n.rpartition(".")[2] in LATER.get(kind, ()))
    optimizer.step()
    optimizer.zero_grad()
    loss(again).backward()
    assert all(bool(p.grad.any()) for p in made.values() if p.grad is not None)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        loss(again).backward()
    assert loss(again).item() < first.item()


def test_layer_norm_scaling_is_for_the_stream(tmp_path: Path) -> None:
    """Norms of queries, keys and of what a sublayer adds stay: the method has none there."""
    build("gemma3").save_pretrained(tmp_path / "source")
    moves = [{"name": "upgrade", "norm": "lns"}]
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": moves})
    expected = {
        f"model.layers.{number}.{norm}": (number + 1) ** -0.5
        for number in (0, 1)
        for norm in ("input_layernorm", "pre_feedforward_layernorm")
    }
    assert {patch["path"]: patch["scale"] for patch in result.rewrite.patches} == pytest.approx(expected)


def test_without_regauge(tmp_path: Path) -> None:
    """As remote code: two files beside the weights."""
    model = build("gemma3").eval()
    model.save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "upgrade", "norm": "gatednorm"}]})
    files = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert files == {"modeling_regauge.py", "norms_regauge.py"}
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    kinds = {type(module).__module__ for module in other.modules()}
    assert any(kind.startswith("transformers_modules") and kind.endswith("norms_regauge") for kind in kinds)
    assert not any(kind.startswith("regauge.") for kind in kinds)
    ids = torch.arange(8)[None]
    assert torch.equal(other(ids).logits, load(tmp_path / "out").eval()(ids).logits)
    tokens = [m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, other)]
    assert torch.equal(*tokens)


def test_offset_gains_keep_their_bits(tmp_path: Path) -> None:
    """Gemma stores g − 1; so does its upgrade, in bfloat16 too."""
    model = build("gemma3").to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 1e-3 * torch.randn(parameter.shape).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    for kind in ("seednorm", "preaffine"):
        rewrite(tmp_path / "source", tmp_path / kind, {"moves": [{"name": "upgrade", "norm": kind}]})
        again = dict(load(tmp_path / kind).named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(again[name], parameter)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("gemma3", {"norm": "branched"}, "one of them is no linear map"),
        ("whisper", {"norm": "branched"}, "with a shift"),
        ("llama", {"norm": "seednorm", "where": "nowhere"}, "no norm to upgrade"),
        ("llama", {"norm": "gatednorm", "rank": 0}, "a rank"),
    ],
)
def test_refused(name: str, options: dict[str, Any], text: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match=text):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "upgrade", **options}]})
    assert not (tmp_path / "out").exists()


class Inline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(nn.functional.layer_norm(x, (6,)) + self.norm(x))


def test_a_norm_that_is_no_module_is_named() -> None:
    x = torch.randn(3, 6)
    with pytest.raises(Refused, match="not a module of its own"):
        rewrite_module(Inline(), (x,), {"moves": ["upgrade"]})
    changed, _ = rewrite_module(Inline(), (x,), {"moves": [{"name": "upgrade", "where": "norm"}]})
    assert "probe" in dict(changed.get_submodule("norm").named_parameters())


class Shifted(nn.Module):
    """An RMSNorm with a shift of another name or shape than that of a norm."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, (6,), self.weight, 1e-5) + self.bias


class Named(Shifted):
    def __init__(self) -> None:
        super().__init__(6)
        self.shift, self.bias = self.bias, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, (6,), self.weight, 1e-5) + self.shift


@pytest.mark.parametrize("norm", [Named(), Shifted(1), Shifted(5, 6)])
def test_a_shift_that_is_not_that_of_a_norm(norm: nn.Module) -> None:
    x = torch.randn(3, 5, 6)
    with pytest.raises(Refused, match="no norm to upgrade"):
        rewrite_module(
            nn.Sequential(norm, nn.Linear(6, 2)), (x,), {"moves": [{"name": "upgrade", "where": "0"}]}
        )
    changed, _ = rewrite_module(nn.Sequential(Shifted(6)), (x,), {"moves": ["upgrade"]})
    assert "probe" in dict(changed[0].named_parameters())


def test_a_wrong_factor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the gate of one half is forgotten."""
    build("llama").save_pretrained(tmp_path / "source")
    real = upgrade._Work.norm  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(
        upgrade._Work, "norm", lambda self, module, kind, factor=1.0, **more: real(self, module, kind, **more)
    )
    with pytest.raises(NotEquivalent):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "upgrade", "norm": "gatednorm"}]})


def test_commands(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "source")
    run = CliRunner().invoke
    source = str(tmp_path / "source")
    done = run(app, ["upgrade", source, str(tmp_path / "a"), "--norm", "magnitude", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["certificate"]["verdict"] == "equivalent"
    assert run(app, ["upgrade", source, str(tmp_path / "b"), "--norm", "rmsnorm", "--untie"]).exit_code == 0
    assert run(app, ["fold", str(tmp_path / "a"), str(tmp_path / "c"), "--untie"]).exit_code == 0
    kinds = {type(module).__name__ for module in load(tmp_path / "c").modules()}
    assert "MagnitudeNorm" not in kinds
    assert run(app, ["upgrade", source, str(tmp_path / "d"), "--norm", "dyt"]).exit_code == 2
    ignored = run(app, ["upgrade", source, str(tmp_path / "d"), "--norm", "seednorm", "--rank", "4"])
    assert ignored.exit_code == 2
    assert "gatednorm" in ignored.output
    build("bert").save_pretrained(tmp_path / "bert")
    refused = run(app, ["upgrade", str(tmp_path / "bert"), str(tmp_path / "e"), "--norm", "rmsnorm"])
    assert refused.exit_code == 3
