"""The certificate: what is the same passes, what rounding explains passes as that, the rest does not."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regauge.certify import (
    Certificate,
    Figures,
    FunctionEvidence,
    Rerounded,
    StoredWeights,
    Verdict,
    certify,
    certify_modules,
    judge,
    render,
    schema,
)
from regauge.certify.figures import Distance, Held, compare
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError, TraceError

transformers = pytest.importorskip("transformers")

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {"tokens": 12, "length": 6}
State = dict[str, Tensor]


def save(directory: Path, state: State, **config: Any) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from regauge.hf import load_meta

    shapes = {n: p.shape for n, p in load_meta(CONFIG).model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    state = {
        n: 0.2 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for n, shape in shapes.items()
    }
    return save(tmp_path_factory.mktemp("a") / "original", state)


def changed(original: Path, target: Path, change: Callable[[State], None], **config: Any) -> Path:
    state = load_file(original / "model.safetensors")
    change(state)
    return save(target, state, **config)


def scale(state: State, part: str, factor: float) -> None:
    for name in state:
        if part in name:
            state[name] = state[name] * factor


# -- two directories -----------------------------------------------------------------------------------


def test_a_model_is_itself_bit_for_bit(original: Path) -> None:
    certificate = certify(original, original, **SMALL)
    assert certificate.verdict is Verdict.EQUIVALENT
    assert certificate.passed
    assert certificate.evidence.bits
    assert certificate.a == certificate.b
    assert certificate.evidence.float64 == Figures(0.0, 0.0, 0.0, 0.0, 1.0)
    assert certificate.evidence.positions == 12
    assert 1e-9 < certificate.evidence.floor.relative < 1e-6
    assert certificate == certify(original, original, **SMALL)


def test_a_power_of_two_between_values_and_output_is_equivalent(original: Path, tmp_path: Path) -> None:
    def move(state: State) -> None:
        scale(state, "v_proj", 2.0)
        scale(state, "o_proj", 0.5)

    certificate = certify(original, changed(original, tmp_path / "b", move), **SMALL)
    assert certificate.verdict is Verdict.EQUIVALENT
    assert certificate.evidence.float64.relative < 1e-14
    assert certificate.a.digest != certificate.b.digest


@pytest.mark.parametrize("part", ["input_layernorm", "v_proj", "embed_tokens", "model.norm"])
def test_a_thousandth_more_in_one_place_is_different(original: Path, tmp_path: Path, part: str) -> None:
    b = changed(original, tmp_path / "b", lambda state: scale(state, part, 1.001))
    certificate = certify(original, b, **SMALL)
    assert certificate.verdict is Verdict.DIFFERENT
    assert not certificate.passed
    assert certificate.evidence.float64.relative > 30 * certificate.evidence.floor.relative


def test_a_copy_rounded_to_bfloat16_is_within_rounding_of_bfloat16_storage_only(
    original: Path, tmp_path: Path
) -> None:
    def rounded(state: State) -> None:
        state.update({n: t.bfloat16() for n, t in state.items()})

    def rounded_and_back(state: State) -> None:
        state.update({n: t.bfloat16().float() for n, t in state.items()})

    narrow = certify(original, changed(original, tmp_path / "b", rounded, dtype="bfloat16"), **SMALL)
    assert narrow.verdict is Verdict.WITHIN_ROUNDING
    assert narrow.floor_dtype == "bfloat16"
    assert 1e-4 < narrow.evidence.float64.relative < 0.1
    wide = certify(original, changed(original, tmp_path / "c", rounded_and_back), **SMALL)
    assert wide.verdict is Verdict.DIFFERENT
    assert wide.floor_dtype == "float32"
    assert wide.evidence.float64 == narrow.evidence.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_alone_is_about_one_floor(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The reference for the floor: a real move that rounds every entry of value and output once."""
    state = {n: t.to(dtype) for n, t in load_file(original / "model.safetensors").items()}
    a = save(tmp_path / "a", state, dtype=str(dtype).removeprefix("torch."))
    exact = dict(state)
    for name, tensor in state.items():
        if "up_proj" in name:
            exact[name] = tensor.double() * math.pi
        if "down_proj" in name:
            exact[name] = tensor.double() / math.pi
    b = save(
        tmp_path / "b",
        {n: t.to(dtype) for n, t in exact.items()},
        dtype=str(dtype).removeprefix("torch."),
    )
    alone = certify(a, b, **SMALL)
    assert alone.verdict is Verdict.WITHIN_ROUNDING
    assert 0.05 < alone.evidence.float64.relative / alone.evidence.floor.relative < 1.5
    proved = certify(a, b, weights_b_exact=exact.__getitem__, **SMALL)
    assert proved.verdict is Verdict.EQUIVALENT
    assert proved.evidence.exact is not None
    assert proved.evidence.exact.relative < 1e-14
    assert proved.evidence.float64 == alone.evidence.float64


