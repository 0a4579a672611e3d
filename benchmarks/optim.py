"""What a step of the optimizers costs beside AdamW of PyTorch, on the parameters of a model of ten million.

Ratios to ``torch.optim.AdamW`` with foreach, see ``timing.py``. Gradients are given; only the step is timed.
``cosine`` is AdamP with the test of its authors, ``trace`` with views from the trace of the model; ``loop``
takes tensors one by one.

    python benchmarks/optim.py
    python benchmarks/optim.py --quick           # does it run; nothing is written
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from regauge.optim import SGDP, SWAN, AdamP, DoG, LDoG, SinkGD, View, scale_invariant, with_adam
from timing import Bench, Variants, keep, parser


class Block(nn.Module):
    """A feed-forward branch with norms before and after it: both of its matrices are scale-invariant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.after(self.down(torch.relu(self.up(self.before(x)))))


def network(bench: Bench, width: int, blocks: int) -> tuple[nn.Module, dict[str, View]]:
    """A model with gradients, and which of its parameters are invariant."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, width), *[Block(width) for _ in range(blocks)], nn.Linear(width, 8)
    )
    views = scale_invariant(model, (torch.zeros(2, width),))
    model.to(bench.here["device"])
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return model, views


def variants(bench: Bench, width: int, blocks: int) -> tuple[dict[str, Any], Variants]:
    model, views = network(bench, width, blocks)
    named = list(model.named_parameters())
    split = with_adam(model, (torch.zeros(2, width, device=bench.here["device"]),), lr=1e-5, adam_lr=1e-5)
    make: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(named, lr=1e-5, foreach=True),
        "adamp-trace": lambda: AdamP(named, lr=1e-5, weight_decay=1e-2, views=views),
        "adamp-cosine": lambda: AdamP(named, lr=1e-5, weight_decay=1e-2),
        "adamp-loop": lambda: AdamP(named, lr=1e-5, weight_decay=1e-2, views=views, foreach=False),
        "sgdp-trace": lambda: SGDP(named, lr=1e-5, momentum=0.9, weight_decay=1e-2, views=views),
        "dog": lambda: DoG(named),
        "ldog": lambda: LDoG(named),
        "sinkgd": lambda: SinkGD(split, lr=1e-5),
        "swan": lambda: SWAN(split, lr=1e-5),
    }
    sizes = [parameter.numel() for _, parameter in named]
    shape = {"parameters": sum(sizes), "tensors": len(sizes), "invariant": len(views)}
    return shape, {name: (made().step, [None]) for name, made in make.items()}


def main() -> None:
    given = parser(__doc__).parse_args()
    bench = Bench(given.device, given.quick, given.seconds)
    shape, made = variants(bench, *((64, 2) if given.quick else (512, 5)))
    keep("optim", bench, "step", bench.case(shape, lambda mode: made, ("eager",)))


if __name__ == "__main__":
    main()
