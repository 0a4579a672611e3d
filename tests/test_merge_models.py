"""``regauge merge``: the arithmetic of each method, alignment before it, the barrier, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import regauge
from regauge.certify import Verdict
from regauge.cli import app
from regauge.errors import BadInput, CheckpointError, Refused
from regauge.merging import inputs, merge
from regauge.merging.barrier import barrier_of
from regauge.merging.methods import Block, _threshold, settings_of  # pyright: ignore[reportPrivateUsage]

WORDS = [f"w{i}" for i in range(60)]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama ``a`` with gains that are not one, two changed copies, a twin, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("merging")
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    reader = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    for seed, name in enumerate(("a", "twin")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(path / name)
        reader.save_pretrained(path / name)
    for seed, name in enumerate(("one", "two")):
        changed(path / "a", path / name, noise(seed, 0.05))
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(WORDS[i] for i in torch.randint(60, (24,), generator=generator)) for _ in range(40)]
    (path / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def changed(source: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a model with changed tensors; None: left out."""
    shutil.copytree(source, out)
    found = {name: change(name, value) for name, value in tensors(source).items()}
    kept = {name: value.contiguous() for name, value in found.items() if value is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def noise(seed: int, size: float) -> Callable[[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return lambda _, value: value + size * torch.randn(value.shape, generator=generator)


def tensors(path: Path) -> Tensors:
    return load_file(path / "model.safetensors")


def doubles(path: Path) -> Tensors:
    return {name: value.double() for name, value in tensors(path).items()}


def logits(path: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)
    ids = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def hidden(source: Path, out: Path, dtype: torch.dtype, seed: int = 3) -> Path:
    """The same function in a random gauge; its tensors have the same names and shapes."""
    names = ("fold-scales", "rotate", "rescale", "permute")
    moves = [
        {"name": name, **({"mode": "random"} if name == "rescale" else {}), "optional": True}
        for name in names
    ]
    regauge.rewrite(source, out, {"moves": moves}, seed=seed, dtype=dtype)
    return out


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, args)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3])
def test_a_model_merged_with_itself_has_the_same_bytes(
    home: Path, tmp_path: Path, dtype: torch.dtype, count: int
) -> None:
    source = changed(home / "a", tmp_path / "a", lambda _, value: value.to(dtype))
    found = merge([source] * count, tmp_path / "out", weights=(1, 2, 4)[:count], align=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert found.certificate.evidence.float64.relative == 0
    assert found.certificate.verdict is Verdict.DIFFERENT, "a merge is never called equivalent"


@pytest.mark.parametrize("entries", [1 << 20, 100, 1])
def test_linear_is_the_weighted_mean_in_blocks_of_any_size(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(inputs, "ENTRIES", entries)
    models = [home / name for name in ("a", "one", "two")]
    merge(models, tmp_path / "out", weights=(2, 1, -0.5), align=False)
    a, b, c = map(doubles, models)
    for name, value in tensors(tmp_path / "out").items():
        assert torch.equal(value, ((2 * a[name] + b[name] - 0.5 * c[name]) / 2.5).float()), name


def test_task_arithmetic_adds_what_was_learnt(home: Path, tmp_path: Path) -> None:
    base, models = home / "a", [home / "one", home / "two"]
    given: dict[str, Any] = {"method": "task", "base": base, "align": False}
    merge(models, tmp_path / "none", scale=0.0, **given)
    assert all(torch.equal(v, tensors(base)[n]) for n, v in tensors(tmp_path / "none").items())
    merge(models[:1], tmp_path / "whole", **given)
    for name, value in tensors(tmp_path / "whole").items():
        torch.testing.assert_close(value, tensors(models[0])[name], rtol=2e-7, atol=1e-15)
    merge(models, tmp_path / "both", scale=0.3, weights=(1, 2), **given)
    start, one, two = map(doubles, (base, *models))
    for name, value in tensors(tmp_path / "both").items():
        wanted = start[name] + 0.3 * (one[name] - start[name] + 2 * (two[name] - start[name]))
        torch.testing.assert_close(value, wanted.float(), rtol=2e-7, atol=1e-15)
    merge([tmp_path / "both"], tmp_path / "back", scale=-1.0, method="task", base=base, align=False)
    for name, value in doubles(tmp_path / "back").items():
        torch.testing.assert_close(
            value - start[name], start[name] - doubles(tmp_path / "both")[name], rtol=1e-4, atol=1e-6
        )


def test_slerp_stays_on_the_arc(home: Path, tmp_path: Path) -> None:
    merge([home / "a", home / "twin"], tmp_path / "out", method="slerp", weights=(1, 3), align=False)
    first, second, found = map(doubles, (home / "a", home / "twin", tmp_path / "out"))
    for name, value in found.items():
        a, b, c = first[name].flatten(), second[name].flatten(), value.flatten()
        u, v = a / a.norm(), b / b.norm()
        angle = torch.arccos((u @ v).clamp(-1, 1))
        p, q = torch.sin(0.25 * angle) / torch.sin(angle), torch.sin(0.75 * angle) / torch.sin(angle)
        torch.testing.assert_close(c, p * a + q * b, rtol=1e-6, atol=1e-7)
        unit = p * u + q * v
        assert math.isclose(float(unit.norm()), 1, rel_tol=1e-9)
        assert math.isclose(float(torch.arccos(unit @ u)), 0.75 * float(angle), rel_tol=1e-6)


def test_ties_trims_elects_and_averages(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the three steps of arXiv 2306.01708, section 4, entry by entry, tensor by tensor."""
    monkeypatch.setattr(inputs, "ENTRIES", 100)
    models = [home / "one", home / "two", home / "twin"]
    merge(models, tmp_path / "out", method="ties", base=home / "a", scale=0.7, density=0.3, align=False)
    start, learnt = doubles(home / "a"), [doubles(model) for model in models]
    for name, value in tensors(tmp_path / "out").items():
        tasks = [(model[name] - start[name]).flatten() for model in learnt]
        kept = []
        for task in tasks:
            trimmed = torch.zeros_like(task)
            top = task.abs().topk(math.ceil(0.3 * len(task))).indices
            trimmed[top] = task[top]
            kept.append(trimmed)
        wanted = []
        for entries in zip(*(task.tolist() for task in kept), strict=True):
            sign = math.copysign(1, sum(entries))
            agreeing = [entry for entry in entries if entry * sign > 0]
            wanted.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
        exact = start[name].flatten() + 0.7 * torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(value.flatten(), exact.float(), rtol=2e-7, atol=1e-15)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_the_threshold_is_that_of_a_sort(density: float) -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).repeat(2)
    x[::7] = 0
    zero = torch.zeros(333, dtype=torch.float64)
    parts = [Block(torch.zeros_like(part), (part,)) for part in x.split(333)]
    wanted = x.abs().sort(descending=True).values[math.ceil(density * len(x)) - 1]
    assert _threshold(lambda: iter(parts), 0, density) == float(wanted)
    assert _threshold(lambda: iter([Block(zero, (zero,))]), 0, density) == 0


def test_dare_drops_at_random_and_keeps_the_mean(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"method": "dare", "base": home / "a", "align": False}
    models = [home / "one", home / "two"]
    wanted: dict[str, dict[str, Any]] = {
        "first": {"density": 0.5, "seed": 1},
        "other": {"density": 0.5, "seed": 2},
        "whole": {"density": 1.0},
    }
    for name, settings in wanted.items():
        merge(models, tmp_path / name, **given, **settings)
    monkeypatch.setattr(inputs, "ENTRIES", 50)
    merge(models, tmp_path / "again", **given, density=0.5, seed=1)
    merge(models, tmp_path / "task", method="task", base=home / "a", align=False)
    start, task = doubles(home / "a"), doubles(tmp_path / "task")
    first, other = tensors(tmp_path / "first"), tensors(tmp_path / "other")
    assert all(torch.equal(v, tensors(tmp_path / "whole")[n]) for n, v in tensors(tmp_path / "task").items())
    assert all(torch.equal(v, tensors(tmp_path / "again")[n]) for n, v in first.items())
    assert any(not torch.equal(first[name], other[name]) for name in first)
    one = doubles(models[0])
    merge(models[:1], tmp_path / "alone", **given, density=0.25, seed=3)
    ratios = torch.cat(
        [
            ((value.double() - start[name]) / (one[name] - start[name])).flatten()
            for name, value in tensors(tmp_path / "alone").items()
        ]
    )
    assert bool(((ratios.abs() < 1e-2) | ((ratios - 4).abs() < 4e-2)).all())
    share = float((ratios > 2).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(ratios))
    names = list(first)
    drawn = [((first[name].double() - start[name]).abs() > 1e-9).flatten() for name in names]
    assert abs(float(torch.cat(drawn).double().mean()) - 0.75) < 0.05, "the models are dropped independently"
    assert set(task) == set(first)


def test_a_disguised_copy_merges_to_the_same_function(home: Path, tmp_path: Path) -> None:
    source = changed(home / "a", tmp_path / "a", lambda _, value: value.double())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))
    copy = hidden(source, tmp_path / "copy", torch.float64)
    found = merge([source, copy], tmp_path / "out", text=home / "text.txt", barrier=True)
    wanted = logits(source)
    # transformers computes its norms in float32
    assert float((logits(tmp_path / "out") - wanted).norm() / wanted.norm()) < 1e-6
    assert found.certificate.evidence.float64.relative < 1e-10
    assert found.certificate.verdict is Verdict.DIFFERENT
    assert found.sources[1].similarity == pytest.approx(1, abs=1e-9)
    assert found.sources[1].related
    assert found.sources[1].moved
    assert not found.warnings
    assert found.barrier is not None
    assert found.barrier.aligned is not None
    assert found.barrier.plain is not None
    assert abs(found.barrier.aligned.barrier) < 1e-5
    losses = found.barrier.plain.losses
    assert max(abs(loss - losses[0]) for loss in losses) > 0.05
    plain = merge([source, copy], tmp_path / "plain", align=False)
    assert plain.certificate.evidence.float64.relative > 0.1
    assert not list(tmp_path.glob(".*")), "nothing is left beside the results"


def test_a_model_in_the_same_gauge_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    near = changed(home / "a", tmp_path / "near", noise(7, 1e-4))
    found = merge([home / "a", near], tmp_path / "out")
    merge([home / "a", near], tmp_path / "plain", align=False)
    assert found.sources[1].moved is False
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain")]
    assert written[0] == written[1]


def test_unrelated_models_are_merged_with_a_warning(home: Path, tmp_path: Path) -> None:
    found = merge([home / "a", home / "twin"], tmp_path / "out")
    assert found.sources[1].related is False
    assert len(found.warnings) == 1
    assert "unrelated" in found.warnings[0]


def test_the_line_runs_through_the_losses_of_transformers(home: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    from regauge.equivalence.documents import cut, draw

    found = merge(
        [home / "a", home / "twin"],
        tmp_path / "out",
        text=home / "text.txt",
        barrier=True,
        align=False,
        tokens=200,
    )
    assert found.barrier is not None
    assert found.barrier.plain is not None
    assert found.barrier.aligned is None
    losses = found.barrier.plain.losses
    assert losses[0] == pytest.approx(found.sources[0].loss, abs=1e-6)
    assert losses[-1] == pytest.approx(found.sources[1].loss, abs=1e-6)
    assert losses[5] == pytest.approx(found.loss, abs=1e-5)
    text = (home / "text.txt").read_text()
    rows = draw(cut(text, 32), AutoTokenizer.from_pretrained(home / "a"), length=32, tokens=200, seed=0)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    total, count = 0.0, 0
    for ids in rows.tokens:
        with torch.no_grad():
            out = model(torch.tensor([ids])).logits[0]
        total += float(torch.nn.functional.cross_entropy(out[:-1], torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    assert found.barrier.tokens == count
    assert found.loss == pytest.approx(total / count, abs=1e-5)


def test_the_barrier_is_above_the_line_of_the_ends() -> None:
    assert barrier_of([1.0, 2.0, 3.0]) == 0
    assert barrier_of([1.0, 5.0, 3.0]) == 3
    assert barrier_of([1.0, 1.5, 4.0, 4.0]) == 1


def test_other_tensors_are_refused_by_name(home: Path, tmp_path: Path) -> None:
    gone = changed(home / "a", tmp_path / "gone", lambda n, v: None if n == "lm_head.weight" else v)
    with pytest.raises(BadInput, match="not in gone") as missing:
        merge([home / "a", gone], tmp_path / "out", align=False)
    assert missing.value.parameter == "lm_head.weight"
    with pytest.raises(BadInput, match="not in gone"):
        merge([gone, home / "a"], tmp_path / "out", align=False)
    short = changed(home / "a", tmp_path / "short", lambda n, v: v[:-1] if n == "lm_head.weight" else v)
    with pytest.raises(BadInput, match="another shape") as shape:
        merge([home / "a", short], tmp_path / "out", align=False)
    assert shape.value.parameter == "lm_head.weight"
    for bad in (math.nan, math.inf):
        spoilt = tmp_path / f"spoilt-{bad}"
        changed(
            home / "a",
            spoilt,
            lambda n, v, bad=bad: v.index_fill(0, torch.tensor([2]), bad) if "norm" in n else v,
        )
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            merge([home / "a", spoilt], tmp_path / "out", align=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"rms_norm_eps": 1e-3}, {"rope_theta": 500.0}])
def test_another_function_of_the_same_tensors_is_refused(
    home: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    other = shutil.copytree(home / "a", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    if "rope_theta" in change:
        config.pop("rope_parameters", None)
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match="different things"):
        merge([home / "a", other], tmp_path / "out", align=False)
    (other / "config.json").write_text(json.dumps(config | {"use_cache": False, "dtype": "bfloat16"}))
    if "rope_theta" not in change:
        merge([home / "a", other], tmp_path / "out", align=False)


def test_values_that_the_dtype_cannot_hold_are_refused(home: Path, tmp_path: Path) -> None:
    large = changed(home / "a", tmp_path / "large", lambda _, value: value * 1e6)
    with pytest.raises(CheckpointError, match="overflows float16"):
        merge([home / "a", large], tmp_path / "out", dtype=torch.float16, align=False)
    assert not (tmp_path / "out").exists()
    merge([home / "a", home / "one"], tmp_path / "half", dtype=torch.bfloat16, align=False)
    wanted = {n: ((v + doubles(home / "one")[n]) / 2).bfloat16() for n, v in doubles(home / "a").items()}
    assert all(torch.equal(value, wanted[name]) for name, value in tensors(tmp_path / "half").items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("method", "count", "options"),
    [
        ("linear", 2, {"based": True}),
        ("linear", 1, {}),
        ("linear", 2, {"weights": (1, -1)}),
        ("linear", 2, {"weights": (1,)}),
        ("linear", 2, {"weights": (1, math.nan)}),
        ("linear", 2, {"scale": 0.5}),
        ("slerp", 3, {}),
        ("slerp", 2, {"weights": (2, -1)}),
        ("task", 2, {}),
        ("task", 2, {"based": True, "density": 0.5}),
        ("ties", 2, {"based": True, "density": 0.0}),
        ("dare", 2, {"based": True, "density": 1.5}),
        ("mean", 2, {}),
    ],
)
def test_options_that_say_nothing_are_refused(method: str, count: int, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        settings_of(method, count, **options)


def test_the_command_line(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (home / "a", home / "one", out, "--no-align", "--barrier", "--text", home / "text.txt")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["barrier"]["plain"]["losses"][5] == pytest.approx(found["loss"], abs=1e-5)
    assert [source["name"] for source in found["sources"]] == ["a", "one"]
    drawing = Path(found["plot"])
    assert drawing == tmp_path / "out-barrier.svg"
    root = ElementTree.fromstring(drawing.read_text(encoding="utf-8"))
    said = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert "Loss between a and one" in said
    assert "as they are" in said
    assert "href" not in drawing.read_text(encoding="utf-8")
    manifest = json.loads((out / "regauge.json").read_text())
    assert manifest["merge"]["method"] == "linear"
    assert manifest["output"]["digest"]
    again = run(home / "a", home / "one", tmp_path / "again", "--no-align")
    assert again.exit_code == 0
    assert "another function" in again.stdout
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert run(*arguments).exit_code == 2, "nothing is overwritten"
    assert run(home / "a", home / "one", tmp_path / "x", "--barrier").exit_code == 2
    assert run(home / "a", home / "one", tmp_path / "x", "--plot", "p.svg").exit_code == 2
    assert run(home / "a", tmp_path / "x").exit_code == 2
    assert run(home / "a", home / "one", tmp_path / "x", "--weights", "1,much").exit_code == 2
    assert run(home / "a", home / "one", tmp_path / "no/x").exit_code == 2
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 2
