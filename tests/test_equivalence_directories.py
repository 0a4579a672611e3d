"""``certify --margin`` on directories: scores against transformers; findings, refusals, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from regauge.cli import app
from regauge.equivalence import Equivalence, Finding, Measure, equivalence
from regauge.equivalence.documents import cut, draw
from regauge.errors import BadInput, NotEquivalent, Refused

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": len(WORDS) + len(SPECIAL),
    "max_position_embeddings": 32,
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models with a tokenizer, a text of lines of 3 to 20 words, and labels for its lines."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    path = tmp_path_factory.mktemp("equivalence")
    torch.manual_seed(0)
    bert = BertConfig(**SIZES, num_labels=3, initializer_range=0.3)
    for name, model in (
        ("llama", LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3))),
        ("masked", BertForMaskedLM(bert)),
        ("vectors", BertModel(bert)),
        ("classes", BertForSequenceClassification(bert)),
    ):
        model.save_pretrained(path / name)
        tokenizer().save_pretrained(path / name)
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=generator.integers(3, 21))) for _ in range(120)]
    (path / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "labels.txt").write_text("\n".join(map(str, generator.integers(0, 3, size=120))))
    return path


def copied(home: Path, name: str, change: Any, out: str) -> Path:
    """A copy of a model with changed tensors."""
    path = home / out
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(home / name, path)
    tensors = load_file(path / "model.safetensors")
    save_file(
        {key: change(value) for key, value in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def rounded(value: torch.Tensor) -> torch.Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def spoiled(value: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return value + 0.3 * noise if value.ndim == 2 else value


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, ["certify", *map(str, args)])


def test_the_losses_are_those_of_transformers_document_by_document(home: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    other = copied(home, "llama", spoiled, "spoiled")
    found = equivalence(
        home / "llama", other, home / "text.txt", 0.01, document="\n", tokens=300, length=12, seed=4
    )
    documents = cut((home / "text.txt").read_text(), 12, pattern="\n")
    reader = AutoTokenizer.from_pretrained(home / "llama")
    rows = draw(documents, reader, length=12, tokens=300, seed=4)
    assert len(set(rows.document)) < len(rows.tokens), "some documents must take two rows"
    sums, sizes = np.zeros((2, len(rows.drawn))), np.zeros(len(rows.drawn))
    for index, path in enumerate((home / "llama", other)):
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)
        for ids, first, last, place in zip(rows.tokens, rows.first, rows.last, rows.document, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            targets = torch.tensor(ids[first:last])
            loss = torch.nn.functional.cross_entropy(logits[first - 1 : last - 1], targets, reduction="sum")
            sums[index, place] += float(loss)
            sizes[place] += (len(targets)) * (index == 0)
    means = sums.sum(1) / sizes.sum()
    assert (found.mean_a, found.mean_b) == pytest.approx(tuple(means), rel=1e-6)
    assert found.decision.mean == pytest.approx(means[1] - means[0], rel=1e-4)
    assert found.decision.members == sizes.sum() == found.sample.tokens >= 300
    assert found.decision.documents == len(rows.drawn)
    total = sizes.sum()
    off = (sums[1] - sums[0]) - sizes * found.decision.mean
    expected = np.sqrt((len(sizes) - 1) / len(sizes) * ((off / (total - sizes)) ** 2).sum())
    assert found.decision.standard_error == pytest.approx(expected, rel=1e-4)


def test_rounding_is_equivalent_noise_is_different_and_a_few_lines_decide_nothing(home: Path) -> None:
    a, text = home / "llama", home / "text.txt"
    near = copied(home, "llama", rounded, "rounded")
    options = ("--text", text, "--margin")
    same = run(a, near, *options, 0.02, "--json")
    assert same.exit_code == 0, same.output
    read = Equivalence.from_json(same.stdout)
    assert read.finding is Finding.EQUIVALENT
    assert read.b.dtypes == {"bfloat16": read.b.parameters}
    assert run(a, near, *options, 0.02, "--json").stdout == same.stdout
    other = copied(home, "llama", spoiled, "spoiled")
    assert run(a, other, *options, 0.02, "--tokens", 3000).exit_code == 1
    # The difference seen lies inside this margin, and its interval does not.
    margin = (abs(read.decision.mean) + read.decision.smallest_margin) / 2
    little = run(a, near, *options, margin, "--json")
    assert little.exit_code == 4, little.output
    undecided = Equivalence.from_json(little.stdout)
    assert undecided.decision.needs is not None
    needed = undecided.decision.needs[0]
    assert needed.documents is not None
    assert needed.documents > undecided.decision.documents
    assert "not enough data" in run(a, near, *options, margin).stdout


def test_vectors_are_mean_pooled_and_padding_does_not_count(home: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    near = copied(home, "vectors", spoiled, "vectors-spoiled")
    found = equivalence(home / "vectors", near, home / "text.txt", 1.9, document="\n", tokens=200)
    assert found.measure is Measure.DISTANCE
    documents = cut((home / "text.txt").read_text(), 256, pattern="\n")
    reader = AutoTokenizer.from_pretrained(home / "vectors")
    rows = draw(documents, reader, length=256, tokens=200, seed=0)
    pooled = []
    for path in (home / "vectors", near):
        model = BertModel.from_pretrained(path, dtype=torch.float64)
        with torch.no_grad():
            pooled.append(
                torch.stack([model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in rows.tokens])
            )
    expected = 1 - torch.nn.functional.cosine_similarity(*pooled)
    assert found.decision.mean == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.decision.p_zero is None
    itself = equivalence(home / "vectors", home / "vectors", home / "text.txt", 1e-9, tokens=200)
    assert (itself.finding, itself.decision.mean) == (Finding.EQUIVALENT, 0.0)


def test_the_accuracy_of_classifiers_is_that_of_transformers(home: Path) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    other = copied(home, "classes", spoiled, "classes-spoiled")
    found = equivalence(
        home / "classes", other, home / "text.txt", 0.2, labels=home / "labels.txt", tokens=100_000
    )
    reader = AutoTokenizer.from_pretrained(home / "classes")
    labels = list(map(int, (home / "labels.txt").read_text().split()))
    lines = (home / "text.txt").read_text().splitlines()
    for path, mean in ((home / "classes", found.mean_a), (other, found.mean_b)):
        model = BertForSequenceClassification.from_pretrained(path)
        with torch.no_grad():
            classes = [int(model(torch.tensor([reader(line).input_ids])).logits.argmax()) for line in lines]
        assert mean == pytest.approx(np.mean(np.equal(classes, labels)))
    assert found.decision.members == len(lines)
    refused = run(home / "classes", other, "--text", home / "text.txt", "--margin", 0.1)
    assert refused.exit_code == 2


def test_a_model_that_sees_what_it_is_scored_on_is_refused(home: Path) -> None:
    with pytest.raises(Refused, match="no loss per token"):
        equivalence(home / "masked", home / "masked", home / "text.txt", 0.1)


def test_what_cannot_be_compared_is_refused(home: Path, tmp_path: Path) -> None:
    a, text = home / "llama", home / "text.txt"
    assert run(a, a, "--margin", 0.1).exit_code == 2
    assert run(a, a, "--text", text, "--level", 0.1).exit_code == 2
    with pytest.raises(BadInput, match="different things"):
        equivalence(a, home / "vectors", text, 0.1)
    with pytest.raises(BadInput, match="too few documents"):
        equivalence(a, a, text, 0.1, document="no such thing", tokens=50)
    with pytest.raises(BadInput, match="no regular expression"):
        equivalence(a, a, text, 0.1, document="(")
    other = tmp_path / "llama"
    shutil.copytree(a, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="different tokens"):
        equivalence(a, other, text, 0.1)
    broken = copied(home, "llama", lambda value: value * float("nan"), "nan")
    with pytest.raises(NotEquivalent, match="NaN"):
        equivalence(a, broken, text, 0.1)


def test_an_encoder_decoder_is_refused(home: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=SIZES["vocab_size"], d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(home / "t5")
    tokenizer().save_pretrained(home / "t5")
    with pytest.raises(Refused, match="does not take text alone"):
        equivalence(home / "t5", home / "t5", home / "text.txt", 0.1)


def test_documents_are_lines_joined_matches_apart_or_lines() -> None:
    text = "aaaa bbbb\ncccc\n\ndddd\n#\neeee\n"
    assert cut(text, 2).texts == ("aaaa bbbb", "cccc\n\ndddd", "#\neeee")
    assert cut(text, 2, pattern="^#$").texts == ("aaaa bbbb\ncccc\n\ndddd", "eeee")
    assert cut(text, 2, lines=True).texts == ("aaaa bbbb", "cccc", "dddd", "#", "eeee")
    with pytest.raises(BadInput, match="no text"):
        cut(" \n", 2)
