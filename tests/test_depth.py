"""Layers are inserted without a change of the function, load in stock transformers, and learn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regauge.depth
import regauge.moves.depth
from regauge.api import RewriteResult, rewrite, rewrite_module
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, NotEquivalent, Refused
from regauge.hf import load_meta
from regauge.interpret import interpret
from regauge.layers import Layer, find_stacks, is_identity
from regauge.moves.depth import order, spread, wanted
from regauge.trace import trace
from test_end_to_end import build, loaded, logits
from zoo import specimen

STACKS = {
    "llama": "model.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "whisper": "model.decoder.layers",
    "vit": "vit.layers",
}


def deepened(
    model: Any, path: Path, *before: Any, name: str = "out", **options: Any
) -> tuple[Path, RewriteResult]:
    if not (path / "source").exists():
        model.save_pretrained(path / "source")
    recipe = {"moves": [*before, {"name": "insert-layers", **options}]}
    return path / name, rewrite(path / "source", path / name, recipe, seed=1)


def exactly(result: RewriteResult) -> None:
    assert str(result.certificate.verdict) == "equivalent"
    assert result.certificate.evidence.exact is not None
    assert result.certificate.evidence.exact.relative == 0.0
    assert result.certificate.evidence.bits
    assert not result.rewrite.patches


@pytest.mark.parametrize("new", ["copy", "random"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_deeper_and_bitwise_the_same_in_stock_transformers(name: str, new: str, tmp_path: Path) -> None:
    model = build(name)
    before = len(model.get_submodule(STACKS[name]))
    out, result = deepened(model, tmp_path, layers="+2", new=new)
    exactly(result)
    deeper = loaded(out, model)
    assert type(deeper) is type(model)
    assert len(deeper.get_submodule(STACKS[name])) == before + 2
    assert torch.equal(logits(deeper), logits(model))
    ids = torch.arange(4, 12)[None]
    made = [m.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None) for m in (model, deeper)]
    assert torch.equal(*made)
    assert made[0].shape == (1, 16)
    learns(deeper, result)


def learns(model: Any, result: RewriteResult) -> None:
    """Every writer of a new layer has a gradient at the first step, all else in it after one step."""
    writers = {name for name in result.rewrite.made if _is_constant(model, name)}
    layers = {".".join(name.split(".")[:3]) for name in writers}
    assert len(layers) == 2
    fresh = {name for name, _ in model.named_parameters() if ".".join(name.split(".")[:3]) in layers}
    assert writers < fresh
    ids = torch.randint(4, 37, (4, 16), generator=torch.Generator().manual_seed(5))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for step in range(2):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        still = {
            name
            for name, parameter in model.named_parameters()
            if name in fresh and (parameter.grad is None or not bool((parameter.grad != 0).any()))
        }
        assert not (still & writers if step == 0 else still)
        optimiser.step()
    model.eval()


def _is_constant(model: Any, name: str) -> bool:
    value = model.get_parameter(name)
    return bool((value == value.flatten()[0]).all())


def test_old_layers_keep_their_values_and_types(tmp_path: Path) -> None:
    """Six layers, two kinds: every old layer is found whole at its new number, with its kind."""
    import transformers

    torch.manual_seed(0)
    kinds = ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"]
    config = transformers.Gemma3TextConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=kinds,
        architectures=["Gemma3ForCausalLM"],
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    out, result = deepened(model, tmp_path, layers="8")
    exactly(result)
    sources, new = order(6, spread(6, 2))
    assert (sources, new) == ([0, 1, 2, 2, 3, 4, 5, 5], [3, 7])
    written = json.loads((out / "config.json").read_text())
    assert written["layer_types"] == [kinds[old] for old in sources]
    old, deeper = Checkpoint.open(tmp_path / "source"), Checkpoint.open(out)
    for number, source in enumerate(sources):
        for name in (n for n in old.names if n.startswith(f"model.layers.{source}.")):
            value = deeper.read(name.replace(f"layers.{source}.", f"layers.{number}."))
            gain = "post_attention_layernorm" in name or "post_feedforward_layernorm" in name
            if number in new and gain:
                assert bool((value == -1).all())
            else:
                assert torch.equal(value, old.read(name))
    assert torch.equal(logits(loaded(out, model)), logits(model))


def test_whisper_names_both_stacks_and_grows_each(tmp_path: Path) -> None:
    model = build("whisper")
    with pytest.raises(Refused, match="several stacks") as caught:
        deepened(model, tmp_path, layers="+1")
    assert "model.encoder.layers" in str(caught.value)
    assert "model.decoder.layers" in str(caught.value)
    features = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    for side in ("encoder", "decoder"):
        out, result = deepened(model, tmp_path, layers="+2", stack=f"model.{side}.layers", name=side)
        exactly(result)
        deeper = loaded(out, model)
        assert len(deeper.get_submodule(f"model.{side}.layers")) == 3
        made = [
            m.generate(features, max_new_tokens=6, do_sample=False, eos_token_id=None)
            for m in (model, deeper)
        ]
        assert torch.equal(*made)


def test_layers_that_differ_take_the_like_one(tmp_path: Path) -> None:
    """T5's first layer alone holds the position table: what comes after it copies the second layer."""
    import transformers

    from zoo import CONFIGS

    config = CONFIGS["t5"]()
    config.num_layers = config.num_decoder_layers = 2
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    out, result = deepened(model, tmp_path, layers="4", stack="encoder.block")
    exactly(result)
    deeper = loaded(out, model)
    assert (len(deeper.encoder.block), len(deeper.decoder.block)) == (4, 2)


