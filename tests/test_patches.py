"""Rewrites that change the structure: exact, stored, loaded by regauge and as remote code, and run on."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from regauge import modeling_regauge, norms_regauge
from regauge.api import inspect, load, rewrite, rewrite_module
from regauge.atlas import Kind
from regauge.certify import certify
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, Refused, TraceError
from regauge.hf import checkpoint_names, load_meta
from regauge.modeling_regauge import Norm, apply_patches
from test_end_to_end import build

GOLDEN = Path(__file__).parent / "data" / "crmsnorm_golden.pt"
MODELS = ("gpt2", "opt", "bloom", "neox", "vit", "whisper")
FOLDS = ("add-bias", "fold-shifts", "fold-scales", "fold-value-bias", "drop-key-bias")


def recipe(model: Any) -> list[Any]:
    """Everything that a LayerNorm model admits, whatever it is."""
    shared = [id(p) for p in model.state_dict(keep_vars=True).values()]
    return [
        *(["untie"] if len(set(shared)) < len(shared) else []),
        *FOLDS,
        {"name": "center", "norm": "rms"},
        "strip",
    ]


def attempt(source: Path, out: Path, wanted: list[Any]) -> Any:
    """Leave out the moves that are refused because there is nothing for them to do."""
    while True:
        try:
            return rewrite(source, out, {"moves": wanted}, seed=1)
        except Refused as refusal:
            name = {"every linear map": "add-bias", "every key bias": "drop-key-bias"}
            gone = next(move for text, move in name.items() if refusal.message.startswith(text))
            wanted = [move for move in wanted if move != gone]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    model.save_pretrained(path / "source")
    result = attempt(path / "source", path / "out", recipe(model))
    return model, path / "source", path / "out", result


def outputs(model: Any, source: Path, batch: int = 2, length: int = 5) -> torch.Tensor:
    inputs = load_meta(source).real_inputs(batch=batch, length=length, seed=3)
    with torch.no_grad():
        return model(**inputs).logits.double()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def test_layer_norms_become_rms_norms(case: Any) -> None:
    model, source, out, result = case
    assert result.certificate.evidence.exact.relative < 1e-12
    assert result.certificate.passed
    again = load(out).eval()
    assert type(again).__name__ == type(model).__name__
    norms = [module for module in again.modules() if isinstance(module, Norm)]
    assert len(norms) == sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert not any(isinstance(module, nn.LayerNorm) for module in again.modules())
    assert {norm.form for norm in norms} == {"rms"}
    # The norm after BLOOM's embeddings writes to the residual: its gain has nowhere to go.
    with_gain = [norm for norm in norms if norm.weight is not None or norm.bias is not None]
    assert len(with_gain) == (type(model).__name__ == "BloomForCausalLM")
    assert distance(outputs(model, source), outputs(again, source)) < 1e-5


def test_the_directory_says_what_was_replaced(case: Any) -> None:
    _, source, out, result = case
    config = json.loads((out / "config.json").read_text())
    manifest = json.loads((out / "regauge.json").read_text())
    assert config["model_type"] == "regauge"
    assert config["regauge"]["stock_type"] == json.loads((source / "config.json").read_text())["model_type"]
    assert config["regauge"]["patches"] == manifest["patches"] == [dict(p) for p in result.rewrite.patches]
    with Checkpoint.open(out) as files:
        again = load_meta(out)
        model, held = again.model, set(checkpoint_names(again, files.names))
        assert held <= set(model.state_dict())
        assert not set(manifest["parameters"]["dropped"]) & held


def test_loads_as_remote_code_and_not_as_stock(case: Any, tmp_path: Path) -> None:
    model, source, out, _ = case
    auto = json.loads((out / "config.json").read_text())["auto_map"]
    name = next(name for name in auto if name != "AutoConfig")
    with pytest.raises(ValueError, match="trust_remote_code"):
        getattr(transformers, name).from_pretrained(out, trust_remote_code=False)
    place = shutil.copytree(out, tmp_path / f"copy_{type(model).__name__.lower()}")
    again = getattr(transformers, name).from_pretrained(place, trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules.")
    assert distance(outputs(load(out), source), outputs(again, source)) < 1e-6
    again.save_pretrained(tmp_path / f"saved_{type(model).__name__.lower()}")
    third = load(tmp_path / f"saved_{type(model).__name__.lower()}")
    assert torch.equal(outputs(again, source), outputs(third, source))


def test_a_rewritten_directory_is_a_source(case: Any, tmp_path: Path) -> None:
    model, source, out, _ = case
    atlas = inspect(out)
    turns = {Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES}
    if any(generator.kind in turns and not generator.copies for generator in atlas.generators):
        result = rewrite(out, tmp_path / "again", {"moves": ["rotate", "permute"]}, seed=5)
        assert result.certificate.evidence.exact.relative < 1e-12
        assert certify(source, tmp_path / "again").passed
        assert distance(outputs(model, source), outputs(load(tmp_path / "again"), source)) < 1e-5
    else:
        assert type(model).__name__ == "BloomForCausalLM"


def test_a_wrong_patch_is_caught(case: Any, tmp_path: Path) -> None:
    _, source, out, _ = case
    assert certify(source, out).passed
    place = shutil.copytree(out, tmp_path / "wrong")
    config = json.loads((place / "config.json").read_text())
    for patch in config["regauge"]["patches"]:
        if patch["module"] == "norm":
            patch["eps"] *= 1000
    (place / "config.json").write_text(json.dumps(config))
    assert not certify(source, place).passed


def test_generates_and_trains(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "source")
    attempt(tmp_path / "source", tmp_path / "out", recipe(model))
    again = load(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([[5, 7, 11]])
    first = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(first, again.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
    again.train()
    again(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)
    assert {p.dtype for p in again.to(torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["bert", "gemma3", "llama"])
def test_refused_where_the_mean_is_seen(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match=r"blind to the mean|does not have mean zero"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{"name": "center", "norm": "rms"}]})
    assert not (tmp_path / "out").exists()


def test_some_layer_norms_stay_only_if_that_is_wanted(tmp_path: Path) -> None:
    """In a post-norm encoder the first norm alone reads what can be centred: the sum of the embeddings."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    move = {"name": "center", "norm": "rms"}
    with pytest.raises(Refused, match="2 of 3 LayerNorms here do not become RMSNorms"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": [move]})
    assert not (tmp_path / "out").exists()
    rewrite(tmp_path / "source", tmp_path / "out", {"moves": [{**move, "partial": True}]})
    again = load(tmp_path / "out")
    assert sum(isinstance(module, Norm) for module in again.modules()) == 1


def test_strip_leaves_what_does_something(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path / "source")
    with pytest.raises(Refused, match="does something"):
        rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["strip"]})


