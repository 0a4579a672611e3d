"""Normalised logistic regression, the Step Law, and the command that prints it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from regauge.cli import app
from regauge.errors import BadInput
from regauge.hf import load_meta
from regauge.optim import logistic_step, non_embedding, separate, step_law
from zoo.configs import CONFIGS

GOLDEN: dict[str, Any] = torch.load(Path(__file__).parent / "data" / "step_law_golden.pt", weights_only=True)

# --- logistic regression -------------------------------------------------------------------------------


def worst_case(n: int = 1000) -> tuple[Tensor, Tensor]:
    """One sample (0.5, −1) against n − 1 copies of (−0.5, −1)."""
    features = torch.full((n, 2), -1.0, dtype=torch.float64)
    features[:, 0] = -0.5
    features[0, 0] = 0.5
    labels = -torch.ones(n)
    labels[0] = 1
    return features, labels


@pytest.mark.parametrize(
    ("step", "normalised", "steps"),
    [(100.0, True, 2), (10.0, True, 2), (1.0, True, 16), (100.0, False, 308), (1.0, False, 7313)],
)
def test_steps_on_the_worst_case_of_the_paper(step: float, normalised: bool, steps: int) -> None:
    done = separate(*worst_case(), step, normalised=normalised)
    assert (done.steps, done.wrong) == (steps, 0)


def test_the_limits_of_the_step() -> None:
    features, labels = worst_case(20)
    weights = torch.tensor([0.3, -0.7], dtype=torch.float64)
    samples = features * labels[:, None]
    small = weights.clone().requires_grad_()
    loss = torch.nn.functional.softplus(-(samples @ small)).mean()
    loss.backward()
    plain = logistic_step(weights, samples, 0.1, normalised=False)
    assert torch.allclose(plain, weights - 0.1 * small.grad, atol=1e-15)
    chance = torch.sigmoid(-(samples @ weights)).mean()
    assert torch.allclose(
        logistic_step(weights, samples, 0.1), weights - 0.1 * small.grad / chance, atol=1e-15
    )
    wrong = samples[samples @ weights < 0].mean(0)
    assert torch.allclose(logistic_step(weights, samples, math.inf), weights + wrong, atol=1e-15)


def test_large_margins_do_not_divide_zero_by_zero() -> None:
    samples = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    moved = logistic_step(torch.tensor([2000.0, 3000.0]), samples, 1.0)
    assert moved.tolist() == [2001.0, 3000.0]


def test_what_separate_refuses_and_where_it_stops() -> None:
    features, labels = worst_case(5)
    assert separate(features, labels, 1.0, limit=1).wrong == 1
    for wrong in ((features, labels[:2], 1.0), (features, labels * 2, 1.0), (features, labels, 0.0)):
        with pytest.raises(BadInput):
            separate(*wrong)


# --- Step Law ------------------------------------------------------------------------------------------


def test_the_authors_predictions() -> None:
    for point in GOLDEN["points"]:
        found = step_law(point["N"], point["D"])
        assert found.lr == pytest.approx(point["lr"], rel=1e-12)
        assert found.batch_tokens == pytest.approx(point["bs_tokens"], rel=1e-12)


def test_the_rounded_law_of_the_paper() -> None:
    found = step_law(5e8, 2e10)
    assert found.lr == pytest.approx(1.79 * 5e8**-0.713 * 2e10**0.307, rel=0.02)
    assert found.batch_tokens == pytest.approx(0.58 * 2e10**0.571, rel=0.01)
    assert found.final_lr == 1e-5


def test_warnings_outside_of_what_was_measured() -> None:
    assert step_law(5e8, 2e10).warnings == ()
    assert ["parameters" in text and "above" in text for text in step_law(7e9, 2e10).warnings] == [True]
    assert ["tokens" in text and "below" in text for text in step_law(5e8, 1e9).warnings] == [True]
    assert len(step_law(1e6, 1e13).warnings) == 2
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BadInput, match="positive"):
            step_law(wrong, 1e10)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("llama-tied", {"model.embed_tokens.weight"}),
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("gemma3", {"model.embed_tokens.weight"}),
    ],
)
def test_parameters_without_embeddings(name: str, tables: set[str]) -> None:
    held = load_meta(CONFIGS[name]())
    found = non_embedding(held.model, held.inputs)
    sizes = {key: value.numel() for key, value in held.model.named_parameters()}
    assert set(found.tables) == tables
    assert found.total == sum(sizes.values())
    assert found.rest == sum(size for key, size in sizes.items() if key not in tables)


# --- regauge lr ----------------------------------------------------------------------------------------


def lr(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["lr", *arguments])


def test_the_command_with_numbers() -> None:
    done = lr("--params", "500M", "--tokens", "2e10", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == step_law(5e8, 2e10).to_dict()
    shown = lr("--params", "7B", "--tokens", "1.5T").stdout
    assert f"{step_law(7e9, 1.5e12).lr:.3e}" in shown
    assert shown.count("warning") == 2


def test_the_command_with_a_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIGS["llama"]().to_json_string())
    held = load_meta(CONFIGS["llama"]())
    count = non_embedding(held.model, held.inputs)
    done = lr(str(tmp_path), "--tokens", "20B", "--json")
    found = json.loads(done.stdout)
    assert (found["parameters"], found["total_parameters"]) == (count.rest, count.total)
    assert set(found["embeddings"]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert f"{count.rest:,} of {count.total:,}" in lr(str(tmp_path), "--tokens", "20B").stdout


@pytest.mark.parametrize(
    "arguments",
    [("--tokens", "1e10"), ("--params", "1e9"), ("--params", "many", "--tokens", "1e10"),
     ("x", "--params", "1e9", "--tokens", "1e10"), ("--params", "0", "--tokens", "1e10")],
)  # fmt: skip
def test_the_command_refuses(arguments: tuple[str, ...]) -> None:
    assert lr(*arguments).exit_code == 2
