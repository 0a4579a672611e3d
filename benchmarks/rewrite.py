"""Rewriting a checkpoint: how fast against copying it, how much memory, how long the certificate takes.

For each case, in a process of its own: copy the weight files three times, rewrite, copy three times more. A
copy ends when its bytes are on the disk, and so does writing: the staged files are synced before the next
stage begins, and that counts as writing. Memory is what the process ever held, certificate included.

Bars: Gemma 3 270M: writing within 5 times a copy, and 700 MB above the import baseline; a checkpoint of 8 GB:
within 1.5 GB in all.

    python benchmarks/rewrite.py                        # Gemma, Whisper, and 8 GB (needs 25 GB of disk)
    python benchmarks/rewrite.py gemma-3-270m           # some
    python benchmarks/rewrite.py --directory /somewhere # where to write; default: a temporary one
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import machine, memory, ratio, save, table, worker

MOVES: dict[str, list[Any]] = {
    "gemma-3-270m": ["fold-scales", {"name": "rotate", "space": "heads"}, "permute"],
    "whisper-tiny.en": [{"name": "rotate", "space": "heads"}, "permute"],
    "llama-8gb": ["fold-scales", {"name": "rotate", "style": "householder"}, "permute"],
}
MEMORY: dict[str, int | None] = {"llama-8gb": 512 << 20}
BARS: dict[str, dict[str, float]] = {
    "gemma-3-270m": {"write_over_copy": 5.0, "above_import_mb": 700.0},
    "whisper-tiny.en": {"write_over_copy": 5.0, "above_import_mb": 700.0},
    "llama-8gb": {"peak_mb": 1500.0},
}
COPIES = 3


def make_llama(directory: Path) -> None:
    """A Llama of 4.0 billion random bfloat16 parameters, written layer by layer; no model is ever built."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, inner, vocabulary, layers, heads, shared = 4096, 6144, 32000, 32, 32, 8
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=False,
    )
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, columns**-0.5, generator=generator)

    def scale() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(hidden, generator=generator)).bfloat16()

    width = hidden // heads * shared
    weight_map: dict[str, str] = {}
    for shard in range(layers + 1):
        if shard == layers:
            tensors = {
                "model.embed_tokens.weight": matrix(vocabulary, hidden),
                "model.norm.weight": scale(),
                "lm_head.weight": matrix(vocabulary, hidden),
            }
        else:
            layer = {
                "self_attn.q_proj": matrix(hidden, hidden),
                "self_attn.k_proj": matrix(width, hidden),
                "self_attn.v_proj": matrix(width, hidden),
                "self_attn.o_proj": matrix(hidden, hidden),
                "mlp.gate_proj": matrix(inner, hidden),
                "mlp.up_proj": matrix(inner, hidden),
                "mlp.down_proj": matrix(hidden, inner),
                "input_layernorm": scale(),
                "post_attention_layernorm": scale(),
            }
            tensors = {f"model.layers.{shard}.{name}.weight": tensor for name, tensor in layer.items()}
        file = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def sync(files: list[Path]) -> None:
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_seconds(source: Path, target: Path) -> float:
    """Plain copy of the weight files, until they are on the disk."""
    target.mkdir()
    begin = time.perf_counter()
    for file in weight_files(source):
        shutil.copyfile(file, target / file.name)
    sync(weight_files(target))
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def rewrite_case(case: str, work: Path) -> dict[str, Any]:
    import transformers  # noqa: F401  (an import is not rewriting)

    import regauge.api
    import regauge.certify
    import regauge.hf

    base = memory("VmRSS")
    source = work / case if case == "llama-8gb" else regauge.api.resolve(f"packaged:{case}")
    out, staged = work / "out", work / ".out.regauge-partial" / "files"
    copies = [copy_seconds(source, work / "copy") for _ in range(COPIES)]
    peaks: dict[str, float] = {}
    begun: dict[str, float] = {}
    processor: dict[str, float] = {}
    synced = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal synced
        if what not in begun:
            if "writing" in begun and not synced:
                begin = time.perf_counter()
                sync(weight_files(staged))
                synced = time.perf_counter() - begin
            begun[what], processor[what] = time.perf_counter(), time.process_time()
        peaks[what] = max(peaks.get(what, 0.0), memory())

    begin = time.perf_counter()
    recipe = {"moves": MOVES[case]}
    result = regauge.api.rewrite(source, out, recipe, seed=1, max_memory=MEMORY.get(case), progress=progress)
    total = time.perf_counter() - begin
    processor["end"] = time.process_time()
    starts = list(processor.items())
    peak = memory()
    copies += [copy_seconds(source, work / "copy") for _ in range(COPIES)]
    write, copy = result.seconds["write"] + synced, statistics.median(copies)
    evidence = result.certificate.evidence
    return {
        "gigabytes": round(sum(file.stat().st_size for file in weight_files(source)) / 1e9, 3),
        "copy_s": round(copy, 3),
        "copies_s": [round(seconds, 3) for seconds in copies],
        "write_s": round(write, 3),
        "write_over_copy": round(write / copy, 2),
        "certify_s": result.seconds["certify"],
        "stages_s": dict(result.seconds),
        "cpu_s": {name: round(end - at, 2) for (name, at), (_, end) in pairwise(starts)},
        "sync_after_writing_s": round(synced, 3),
        "total_s": round(total, 2),
        "import_mb": round(base),
        "peak_mb": round(peak),
        "above_import_mb": round(peak - base),
        "peak_mb_before_the_end_of": {what: round(value) for what, value in peaks.items()},
        "max_memory": MEMORY.get(case),
        "moves": MOVES[case],
        "tensors": {key: getattr(result.report, key) for key in ("copied", "moved", "computed")},
        "certificate": {
            "verdict": str(result.certificate.verdict),
            "relative_error_float64_before_rounding": None
            if evidence.exact is None
            else evidence.exact.relative,
            "relative_error_float64_as_stored": evidence.float64.relative,
            "rounding_floor": evidence.floor.relative,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=list(MOVES), help=f"of {', '.join(MOVES)}")
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        case, work = given.cases[0], given.directory
        if work.joinpath("make").exists():
            make_llama(work / case)
            print("{}")
        else:
            print(json.dumps(rewrite_case(case, work)))
        return
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    for case in given.cases:
        before = machine()
        with tempfile.TemporaryDirectory(dir=given.directory) as place:
            if case == "llama-8gb":
                (Path(place) / "make").touch()
                worker(__file__, case, "--directory", place)
                (Path(place) / "make").unlink()
            figures = worker(__file__, case, "--directory", place)
        bars = BARS[case]
        figures["ratio_to_bar"] = {key: round(figures[key] / bar, 3) for key, bar in bars.items()}
        found[case] = {**figures, "bars": bars, "machine": before}
        cells = [case, f"{figures['gigabytes']:.2f}"]
        cells += [f"{figures[key]:.1f}" for key in ("copy_s", "write_s", "write_over_copy")]
        cells.append(
            ratio(figures["write_over_copy"], bars["write_over_copy"]) if "write_over_copy" in bars else ""
        )
        cells += [f"{figures['certify_s']:.1f}", f"{figures['total_s']:.1f}"]
        for key in ("above_import_mb", "peak_mb"):
            cells += [str(figures[key]), ratio(figures[key], bars[key]) if key in bars else ""]
        rows.append([*cells, figures["certificate"]["verdict"]])
        print(f"{case}: {figures['total_s']} s", flush=True)
    head = [
        "case",
        "GB",
        "copy s",
        "write s",
        "write / copy",
        "/ bar",
        "certify s",
        "all s",
        "above import MB",
        "/ bar",
    ]
    print("\n" + table([*head, "peak MB", "/ bar", "verdict"], rows))
    save("rewrite", found)


if __name__ == "__main__":
    main()