def test_exact_weights_do_not_excuse_what_was_stored(original: Path, tmp_path: Path) -> None:
    state = load_file(original / "model.safetensors")
    b = changed(original, tmp_path / "b", lambda s: scale(s, "v_proj", 1.001))
    certificate = certify(original, b, weights_b_exact=state.__getitem__, **SMALL)
    assert certificate.evidence.exact == Figures(0.0, 0.0, 0.0, 0.0, 1.0)
    assert certificate.verdict is Verdict.DIFFERENT
    wrong = {n: t * 1.001 if "v_proj" in n else t for n, t in state.items()}
    certificate = certify(original, original, weights_b_exact=wrong.__getitem__, **SMALL)
    assert certificate.evidence.bits
    assert certificate.verdict is Verdict.DIFFERENT


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_different_even_from_themselves(
    original: Path, tmp_path: Path, value: float
) -> None:
    def spoil(state: State) -> None:
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = value

    b = changed(original, tmp_path / "b", spoil)
    for a in (original, b):
        certificate = certify(a, b, stored=False, **SMALL)
        assert certificate.verdict is Verdict.DIFFERENT
        assert certificate == Certificate.from_json(certificate.to_json())


def test_the_architecture_may_differ(original: Path, tmp_path: Path) -> None:
    def untie(state: State) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    b = changed(original, tmp_path / "b", untie, tie_word_embeddings=False)
    certificate = certify(original, b, **SMALL)
    assert certificate.verdict is Verdict.EQUIVALENT
    assert certificate.b.parameters - certificate.a.parameters == 61 * 32


def test_memory_decides_the_batch_and_not_the_verdict(original: Path, tmp_path: Path) -> None:
    b = changed(original, tmp_path / "b", lambda state: scale(state, "v_proj", 1.001))
    wide = certify(original, b, **SMALL)
    narrow = certify(original, b, max_memory=2 * 32 * 61 * 6 + 1, **SMALL)
    assert wide.inputs.shapes == {"input_ids": (2, 6)}
    assert narrow.inputs.shapes == {"input_ids": (1, 6)}
    assert wide.evidence.positions == narrow.evidence.positions == 12
    assert narrow.verdict is Verdict.DIFFERENT
    assert certify(original, b, max_memory=2 * 32 * 61 * 3 + 1, **SMALL).inputs.shapes == {
        "input_ids": (1, 3)
    }
    with pytest.raises(BadInput, match="memory"):
        certify(original, b, max_memory=100, **SMALL)


