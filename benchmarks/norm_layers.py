"""What every layer of ``regauge.nn`` costs beside LayerNorm and RMSNorm of torch: time and memory.

Each layer is timed against ``torch.nn.LayerNorm`` of the same width on as many tokens, with RMSNorm of torch
beside them, interleaved, see ``timing.py``; eager and compiled. Tokens are [2, rows / 2, width]; layers of
images get [2, width, 16, rows / 32], which has as many entries. Three inputs take turns.

    evaluation  forward, in evaluation mode, without gradients
    training    forward and backward, in training mode: gradients of the input and of every parameter

Memory is the most that is allocated in one pass beyond what there was before, per token: outputs,
intermediate values and gradients. On a GPU float32 and bfloat16 are measured, training is not replayed from a
graph, and the layers of Liger Kernel stand beside the others where it is installed. On a GPU this has not run
yet. GDWCT has a matrix of width² / 4 entries as its gain and is left out above a width of 256.

    python benchmarks/norm_layers.py --seconds 2
    python benchmarks/norm_layers.py --layers seednorm unified --widths 768
    python benchmarks/norm_layers.py --quick         # does it run; nothing is written
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from harness import table
from regauge.nn.catalog import ENTRIES
from timing import Bench, Variants, compiler, keep, parser

KINDS = {entry.name: entry for entry in ENTRIES}
QUICK_COMPILED = ("seednorm", "unified")
"""Layers that are compiled to see that it runs."""
WIDEST = {"gdwct": 256}


def layer(name: str, width: int) -> tuple[nn.Module, str]:
    """A layer by its name in the table of norms, and what it takes: tokens or images."""
    if name.startswith("liger"):
        made = getattr(importlib.import_module("liger_kernel.transformers"), LIGER[name])
        return made(width), "tokens"
    entry = KINDS[name]
    return entry.make(width, torch.Generator().manual_seed(0)), entry.kind


LIGER = {"liger-rmsnorm": "LigerRMSNorm", "liger-layernorm": "LigerLayerNorm"}


def inputs(kind: str, width: int, rows: int, training: bool, here: dict[str, Any]) -> list[torch.Tensor]:
    shape = (2, rows // 2, width) if kind == "tokens" else (2, width, 16, rows // 32)
    return [torch.randn(shape, **here).requires_grad_(training) for _ in range(3)]


def step(module: nn.Module, call: Callable[[Any], Any], training: bool) -> Callable[[Any], Any]:
    """What is timed: forward, or forward and backward with a gradient of ones."""
    if not training:
        return call
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def both(x: torch.Tensor) -> Any:
        y = call(x)
        return torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)

    return both


def peak(function: Callable[[Any], Any], x: torch.Tensor) -> int:
    """Bytes allocated at most at one time during a call, beyond what there was."""
    function(x)
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(x)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(x)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def case(bench: Bench, name: str, width: int, rows: int, training: bool, mode: str) -> list[dict[str, Any]]:
    """One layer against the two of torch."""
    made, kind = layer(name, width)
    modules = {
        "torch layernorm": (nn.LayerNorm(width), "tokens"),
        "torch rmsnorm": (nn.RMSNorm(width, 1e-6), "tokens"),
        name: (made, kind),
    }
    variants: Variants = {}
    for label, (module, takes) in modules.items():
        module.to(**bench.here).train(training)
        called = step(module, compiler(mode)(module), training)
        variants[label] = called, inputs(takes, width, rows, training, bench.here)
    memory = {label: peak(call, given[0]) for label, (call, given) in variants.items()}
    timings = bench.measure(variants)
    shape = {"layer": name, "width": width, "rows": rows, "dtype": str(bench.here["dtype"])[6:]}
    found: list[dict[str, Any]] = []
    for timing, figures in itertools.islice(timings, 1 if training else None):
        for label, value in figures.items():
            value["ns_per_token"] = round(1e3 * value["us"] / rows, 2)
            if label in memory:
                value["bytes_per_token"] = round(memory[label] / rows, 1)
        what = {"mode": mode, "step": "training" if training else "evaluation", "timing": timing}
        found.append({**shape, **what, "variants": figures})
    return found


def measured(bench: Bench, names: list[str], width: int, rows: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for training, mode, name in itertools.product((False, True), ("eager", "compiled"), names):
        few = bench.quick and name not in QUICK_COMPILED
        if width > WIDEST.get(name, math.inf) or (mode == "compiled" and (few or name.startswith("liger"))):
            continue
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            found += case(bench, name, width, rows, training, mode)
    return found


def rendered(cases: list[dict[str, Any]]) -> str:
    """One row a layer: time for a token, its ratio to both norms of torch, memory for a token."""
    rows: list[list[str]] = []
    for each in cases:
        layernorm, rmsnorm, own = (each["variants"][label] for label in each["variants"] if label != "again")
        low, high = own["quartiles"]
        rows.append(
            [
                *(str(each[key]) for key in ("layer", "width", "dtype", "step", "mode", "timing")),
                f"{own['ns_per_token']:.1f}",
                f"{own['ratio']:.2f} ({low:.2f}–{high:.2f})",
                f"{own['ratio'] / rmsnorm['ratio']:.2f}",
                f"{each['variants']['again']['ratio']:.2f}",
                f"{own['bytes_per_token']:.0f}",
                f"{own['bytes_per_token'] / layernorm['bytes_per_token']:.2f}",
            ]
        )
    head = ["layer", "width", "dtype", "step", "mode", "timing", "ns/token", "/ LayerNorm", "/ RMSNorm"]
    return table([*head, "again", "bytes/token", "/ LayerNorm"], rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", nargs="+", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--widths", nargs="+", type=int, default=None)
    given = options.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # a line for every start and stop of the profiler
    bench = Bench(given.device, given.quick, given.seconds)
    torch.manual_seed(0)
    widths = given.widths or ((64,) if given.quick else (256, 768, 2048, 4096))
    names = list(given.layers)
    if bench.gpu and importlib.util.find_spec("liger_kernel"):
        names += LIGER
    else:
        print("Liger Kernel is left out:", "not installed" if bench.gpu else "it needs a GPU")
    for dtype in (torch.float32, torch.bfloat16) if bench.gpu else (torch.float32,):
        bench.here["dtype"] = dtype
        for width in widths:
            cases = measured(bench, names, width, 64 if given.quick else 8192 if bench.gpu else 512)
            keep("norm_layers", bench, f"{width} {str(dtype)[6:]}", cases, rendered)


if __name__ == "__main__":
    main()
