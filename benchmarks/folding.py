"""What it is worth at inference that a norm with running statistics folds into the maps beside it.

An encoder (width 384, 6 layers, 197 tokens) and a decoder (the same with a causal mask, 128 tokens) with each
of the norms below before attention, before the feed-forward map and at the end. Their statistics are random.

    layer, rms                 norms of torch, which do not fold
    unified, repbn, prepbn     as trained, and folded: regauge.rewrite_module, move fold-batchnorm

Ratios are of latencies to the same model with LayerNorm, see ``timing.py``; the last columns are of a folded
model to itself unfolded, pass by pass. Outputs before and after folding are compared before anything is
timed. Claims to hold beside it: Unified Normalization, about 31 % more throughput than LayerNorm; SLAB
(PRepBN), 2.4 ms less of 18.6 ms for an image.

    python benchmarks/folding.py
    python benchmarks/folding.py --device cuda
    python benchmarks/folding.py --quick         # does it run; nothing is written
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import regauge
from harness import table
from regauge.nn.repbn import PRepBN, RepBN
from regauge.nn.unified import UnifiedNorm
from timing import Bench, Variants, compiler, keep, parser

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "rms": lambda size: nn.RMSNorm(size, 1e-6),
    "unified": UnifiedNorm,
    "repbn": RepBN,
    "prepbn": PRepBN,
}
FOLDED = ("unified", "repbn", "prepbn")


class Block(nn.Module):
    """x + attention(norm(x)), then x + map(norm(x)): the block of a ViT, or of a GPT where it is causal."""

    def __init__(self, norm: Callable[[int], nn.Module], size: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.qkv, self.out = norm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.second, self.up, self.down = norm(size), nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).movedim(-2, 1).unbind(-2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.movedim(1, -2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Net(nn.Module):
    """Patches or words, already cut, in; blocks; a norm; a head."""

    def __init__(self, norm: str, size: int, depth: int, tokens: int, causal: bool) -> None:
        super().__init__()
        kind = NORMS[norm]
        self.entry = nn.Linear(size, size)
        self.places = nn.Parameter(torch.randn(tokens, size) / size**0.5)
        self.blocks = nn.Sequential(*(Block(kind, size, max(size // 64, 2), causal) for _ in range(depth)))
        self.last, self.head = kind(size), nn.Linear(size, 1000 if size > 100 else 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.blocks(self.entry(x) + self.places)))


def randomise(model: nn.Module) -> None:
    """Statistics, gains and shifts of a model that is not fresh; the schedule of a PRepBN at its end."""
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        leaf = name.rpartition(".")[2]
        if leaf in ("weight", "running_var") and held.dim() == 1:
            nn.init.uniform_(held, 0.5, 1.5)
        elif leaf in ("bias", "running_mean"):
            nn.init.uniform_(held, -0.5, 0.5)
        elif leaf in ("left", "warm"):
            held.zero_()


def case(bench: Bench, name: str, batch: int) -> list[dict[str, Any]]:
    size, depth, tokens = (32, 2, 17) if bench.quick else (384, 6, 197 if name == "encoder" else 128)
    x = torch.randn(batch, tokens, size)
    models: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    for norm in NORMS:
        torch.manual_seed(0)
        model = Net(norm, size, depth, tokens, name == "decoder").eval()
        randomise(model)
        models[norm] = model
        if norm in FOLDED:
            folded, _ = regauge.rewrite_module(model, (x,), {"moves": ["fold-batchnorm"]})
            models[f"{norm} folded"] = folded.eval()
            wanted = model(x)
            errors[norm] = float((folded(x) - wanted).norm() / wanted.norm())
    assert max(errors.values()) < 1e-4, errors
    held = {label: model.to(**bench.here) for label, model in models.items()}
    x = x.to(**bench.here)

    def build(mode: str) -> Variants:
        return {label: (compiler(mode)(model), [x]) for label, model in held.items()}

    shape = {"model": name, "batch": batch, "tokens": tokens, "width": size, "dtype": str(x.dtype)[6:]}
    found = bench.case(shape, build, ("eager", "compiled"))
    return [{**each, "errors": errors} for each in found]


def rendered(cases: list[dict[str, Any]]) -> str:
    """One row a norm: latency, to LayerNorm, and folded to unfolded."""
    rows: list[list[str]] = []
    for each in cases:
        shape = [str(each[key]) for key in ("model", "batch", "mode", "timing")]
        for label, value in each["variants"].items():
            before = each["variants"].get(label.removesuffix(" folded"))
            to_itself = f"{value['ratio'] / before['ratio']:.3f}" if label.endswith(" folded") else ""
            low, high = value["quartiles"]
            ratio = f"{value['ratio']:.3f} ({low:.3f}–{high:.3f})"
            rows.append([*shape, label, f"{value['us'] / 1e3:.3f}", ratio, to_itself])
    return table(["model", "batch", "mode", "timing", "norm", "ms", "/ LayerNorm", "/ unfolded"], rows)


def main() -> None:
    given = parser(__doc__).parse_args()
    bench = Bench(given.device, given.quick, given.seconds)
    torch.manual_seed(0)
    for name, batch in product(("encoder", "decoder"), (1, 8)):
        if not given.quick or batch == 1:
            with torch.no_grad():
                keep("folding", bench, f"{name} {batch}", case(bench, name, batch), rendered)


if __name__ == "__main__":
    main()
