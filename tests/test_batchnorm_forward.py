"""What is left of a batch norm goes into its reader, exactly at borders too, or stays."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from regauge.api import inspect, load, rewrite, rewrite_module
from regauge.hf import load_meta
from regauge.modeling_regauge import Affine, Convolution, Identity
from regauge.trace import trace
from test_batchnorm import trained
from test_end_to_end import build


def fold(forward: str) -> dict[str, Any]:
    return {"moves": [{"name": "fold-batchnorm", "forward": forward}]}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / a.norm()).detach())


class Call(nn.Module):
    """A function without parameters as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


PLAIN: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "linear": ((5, 4), [nn.BatchNorm1d(4), nn.Linear(4, 3)]),
    "linear without bias": ((5, 4), [nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)]),
    "one axis": ((2, 4, 9), [nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, bias=False)]),
    "two axes": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, (3, 2), stride=2)]),
    "three axes": ((2, 4, 5, 5, 5), [nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2)]),
    "groups": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)]),
    "depthwise": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, bias=False)]),
    "max pooling": ((2, 4, 9), [nn.BatchNorm1d(4), nn.MaxPool1d(3, 2, 1), nn.Conv1d(4, 6, 2)]),
    "two poolings": (
        (2, 4, 19, 18),
        [nn.BatchNorm2d(4), *(nn.MaxPool2d(2, ceil_mode=True, padding=1),) * 2, nn.Conv2d(4, 6, 2)],
    ),
}
PADDED: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "one axis": ((2, 4, 9), [nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding=2, bias=False)]),
    "two axes": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, (5, 3), padding=(2, 1), stride=2)]),
    "three axes": ((2, 4, 5, 5, 5), [nn.BatchNorm3d(4), nn.Conv3d(4, 6, 3, padding=(0, 1, 2))]),
    "groups": ((2, 4, 9, 8), [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)]),
    "max pooling": ((2, 4, 9), [nn.BatchNorm1d(4), nn.MaxPool1d(3, 2, 1), nn.Conv1d(4, 6, 3, padding=1)]),
}


def net(tail: list[nn.Module], gelu: bool) -> nn.Module:
    """A batch norm behind a GELU keeps scale and shift; behind a ReLU after a map, the shift."""
    kinds = {nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm3d: nn.Conv3d}
    linear = isinstance(tail[1], nn.Linear)
    stem = nn.Linear(4, 4) if linear else kinds[type(tail[0])](4, 4, 1)  # type: ignore[index]
    return trained(nn.Sequential(stem, nn.GELU() if gelu else nn.ReLU(), *tail))


@pytest.mark.parametrize("gelu", [True, False], ids=["scale and shift", "shift"])
@pytest.mark.parametrize("name", PLAIN)
def test_into_a_map_that_pads_nothing(name: str, gelu: bool) -> None:
    torch.manual_seed(0)
    shape, tail = PLAIN[name]
    model, x = net(tail, gelu), torch.randn(shape, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    assert isinstance(folded.get_submodule("2"), Identity)
    more = torch.randn(3, *(size + 2 * (at > 0) for at, size in enumerate(shape[1:])), dtype=torch.float64)
    assert relative(model(more), folded(more)) < 1e-14
    kept, _ = rewrite_module(model, (x,), fold("none"))
    assert isinstance(kept.get_submodule("2"), Affine)


@pytest.mark.parametrize("gelu", [True, False], ids=["scale and shift", "shift"])
@pytest.mark.parametrize("name", PADDED)
def test_into_a_padded_map_by_padding_values(name: str, gelu: bool) -> None:
    torch.manual_seed(0)
    shape, tail = PADDED[name]
    model, x = net(tail, gelu), torch.randn(shape, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), fold("padded"))
    assert certificate.evidence.float64.relative < 1e-14
    last = list(folded.children())[-1]
    assert isinstance(folded.get_submodule("2"), Identity)
    assert isinstance(last, Convolution)
    assert last.pad is not None
    more = torch.randn(3, *(size + 2 * (at > 0) for at, size in enumerate(shape[1:])), dtype=torch.float64)
    assert relative(model(more), folded(more)) < 1e-14
    with torch.no_grad():
        last.pad.zero_()  # what folding without padding values gives: right inside, wrong along the border
    naive = (model(more) - folded(more)).abs().detach()
    assert float(naive.max()) > 0.1
    inside = naive[(slice(None), slice(None), *(slice(2, -2),) * (naive.dim() - 2))]
    assert shape[2] < 9 or float(inside.max()) < 1e-13
    kept, _ = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert isinstance(kept.get_submodule("2"), Affine)
    inspect(folded, (more,))


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT


