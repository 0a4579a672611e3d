"""Unified Normalization against the authors' training steps, and by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from norm_steps import check_steps, golden, load, near, randn, same_state
from regauge.errors import BadInput, Refused
from regauge.nn import Affine
from regauge.nn.unified import UnifiedNorm

CASES = {name: case for name, case in golden("unified_normalization").items() if name != "meta"}


def names(name: str) -> str:
    return name


def layer_of(case: dict[str, Any]) -> UnifiedNorm:
    config = case["config"]
    window = config["window_size"]
    layer = UnifiedNorm(
        config["channels"],
        window if isinstance(window, int) else tuple(window),
        config["warmup_iters"],
        config["outlier_filtration"],
        config["eps"],
        config["momentum"],
        dtype=case["init"]["weight"].dtype,
    )
    load(layer, case["init"], names)
    return layer


@pytest.mark.parametrize("name", sorted(CASES))
def test_steps_are_those_of_the_authors(name: str) -> None:
    case = CASES[name]
    layer = layer_of(case)
    layer.iters.fill_(case["config"]["start_iter"])
    check_steps(layer, case, names, lambda step, x: layer(x, step.get("pad_mask")))
    same_state(layer, case["eval"]["state"], names, "at the end")
    near(layer(case["eval"]["x"]), case["eval"]["y"], "evaluation")
    near(layer.fold()(case["eval"]["x"]), case["eval"]["y"], "folded")


def test_the_filter_keeps_an_outlying_batch_out_of_the_window() -> None:
    layers = [
        UnifiedNorm(5, 4, warmup=0, filtered=filtered, dtype=torch.float64) for filtered in (False, True)
    ]
    for layer in layers:
        for number in range(6):
            layer(torch.arange(1.0, 6.0) * randn(64, 5, seed=number))
        layer(1000 * randn(64, 5, seed=9))
    plain, filtered = layers
    assert plain.skip_counter == 0
    assert filtered.skip_counter == 1
    assert plain.buffer_x2.max() > 1e4
    assert filtered.buffer_x2.max() < 50


def test_the_filter_waits_for_a_full_window() -> None:
    """An empty row of the window would make every geometric mean 0, and every batch an outlier."""
    layer = UnifiedNorm(5, 4, warmup=0, filtered=True, dtype=torch.float64)
    for number in range(4):
        layer(1 + 0.01 * randn(64, 5, seed=number))
    assert layer.skip_counter == 0


def test_a_window_of_one_uses_the_batch_and_its_exact_gradient() -> None:
    """y = x / sqrt(mean x² + eps): the gradient is that of the formula."""
    layer = UnifiedNorm(5, 1, dtype=torch.float64)
    x, out = randn(6, 3, 5), randn(6, 3, 5, seed=1)
    given, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(given).backward(out)
    (exact / torch.sqrt((exact * exact).mean((0, 1)) + layer.eps)).backward(out)
    assert torch.allclose(given.grad, exact.grad, rtol=0, atol=1e-13)


def test_what_it_folds_to_and_what_is_refused() -> None:
    layer = UnifiedNorm(5)
    with pytest.raises(Refused, match="training mode"):
        layer.fold()
    folded = layer.eval().fold()
    assert isinstance(folded, Affine)
    assert folded.axis == -1
    with pytest.raises(Refused, match="no existing norm"):
        UnifiedNorm.upgrade_from(torch.nn.LayerNorm(5))
    with pytest.raises(BadInput, match="window"):
        UnifiedNorm(5, (0, 3))
