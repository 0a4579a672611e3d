"""What rewriting normalisation is worth: layers alone, whole transformer blocks, and batch norm folded away.

Variants run interleaved, A B C A B C …, in an order that turns from round to round; a ratio is of two times
of one round, to LayerNorm with gain and bias (or to batch norm not folded); its median and quartiles count,
and below one is faster. "again" is the reference a second time: how far it is from one is the noise.

    layers  one layer; prefill changes its input from call to call, so that no cache holds it, decode does not
    blocks  pre-norm transformer blocks (attention, MLP with GELU), enough of them that their weights fit no
            cache; decode has 1024 tokens cached for each sequence
    convs   basic blocks of two 3×3 convolutions each with batch norm and ReLU, 64 to 256 channels

Eager and compiled. On a GPU each is timed twice: launched from Python, which at decode shapes is the time of
launching, and replayed from a CUDA graph, which is the time of the kernels. On a GPU this has not run yet.

Claim to compare with: Pre-RMSNorm takes 1–10 % less time than Pre-LayerNorm (Jiang et al., arXiv 2305.14858).

    python benchmarks/norms.py --device cuda            # all three; minutes, mostly compiling
    python benchmarks/norms.py --device cpu --sections blocks
    python benchmarks/norms.py --device cpu --quick     # does it run; nothing is written
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from harness import machine, save, table

SOURCE = Path(__file__).parent.parent / "src" / "regauge" / "modeling_regauge.py"
CONTEXT = 1024
"""Tokens cached for each sequence when decoding."""
BEYOND_CACHE = 160e6
"""Bytes of weights or activations that no cache holds."""
LAYERS: dict[str, dict[str, Any]] = {
    "layer": {"form": "layer", "weight": True, "bias": True},
    "layer-plain": {"form": "layer"},
    "rms": {"form": "rms", "weight": True},
    "rms-plain": {"form": "rms"},
    "crms": {"form": "crms"},
    "chart": {"form": "chart"},
}
BLOCKS: dict[str, tuple[str, bool]] = {
    "layer": ("layer", True),
    "rms-plain": ("rms", True),
    "rms-plain-unbiased": ("rms", False),
    "none": ("", True),
    "none-unbiased": ("", False),
}
"""Form of norm, of which only that of LayerNorm has parameters; and whether linear layers have biases."""


def load_norm() -> Any:
    """``Norm`` from the runtime file, which imports transformers: not for Norm, so a stub does."""
    module = types.ModuleType(SOURCE.stem)
    with mock.patch.dict(sys.modules, transformers=types.ModuleType("transformers")):
        exec(compile(SOURCE.read_text(), SOURCE, "exec"), module.__dict__)
    sys.modules[SOURCE.stem] = module  # where the compiler looks for it
    return module.Norm


Norm = load_norm()


class Block(nn.Module):
    """One pre-norm block on a residual ``x`` and what is still to be added to it, so that adding and the norm
    after it are one graph to the compiler, as they are in a whole model."""

    def __init__(self, width: int, **here: Any) -> None:
        super().__init__()
        self.heads = width // (64 if width < 2048 else 128)
        self.norms = nn.ModuleList(Norm("layer", width, 1e-5, True, True, **here) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, **here), nn.Linear(width, width, **here)
        self.up, self.down = nn.Linear(width, 4 * width, **here), nn.Linear(4 * width, width, **here)
        for linear in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def variant(self, form: str, biased: bool) -> Block:
        """The same weights with other norms, with or without biases."""
        if form == "layer":
            return self
        new = copy.deepcopy(self, {id(parameter): parameter for parameter in self.parameters()})
        for i, norm in enumerate(self.norms):
            new.norms[i] = Norm(form, norm.size, norm.eps) if form else nn.Identity()
        for linear in (new.qkv, new.out, new.up, new.down):
            linear.bias = linear.bias if biased else None
        return new

    def forward(self, x: torch.Tensor, delta: torch.Tensor, cache: torch.Tensor | None) -> Any:
        x = x + delta
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, -tokens:], cache[1, :, :, -tokens:] = key, value
            key, value = cache[0], cache[1]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x, self.down(functional.gelu(self.up(self.norms[1](x))))


class Basic(nn.Module):
    """ResNet's basic block; ``folded`` has every batch norm in the convolution before it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        conv = functools.partial(nn.Conv2d, bias=False)
        self.convs = nn.ModuleList([conv(inputs, outputs, 3, stride, 1), conv(outputs, outputs, 3, 1, 1)])
        self.convs.append(conv(inputs, outputs, 1, stride) if stride > 1 else nn.Identity())
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(outputs) if isinstance(conv, nn.Conv2d) else nn.Identity() for conv in self.convs
        )
        for tensor in self.norms.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)

    def folded(self) -> Basic:
        new = copy.deepcopy(self)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if isinstance(conv, nn.Conv2d):
                new.convs[i], new.norms[i] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norms[0](self.convs[0](x)))
        y = self.norms[1](self.convs[1](y))
        return functional.relu(y + self.norms[2](self.convs[2](x)))