def test_text_is_read_with_the_tokenizer_of_the_directory(original: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 3)
    with pytest.raises(BadInput, match="no tokenizer"):
        certify(original, original, text=text, **SMALL)
    a = save(tmp_path / "a", load_file(original / "model.safetensors"))
    words = {word: index for index, word in enumerate(("[UNK]", "the", "cat", "sat", "on", "mat"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(a)
    certificate = certify(a, original, text=text, **SMALL)
    assert certificate.inputs.source == "text"
    assert certificate.verdict is Verdict.EQUIVALENT
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on the cat " * 3)
    assert certify(a, original, text=other, **SMALL).inputs.digest != certificate.inputs.digest
    other.write_text("cat")
    with pytest.raises(BadInput, match="too short"):
        certify(a, original, text=other, **SMALL)
    with pytest.raises(BadInput, match="cannot be read"):
        certify(a, original, text=tmp_path / "missing.txt", **SMALL)


def test_what_cannot_be_compared_is_refused(original: Path, tmp_path: Path) -> None:
    def cut(state: State) -> None:
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:50]

    smaller = changed(original, tmp_path / "smaller", cut, vocab_size=50)
    with pytest.raises(BadInput, match="different outputs"):
        certify(original, smaller, **SMALL)
    mismatched = changed(original, tmp_path / "mismatched", cut)
    with pytest.raises(CheckpointError, match="another shape than the config says"):
        certify(original, mismatched, **SMALL)

    def twice(state: State) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1

    with pytest.raises(BadInput, match="ties tensors"):
        certify(original, changed(original, tmp_path / "twice", twice), **SMALL)


def test_rows_of_stored_weights_are_rows_of_the_tensor(original: Path) -> None:
    tensor = load_file(original / "model.safetensors")["model.embed_tokens.weight"]
    with Checkpoint.open(original) as files:
        weights = StoredWeights(files, {"w": "model.embed_tokens.weight"})
        for index in (
            torch.arange(3, 9),
            torch.tensor([5, 0, 60]),
            torch.tensor([4, 4, 6]),
            torch.tensor([2]),
        ):
            assert torch.equal(weights.rows("w", index), tensor[index])
        with pytest.raises(CheckpointError, match="no tensor"):
            weights("v")


def test_a_config_without_dtype_means_the_dtype_of_the_checkpoint(original: Path, tmp_path: Path) -> None:
    def rounded(state: State) -> None:
        state.update({n: t.bfloat16() for n, t in state.items()})

    silent = changed(original, tmp_path / "silent", rounded)
    stated = changed(original, tmp_path / "stated", rounded, dtype="bfloat16")
    certificate = certify(silent, stated, **SMALL)
    assert certificate.evidence.stored is not None
    assert certificate.evidence.stored.max_abs == 0.0


# -- two modules ---------------------------------------------------------------------------------------


def mlp(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 3)).eval()


def test_modules_are_compared_on_the_inputs_given() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 0, 6, 5, 2, 4])
    a, b = mlp(), mlp()
    state = b.state_dict()
    for name, tensor in state.items():
        if name.startswith(("0.", "2.")) and tensor.ndim:
            state[name] = tensor[order]
    state["3.weight"] = state["3.weight"][:, order]
    b.load_state_dict(state)
    certificate = certify_modules(a, b, (x,))
    assert certificate.verdict is Verdict.EQUIVALENT
    assert certificate.inputs.source == "given"
    assert certificate.a.digest != certificate.b.digest
    state["3.weight"] = state["3.weight"][:, order]
    b.load_state_dict(state)
    assert certify_modules(a, b, (x,)).verdict is Verdict.DIFFERENT


def test_statistics_of_a_batch_norm_are_part_of_the_function() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    b = mlp()
    b.get_buffer("2.running_mean").add_(1e-3)
    assert certify_modules(mlp(), b, (x,)).verdict is Verdict.DIFFERENT


def test_a_module_that_cannot_be_traced_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError):
        certify_modules(Branch(), Branch(), (torch.ones(2),))


# -- figures, against independent formulas ---------------------------------------------------------------


def test_figures_are_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(4)
    a = 3 * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    b = a + torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    total = Distance(logits=True)
    compare([Held(a[:1])], [(total, [Held(b[:1])])])
    compare([Held(a[1:])], [(total, [Held(b[1:])])])
    figures = total.figures()
    p, q = a.softmax(-1).reshape(10, 11), b.softmax(-1).reshape(10, 11)
    kl = (p * (p / q).log()).sum(-1)
    assert figures.relative == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-12)
    assert figures.max_abs == float((a - b).abs().max())
    assert figures.kl_mean == pytest.approx(float(kl.mean()), rel=1e-12)
    assert figures.kl_max == pytest.approx(float(kl.max()), rel=1e-12)
    assert figures.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert 0 < figures.top1 < 1


@pytest.mark.parametrize("size", [1e-9, 1.0, 300.0])
def test_kl_of_close_and_of_distant_logits(size: float) -> None:
    """Against a formula that cancels nothing for close logits, and against the plain one for others."""
    generator = torch.Generator().manual_seed(7)
    a = 3 * torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    a[1, 10:20] = -math.inf
    d = size * torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    total = Distance(logits=True)

    @dataclass(frozen=True)
    class Narrow(Held):
        step: int = 600

    compare([Narrow(a)], [(total, [Held(a + d)])])
    p = a.softmax(-1)
    if size < 1e-6:  # variance of d under p, to third order
        expected = 0.5 * ((p * d.square()).sum(-1) - (p * d).sum(-1).square())
    else:
        gap = a.log_softmax(-1) - (a + d).log_softmax(-1)
        expected = torch.where(p > 0, p * gap, 0.0).sum(-1)
    assert total.figures().kl_mean == pytest.approx(float(expected.mean()), rel=1e-6)
    assert total.figures().kl_max == pytest.approx(float(expected.max()), rel=1e-6)