class Block(nn.Module):
    """A GELU writes to the stream, so it must be centred once on the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10, bias=False), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 6), nn.Sequential(Block(), Block())
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(torch.nn.functional.gelu(self.stem(x)))))


def test_a_module_that_is_as_it_was_is_not_replaced(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "source")
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["add-bias", "strip"]})
    assert not result.rewrite.patches
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "source" / "model.safetensors"
    ).read_bytes()


def test_plain_modules_too() -> None:
    torch.manual_seed(0)
    model = Stack().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    moves = ["add-bias", "fold-shifts", "fold-scales", {"name": "center", "norm": "rms"}, "strip"]
    changed, certificate = rewrite_module(model, (x,), {"moves": moves})
    assert certificate.evidence.float64.relative < 1e-12
    assert not any(isinstance(module, nn.LayerNorm) for module in changed.modules())
    assert sum(p.numel() for n, p in changed.named_parameters() if "norm" in n or "last" in n) == 0
    up = changed.get_submodule("blocks.0.up")
    assert isinstance(up, nn.Linear)
    assert up.bias is not None
    assert torch.allclose(model(x), changed(x), rtol=0, atol=1e-12)
    assert isinstance(model.last, nn.LayerNorm)


def test_norms_against_the_authors() -> None:
    golden = torch.load(GOLDEN, weights_only=True)["functions"]
    for form, key in (("layer", "layer_norm"), ("rms", "rms_norm"), ("crms", "crms_norm")):
        case = golden[key]
        x = case["x"].clone().requires_grad_()
        y = Norm(form, x.shape[-1], case["eps"]).double()(x)
        y.backward(case["grad_out"])
        assert x.grad is not None
        assert torch.allclose(y, case["y"], rtol=0, atol=1e-12)
        assert torch.allclose(x.grad, case["grad_x"], rtol=0, atol=1e-12)


def test_forms_are_one_function_in_other_coordinates() -> None:
    x = torch.randn(7, 6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    wanted = Norm("layer", 6, 1e-5)(x)
    assert torch.allclose(Norm("rms", 6, 1e-5)(centred), wanted)
    assert torch.allclose(Norm("crms", 5, 1e-5)(centred[:, :-1]), wanted[:, :-1])
    ones = torch.full((6, 1), 6**-0.5, dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([ones, torch.randn(6, 5, dtype=torch.float64)], 1))[0][:, 1:]
    assert torch.allclose(Norm("chart", 5, 1e-5)(centred @ q) @ q.T, wanted)


@pytest.mark.parametrize("module", [modeling_regauge, norms_regauge])
def test_the_runtime_stands_alone(module: Any) -> None:
    """Two files that need each other, torch and transformers."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(f"{'.' * node.level}{node.module or ''}".split(".")[0] or f".{node.module}")
    assert roots <= {"functools", "math", "typing", "torch", "transformers", ".norms_regauge"}
    assert module is modeling_regauge or "transformers" not in roots


