"""How variants of a model are timed against each other, on the CPU or a GPU, by PyTorch or ONNX Runtime.

Variants run interleaved, A B C A B C …, in an order that turns from round to round; a ratio is of two times
of one round, to the first variant; its median and quartiles count, and below one is faster. "again" is the
reference a second time: how far it is from one is the noise.

On a GPU each is timed twice: launched from Python, which for small shapes is the time of launching, and
replayed from a CUDA graph, which is the time of the kernels. On a GPU this has not run yet.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import machine, save, table

LEAST = 5
"""Rounds that are made however long they take."""
BEYOND_CACHE = 160e6
"""Bytes of weights or activations that no cache holds."""


Variants = dict[str, tuple[Callable[[Any], Any], list[Any]]]
"""What is timed by name: a function and the inputs it is given in turn. The first is the reference."""


class Bench:
    """Times variants interleaved, in a way that suits the device."""

    def __init__(self, device: str, quick: bool, seconds: float = math.inf) -> None:
        self.quick, self.gpu, self.seconds = quick, device == "cuda", seconds
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
        end = warm_until + self.seconds
        while len(rounds) < (self.rounds if time.perf_counter() < end else min(self.rounds, LEAST)):
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
                "rounds": len(rounds),
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

    def case(
        self, shape: dict[str, Any], build: Callable[[str], Variants], modes: Sequence[str]
    ) -> list[Any]:
        """One shape in several modes, what ``build`` makes for each timed against each other."""
        found: list[dict[str, Any]] = []
        for mode in modes:
            torch._dynamo.reset()
            for timing, figures in self.measure(build(mode)):
                found.append({**shape, "mode": mode, "timing": timing, "variants": figures})
                print(*shape.values(), mode, timing, {name: figures[name]["ratio"] for name in figures})
        return found


def compiler(mode: str) -> Callable[[Any], Any]:
    """What turns a function or module into a compiled one, or leaves it."""
    if mode == "eager":
        return lambda function: function
    return functools.partial(torch.compile, fullgraph=True, dynamic=False)


def onnx_runner(
    module: nn.Module, x: torch.Tensor, allowed: float = 1e-4
) -> tuple[Callable[[Any], Any], Any]:
    """A module as ONNX Runtime runs it, on the threads of PyTorch, and its input. Outputs are compared."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(place) / "model.onnx"
        program = torch.export.export(module.eval(), (x,), strict=False)
        torch.onnx.export(program, (), file, dynamo=True, verbose=False, external_data=True)
        session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(value: Any) -> Any:
        return session.run(None, {given.name: value})[0]

    wanted, found = module(x).double(), torch.from_numpy(run(x.numpy())).double()
    error = float((found - wanted).norm() / wanted.norm())
    assert error < allowed, f"ONNX Runtime computes something else: {error}"
    return run, x.numpy()


def rendered(cases: list[dict[str, Any]]) -> str:
    """A table of medians and quartiles of ratios to the first variant."""
    first, *others = cases[0]["variants"]
    shape = [key for key in cases[0] if key not in ("variants", "errors")]
    rows: list[list[str]] = []
    for case in cases:
        found = [case["variants"][name] for name in others]
        ratios = ("{:.3f} ({:.3f}–{:.3f})".format(value["ratio"], *value["quartiles"]) for value in found)
        rows.append([*(str(case[key]) for key in shape), f"{case['variants'][first]['us']:.2f}", *ratios])
    return table([*shape, f"{first} µs", *others], rows)


def parser(text: str | None) -> argparse.ArgumentParser:
    """Options that every script of this kind takes."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    made.add_argument(
        "--seconds", type=float, default=6, help="to spend on the rounds of one case in one mode"
    )
    made.add_argument("--quick", action="store_true", help="few shapes and rounds, to see that it runs")
    return made


def keep(
    name: str,
    bench: Bench,
    key: str,
    cases: list[dict[str, Any]],
    show: Callable[[list[dict[str, Any]]], str] = rendered,
) -> None:
    """Print, and unless it was only tried out, save under ``results/NAME-DEVICE.json``."""
    here = {**machine(), "threads": torch.get_num_threads()}
    if bench.gpu:
        here |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    print("\n" + show(cases) + "\n", flush=True)
    if not bench.quick:
        content = {key: {"machine": here, "cases": cases}}
        save(f"{name}-{bench.here['device']}", content)
