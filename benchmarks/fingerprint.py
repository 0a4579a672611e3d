"""Fingerprints of models and of their disguises: distances, ranks in an index, time, memory and size.

A disguise is a random element of every generator that the model has, with whatever folds and with norms
written in another way; then the same rounded to bfloat16, to 8 and to 4 bits. Run as

    python benchmarks/fingerprint.py [NAME ...]

The result is merged into ``results/fingerprint.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness import machine, memory, save, table, worker

MOVES: list[tuple[str, dict[str, Any]]] = [
    ("untie", {}),
    ("fold-shifts", {}),
    ("fold-scales", {}),
    ("fold-value-bias", {}),
    ("center", {"norm": "rms"}),
    ("rotate", {"space": "all"}),
    ("permute", {"signs": True}),
    ("rescale", {"mode": "random"}),
]
_TEXT = {
    "vocab_size": 499, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}
_GPT = {"vocab_size": 499, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_TEXT, "ffn_dim": 160, "word_embed_proj_dim": 64}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GROUPED),
}
REAL = ("minilm", "whisper-tiny.en", "gemma-3-270m")
BITS = (16, 8, 4)


def tiny(name: str, seed: int, out: Path) -> Path:
    import transformers

    config, cls, fields = TINY[name]
    torch.manual_seed(seed)
    made = getattr(transformers, cls)(getattr(transformers, config)(architectures=[cls], **fields)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    made.save_pretrained(out)
    return out


def rounded(source: Path, out: Path, bits: int) -> Path:
    """Every matrix rounded: to bfloat16, or to so many bits with one scale for each row."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        held = {name: _round(value, bits).contiguous() for name, value in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    return out


def _round(value: torch.Tensor, bits: int) -> torch.Tensor:
    if value.dim() < 2 or not value.is_floating_point():
        return value
    if bits == 16:
        return value.bfloat16().to(value.dtype)
    rows = value.float().reshape(value.shape[0], -1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return ((rows / scale).round() * scale).reshape(value.shape).to(value.dtype)


def run_case(name: str) -> dict[str, Any]:
    """All fingerprints of one model and its disguises, as JSON lines by label."""
    from regauge.api import resolve, rewrite
    from regauge.provenance import fingerprint

    with tempfile.TemporaryDirectory(prefix="fingerprint-") as folder:
        work = Path(folder)
        source = resolve(f"packaged:{name}") if name in REAL else tiny(name, 0, work / "source")
        begin = time.perf_counter()
        first = fingerprint(source)
        wall, most = time.perf_counter() - begin, memory()
        found = {"source": first}
        recipe = {"moves": [{"name": n, "optional": True, **o} for n, o in MOVES]}
        result = rewrite(source, work / "moved", recipe, dtype=torch.float32, seed=11)
        found["moved"] = fingerprint(work / "moved")
        for bits in BITS:
            at = rounded(work / "moved", work / f"bits{bits}", bits)
            found[f"{bits} bit"] = fingerprint(at, run=False)
            shutil.rmtree(at)
        if name in TINY:
            found["twin"] = fingerprint(tiny(name, 1, work / "twin"), run=False)
        moves = list(dict.fromkeys(item["move"] for item in result.rewrite.recipe))
    return {
        "fingerprints": {label: f.to_json() for label, f in found.items()},
        "seconds": round(wall, 1),
        "peak_mb": round(most),
        "bytes": len(first.to_json()),
        "vector_bytes": int(first.vector.nbytes),
        "parameters": first.parameters,
        "products": dict(first.details["products"]),
        "missing": len(first.details["missing"]),
        "moves": moves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=[*TINY, *REAL])
    parser.add_argument("--worker")
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(run_case(given.worker)))
        return
    from regauge.provenance import Fingerprint, Index, distance, same_function

    host = machine()
    cases = {name: worker(__file__, name) for name in given.names}
    held = {
        (name, label): Fingerprint.from_json(text)
        for name, case in cases.items()
        for label, text in case.pop("fingerprints").items()
    }
    with tempfile.TemporaryDirectory() as folder, Index.open(Path(folder) / "db", create=True) as index:
        index.add((f"{name}/{label}", f) for (name, label), f in held.items() if label in ("source", "twin"))
        rows: list[list[str]] = []
        for name, case in cases.items():
            mine = {label: f for (other, label), f in held.items() if other == name}
            disguises = [label for label in mine if label not in ("source", "twin")]
            case["distance"] = {
                label: distance(mine["source"], f) for label, f in mine.items() if label != "source"
            }
            case["same function"] = same_function(mine["source"], mine["moved"])
            case["found first"] = {
                label: index.search(mine[label], 1)[0].name == f"{name}/source" for label in disguises
            }
            others = [f for (other, _), f in held.items() if other != name]
            case["nearest other"] = min((distance(mine["source"], f) for f in others), default=None)
            case["machine"] = host
            rows.append(
                [
                    name,
                    *(f"{case['distance'].get(label, float('nan')):.1e}" for label in ("moved", "16 bit")),
                    *(
                        f"{case['distance'].get(label, float('nan')):.3f}"
                        for label in ("8 bit", "4 bit", "twin")
                    ),
                    f"{case['nearest other'] or float('nan'):.2f}",
                    str(all(case["found first"].values())),
                    f"{case['seconds']:.0f} s",
                    f"{case['peak_mb']} MB",
                    f"{case['bytes']} B",
                ]
            )
    pairs = itertools.combinations([key for key in held if key[1] in ("source", "twin")], 2)
    closest = min((distance(held[a], held[b]) for a, b in pairs), default=None)
    head = [
        "model",
        "moved",
        "16 bit",
        "8 bit",
        "4 bit",
        "twin",
        "nearest other",
        "first",
        "time",
        "memory",
        "size",
    ]
    print(table(head, rows))
    print(f"closest pair of different models: {closest}")
    save("fingerprint", cases)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