def test_unknown_patches_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown replacement"):
        apply_patches(nn.Sequential(nn.Linear(2, 2)), [{"path": "0", "module": "magic"}])


class Branching(nn.LayerNorm):
    """Does something else on large batches: one trace does not show it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = super().forward(input)
        return 2 * y if input.shape[0] > 4 else y


class Masked(nn.Module):
    """Takes the stream as its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        y = self.map(self.norm(x))
        return x + (y if mask is None else y * mask)


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.last = nn.Linear(4, 6), Masked(), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(None, torch.nn.functional.gelu(self.stem(x))))


def test_only_code_without_branches_is_replaced() -> None:
    net = nn.Sequential(nn.Linear(6, 6), Branching(6), nn.Linear(6, 2))
    with pytest.raises(Refused):
        rewrite_module(net, (torch.randn(2, 6),), {"moves": ["fold-shifts", "fold-scales", "strip"]})


def test_a_stream_that_is_not_the_first_argument_is_not_centred() -> None:
    with pytest.raises(Refused, match="with them replaced"):
        rewrite_module(Second(), (torch.randn(2, 4),), {"moves": [{"name": "center", "norm": "rms"}]})


def test_a_module_with_hooks_is_not_replaced() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    net[1].register_forward_hook(lambda module, args, out: None)
    with pytest.raises(Refused, match="a module cannot be replaced"):
        rewrite_module(net, (torch.randn(2, 6),), {"moves": ["fold-shifts", "fold-scales", "strip"]})


def test_frozen_stays_frozen() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, bias=False), nn.Linear(6, 2, bias=False))
    net[2].weight.requires_grad_(False)
    changed, _ = rewrite_module(net, (torch.randn(2, 6),), {"moves": ["add-bias"]})
    assert not changed.get_parameter("2.weight").requires_grad
    assert changed.get_parameter("2.bias").requires_grad


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_other_auto_classes_do_not_find_the_stock_model(auto: str, tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "source")
    attempt(tmp_path / "source", tmp_path / "auto_gpt2", recipe(model))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        getattr(transformers, auto).from_pretrained(tmp_path / "auto_gpt2", trust_remote_code=True)


GOOD = {"path": "transformer.h.0.ln_1", "module": "norm", "form": "rms", "size": 32, "eps": 1e-5,
        "weight": True, "bias": True}  # fmt: skip
HOSTILE: dict[str, dict[str, Any]] = {
    "ordinary type": {"model_type": "gpt2"},
    "no patches": {"regauge": {"format": 1, "stock_type": "gpt2"}},
    "another format": {"regauge": {"format": 99, "stock_type": "gpt2", "patches": []}},
    "unknown type": {"regauge": {"format": 1, "stock_type": "nonsense", "patches": []}},
    "architectures": {"architectures": [5]},
    "abstract class": {"architectures": ["PreTrainedModel"]},
}
BAD_PATCHES: dict[str, Any] = {
    "no mapping": None,
    "no path": {k: v for k, v in GOOD.items() if k != "path"},
    "empty path": GOOD | {"path": ""},
    "unknown path": GOOD | {"path": "transformer.nonsense"},
    "property": GOOD | {"path": "base_model"},
    "unknown module": GOOD | {"module": "magic"},
    "unknown field": GOOD | {"positions": 300_000_000},
    "huge": GOOD | {"size": 1 << 40},
    "wrong type": GOOD | {"eps": "small"},
    "unknown form": GOOD | {"form": "magic"},
}


@pytest.mark.parametrize("what", [*HOSTILE, *BAD_PATCHES])
def test_a_config_from_a_stranger(what: str, tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    patches = [BAD_PATCHES[what]] if what in BAD_PATCHES else [GOOD]
    config |= {"model_type": "regauge", "regauge": {"format": 1, "stock_type": "gpt2", "patches": patches}}
    path.write_text(json.dumps(config | HOSTILE.get(what, {})))
    for verb in (load, inspect):
        with pytest.raises((BadInput, TraceError)):
            verb(tmp_path / "source")


def test_the_runtime_is_always_our_own(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "source")
    attempt(tmp_path / "source", tmp_path / "out", recipe(model))
    (tmp_path / "out" / "modeling_regauge.py").write_text("raise SystemExit")
    rewrite(tmp_path / "out", tmp_path / "again", {"moves": ["permute"]})
    found = (tmp_path / "again" / "modeling_regauge.py").read_bytes()
    assert found == Path(modeling_regauge.__file__).read_bytes()
