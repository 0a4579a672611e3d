"""PowerNorm against the authors' training steps, and by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from norm_steps import check_steps, golden, load, near, randn, same_state
from regauge.errors import BadInput, Refused
from regauge.nn.powernorm import GroupScaling, PowerNorm

CASES = {name: case for name, case in golden("powernorm").items() if name != "meta"}


def names(name: str) -> str:
    return name


def layer_of(case: dict[str, Any]) -> PowerNorm:
    config = case["config"]
    layer = PowerNorm(
        config["num_features"],
        config["group_num"],
        config["eps"],
        config["alpha_fwd"],
        config["alpha_bkw"],
        config["warmup_iters"],
        dtype=case["init"]["weight"].dtype,
    )
    load(layer, case["init"], names)
    return layer


def mask_of(step: dict[str, Any]) -> torch.Tensor | None:
    """The authors' mask is [batch, positions] beside x [positions, batch, c]."""
    return step["pad_mask"].T if "pad_mask" in step else None


@pytest.mark.parametrize("name", sorted(CASES))
def test_steps_are_those_of_the_authors(name: str) -> None:
    case = CASES[name]
    layer = layer_of(case)
    check_steps(layer, case, names, lambda step, x: layer(x, mask_of(step)))
    same_state(layer, case["eval"]["state"], names, "at the end")
    near(layer(case["eval"]["x"]), case["eval"]["y"], "evaluation")
    near(layer.fold()(case["eval"]["x"]), case["eval"]["y"], "folded")


def test_groups_are_scaled_apart() -> None:
    """u of a group does not change when another group, or the size of its own, does."""
    x = randn(2, 3, 6)
    u = GroupScaling(3, 0.0)(x)
    factor = torch.tensor([1.0, 1.0, 5.0, 5.0, 0.1, 0.1], dtype=torch.float64)
    assert torch.allclose(GroupScaling(3, 0.0)(x * factor), u, rtol=1e-14)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        assert torch.allclose(u[..., part], nn.functional.rms_norm(x[..., part], (2,), eps=0.0), rtol=1e-14)


def test_the_running_gradient_reaches_the_exact_one() -> None:
    """With the same batch again and again, the gradient tends to that of u / sqrt(mean u² + eps)."""
    layer = PowerNorm(6, 2, warmup=0, dtype=torch.float64)
    x, out = randn(8, 4, 6), randn(8, 4, 6, seed=1)
    for _ in range(400):
        given = x.clone().requires_grad_()
        layer(given).backward(out)
    exact = x.clone().requires_grad_()
    u = layer.scaling(exact)
    (u / torch.sqrt((u * u).mean((0, 1)) + layer.eps)).backward(out)
    assert torch.allclose(given.grad, exact.grad, rtol=0, atol=1e-4)


def test_an_rms_norm_becomes_one_in_evaluation_mode() -> None:
    norm = nn.RMSNorm(6, 1e-3, dtype=torch.float64).eval()
    with torch.no_grad():
        norm.weight.copy_(randn(6))
    layer = PowerNorm.upgrade_from(norm, warmup=7)
    assert not layer.training
    assert layer.warmup == 7
    x = randn(4, 3, 6, seed=2)
    assert torch.allclose(layer(x), norm(x), rtol=0, atol=1e-14)
    assert torch.allclose(layer.fold()(x), norm(x), rtol=0, atol=1e-14)


def test_what_is_refused() -> None:
    norm = nn.RMSNorm(6, 1e-5)
    with pytest.raises(Refused, match="evaluation mode only"):
        PowerNorm.upgrade_from(norm)
    with pytest.raises(Refused, match="one group"):
        PowerNorm.upgrade_from(norm.eval(), groups=2)
    with pytest.raises(Refused, match="same eps"):
        PowerNorm.upgrade_from(norm.eval(), eps=1e-3)
    with pytest.raises(Refused, match="cannot become"):
        PowerNorm.upgrade_from(nn.LayerNorm(6).eval())
    with pytest.raises(BadInput, match="divide"):
        PowerNorm(6, 4)
    with pytest.raises(BadInput, match="mask"):
        PowerNorm(6)(torch.zeros(5, 3, 6), torch.zeros(3, 5))


def test_one_group_folds_to_a_plain_norm() -> None:
    folded = PowerNorm(6, 1).eval().fold()
    assert isinstance(folded[0], nn.RMSNorm)
    assert isinstance(PowerNorm(6, 2).eval().fold()[0], GroupScaling)
