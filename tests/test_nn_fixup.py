"""Fixup against the authors' ResNet-20: initial weights, logits, and a block with other numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from nn_laws import compiles, distance, golden
from regauge.errors import BadInput
from regauge.nn.fixup import FixupBlock, PaddedSkip, fixup_


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class ResNet(nn.Module):
    """The authors' network of 20 layers, with its two scalars at the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 16)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList()
        for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
            for index in range(3):
                stride = 2 if index == 0 and inputs != outputs else 1
                layers = [conv(outputs if index else inputs, outputs, stride), conv(outputs, outputs)]
                self.blocks.append(FixupBlock(layers, PaddedSkip() if stride == 2 else None))
        self.fc = nn.Linear(64, 10)
        fixup_(list(self.blocks), self.fc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv1(x) + self.bias1)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)) + self.bias2)


def test_initial_weights_are_those_of_the_authors() -> None:
    """With the same seed and order of draws, number by number."""
    case = golden("fixup")
    torch.manual_seed(0)
    network = ResNet()
    stats = case["param_stats"]
    for index, block in enumerate(network.blocks):
        first, last = (stats[f"layer{index // 3 + 1}.{index % 3}.conv{k}.weight"] for k in (1, 2))
        weight = block.layers[0].weight.detach()
        assert list(weight.shape) == first["shape"]
        assert abs(float(weight.std()) - first["std"]) < 1e-7
        assert abs(float(weight.abs().max()) - first["absmax"]) < 1e-7
        assert last["absmax"] == float(block.layers[1].weight.detach().abs().max()) == 0
    stem = network.conv1.weight.detach()
    assert abs(float(stem.std()) - stats["conv1.weight"]["std"]) < 1e-7
    assert distance(network(case["x"]), case["init_logits"]) == 0


def test_block_is_that_of_the_authors() -> None:
    case = golden("fixup")["block"]
    params = case["params"]
    block = FixupBlock([conv(4, 4), conv(4, 4)], dtype=torch.float64).double()
    block.load_state_dict(
        {
            "before": torch.cat([params["bias1a"], params["bias2a"]]),
            "after": torch.cat([params["bias1b"], params["bias2b"]]),
            "scale": params["scale"],
            "layers.0.weight": params["conv1.weight"],
            "layers.1.weight": params["conv2.weight"],
        },
        strict=True,
    )
    assert distance(block(case["x"]), case["y"]) < 1e-12
    compiles(block, case["x"])
    assert block.bfloat16()(case["x"].bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("depth", "power"), [(2, -1 / 2), (3, -1 / 4), (5, -1 / 8)])
def test_weights_shrink_with_the_depth(depth: int, power: float) -> None:
    """m layers in each of 16 blocks; the fan is that of the outputs."""
    random = torch.Generator().manual_seed(0)
    sizes = [300, *[400] * (depth - 1), 300]
    blocks = [FixupBlock([nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]) for _ in range(16)]
    fixup_(blocks, generator=random)
    for layer in blocks[0].layers[:-1]:
        assert abs(float(layer.weight.detach().std()) / (math.sqrt(2 / 400) * 16**power) - 1) < 0.02
    assert not bool(blocks[0].layers[-1].weight.any())
    x = torch.rand(2, 300)
    assert distance(blocks[0](x), x) == 0
    blocks[0](x).square().sum().backward()
    assert float(blocks[0].layers[-1].weight.grad.abs().max()) > 0


def test_every_scalar_acts() -> None:
    torch.manual_seed(0)
    block = FixupBlock([conv(3, 6, 2), conv(6, 6)], PaddedSkip(), last=False)
    x = torch.randn(2, 3, 8, 8)
    block(x).square().sum().backward()
    assert all(bool((parameter.grad != 0).all()) for parameter in (block.before, block.after, block.scale))
    assert block(x).shape == (2, 6, 4, 4)
    skip = PaddedSkip()(x)
    assert distance(skip[:, :3], functional.avg_pool2d(x, 1, 2)) == 0
    assert not bool(skip[:, 3:].any())


def test_refuses() -> None:
    with pytest.raises(BadInput, match="without layers"):
        FixupBlock([])
    with pytest.raises(BadInput, match="one weight"):
        fixup_([FixupBlock([nn.Linear(3, 3)])])
    with pytest.raises(BadInput, match="one weight"):
        fixup_([FixupBlock([nn.ReLU()])])
