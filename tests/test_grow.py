"""Growth in width of models of transformers: exact, stored in stock form where that can be, run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.api import load, rewrite, rewrite_module
from regauge.errors import RecipeError, Refused
from test_end_to_end import build, go
from test_patches import distance, outputs
from zoo import CONFIGS
from zoo.parts import EPS

PATCHED = {"architectures", "auto_map", "model_type", "regauge"}
LINEAR, NUMBERS, TABLE = "linear", "attributes", "buffers"
HEADS = {"num_attention_heads", "num_key_value_heads"}
CASES: tuple[tuple[str, dict[str, str], set[str], set[str]], ...] = (
    # model, sizes, entries of the configuration that change, kinds of patches
    ("llama", {"neurons": "29"}, {"intermediate_size"}, set()),
    ("llama", {"heads": "+2"}, HEADS, set()),
    ("llama", {"queries": "+1"}, {"num_attention_heads"}, set()),
    ("llama", {"keys": "+4", "values": "+4"}, {"head_dim"}, {TABLE}),
    ("llama", {"residual": "+4"}, {"hidden_size", "rms_norm_eps"}, set()),
    ("llama", {"residual": "30", "neurons": "30", "heads": "+1", "keys": "8", "values": "8"},
     {"hidden_size", "rms_norm_eps", "intermediate_size", "head_dim"} | HEADS, {TABLE}),
    ("llama-tied", {"residual": "+4"}, {"hidden_size", "rms_norm_eps"}, set()),
    ("gpt2", {"neurons": "+3"}, {"n_inner"}, set()),
    ("gpt2", {"heads": "+2"}, set(), {LINEAR, NUMBERS}),
    ("gpt2", {"keys": "+3", "values": "+3"}, set(), {LINEAR, NUMBERS}),
    ("gemma3", {"residual": "+4"}, {"hidden_size"}, {NUMBERS, TABLE}),
    ("gemma2", {"keys": "+2", "values": "+2"}, {"head_dim"}, {TABLE}),
    ("opt", {"neurons": "+4", "heads": "+2"}, set(), {LINEAR, NUMBERS}),
    ("neox", {"neurons": "+4", "heads": "+2"}, set(), {LINEAR}),
    ("bert", {"keys": "+2", "values": "+2"}, set(), {LINEAR, NUMBERS}),
    ("whisper", {"neurons": "+4"}, {"encoder_ffn_dim", "decoder_ffn_dim"}, set()),
)  # fmt: skip


def model_of(name: str) -> Any:
    if name != "gemma2":
        return build(name)
    import transformers

    config = transformers.Gemma2Config(
        architectures=["Gemma2ForCausalLM"], vocab_size=37, hidden_size=24, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        query_pre_attn_scalar=8, sliding_window=4, max_position_embeddings=32, rms_norm_eps=EPS,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return build(name, config)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{'-'.join(c[1])}")
def test_grown(case: Any, tmp_path: Path) -> None:
    """The same function in float64; stored, loaded, saved and run as any model is."""
    name, sizes, config, kinds = case
    model = model_of(name)
    source, out, result = go(model, tmp_path, [{"name": "grow", **sizes}])
    assert result.certificate.passed
    exact = result.certificate.evidence.exact or result.certificate.evidence.float64
    assert exact.relative < 1e-14
    assert set(result.rewrite.config) - PATCHED == config
    assert {patch["module"] for patch in result.rewrite.patches} == kinds

    again = load(out).eval()
    assert isinstance(again, type(model))
    assert (type(again) is type(model)) is not bool(kinds)
    assert sum(p.numel() for p in again.parameters()) > sum(p.numel() for p in model.parameters())
    found = outputs(again, source)
    assert distance(outputs(model, source), found) < 1e-5
    if name not in ("bert", "whisper"):
        ids = torch.tensor([[5, 7, 11, 13], [3, 9, 4, 30]])
        tokens = [m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, again)]
        assert torch.equal(*tokens)
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(load(tmp_path / "saved").eval(), source), found)


REFUSED: tuple[tuple[str, dict[str, Any], type[Exception], str], ...] = (
    ("gemma3", {"keys": "+2", "values": "+2"}, Refused, "both factors would have to be zero"),
    ("qwen3", {"keys": "+2"}, Refused, "both factors would have to be zero"),
    ("gpt2", {"residual": "+4"}, Refused, "center:norm=rms"),
    ("bert", {"residual": "+4"}, Refused, "center:norm=rms"),
    ("llama", {"keys": "+3", "values": "+3"}, Refused, "an even number"),
    ("llama", {"values": "+2"}, Refused, "ties together in one step"),
    ("llama", {"channels": "+2"}, Refused, "there are no channels"),
    ("llama", {"neurons": "+2", "where": "nowhere.*"}, Refused, "there are no neurons"),
    ("llama", {"neurons": "10"}, RecipeError, "more than 20"),
    ("llama", {"neurons": "many"}, RecipeError, "a number, or"),
    ("llama", {"neurons": "9" * 20}, RecipeError, "too many neurons"),
    ("llama", {"neurons": "+2", "noise": 7.0}, RecipeError, "below 1"),
    ("llama", {}, RecipeError, "nothing is to grow"),
    ("llama", {"neurons": "+2", "new": "split", "noise": 1.0}, RecipeError, "below 1"),
)


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: f"{c[0]}-{'-'.join(c[1])}-{c[3][:12]}")
def test_refused(case: Any, tmp_path: Path) -> None:
    name, sizes, error, text = case
    model = model_of(name)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(error, match=text):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "grow", **sizes}]})
    assert not (tmp_path / "out").exists()


WHOLE = {
    "torch.tensor": lambda n: torch.sqrt(torch.tensor(n)),
    "torch.full": lambda n: torch.full((), n).sqrt(),
    "torch.linspace": lambda n: torch.linspace(1, n, 4)[:, None, None],
}


class Attention(torch.nn.Module):
    """Scores are divided by what a function makes of the size of a key."""

    def __init__(self, divisor: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / self.divisor(q.shape[-1])
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", WHOLE)
def test_a_size_in_a_tensor_of_whole_numbers_is_seen(name: str) -> None:
    """A refusal that names the operation, and not a certificate that fails."""
    torch.manual_seed(0)
    move = {"name": "grow", "keys": "+2"}
    with pytest.raises(Refused, match="constant of the forward pass changes"):
        rewrite_module(Attention(WHOLE[name]), (torch.randn(2, 5, 8),), {"moves": [move]})


def test_where_names_what_grows(tmp_path: Path) -> None:
    """One layer alone: the configuration cannot say it, so that its maps are replaced."""
    model = model_of("llama")
    move = {"name": "grow", "neurons": "+4", "where": "*.layers.1.*"}
    _, out, result = go(model, tmp_path, [move])
    assert {patch["path"].split(".")[2] for patch in result.rewrite.patches} == {"1"}
    again = load(out)
    sizes = [layer.mlp.up_proj.out_features for layer in again.model.layers]
    assert sizes == [20, 24]


def test_a_grown_directory_is_a_source(tmp_path: Path) -> None:
    """Growth after growth and among other moves."""
    model = model_of("llama")
    moves = ["fold-scales", "rotate", {"name": "grow", "neurons": "+4"}, "permute"]
    source, out, _ = go(
        model, tmp_path, [*moves, {"name": "grow", "heads": "+1", "keys": "8", "values": "8"}]
    )
    result = rewrite(out, tmp_path / "again", {"moves": [{"name": "grow", "residual": "+8", "keys": "10",
                                                          "values": "10"}]})  # fmt: skip
    assert result.certificate.passed
    again = load(tmp_path / "again").eval()
    assert distance(outputs(model, source), outputs(again, source)) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt", "neox"])
def test_a_layer_norm_stream_grows_once_its_norms_are_rms(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    before = ["untie"] if name != "neox" else []
    moves = [*before, {"name": "center", "norm": "rms"}, {"name": "grow", "residual": "32"}]
    source, out, result = go(model, tmp_path, moves)
    assert result.certificate.evidence.exact.relative < 1e-14
    again = load(out).eval()
    assert again.get_input_embeddings().weight.shape[1] == 32
    assert distance(outputs(model, source), outputs(again, source)) < 1e-5


def test_training_goes_on_from_the_loss_it_had(tmp_path: Path) -> None:
    """A small Llama learns a sequence, grows in every direction, has the same loss, and learns on."""
    import transformers

    torch.manual_seed(0)
    small = transformers.LlamaForCausalLM(CONFIGS["llama"]())
    rows = torch.arange(16)[:, None] * torch.arange(1, 13) % 37

    def learn(model: Any, steps: int) -> list[float]:
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses: list[float] = []
        for _ in range(steps):
            loss = model(input_ids=rows, labels=rows).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return losses

    learn(small, 60)
    sizes = {"residual": "40", "neurons": "40", "heads": "+2", "keys": "8", "values": "8"}
    _, out, _ = go(small, tmp_path, [{"name": "grow", **sizes}])
    large = load(out)
    before, after = learn(small, 60), learn(large, 60)
    assert after[0] == pytest.approx(before[0], rel=1e-5)
    assert after[-1] < before[-1] < before[0]
