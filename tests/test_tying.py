"""Parameters that are one are given apart, and equal ones are made one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from regauge.api import load, rewrite, rewrite_module
from regauge.certify import certify
from regauge.errors import Refused
from regauge.hf import load_meta
from regauge.ties import shared_names
from test_end_to_end import build

HEAD, TABLES = (
    "lm_head.weight",
    ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)


def seq2seq(scaled: bool = True) -> Any:
    """A small T5, whose head is tied whatever the configuration says; gains far from one."""
    config = transformers.T5Config(
        vocab_size=37,
        d_model=24,
        d_kv=6,
        d_ff=20,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=scaled,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    ids, answers = (torch.randint(4, 37, (2, length), generator=random) for length in (7, 5))
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=answers).logits.double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def groups(model: nn.Module) -> list[list[str]]:
    return [names for names in shared_names(model) if len(names) > 1]


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("t5_apart")
    model = seq2seq()
    model.save_pretrained(path / "source")
    moves = ["untie", "fold-scales", "rotate"]
    return model, path, rewrite(path / "source", path / "out", {"moves": moves}, seed=1)


def test_a_head_that_is_always_tied_gets_a_weight_of_its_own(rotated: Any) -> None:
    """Tied, the gain of the last norm cannot go into the head, so that the stream does not turn."""
    model, path, result = rotated
    assert result.certificate.evidence.exact.relative < 1e-13
    (patch,) = json.loads((path / "out" / "config.json").read_text())["regauge"]["patches"]
    assert patch == {
        "path": "lm_head",
        "module": "linear",
        "inputs": 24,
        "outputs": 37,
        "bias": False,
        "transposed": False,
    }
    again = load(path / "out").eval()
    assert distance(logits(model), logits(again)) < 1e-5
    assert distance(again.shared.weight.detach(), again.lm_head.weight.detach()) > 0.1
    assert groups(again) == groups(load_meta(path / "out").model) == [list(TABLES)]


def test_nothing_ties_it_again(rotated: Any, tmp_path: Path) -> None:
    model, path, _ = rotated
    place = shutil.copytree(path / "out", tmp_path / "t5_remote")
    remote = transformers.AutoModelForSeq2SeqLM.from_pretrained(place, trust_remote_code=True).eval()
    assert type(remote).__module__.startswith("transformers_modules.")
    wanted = logits(load(path / "out").eval())
    assert torch.equal(wanted, logits(remote))
    remote.tie_weights()
    remote.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved").eval()
    saved.tie_weights()
    assert torch.equal(wanted, logits(saved))
    assert HEAD in load_file(tmp_path / "saved" / "model.safetensors")
    ids = torch.tensor([[5, 7, 11]])
    first = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(first, saved.generate(ids, max_new_tokens=6, do_sample=False))


def test_equal_values_stay_apart(tmp_path: Path) -> None:
    """Right after untying both are equal, which is where a loader would tie them."""
    model = seq2seq(scaled=False)
    model.save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["untie"]})
    again = load(tmp_path / "out").eval()
    assert torch.equal(again.lm_head.weight, again.shared.weight)
    assert torch.equal(logits(model), logits(again))
    with torch.no_grad():
        again.lm_head.weight.zero_()
    assert not bool((again.shared.weight == 0).all())
    with pytest.raises(Refused, match="keeps its parameters tied"):
        rewrite(tmp_path / "out", tmp_path / "twice", {"moves": ["untie"]})
    with pytest.raises(Refused, match="ties nothing"):
        rewrite(tmp_path / "out", tmp_path / "tied", {"moves": ["tie"]})


def test_the_certificate_sees_the_head_alone(rotated: Any, tmp_path: Path) -> None:
    _, path, _ = rotated
    place = shutil.copytree(path / "out", tmp_path / "wrong")
    assert certify(path / "source", place).passed
    state = load_file(place / "model.safetensors")
    save_file(
        state | {HEAD: state[TABLES[0]].clone()}, place / "model.safetensors", metadata={"format": "pt"}
    )
    assert not certify(path / "source", place).passed


def test_the_result_is_a_source(rotated: Any, tmp_path: Path) -> None:
    _, path, _ = rotated
    result = rewrite(path / "out", tmp_path / "again", {"moves": ["fold-scales", "rotate"]}, seed=5)
    assert "orthogonal" in {used["kind"] for used in result.rewrite.used}
    assert HEAD in result.rewrite.steps
    assert result.certificate.evidence.exact.relative < 1e-13
    assert certify(path / "source", tmp_path / "again").passed


@pytest.mark.parametrize("stored", TABLES)
def test_whichever_name_it_is_stored_under(stored: str, tmp_path: Path) -> None:
    model = seq2seq()
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    save_file({stored if n == TABLES[0] else n: v for n, v in state.items()}, file, metadata={"format": "pt"})
    rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["untie", "fold-scales"]})
    assert distance(logits(model), logits(load(tmp_path / "out").eval())) < 1e-5


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_name_that_is_taken(name: str, tmp_path: Path) -> None:
    """The shared weight is stored under the name of the head, which the head needs."""
    model = seq2seq() if name == "t5" else build("llama-tied")
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    stored = TABLES[0] if name == "t5" else "model.embed_tokens.weight"
    state = {HEAD if n == stored else n: v for n, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"is stored as lm_head\.weight"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["untie"]})


def test_plain_modules_are_untied_as_they_are() -> None:
    model = seq2seq().double()
    random = torch.Generator().manual_seed(3)
    names = ("input_ids", "decoder_input_ids")
    inputs: dict[str, Any] = {name: torch.randint(4, 37, (2, 5), generator=random) for name in names}
    inputs["use_cache"] = False
    changed, certificate = rewrite_module(model, inputs, {"moves": ["untie", "fold-scales"]})
    assert certificate.evidence.float64.relative < 1e-13
    assert not groups(changed)
    assert distance(logits(model), logits(changed)) < 1e-13


class Shared(nn.Module):
    """Two maps with one weight and one bias, and no table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.c.bias = self.a.weight, self.a.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_tied_pairs_of_linear_maps() -> None:
    changed, certificate = rewrite_module(
        Shared().double(), (torch.randn(2, 6).double(),), {"moves": ["untie"]}
    )
    assert certificate.evidence.float64.relative == 0
    assert not groups(changed)


