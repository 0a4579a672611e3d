"""Exported files compute what their source computes, at sizes nobody saw; what does not is not kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import regauge
from regauge import BadInput, ExportCertificate, NotEquivalent, TraceError
from regauge.cli import app
from regauge.exporting import evidence, program, run, subject
from regauge.exporting.evidence import true_float64

TOKENS = 60


def _save(kind: str, place: Path, **fields: Any) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, config.architectures[0])(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(place: Path) -> Path:
    return _save(
        "Llama",
        place / "llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=TOKENS,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def bert(place: Path) -> Path:
    return _save(
        "Bert",
        place / "bert",
        architectures=["BertModel"],
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=TOKENS,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def gpt2(place: Path) -> Path:
    return _save(
        "GPT2",
        place / "gpt2",
        architectures=["GPT2LMHeadModel"],
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=TOKENS,
        n_positions=64,
    )


@pytest.fixture(scope="module")
def rewritten(gpt2: Path) -> Path:
    """The same function with RMSNorms for LayerNorms: it is loaded by another class."""
    out = gpt2.with_name("rewritten")
    moves = ["untie", "fold-shifts", "fold-scales", {"name": "center", "norm": "rms"}, "strip"]
    regauge.rewrite(gpt2, out, {"moves": moves}, seed=1)
    return out


@pytest.fixture(scope="module")
def whisper(place: Path) -> Path:
    return _save(
        "Whisper",
        place / "whisper",
        architectures=["WhisperForConditionalGeneration"],
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        vocab_size=TOKENS,
        num_mel_bins=4,
        max_source_positions=10,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


class Net(nn.Module):
    """Convolution, normalisation, a cast to half precision and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.norm(torch.relu(self.conv(x))).mean(-1)
        return scale * self.out(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def _onnx(path: Path) -> Callable[..., dict[str, Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(**inputs: Tensor) -> dict[str, Tensor]:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        names = [item.name for item in session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return call


def _archive(path: Path) -> Callable[..., dict[str, Tensor]]:
    return torch.export.load(path).module()


def _ids(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, TOKENS, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert set(found) <= set(wanted)
    assert found
    pairs = [(value.detach().double(), wanted[name]) for name, value in found.items()]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _reference(directory: Path) -> Callable[..., dict[str, Tensor]]:
    model = regauge.load(directory, dtype=torch.float64)

    def call(**inputs: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
            return dict(model(**inputs))

    return call


UNSEEN = ((2, 2), (1, 9), (5, 23), (7, 60))


# --- the law: the same function, at sizes that neither exporter nor certificate saw -------------------


@pytest.fixture(scope="module")
def llama_onnx(llama: Path) -> tuple[Path, regauge.ExportResult]:
    out = llama.with_name("llama.onnx")
    return out, regauge.export(llama, out)


def test_onnx_of_a_language_model_is_the_same_function(
    llama: Path, llama_onnx: tuple[Path, regauge.ExportResult]
) -> None:
    out, result = llama_onnx
    exported, reference = _onnx(out), _reference(llama)
    for batch, length in UNSEEN:
        inputs = _ids(batch, length)
        assert _error(exported(**inputs), reference(**inputs)) < 1e-5
    found = result.certificate
    assert found.verdict is regauge.Verdict.WITHIN_ROUNDING
    assert found.outputs["logits"].floor.relative < 1e-5
    assert found.outputs["logits"].error.top1 == 1.0
    assert ExportCertificate.from_json(found.to_json()) == found


def test_axes_have_names_and_nothing_else_is_left(llama_onnx: tuple[Path, regauge.ExportResult]) -> None:
    import onnx

    out, result = llama_onnx
    model = onnx.load(out)
    onnx.checker.check_model(model)
    for value in (*model.graph.input, *model.graph.output):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims == ["batch", "length", TOKENS][: len(dims)]
    assert {(axis.input, axis.axis, axis.name) for axis in result.certificate.dynamic} == {
        (name, axis, label)
        for name in ("input_ids", "attention_mask")
        for axis, label in enumerate(("batch", "length"))
    }
    assert result.files == (out,)
    assert not [path for path in out.parent.iterdir() if "regauge-" in path.name]


def test_archive_of_a_rewritten_structure_is_the_function_of_the_original(
    gpt2: Path, rewritten: Path, tmp_path: Path
) -> None:
    assert (rewritten / "modeling_regauge.py").exists()
    out = tmp_path / "gpt2.pt2"
    result = regauge.export(rewritten, out, format="pt2")
    exported, reference = _archive(out), _reference(gpt2)
    for batch, length in UNSEEN:
        inputs = _ids(batch, length)
        assert _error(exported(**inputs), reference(**inputs)) < 1e-5
    assert set(result.certificate.outputs) == {"logits"}


def test_encoder_and_decoder_in_one_archive(whisper: Path, tmp_path: Path) -> None:
    out = tmp_path / "whisper.pt2"
    result = regauge.export(whisper, out, format="pt2")
    exported, reference = _archive(out), _reference(whisper)
    for batch, length in ((1, 1), *UNSEEN):
        inputs = {
            "input_features": torch.randn(batch, 4, 20),
            "decoder_input_ids": torch.randint(3, TOKENS, (batch, length)),
        }
        assert _error(exported(**inputs), reference(**inputs)) < 1e-5
    assert [(axis.input, axis.axis, axis.name) for axis in result.certificate.dynamic] == [
        ("input_features", 0, "batch"),
        ("decoder_input_ids", 0, "batch"),
        ("decoder_input_ids", 1, "length"),
    ]


@pytest.mark.parametrize("form", program.FORMATS)
def test_a_module_with_probes_of_other_sizes(net: Net, tmp_path: Path, form: str) -> None:
    out = tmp_path / f"net.{form}"
    result = regauge.export(
        net,
        out,
        format=form,
        inputs=(torch.randn(2, 3, 8), 2.0),
        probes=[(torch.randn(4, 3, 11), 2.0), {"x": torch.randn(1, 3, 5)}],
    )
    assert net.training
    net.eval().double()
    exported = (_onnx if form == "onnx" else _archive)(out)
    for batch, length in UNSEEN:
        x = torch.randn(batch, 3, length)
        assert _error(exported(x=x), {"output": net(x.double(), 2.0).detach()}) < 1e-5
    assert [probe.shapes["x"] for probe in result.certificate.probes] == [(2, 3, 8), (4, 3, 11), (1, 3, 5)]


def test_an_axis_that_the_code_fixes_stays_and_is_reported(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0) + (1 if x.shape[1] == 6 else torch.arange(x.shape[1]))

    result = regauge.export(
        Fixed(),
        tmp_path / "fixed.pt2",
        format="pt2",
        inputs=torch.randn(3, 6),
        probes=[torch.randn(5, 6), torch.randn(5, 7)],
    )
    assert result.certificate.static == {"x.1": 6}
    assert [axis.axis for axis in result.certificate.dynamic] == [0]
    assert [probe.shapes["x"] for probe in result.certificate.probes] == [(3, 6), (5, 6)]


def test_sizes_that_the_exporter_excludes_are_reported_and_not_compared(tmp_path: Path) -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unfold(1, 5, 1).sum(1) if x.shape[1] >= 6 else x[:, :5]

    others = [torch.randn(5, 9), torch.randn(2, 5)]
    result = regauge.export(
        Windows(), tmp_path / "a.pt2", format="pt2", inputs=torch.randn(3, 7), probes=others
    )
    assert [(axis.axis, axis.least) for axis in result.certificate.dynamic] == [(0, 2), (1, 6)]
    assert [probe.shapes["x"] for probe in result.certificate.probes] == [(3, 7), (5, 9)]


def test_weights_too_large_for_one_file_lie_beside_it(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "LARGE", 0)
    out = tmp_path / "net.onnx"
    result = regauge.export(net, out, inputs={"x": torch.randn(2, 3, 8)})
    assert {path.name for path in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    assert [path.name for path in result.files] == ["net.onnx", "net.onnx.data"]
    x = torch.randn(3, 3, 8)
    assert _error(_onnx(out)(x=x), {"output": net.eval().double()(x.double()).detach()}) < 1e-5
    out.unlink()
    with pytest.raises(BadInput, match=r"net\.onnx\.data exists already"):
        regauge.export(net, out, inputs={"x": torch.randn(2, 3, 8)})


# --- what is not the same function is not kept --------------------------------------------------------


@pytest.mark.parametrize("form", program.FORMATS)
def test_one_weight_off_by_a_thousandth_is_refused(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    write = run.write

    def mutant(traced: program.Program, *args: Any) -> None:
        held = traced.program.state_dict
        changed = held["model.conv.weight"].detach().clone()
        changed.view(-1)[7] *= 1.001
        held["model.conv.weight"] = nn.Parameter(changed)
        write(traced, *args)

    monkeypatch.setattr(run, "write", mutant)
    with pytest.raises(NotEquivalent, match=r"relative error .* of output"):
        regauge.export(net, tmp_path / "out", format=form, inputs={"x": torch.randn(2, 3, 8)})
    assert not list(tmp_path.iterdir())


def test_an_archive_of_one_size_is_refused_if_it_claims_more(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run.write
    x = torch.randn(2, 3, 8)

    def mutant(traced: program.Program, *args: Any) -> None:
        module = torch.export.export(subject.from_module(net, {"x": x}, None).module, (), {"x": x})
        write(program.Program(module, traced.outputs, traced.dynamic, {}), *args)

    monkeypatch.setattr(run, "write", mutant)
    with pytest.raises(NotEquivalent, match="does not run on inputs that the source takes"):
        regauge.export(net, tmp_path / "out", format="pt2", inputs={"x": x})
    assert not list(tmp_path.iterdir())


def test_nan_is_no_evidence() -> None:
    x = torch.ones(2, 3)
    module = subject.from_module(nn.Identity(), {"input": x}, None).module
    outputs, _, bits = evidence.measure(module, lambda inputs: {"output": x * torch.nan}, [{"input": x}])
    assert evidence.judge(outputs, bits)[0] is regauge.Verdict.DIFFERENT
    outputs, _, bits = evidence.measure(module, lambda inputs: {"output": x}, [{"input": x}])
    assert evidence.judge(outputs, bits)[0] is regauge.Verdict.EQUIVALENT
    with pytest.raises(NotEquivalent):
        evidence.measure(module, lambda inputs: {"output": x[:1]}, [{"input": x}])


def test_float64_lifts_casts_and_reads_parameters_wide(net: Net) -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.half().float().to(torch.bfloat16).type_as(x)
            return nn.functional.softmax(y, -1, dtype=torch.float32).to(x.dtype) * torch.tensor(0.1)

    x = torch.randn(4, 7)
    with true_float64():
        found = Casts()(x)
    wanted = torch.softmax(x.double(), -1) * 0.1
    assert float((found - wanted).abs().max()) < 1e-16
    y = torch.randn(2, 3, 8)
    with true_float64():
        found = net.eval()(y).detach()
    assert torch.get_default_dtype() is torch.float32
    assert float((found - net.double()(y.double()).detach()).abs().max()) < 1e-14


# --- refusals -----------------------------------------------------------------------------------------


def test_what_the_exporters_refuse_is_refused_with_their_reason(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x @ x.T)

    with pytest.raises(TraceError, match=r"torch\.export cannot trace"):
        regauge.export(Branches(), tmp_path / "out", format="pt2", inputs=torch.randn(2, 3))
    with pytest.raises(TraceError, match=r"(?s)ONNX cannot express.*eigh"):
        regauge.export(Foreign(), tmp_path / "out", inputs=torch.randn(2, 3))
    assert not list(tmp_path.iterdir())


def test_inputs_that_cannot_be_used(net: Net, llama: Path, tmp_path: Path) -> None:
    out, x = tmp_path / "out", torch.randn(2, 3, 8)
    for options, message in (
        ({}, "needs example inputs"),
        ({"inputs": {"x": [x]}}, "only tensors"),
        ({"inputs": (x, 1.0, 2.0)}, "do not fit"),
        ({"inputs": x, "probes": [x[0]]}, "another rank"),
        ({"inputs": x, "text": "book.txt"}, "on the inputs given"),
        ({"inputs": x, "format": "tflite"}, "unknown format"),
    ):
        with pytest.raises(BadInput, match=message):
            regauge.export(net, out, **options)
    with pytest.raises(BadInput, match="inputs are for modules"):
        regauge.export(llama, out, inputs=x)
    with pytest.raises(BadInput, match="is not a directory"):
        regauge.export(net, tmp_path / "no" / "out", inputs=x)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"(?s)no onnx, onnxscript, onnxruntime.*regauge\[export\]"):
        regauge.export(net, tmp_path / "out", inputs=torch.randn(2, 3, 8))


def test_a_checkpoint_without_all_tensors_is_not_filled_up(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(bert / "model.safetensors")
    del held["encoder.layer.1.output.dense.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(regauge.CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        regauge.export(tmp_path, tmp_path / "out.pt2", format="pt2")


# --- the command --------------------------------------------------------------------------------------


def _run(*args: object) -> Any:
    return CliRunner(env={"COLUMNS": "150", "NO_COLOR": "1"}).invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def book(bert: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(TOKENS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(bert)
    path = bert.with_name("book.txt")
    path.write_text(" ".join(f"w{i % TOKENS}" for i in range(1000)), encoding="utf-8")
    return path


def test_the_command_certifies_on_text_and_prints_json(bert: Path, book: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    result = _run("export", bert, out, "--format", "pt2", "--text", book, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["out"] == str(out)
    assert report["certificate"]["inputs"] == "text"
    assert set(report["certificate"]["outputs"]) == {"last_hidden_state", "pooler_output"}
    assert report["certificate"]["bytes"] == out.stat().st_size
    again = _run("export", bert, out, "--format", "pt2")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_the_command_shows_figures_and_fails_with_one(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _run("export", bert, tmp_path / "a.pt2", "--format", "pt2", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("equivalent")
    assert "floor: source against float64" in result.stdout
    assert "input_ids.1 length" in result.stdout
    monkeypatch.setattr(run, "judge", lambda *args: (regauge.Verdict.DIFFERENT, "for the sake of it"))
    assert _run("export", bert, tmp_path / "b.pt2", "--format", "pt2").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


@pytest.mark.parametrize("form", program.FORMATS)
def test_every_field_of_the_certificate_is_documented(form: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
    whole = evidence._adapter().json_schema()  # pyright: ignore[reportPrivateUsage]
    for part in (whole, whole["$defs"]["OutputEvidence"], whole["$defs"]["Probe"], whole["$defs"]["Dynamic"]):
        for key in part["properties"]:
            assert f"`{key}`" in text, key
    assert f"`{form}`" in text
