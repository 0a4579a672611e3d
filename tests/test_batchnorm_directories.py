"""Batch norms of stock models in directories: folded, stored, loaded again, and counted."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from regauge.api import load, rewrite
from regauge.hf import load_meta
from regauge.trace import trace
from test_end_to_end import build


def fold(forward: str) -> dict[str, Any]:
    return {"moves": [{"name": "fold-batchnorm", "forward": forward}]}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def operations(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Counter[str]:
    """Multiplications and additions of maps, entries computed by other operations, parameters."""
    traced, count = trace(model, (), inputs), Counter[str]()
    for node in traced.graph.nodes:
        name, value = str(node.target), node.meta.get("val")
        if node.op != "call_function" or "getitem" in name or "dropout" in name:
            continue
        entries = (value[0] if isinstance(value, (tuple, list)) else value).numel()
        if "conv" in name or "linear" in name:
            count["macs"] += entries * math.prod(node.args[1].meta["val"].shape[1:])
        elif "batch_norm" in name:
            count["normalised"] += entries
            count["entries"] += 2 * entries
        else:
            count["entries"] += entries
    count["parameters"] = sum(value.numel() for value in model.state_dict().values())
    return count


def statistics(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
                module.bias.normal_(generator=draw)


def agree(source: Path, out: Path) -> float:
    inputs = load_meta(source).real_inputs(batch=2, length=7, seed=0)
    outputs: list[torch.Tensor] = []
    for path in (source, out):
        with torch.no_grad():
            result = load(path).eval()(**inputs)
        outputs.append(result.logits if "logits" in result else result[0])
    return relative(*outputs)


def test_a_stock_resnet(tmp_path: Path) -> None:
    """Every batch norm is behind a convolution: the maps do the same work, and nothing else is left of it."""
    model = build("resnet")
    statistics(model)
    model.save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", tmp_path / "out", {"moves": ["fold-batchnorm"]})
    assert agree(tmp_path / "source", tmp_path / "out") < 1e-5
    inputs = load_meta(tmp_path / "source").real_inputs(batch=1, length=7, seed=0)
    before = operations(model.eval(), inputs)
    after = operations(load(tmp_path / "out").eval(), inputs)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert after["macs"] == before["macs"]
    assert before["entries"] - after["entries"] == 2 * before["normalised"] > 0
    # gain, shift, mean, variance of each channel and a count for each norm go, a bias for each channel comes
    assert before["parameters"] - after["parameters"] == sum(3 * m.num_features + 1 for m in norms)


def test_a_directory_with_padding_values(tmp_path: Path) -> None:
    """HuBERT with a batch norm before its padded convolution of positions, in 4 groups."""
    config = transformers.HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=13,
        conv_dim=(8, 8), conv_kernel=(5, 3), conv_stride=(4, 2), num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=4, conv_pos_batch_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.HubertForCTC(config).eval()
    statistics(model)
    model.save_pretrained(tmp_path / "source")
    result = rewrite(tmp_path / "source", tmp_path / "out", fold("padded"))
    exact = result.certificate.evidence.exact
    assert exact is not None
    assert exact.relative < 1e-12
    patches = json.loads((tmp_path / "out" / "config.json").read_text())["regauge"]["patches"]
    assert [(patch["module"], patch.get("pad")) for patch in patches] == [
        ("convolution", True),
        ("identity", None),
    ]
    assert agree(tmp_path / "source", tmp_path / "out") < 1e-5
    rewrite(tmp_path / "out", tmp_path / "again", {"moves": ["permute"]}, seed=1)
    assert agree(tmp_path / "source", tmp_path / "again") < 1e-5
    remote = transformers.AutoModelForCTC.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert any(name.endswith(".pad") for name in remote.state_dict())


def test_a_directory_with_norms_before_convolutions_of_one_position(tmp_path: Path) -> None:
    """SwiftFormer has a batch norm before the maps of each MLP."""
    config = transformers.SwiftFormerConfig(
        image_size=64, embed_dims=[8, 16, 16, 16], depths=[1, 1, 1, 1], mlp_ratio=2
    )
    torch.manual_seed(0)
    model = transformers.SwiftFormerForImageClassification(config).eval()
    statistics(model)
    model.save_pretrained(tmp_path / "source")
    left: dict[str, int] = {}
    for forward in ("none", "unpadded"):
        out = tmp_path / forward
        rewrite(tmp_path / "source", out, fold(forward))
        assert agree(tmp_path / "source", out) < 1e-5
        patches = json.loads((out / "config.json").read_text())["regauge"]["patches"]
        left[forward] = sum(patch["module"] == "affine" for patch in patches)
    assert left == {"none": 5, "unpadded": 1}
