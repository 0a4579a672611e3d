"""EvoNorm against a reference written position by position, and its known special cases."""

from __future__ import annotations

import math
import statistics as numbers

import pytest
import torch
from torch import nn

from norm_steps import near, randn
from regauge.errors import Refused
from regauge.nn import Affine
from regauge.nn.evonorm import EvoNormB0, EvoNormS0


def generic(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=50 + number))
    return layer


def variance(values: torch.Tensor, unbiased: bool) -> float:
    values = values.flatten().tolist()
    return numbers.variance(values) if unbiased else numbers.pvariance(values)


def b0(layer: EvoNormB0, x: torch.Tensor, batch: list[float]) -> torch.Tensor:
    y = torch.empty_like(x)
    for n, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        value, eps = float(x[n, c, h, w]), layer.eps
        own = layer.v.tolist()[c] * value + math.sqrt(variance(x[n, c], layer.unbiased) + eps)
        z = value / max(math.sqrt(batch[c] + eps), own)
        y[n, c, h, w] = layer.weight.tolist()[c] * z + layer.bias.tolist()[c]
    return y


def s0(layer: EvoNormS0, x: torch.Tensor) -> torch.Tensor:
    y, size = torch.empty_like(x), x.shape[1] // layer.groups
    for n, c, h, w in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        value = float(x[n, c, h, w])
        group = x[n, c // size * size : (c // size + 1) * size]
        gate = 1 / (1 + math.exp(-layer.v.tolist()[c] * value))
        z = value * gate / math.sqrt(variance(group, layer.unbiased) + layer.eps)
        y[n, c, h, w] = layer.weight.tolist()[c] * z + layer.bias.tolist()[c]
    return y


@pytest.mark.parametrize("unbiased", [False, True])
def test_b0(unbiased: bool) -> None:
    layer = generic(EvoNormB0(3, 1e-3, 0.8, unbiased=unbiased, dtype=torch.float64))
    x = randn(2, 3, 3, 2)
    batch = [variance(x[:, c], False) for c in range(3)]
    near(layer(x), b0(layer, x, batch), "training")
    moved = [0.8 + 0.2 * value for value in batch]
    near(layer.moving_variance, torch.tensor(moved, dtype=torch.float64), "moving variance")
    near(layer.eval()(x), b0(layer, x, moved), "evaluation")


@pytest.mark.parametrize("unbiased", [False, True])
def test_s0(unbiased: bool) -> None:
    layer = generic(EvoNormS0(6, 4, 1e-3, unbiased=unbiased, dtype=torch.float64))
    assert layer.groups == 3
    x = randn(2, 6, 3, 2)
    near(layer(x), s0(layer, x), "training")
    near(layer.eval()(x), s0(layer, x), "evaluation")


def test_s0_is_swish_of_a_group_norm_without_mean_where_the_mean_is_zero() -> None:
    x = randn(2, 6, 3, 2).unflatten(1, (3, 2))
    x = (x - x.mean((2, 3, 4), keepdim=True)).flatten(1, 2)
    layer = EvoNormS0(6, 3, dtype=torch.float64)
    near(layer(x), nn.functional.group_norm(x, 3) * torch.sigmoid(x), "S0")


def test_b0_is_invariant_to_scales_of_channels_in_training() -> None:
    """x[:, c] → s[c]·x[:, c], v as it is, but for eps."""
    layer = generic(EvoNormB0(3, 1e-14, dtype=torch.float64))
    x, scale = randn(4, 3, 3, 2), torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    near(layer(x * scale[:, None, None]), layer(x), "scaled", 1e-11)


def test_a_map_of_one_position_has_no_variance_of_its_own() -> None:
    y = EvoNormB0(3, dtype=torch.float64).eval()(torch.full((2, 3, 1, 1), 10.0, dtype=torch.float64))
    assert torch.allclose(y, torch.full_like(y, 10 / (10 + math.sqrt(1e-5))))


@pytest.mark.parametrize("form", [EvoNormB0, EvoNormS0])
def test_what_folds_and_what_is_refused(form: type[nn.Module]) -> None:
    with pytest.raises(Refused, match="does not collapse"):
        form(4).eval().fold()
    with pytest.raises(Refused, match="no existing norm"):
        form.upgrade_from(nn.BatchNorm2d(4))
    plain = generic(form(4, nonlinearity=False, dtype=torch.float64))
    with pytest.raises(Refused, match="training mode"):
        plain.fold()
    folded = plain.eval().fold()
    assert isinstance(folded, Affine)
    x = randn(2, 4, 3, 3)
    near(folded(x), plain(x), "folded")
    near(plain(x), x * plain.weight[:, None, None] + plain.bias[:, None, None], "affine")
    assert not form(4, zero_gain=True)(x.float()).any()