# --- tie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "whisper"])
def test_tying_undoes_untying(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "apart", {"moves": ["untie"]})
    result = rewrite(tmp_path / "apart", tmp_path / "out", {"moves": ["tie"]})
    assert result.certificate.evidence.exact.relative == 0
    sizes = [
        sum(v.numel() for v in load_file(tmp_path / d / "model.safetensors").values())
        for d in ("source", "apart", "out")
    ]
    assert sizes[0] == sizes[2] < sizes[1]
    again = type(model).from_pretrained(tmp_path / "out")
    assert groups(again) == groups(model)
    rewrite(tmp_path / "source", tmp_path / "both", {"moves": ["untie", "tie", "permute"]}, seed=1)
    rewrite(tmp_path / "source", tmp_path / "none", {"moves": ["permute"]}, seed=1)
    both, none = (load_file(tmp_path / d / "model.safetensors") for d in ("both", "none"))
    assert both.keys() == none.keys()


def test_only_equal_parameters_are_tied(tmp_path: Path) -> None:
    build("llama-tied").save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "apart", {"moves": ["untie"]})
    file = tmp_path / "apart" / "model.safetensors"
    state = load_file(file)
    state[HEAD][3, 5] += 1e-6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match="1 of 888 entries"):
        rewrite(tmp_path / "apart", tmp_path / "out", {"moves": ["tie"]})
    with pytest.raises(Refused, match="not equal"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["untie", "fold-scales", "tie"]})


def test_tying_where_it_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="said by its code"):
        rewrite_module(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),), {"moves": ["tie"]}
        )
    build("vit").save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match="ties nothing"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["tie"]})