def added(total: Distance, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    compare([Held(x) for x in a], [(total, [Held(x) for x in b])])


def test_the_worst_output_counts_and_shared_infinities_do_not() -> None:
    big, small = torch.full((3,), 1e6), torch.tensor([1.0, -math.inf, 2.0])
    total = Distance(logits=False)
    added(total, (big, small), (big, small + torch.tensor([0.0, 0.0, 1.0])))
    assert total.figures().relative == pytest.approx(1 / math.sqrt(5))
    added(total, (big, small), (big, torch.tensor([1.0, math.inf, 2.0])))
    assert not total.figures().finite
    with pytest.raises(BadInput, match="different shapes"):
        added(total, (big,), (big[:2],))


def evidence(float64: float, floor: float, exact: float | None = None) -> FunctionEvidence:
    made = None if exact is None else Figures(exact, exact)
    return FunctionEvidence(made, Figures(float64, float64), Figures(floor, floor), None, None, 1, False)


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (evidence(1e-14, 1e-7), Verdict.EQUIVALENT),
        (evidence(2.9e-7, 1e-7), Verdict.WITHIN_ROUNDING),
        (evidence(3.1e-7, 1e-7), Verdict.DIFFERENT),
        (evidence(2.9e-7, 1e-7, 1e-14), Verdict.EQUIVALENT),
        (evidence(2.9e-7, 1e-7, 1e-9), Verdict.DIFFERENT),
        (evidence(1e-14, 1e-7, 1e-9), Verdict.DIFFERENT),
        (evidence(3.1e-7, 1e-7, 1e-14), Verdict.DIFFERENT),
        (evidence(1e-9, 0.0), Verdict.DIFFERENT),
        (replace(evidence(0.0, 1e-7), bits=True), Verdict.EQUIVALENT),
        (replace(evidence(0.0, 1e-7), stored=Figures(math.inf, math.inf, finite=False)), Verdict.DIFFERENT),
    ],
)
def test_verdicts(given: FunctionEvidence, verdict: Verdict) -> None:
    assert judge(given)[0] is verdict


# -- the rounding floor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rerounding_has_the_variance_of_rounding(dtype: torch.dtype) -> None:
    w = torch.randn(800, 500, generator=torch.Generator().manual_seed(5)).to(dtype)
    before = w.clone()
    noisy = Rerounded(lambda name: w, None, 0)("w")
    assert noisy.dtype is dtype
    assert torch.equal(w, before)
    normal = w.abs() > 0.1
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(w.double().abs()))
    steps = ((noisy.double() - w.double()) / ulp)[normal]
    assert float(steps.square().mean()) == pytest.approx(1 / 12, rel=0.03)
    assert abs(float(steps.mean())) < 2e-3
    rounded = torch.randn(800, 500, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    if dtype is not torch.float64:
        plain = Rerounded(lambda name: rounded, lambda name: dtype, 0)("w")
        assert torch.equal(plain, rounded.to(dtype))


def test_rerounding_by_rows_is_rerounding_and_depends_on_seed_name_and_place() -> None:
    w = torch.ones(300, 40)
    noisy = Rerounded(lambda name: w, None, 0)
    whole, index = noisy("w"), torch.tensor([7, 3, 299])
    assert torch.equal(noisy.rows("w", index), whole[index])
    assert torch.equal(whole, Rerounded(lambda name: w, None, 0)("w"))
    assert not torch.equal(whole, Rerounded(lambda name: w, None, 1)("w"))
    assert not torch.equal(whole, noisy("v"))
    assert len(whole.unique(dim=0)) > 250


def test_rerounding_leaves_zeros_integers_and_the_largest_number_finite() -> None:
    largest = torch.finfo(torch.float16).max
    w = torch.tensor([0.0, -0.0, largest, -largest] * 500, dtype=torch.float16).reshape(40, 50)
    noisy = Rerounded(lambda name: w, None, 0)("w")
    assert torch.isfinite(noisy).all()
    assert torch.equal(noisy == 0, w == 0)
    count = torch.arange(5)
    assert torch.equal(Rerounded(lambda name: count, None, 0)("n"), count)


# -- the record ------------------------------------------------------------------------------------------


def test_json_round_trip_schema_and_table(original: Path) -> None:
    from rich.console import Console

    certificate = certify(original, original, **SMALL)
    text = certificate.to_json()
    assert Certificate.from_json(text) == certificate
    data = json.loads(text)
    described = schema()
    assert set(data) == set(described["properties"])
    assert set(described["required"]) == set(data) - {"version"}
    assert data["verdict"] == "equivalent"
    with pytest.raises(ValueError, match="surprise"):
        Certificate.from_json(json.dumps({**data, "surprise": 1}))
    with pytest.raises(ValueError, match="version 99"):
        Certificate.from_json(json.dumps({**data, "version": 99}))
    shown = io.StringIO()
    Console(width=120, file=shown).print(render(certificate))
    for part in ("equivalent", "KL mean", "floor", "float32", certificate.a.digest[:16]):
        assert part in shown.getvalue()