def test_after_other_moves_and_before_others(tmp_path: Path) -> None:
    """What earlier moves did travels with the layer; later moves see the deeper model."""
    model = build("llama-tied")
    model.save_pretrained(tmp_path / "source")
    first: list[Any] = ["untie", "fold-scales", {"name": "rotate", "space": "all"}]
    grow = {"name": "insert-layers", "layers": "+1"}
    recipe = [*first, grow, "permute", {**grow, "place": "end", "new": "random"}, "rescale"]
    result = rewrite(tmp_path / "source", tmp_path / "out", {"moves": recipe}, seed=3)
    evidence = result.certificate.evidence
    assert evidence.exact is not None
    assert 0 < evidence.exact.relative < 1e-12
    deeper = loaded(tmp_path / "out", model)
    assert len(deeper.model.layers) == 3
    base, found = logits(model), logits(deeper)
    assert float((base - found).norm() / base.norm()) < 1e-5


def test_shards_and_names_without_the_prefix(tmp_path: Path) -> None:
    """New tensors are spelled as the old ones are, and stand in the index."""
    model = build("gpt2")
    model.transformer.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    out, result = deepened(model, tmp_path, layers="3")
    exactly(result)
    names = set(Checkpoint.open(out).names)
    assert names == set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"])
    assert {name.split(".")[1] for name in names if name.startswith("h.")} == {"0", "1", "2"}
    assert not [name for name in names if name.startswith("transformer.")]
    assert torch.equal(logits(loaded(out, model)), logits(model))


# --- what is refused --------------------------------------------------------------------------------


def test_post_norm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="post-norm") as caught:
        deepened(build("bert"), tmp_path)
    assert caught.value.node is not None
    assert not (tmp_path / "out").exists()


def test_plain_modules_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(Refused, match="plain module"):
        rewrite_module(model, (torch.randn(2, 4),), {"moves": ["insert-layers"]})


@pytest.mark.parametrize("layers", ["2", "1", "+0"])
def test_only_more_layers(layers: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="only be added"):
        deepened(build("llama"), tmp_path, layers=layers)


@pytest.mark.parametrize("text", ["", "two", "-1", "+", "1.5", "²"])
def test_a_number_of_layers_is_a_number(text: str) -> None:
    with pytest.raises(BadInput, match="number of layers"):
        wanted(text, 3)


# --- the rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKS)
def test_a_layer_is_the_identity_when_every_writer_is_zero_and_not_when_one_is_left_out(name: str) -> None:
    held = specimen(name)
    walk = interpret(held.trace)
    stack = find_stacks(walk)[0][STACKS[name]]
    layer = stack.layers[-1]
    assert is_identity(walk, layer, layer.writers)
    assert len(layer.writers) >= 2
    for left_out in layer.writers:
        rest = {key: value for key, value in layer.writers.items() if key != left_out}
        assert not is_identity(walk, layer, rest)
        assert not is_identity(walk, layer, {**rest, left_out: 1.0})


