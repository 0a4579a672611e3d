"""What another normalisation is worth in whole pre-norm transformer blocks: attention, and an MLP with GELU.

Ratios to LayerNorm with gain and shift, see ``timing.py``; eager, compiled, and (on the CPU) by ONNX Runtime.
All variants have the same linear maps with biases; CRMSNorm has a stream one narrower, so one row or column
less. Blocks are as many as it takes for their weights to fit no cache.

    prefill  256 rows
    decode   1 row; eager and compiled attend to 1024 tokens cached, ONNX Runtime to that row alone

Claim to compare with: Pre-RMSNorm takes 1–10 % less time than Pre-LayerNorm (Jiang et al., arXiv 2305.14858).

    python benchmarks/blocks.py --widths 768            # minutes, mostly compiling
    python benchmarks/blocks.py --device cuda
    python benchmarks/blocks.py --quick                 # does it run; nothing is written
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from regauge.modeling_regauge import Norm
from timing import BEYOND_CACHE, Bench, Variants, compiler, keep, onnx_runner, parser

CONTEXT = 1024
"""Tokens cached for each sequence when decoding."""
NORMS: dict[str, dict[str, Any]] = {
    "layer": {"form": "layer", "weight": True, "bias": True},
    "rms": {"form": "rms", "weight": True},
    "rms-plain": {"form": "rms"},
    "crms": {"form": "crms"},
}


class Block(nn.Module):
    """One pre-norm block on a residual ``x`` and what is still to be added to it, so that adding and the norm
    after it are one graph to the compiler, as they are in a whole model.

    Args:
        width: of queries, keys, values and, divided by four, of the MLP.
        stream: of the residual stream: ``width``, or one less for CRMSNorm.
        norm: options of the norm.
    """

    def __init__(self, width: int, stream: int, norm: dict[str, Any], **here: Any) -> None:
        super().__init__()
        self.width, self.heads = width, width // (64 if width < 2048 else 128)
        self.norms = nn.ModuleList(Norm(size=stream, eps=1e-5, **norm, **here) for _ in range(2))
        self.qkv, self.out = nn.Linear(stream, 3 * width, **here), nn.Linear(width, stream, **here)
        self.up, self.down = nn.Linear(stream, 4 * width, **here), nn.Linear(4 * width, stream, **here)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def share(self, other: Block) -> Block:
        """Take the linear maps of another block, whose stream is as wide."""
        self.qkv, self.out, self.up, self.down = other.qkv, other.out, other.up, other.down
        return self

    def forward(self, x: torch.Tensor, delta: torch.Tensor, cache: torch.Tensor | None) -> Any:
        x = x + delta
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, self.width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, -tokens:], cache[1, :, :, -tokens:] = key, value
            key, value = cache[0], cache[1]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, self.width))
        return x, self.down(functional.gelu(self.up(self.norms[1](x))))


class Stack(nn.Module):
    """Blocks one after the other; ``step`` is how one is run."""

    def __init__(self, blocks: list[Block], caches: list[torch.Tensor | None], step: Any) -> None:
        super().__init__()
        self.blocks, self.caches, self.step = nn.ModuleList(blocks), caches, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = torch.zeros_like(x)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x, delta = self.step(block, x, delta, cache)
        return x + delta


def block_case(
    bench: Bench, width: int, batch: int, tokens: int, modes: tuple[str, ...]
) -> list[dict[str, Any]]:
    depth = math.ceil((1e6 if bench.quick else BEYOND_CACHE) / (12 * width**2 * bench.dtype.itemsize))
    blocks: dict[str, list[Block]] = {}
    for name, norm in NORMS.items():
        narrow = norm["form"] == "crms"
        blocks[name] = [Block(width, width - narrow, norm, **bench.here) for _ in range(depth)]
        if not narrow and name != "layer":
            blocks[name] = [new.share(old) for new, old in zip(blocks[name], blocks["layer"], strict=True)]
    x = torch.randn(batch, tokens, width, **bench.here)
    heads = blocks["layer"][0].heads
    empty: list[torch.Tensor | None] = [None] * depth
    caches = (
        [torch.randn(2, batch, heads, CONTEXT, width // heads, **bench.here) for _ in empty]
        if tokens == 1
        else empty
    )

    def build(mode: str) -> Variants:
        variants: Variants = {}
        step = Block.forward if mode == "onnx" else compiler(mode)(Block.forward)
        for name, held in blocks.items():
            given = x[..., : held[0].qkv.in_features].contiguous()
            if mode == "onnx":
                run, array = onnx_runner(Stack(held, empty, step), given)
                variants[name] = run, [array]
            else:
                stack = Stack(held, caches, step)
                assert stack(given).isfinite().all(), name
                variants[name] = functools.partial(stack), [given]
        return variants

    shape = {"width": width, "batch": batch, "tokens": tokens, "blocks": depth, "dtype": str(bench.dtype)[6:]}
    return bench.case(shape, build, modes)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--widths", nargs="+", type=int, default=(768, 2048, 4096))
    given = options.parse_args()
    bench = Bench(given.device, given.quick, given.seconds)
    torch.manual_seed(0)
    onnx = not bench.gpu and importlib.util.find_spec("onnxruntime") is not None
    modes = ("eager", "compiled", *(("onnx",) if onnx else ()))
    shapes = ((1, 1), (1, 16)) if given.quick else ((1, 1), (1, 256), *(((8, 1), (4, 1024)) * bench.gpu))
    for width in (768,) if given.quick else given.widths:
        with torch.no_grad():
            cases = [case for shape in shapes for case in block_case(bench, width, *shape, modes)]
        keep("blocks", bench, f"width {width}", cases)


if __name__ == "__main__":
    main()
