"""What growth is for: a small language model that learns on as a larger one, from the loss it had.

A byte-level Llama is trained on the King James Bible, then grown in every direction of its width by regauge,
and trained on. Four models go on from the same point with the same batches and the same schedule:

    small   not grown
    pairs   grown; new entries in pairs that cancel (residual stream and rotary keys: silent zeros)
    zero    grown; the silent side of every index set is zero
    naive   as pairs, but every new entry of a matrix is drawn, so that nothing is silent, and eps stays as
            it was; factors on gains and keys are kept

The loss is that of held-out text, in nats per byte. All optimisers start anew, with a short warm-up.

    python benchmarks/growth.py            # 425 s on one thread of a busy machine
    python benchmarks/growth.py --steps 20 # does it run; nothing is written
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import regauge
from harness import machine, save, table
from regauge.packaged.text import text

LENGTH, BATCH = 64, 16
EVERY = 25
FIRST = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
GROWTH: tuple[dict[str, Any], ...] = (
    {"name": "grow", "residual": "144", "neurons": "384", "heads": "3", "keys": "24", "values": "24"},
)
"""Moves that grow the model; a move that adds layers belongs after this one."""


def data(characters: int = 1_000_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and to test on, int64, cut into rows of LENGTH + 1."""
    held = torch.tensor(list(text(characters).encode("ascii", "replace")))
    rows = held[: len(held) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return rows[:-96], rows[-96:]


def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each next byte."""
    logits = model(input_ids=rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def evaluate(model: Any, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return sum(float(loss(model, part)) for part in rows.split(32)) / math.ceil(len(rows) / 32)


def train(model: Any, rows: torch.Tensor, test: torch.Tensor, steps: int, seed: int) -> list[list[float]]:
    """[step, loss on held-out text] every EVERY steps, the first before any."""
    random = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm, 0.1 + 0.9 * max(0.0, 1 - (step - warm) / max(1, steps - warm))),
    )
    curve = [[0, evaluate(model, test)]]
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=random)]
        optimiser.zero_grad()
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % EVERY == 0 or step == steps:
            curve.append([step, evaluate(model, test)])
    return curve


def grown(source: Path, out: Path, new: str, seed: int) -> tuple[Any, float]:
    """The model of a directory grown, and the relative error of its certificate in float64."""
    moves = [{**move, "new": new} if move["name"] == "grow" else move for move in GROWTH]
    result = regauge.rewrite(source, out, {"moves": moves}, seed=seed)
    assert result.certificate.evidence.exact is not None
    return regauge.load(out), result.certificate.evidence.exact.relative


def naive(one: Any, other: Any) -> Any:
    """A model of the grown shapes: what two growths with different seeds agree in, the rest drawn."""
    import copy

    model = copy.deepcopy(one)
    torch.manual_seed(3)
    with torch.no_grad():
        for held, a, b in zip(model.parameters(), one.parameters(), other.parameters(), strict=True):
            if a.dim() > 1:
                old = (a == b) & (a != 0)
                held.copy_(torch.where(old, a, torch.randn_like(a) * a[old].std()))
    model.config.rms_norm_eps = FIRST_EPS
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = FIRST_EPS
    return model


FIRST_EPS = 1e-6


def run(steps: int) -> dict[str, Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, test = data()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **FIRST, vocab_size=128, max_position_embeddings=128, rms_norm_eps=FIRST_EPS,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    small = transformers.LlamaForCausalLM(config)
    start = time.perf_counter()
    before = train(small, rows, test, steps, seed=1)
    print(f"trained: {before[-1][1]:.4f} after {steps} steps, {time.perf_counter() - start:.0f} s")
    models: dict[str, Any] = {}
    exact: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small.save_pretrained(place / "small")
        for new, seed in (("pairs", 1), ("zero", 2)):
            models[new], exact[new] = grown(place / "small", place / new, new, seed)
    models = {"small": small, **models, "naive": naive(models["pairs"], models["zero"])}
    curves = {name: train(model.train(), rows, test, steps, seed=2) for name, model in models.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {
        "machine": machine(),
        "text": "kjv",
        "first": FIRST,
        "growth": [dict(move) for move in GROWTH],
        "steps": steps,
        "bytes_per_step": LENGTH * BATCH,
        "parameters": sizes,
        "relative_error_float64": exact,
        "loss_before": before,
        "loss_after": curves,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    found = run(steps)
    before = found["loss_before"][-1][1]
    rows = [
        [
            name,
            f"{found['parameters'][name]:,}",
            *(f"{curve[0][1]:.4f}", f"{curve[0][1] - before:+.1e}", f"{curve[-1][1]:.4f}"),
        ]
        for name, curve in found["loss_after"].items()
    ]
    print(table(["model", "parameters", "loss after growth", "change", f"after {steps} more steps"], rows))
    print(f"{found['seconds']} s")
    if steps >= 300:
        save("growth", {"kjv": found})


if __name__ == "__main__":
    main()