class _Block(nn.Module):
    """x + c·f(x), or something like it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(6, eps=1e-6), nn.Linear(6, 6)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(torch.relu(self.norm(x)))
        if self.kind == "plain":
            return x + y
        if self.kind == "doubled":
            return torch.add(y, x, alpha=2)
        if self.kind == "scaled":
            return (x + y) * 0.5
        if self.kind == "log":
            return x + torch.log(self.out.weight.sum()) * y
        if self.kind == "mean":
            return x + y.mean(-1, keepdim=True)
        return torch.lerp(x, y, 0.5)


@pytest.mark.parametrize("kind", ["plain", "doubled", "scaled", "log", "mean", "lerp"])
def test_what_is_no_sum_with_the_stream_is_no_layer(kind: str) -> None:
    """Where the rule says identity it is one, for numbers; where it would not be, nothing is claimed."""
    torch.manual_seed(0)
    model = nn.Sequential(*[_Block(kind) for _ in range(2)])
    holder = nn.ModuleDict({"list": model})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = holder

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.held["list"](x)

    net, x = Net(), torch.randn(3, 6)
    walk = interpret(trace(net, (x,)))
    found = find_stacks(walk)[0]
    if kind in ("doubled", "scaled", "lerp", "log"):
        claimed = [layer for stack in found.values() for layer in stack.layers]
        assert not [layer for layer in claimed if is_identity(walk, layer, layer.writers)]
        return
    layer = found["held.list"].layers[1]
    assert is_identity(walk, layer, layer.writers)
    with torch.no_grad():
        for name, value in layer.writers.items():
            net.get_parameter(name).fill_(value)
        assert torch.equal(model[1](x), x)


# --- mutants ---------------------------------------------------------------------------------------


def test_a_bias_left_as_it_is_is_noticed_by_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = regauge.moves.depth.choose_stack

    def careless(*args: Any) -> Any:
        stack = choose(*args)

        def without(layer: Layer) -> Layer:
            kept = {name: value for name, value in layer.writers.items() if not name.endswith("bias")}
            return replace(layer, writers=kept)

        return replace(stack, layers=tuple(map(without, stack.layers)))

    monkeypatch.setattr(regauge.moves.depth, "choose_stack", careless)
    with pytest.raises(Refused, match="does not follow to do nothing"):
        deepened(build("gpt2"), tmp_path)
    monkeypatch.setattr(regauge.moves.depth, "is_identity", lambda *_: True)
    with pytest.raises(NotEquivalent, match="the certificate failed"):
        deepened(build("gpt2"), tmp_path)


def test_a_wrong_renumbering_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = regauge.moves.depth.resized

    def wrong(content: Mapping[str, Any], walk: Any, stack: Any, sources: Any) -> Any:
        found = real(content, walk, stack, sources)
        takes = {new: old for new, old in found.takes.items() if not new.startswith("model.layers.2.")}
        takes |= {n: o.replace("layers.1.", "layers.0.") for n, o in found.takes.items() if n not in takes}
        return replace(found, takes=takes)

    monkeypatch.setattr(regauge.moves.depth, "resized", wrong)
    with pytest.raises(NotEquivalent, match="the certificate failed"):
        deepened(build("llama"), tmp_path, layers="+2")


def test_kinds_of_layers_that_do_not_fit_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of kinds in another order gives layers that compute something else."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        architectures=["Gemma3ForCausalLM"],
    )
    content = config.to_dict()
    held = load_meta(content)
    walk = interpret(trace(held.model, (), held.inputs))
    stack = find_stacks(walk)[0]["model.layers"]
    found = regauge.depth.resized(content, walk, stack, [0, 0, 1])
    assert found.config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    real = regauge.depth.changes

    def backwards(content: Any, edits: Any) -> Any:
        return {k: v[::-1] if k == "layer_types" else v for k, v in real(content, edits).items()}

    monkeypatch.setattr(regauge.depth, "changes", backwards)
    with pytest.raises(Refused, match="no configuration gives") as caught:
        regauge.depth.resized(content, walk, stack, [0, 0, 1])
    assert "what layer" in str(caught.value.found)
