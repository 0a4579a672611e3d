"""What folding batch norms is worth: CREPE, residual blocks, and batch norms with no map before them.

Ratios to the model with its batch norms, see ``timing.py``; eager, compiled and (on the CPU) ONNX Runtime.
Every variant is the same function: its output is compared with that of the first.

    crepe-tiny, crepe-full  64 and 8 frames; the scale goes back through the ReLU, an addition stays
    resnet                  basic blocks of two 3×3 convolutions with batch norm and ReLU, 64 to 256 channels,
                            56 × 56; nothing of the batch norms stays
    norm-first              GELU, batch norm, padded 3×3 convolution, four times, 64 channels, 56 × 56; the
                            batch norm stays y = a·x + h (folded), or goes into padding values (padded)

    python benchmarks/batchnorm.py
    python benchmarks/batchnorm.py --cases resnet --device cuda
    python benchmarks/batchnorm.py --quick              # does it run; nothing is written
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import regauge
from regauge import packaged
from timing import Bench, Variants, compiler, keep, onnx_runner, parser


class Basic(nn.Module):
    """ResNet's basic block: two 3×3 convolutions, and a 1×1 one beside them where the size changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.a, self.na = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.b, self.nb = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        beside = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.beside = nn.Sequential(*beside if stride > 1 else ())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.nb(self.b(functional.relu(self.na(self.a(x)))))
        return functional.relu(y + self.beside(x))


def resnet(quick: bool) -> tuple[nn.Module, torch.Tensor]:
    channels = (8, 8, 16) if quick else (64, 64, 64, 128, 128, 256, 256)
    size = 16 if quick else 56
    return nn.Sequential(*(Basic(*pair) for pair in pairwise(channels))), torch.randn(
        1, channels[0], size, size
    )


def norm_first(quick: bool) -> tuple[nn.Module, torch.Tensor]:
    width, size = (8, 16) if quick else (64, 56)
    layers = [
        layer
        for _ in range(4)
        for layer in (nn.GELU(), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1))
    ]
    return nn.Sequential(*layers), torch.randn(1, width, size, size)


def crepe(name: str, batch: int, quick: bool) -> tuple[nn.Module, torch.Tensor]:
    frames = packaged.example(name)["frames"].repeat(1 if quick else batch // 2, 1)
    return packaged.module(name), frames


CASES: dict[str, Callable[[bool], tuple[nn.Module, torch.Tensor]]] = {
    "crepe-tiny": lambda quick: crepe("crepe-tiny", 64, quick),
    "crepe-full": lambda quick: crepe("crepe-full", 8, quick),
    "resnet": resnet,
    "norm-first": norm_first,
}


def randomise(model: nn.Module) -> None:
    """Statistics, gains and shifts of a model that no longer is fresh."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)


def case(bench: Bench, name: str, modes: tuple[str, ...]) -> list[dict[str, Any]]:
    model, x = CASES[name](bench.quick)
    if not name.startswith("crepe"):
        randomise(model)
    models = {"batch-norm": model.eval()}
    for label, forward in {"folded": "unpadded", "padded": "padded"}.items():
        if label == "folded" or name == "norm-first":
            move = {"name": "fold-batchnorm", "forward": forward}
            models[label], _ = regauge.rewrite_module(model, (x,), {"moves": [move]})
    layout = torch.channels_last if bench.gpu and x.dim() == 4 else torch.contiguous_format
    held = {label: made.eval().to(memory_format=layout, **bench.here) for label, made in models.items()}
    x = x.to(memory_format=layout, **bench.here)
    wanted = held["batch-norm"](x).double()
    errors = {
        label: float((made(x).double() - wanted).norm() / wanted.norm()) for label, made in held.items()
    }
    assert max(errors.values()) < (0.05 if bench.gpu else 1e-4), errors

    def build(mode: str) -> Variants:
        if mode == "onnx":
            runners = {label: onnx_runner(made, x) for label, made in held.items()}
            return {label: (run, [array]) for label, (run, array) in runners.items()}
        return {label: (compiler(mode)(made), [x]) for label, made in held.items()}

    shape = {"case": name, "input": "×".join(map(str, x.shape)), "dtype": str(bench.dtype)[6:]}
    found = bench.case(shape, build, modes)
    return [{**each, "errors": errors} for each in found]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    given = options.parse_args()
    bench = Bench(given.device, given.quick, given.seconds)
    torch.manual_seed(0)
    onnx = not bench.gpu and importlib.util.find_spec("onnxruntime") is not None
    modes = ("eager", "compiled", *(("onnx",) if onnx else ()))
    for name in given.cases:
        with torch.no_grad():
            keep("batchnorm", bench, name, case(bench, name, modes))


if __name__ == "__main__":
    main()