STAYS: dict[str, tuple[tuple[int, ...], list[nn.Module]]] = {
    "two readers": ((2, 4, 9), [nn.BatchNorm1d(4), Call(lambda y: y + y.tanh()), nn.Conv1d(4, 6, 1)]),
    "average pooling": ((2, 4, 9), [nn.BatchNorm1d(4), nn.AvgPool1d(3, padding=1), nn.Conv1d(4, 6, 1)]),
    "rectifier": ((2, 4, 9), [nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 1)]),
    "explicit padding": (
        (2, 4, 9),
        [nn.BatchNorm1d(4), Call(lambda y: functional.pad(y, (1, 1))), nn.Conv1d(4, 6, 1)],
    ),
    "other axis": ((2, 4, 4), [nn.BatchNorm1d(4), nn.Linear(4, 3)]),
    "pooling of channels": ((5, 4), [nn.BatchNorm1d(4), nn.MaxPool1d(1), nn.Linear(4, 3)]),
    "pooling without a batch": ((2, 4, 4), [nn.BatchNorm1d(4), nn.MaxPool2d(1), nn.Conv1d(4, 4, 1)]),
    "no batch": ((4, 4, 9), [nn.BatchNorm1d(4), nn.Conv2d(4, 4, 1)]),
    "transposed": ((2, 4, 4), [nn.BatchNorm1d(4), Call(transposed), nn.Conv1d(4, 6, 1)]),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str) -> None:
    torch.manual_seed(0)
    shape, tail = STAYS[name]
    model, x = trained(nn.Sequential(nn.Tanh(), *tail)), torch.randn(shape, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), fold("padded"))
    assert certificate.evidence.float64.relative < 1e-14
    assert isinstance(folded.get_submodule("1"), Affine)
    assert torch.equal(folded.state_dict()[f"{len(tail)}.weight"], model.state_dict()[f"{len(tail)}.weight"])


def test_a_norm_that_is_also_an_output_stays() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.map = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.norm(x)
            return y, self.map(y)

    folded, _ = rewrite_module(trained(Both()), (torch.randn(5, 4).double(),), {"moves": ["fold-batchnorm"]})
    assert isinstance(folded.get_submodule("norm"), Affine)


@pytest.mark.parametrize("tail", ["max pooling", "two axes"])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_gain_that_does_not_pass(tail: str, value: float) -> None:
    """A negative one turns max pooling into min pooling; for a zero there is no padding value."""
    torch.manual_seed(0)
    shape, modules = PADDED[tail]
    model, x = net(modules, gelu=True), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        model.get_parameter("2.weight")[1] = value
    folded, certificate = rewrite_module(model, (x,), fold("padded"))
    assert certificate.evidence.float64.relative < 1e-14
    passes = tail == "two axes" and value != 0
    assert isinstance(folded.get_submodule("2"), Identity if passes else Affine)


def test_one_map_between_two_norms() -> None:
    """Its rows take the norm after it, its columns the one before it; it has no bias yet, and needs one."""
    torch.manual_seed(0)
    for bias in (False, True):
        middle = nn.Conv2d(4, 4, 3, bias=bias, groups=2)
        norms = [nn.BatchNorm2d(4) for _ in range(2)]
        model = trained(nn.Sequential(nn.GELU(), norms[0], middle, nn.ReLU(), norms[1], nn.Conv2d(4, 2, 2)))
        x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
        folded, certificate = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
        assert certificate.evidence.float64.relative < 1e-14
        assert [type(folded.get_submodule(place)) for place in "14"] == [Identity, Identity]


class Before(nn.Module):
    """A pre-activation block: batch norm after the sum, rectifier, padded convolution, batch norm …"""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c1(functional.relu(self.n1(x)))
        return x + self.c2(functional.relu(self.n2(y)))


def test_pre_activation_blocks() -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 3, padding=1)
    head = [nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)]
    model = trained(nn.Sequential(stem, Before(), Before(), *head))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded, certificate = rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
    assert certificate.evidence.float64.relative < 1e-14
    kinds = {name: type(m) for name, m in folded.named_modules() if name[2:3] == "n"}
    assert kinds == {"1.n1": Affine, "1.n2": Identity, "2.n1": Affine, "2.n2": Identity}
    assert isinstance(folded.get_submodule("3"), Identity)


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
