"""Directories saved by transformers, through the whole pipeline, and back into transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from regauge.api import RewriteResult, rewrite, rewrite_module
from regauge.certify import certify
from regauge.certify.certificate import Certificate
from regauge.checkpoint import Checkpoint
from zoo import CONFIGS, HOSTILE

CAUSAL = ("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "opt", "neox")
FULL = ("fold-scales", {"name": "rotate", "space": "all"}, "permute", "rescale")


def build(name: str, config: Any = None) -> Any:
    """A model of transformers with weights like trained ones: gains and biases far from one and zero."""
    import transformers

    config = CONFIGS[name]() if config is None else config
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(0.12 * noise)
    return model


def moves(model: Any) -> list[Any]:
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    return [*(["untie"] if tied else []), *FULL]


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 37, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def loaded(path: Path, model: Any) -> Any:
    """With stock transformers, every tensor where it belongs."""
    again, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again.eval()


def go(model: Any, path: Path, recipe: list[Any], **save: Any) -> tuple[Path, Path, RewriteResult]:
    source, out = path / "source", path / "out"
    model.save_pretrained(source, **save)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    result = rewrite(source, out, {"moves": recipe}, seed=1)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    return source, out, result


@pytest.mark.parametrize("name", CAUSAL)
def test_fold_rotate_permute_rescale(name: str, tmp_path: Path) -> None:
    model = build(name)
    source, out, result = go(model, tmp_path, moves(model))
    assert result.certificate.passed
    assert result.certificate.evidence.exact is not None
    assert result.certificate.evidence.exact.relative < 1e-12
    base, found = logits(model), logits(loaded(out, model))
    assert float((base - found).norm() / base.norm()) < 1e-5
    old, new = Checkpoint.open(source), Checkpoint.open(out)
    kept = [n for n in old.names if torch.equal(old.read(n).double(), new.read(n).double())]
    assert not kept, "every tensor takes part in this recipe"

    again = certify(source, out)
    assert again.passed
    assert again.a.digest == result.certificate.a.digest == old.digest()
    assert again.b.digest == result.certificate.b.digest == new.digest()
    manifest = json.loads((out / "regauge.json").read_text())
    assert manifest["source"]["digest"] == old.digest()
    assert manifest["output"]["digest"] == new.digest()
    names = [item if isinstance(item, str) else item["name"] for item in moves(model)]
    assert [item["move"] for item in manifest["recipe"]] == names
    assert Certificate.from_json(json.dumps(manifest["certificate"])) == result.certificate


def test_a_recipe_is_read_back_from_the_manifest(tmp_path: Path) -> None:
    """What the manifest says is enough to make the same bytes again."""
    model = build("llama")
    source, out, _ = go(model, tmp_path, moves(model))
    manifest = json.loads((out / "regauge.json").read_text())
    again = [{("name" if k == "move" else k): v for k, v in item.items()} for item in manifest["recipe"]]
    rewrite(source, tmp_path / "again", {"moves": again}, seed=manifest["seed"])
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_shards_give_the_same_tensors(tmp_path: Path) -> None:
    model = build("llama-tied")
    _, whole, _ = go(model, tmp_path / "whole", moves(model))
    source, out, _ = go(model, tmp_path / "shards", moves(model), max_shard_size="5KB")
    files = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(file.name for file in out.glob("*.safetensors")) == files
    one = load_file(whole / "model.safetensors")
    many = {key: value for file in files for key, value in load_file(out / file).items()}
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert "lm_head.weight" in many
    found = logits(loaded(out, model))
    assert float((found - logits(model)).norm() / found.norm()) < 1e-5


def test_bfloat16_is_cast_once(tmp_path: Path) -> None:
    """The weights before the cast are exact, after it near the floor: what anyone else can still see."""
    model = build("llama").to(torch.bfloat16)
    source, out, result = go(model, tmp_path, moves(model))
    evidence = result.certificate.evidence
    assert str(result.certificate.verdict) == "equivalent"
    assert evidence.exact is not None
    assert evidence.exact.relative < 1e-12
    assert evidence.floor is not None
    assert 1e-4 < evidence.float64.relative < 8 * evidence.floor.relative
    assert {Checkpoint.open(out).dtype(n) for n in Checkpoint.open(out).names} == {torch.bfloat16}
    again = certify(source, out)
    assert again.passed
    assert str(again.verdict) == "equivalent within rounding"


def test_permutations_of_bfloat16_are_bitwise(tmp_path: Path) -> None:
    model = build("opt").to(torch.bfloat16)
    source, out, result = go(model, tmp_path, ["permute"])
    assert str(result.certificate.verdict) == "equivalent"
    old, new = Checkpoint.open(source), Checkpoint.open(out)
    for name in old.names:
        assert torch.equal(old.read(name).flatten().sort().values, new.read(name).flatten().sort().values)


def test_the_certificate_sees_one_wrong_entry(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = build("gpt2")
    source, out, _ = go(model, tmp_path, moves(model))
    state = load_file(out / "model.safetensors")
    state["transformer.h.0.mlp.c_fc.weight"][3, 5] += 1e-2
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    assert not certify(source, out).passed


@pytest.mark.parametrize(
    "name", ["tied_head", "picture_stack", "token_in_front", "experts_best_two", "called_twice"]
)
def test_plain_modules(name: str) -> None:
    """The same for any module: a changed copy, the original as it was."""
    torch.manual_seed(0)
    module, args = HOSTILE[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    recipe = (
        ["untie", "fold-scales", "rotate"] if name == "tied_head" else [{"name": "rescale", "mode": "random"}]
    )
    changed, certificate = rewrite_module(module, args, {"moves": [*recipe, "permute"]})
    assert certificate.passed
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not all(torch.equal(value, before[key]) for key, value in changed.state_dict().items())
    with torch.no_grad():
        a, b = module(*args), changed.eval()(*args)
    assert float((a - b).norm() / a.norm()) < 1e-5