Variants = dict[str, tuple[Callable[[Any], Any], list[Any]]]
"""What is timed by name: a function and the inputs it is given in turn. The first is the reference."""


class Bench:
    """Times variants interleaved, in a way that suits the device."""

    def __init__(self, device: str, quick: bool) -> None:
        self.quick, self.gpu = quick, device == "cuda"
        self.rounds = 3 if quick else 21 if self.gpu else 15
        self.sample_s = 0.002 if self.gpu or quick else 0.02
        self.warm_s = 0.02 if quick else 0.3
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.here: dict[str, Any] = {"device": device, "dtype": self.dtype}

    def clock(self, call: Callable[[], Any], repeat: int) -> float:
        """Seconds for ``repeat`` calls one after the other."""
        if self.gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        if not self.gpu:
            return time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def interleave(self, calls: dict[str, Callable[[], Any]], passes: int) -> dict[str, Any]:
        """Microseconds of a pass, of which each call makes several, and the ratio to the first."""
        names = list(calls)
        repeat = math.ceil(self.sample_s / min(self.clock(calls[names[0]], 3) / 3 for _ in range(3)))
        rounds: list[dict[str, float]] = []
        warm_until = time.perf_counter() + self.warm_s
        while len(rounds) < self.rounds:
            warm, turn = time.perf_counter() > warm_until, len(rounds) % len(names)
            times = {name: self.clock(calls[name], repeat) for name in (*names[turn:], *names[:turn])}
            rounds += [times] if warm else []
        found: dict[str, Any] = {}
        for name in names:
            ratios = [times[name] / times[names[0]] for times in rounds]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            found[name] = {
                "us": round(statistics.median(times[name] for times in rounds) / repeat / passes * 1e6, 3),
                "ratio": round(middle, 4),
                "quartiles": [round(low, 4), round(high, 4)],
            }
        return found

    def measure(self, variants: Variants) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ways of timing, and what they find."""
        first = next(iter(variants))
        variants = {first: variants[first], "again": variants[first], **variants}

        def run(name: str) -> Any:
            function, inputs = variants[name]
            if self.gpu:  # all outputs are held until the last exists: none takes memory just written
                return [function(x) for x in inputs]
            for x in inputs:
                function(x)
            return None

        calls: dict[str, Callable[[], Any]] = {name: functools.partial(run, name) for name in variants}
        passes = len(variants[first][1])
        for name in [*calls] * 3:
            run(name)
        yield "launched" if self.gpu else "called", self.interleave(calls, passes)
        if self.gpu:
            for name in variants:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run(name)
                calls[name] = graph.replay
            yield "graph", self.interleave(calls, passes)

    def case(self, shape: dict[str, Any], build: Callable[[Any], Variants]) -> list[dict[str, Any]]:
        """One shape, eager and compiled: ``build`` is given what compiles, or does not."""
        found: list[dict[str, Any]] = []
        for mode in ("eager", "compiled"):
            torch._dynamo.reset()
            compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False)
            variants = build(compiler if mode == "compiled" else lambda function: function)
            for timing, figures in self.measure(variants):
                found.append({**shape, "mode": mode, "timing": timing, "variants": figures})
                print(*shape.values(), mode, timing, {name: figures[name]["ratio"] for name in figures})
        return found


def layer_case(bench: Bench, width: int, rows: int) -> list[dict[str, Any]]:
    sets, times = 1, 32
    if rows > 8 and not bench.quick:
        sets, times = max(3, math.ceil(BEYOND_CACHE / (rows * width * bench.dtype.itemsize))), 1
    inputs = [
        [torch.randn(1, rows, size, **bench.here) for _ in range(sets)] * times for size in (width, width - 1)
    ]

    def build(compiler: Any) -> Variants:
        variants: Variants = {}
        for name, options in LAYERS.items():
            less = options["form"] in ("crms", "chart")
            norm = Norm(size=width - less, eps=1e-5, **options, **bench.here)
            variants[name] = compiler(norm), inputs[less]
        return variants

    return bench.case({"width": width, "rows": rows, "dtype": str(bench.dtype)[6:]}, build)


def block_case(bench: Bench, width: int, batch: int, tokens: int) -> list[dict[str, Any]]:
    depth = math.ceil((1e6 if bench.quick else BEYOND_CACHE) / (12 * width**2 * bench.dtype.itemsize))
    stack = [Block(width, **bench.here) for _ in range(depth)]
    x = torch.randn(batch, tokens, width, **bench.here)
    zero, heads = torch.zeros_like(x), stack[0].heads
    caches: list[torch.Tensor | None] = [None for _ in stack]
    if tokens == 1:
        caches = [torch.randn(2, batch, heads, CONTEXT, width // heads, **bench.here) for _ in stack]

    def run(step: Any, variant: list[Block], x: torch.Tensor) -> torch.Tensor:
        delta = zero
        for block, cache in zip(variant, caches, strict=True):
            x, delta = step(block, x, delta, cache)
        return x + delta

    def build(compiler: Any) -> Variants:
        step = compiler(Block.forward)
        variants: Variants = {}
        for name, options in BLOCKS.items():
            function = functools.partial(run, step, [block.variant(*options) for block in stack])
            assert function(x).isfinite().all(), name
            variants[name] = function, [x]
        return variants

    shape = {"width": width, "batch": batch, "tokens": tokens, "blocks": depth, "dtype": str(bench.dtype)[6:]}
    return bench.case(shape, build)


def conv_case(bench: Bench, batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    channels = (64, 64, 64, 128, 128, 256, 256)
    stack = [Basic(before, after, 1 + (before != after)).eval() for before, after in pairwise(channels)]
    layout = torch.channels_last if bench.gpu else torch.contiguous_format
    here: dict[str, Any] = {"device": bench.here["device"], "dtype": dtype, "memory_format": layout}
    folded = nn.Sequential(*(block.folded() for block in stack)).to(**here)
    models = {"batch-norm": nn.Sequential(*stack).to(**here), "folded": folded}
    x = torch.randn(batch, 64, 56, 56).to(**here)
    before, after = (model(x).double() for model in models.values())
    error = ((after - before).norm() / before.norm()).item()
    assert error < 0.05, error
    shape = {"batch": batch, "layout": str(layout)[6:], "dtype": str(dtype)[6:], "error": round(error, 9)}
    return bench.case(shape, lambda compiler: {name: (compiler(models[name]), [x]) for name in models})


def section(bench: Bench, name: str) -> list[dict[str, Any]]:
    gpu, quick = bench.gpu, bench.quick
    if name == "convs":
        dtypes = (torch.bfloat16, torch.float32) if gpu else (torch.float32,)
        shapes = product((1,) if quick else (1, 64) if gpu else (1, 8), dtypes)
        return [case for shape in shapes for case in conv_case(bench, *shape)]
    widths = (768,) if quick else (768, 1024, 2048, 4096, 8192)
    if name == "layers":
        rows = (1, 512) if quick else (1, 8, 4096, 16384) if gpu else (1, 8, 512)
        return [case for shape in product(widths, rows) for case in layer_case(bench, *shape)]
    tokens = ((1, 1), (1, 128)) if quick else ((1, 1), (8, 1), (4, 1024) if gpu else (1, 512))
    widths = widths if gpu else widths[:4]  # those of 8192 would take the hour
    return [case for width, shape in product(widths, tokens) for case in block_case(bench, width, *shape)]


def rendered(cases: list[dict[str, Any]]) -> str:
    first, *others = cases[0]["variants"]
    shape = [key for key in cases[0] if key != "variants"]
    rows: list[list[str]] = []
    for case in cases:
        found = [case["variants"][name] for name in others]
        ratios = ("{:.3f} ({:.3f}–{:.3f})".format(value["ratio"], *value["quartiles"]) for value in found)
        rows.append([*(str(case[key]) for key in shape), f"{case['variants'][first]['us']:.2f}", *ratios])
    return table([*shape, f"{first} µs", *others], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = ("layers", "blocks", "convs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--quick", action="store_true", help="few shapes and rounds, to see that it runs")
    given = parser.parse_args()
    bench = Bench(given.device, given.quick)
    torch.manual_seed(0)
    for name in given.sections:
        here = {**machine(), "threads": torch.get_num_threads()}
        if bench.gpu:
            here |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        with torch.no_grad():
            cases = section(bench, name)
        print("\n" + rendered(cases) + "\n", flush=True)
        if not given.quick:
            save(f"norms-{given.device}", {name: {"machine": here, "rounds": bench.rounds, "cases": cases}})


if __name__ == "__main__":
    main()
