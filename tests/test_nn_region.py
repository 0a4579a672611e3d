"""Region Normalization against batch norms of images whose other region is filled by the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from norm_steps import near, randn
from regauge.errors import BadInput, Refused
from regauge.nn.region import RegionNormB, RegionNormL, region_norm


def square(batch: int = 2, height: int = 6, width: int = 5) -> torch.Tensor:
    mask = torch.zeros(batch, 1, height, width, dtype=torch.float64)
    mask[0, :, 1:4, 2:] = 1
    mask[-1, :, :2] = 1
    return mask


def filled(x: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    """Batch norm of x with the mean of the region outside of it, times sqrt(r / n)."""
    inside = mask.bool().expand_as(x)
    rows = [x[:, c][inside[:, c]] for c in range(x.shape[1])]
    mean = torch.stack([row.mean() for row in rows])[:, None, None]
    whole = functional.batch_norm(torch.where(inside, x, mean), None, None, training=True, eps=eps)
    return whole * mask.mean().sqrt()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_a_region_is_normalised_by_itself(eps: float) -> None:
    x, mask = randn(2, 3, 6, 5), square()
    near(region_norm(x, mask, eps), filled(x, mask, eps), "region")
    for c in range(3):
        values = region_norm(x, mask, 1e-15)[:, c][mask[:, 0].bool()]
        assert abs(values.mean()) < 1e-12
        assert values.var(unbiased=False) == pytest.approx(1)
    assert not region_norm(x, mask, eps)[(mask == 0).expand_as(x)].any()
    assert not region_norm(x, torch.zeros_like(mask), eps).any()


def basic(**options: bool) -> RegionNormB:
    layer = RegionNormB(3, dtype=torch.float64, **options)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(3, seed=20 + number))
    return layer


def test_each_region_has_its_own_gain_and_shift() -> None:
    layer, x, mask = basic(), randn(2, 3, 6, 5), square()
    y = layer(x, mask)
    for side, part in (("foreground", mask), ("background", 1 - mask)):
        gain, shift = (getattr(layer, f"{side}_{kind}")[:, None, None] for kind in ("gain", "shift"))
        near(part * y, part * (filled(x, part, 1e-5) * (1 + gain) + shift), side)


def test_as_published_a_shift_of_the_foreground_moves_the_background() -> None:
    x, mask = randn(2, 3, 6, 5), square()
    difference = basic(shift_everywhere=True)(x, mask) - basic()(x, mask)
    layer = basic()
    wanted = mask * layer.background_shift[:, None, None] + (1 - mask) * layer.foreground_shift[:, None, None]
    near(difference, wanted, "difference")


def test_one_region_is_a_batch_norm() -> None:
    x, layer = randn(4, 3, 5, 5), RegionNormB(3, dtype=torch.float64)
    batch = nn.BatchNorm2d(3, affine=False, dtype=torch.float64)
    near(layer(x), batch(x), "no mask")
    near(layer(x, torch.zeros(4, 1, 5, 5)), batch(x), "all background")
    near(layer.eval()(x), batch(x), "evaluation is as training")


def test_each_region_has_its_own_scale_and_shift_of_the_input() -> None:
    """x → s·x + a in one region, s > 0, changes nothing, but for eps."""
    x, mask = randn(2, 3, 6, 5), square()
    layer = RegionNormB(3, 1e-15, dtype=torch.float64)
    changed = torch.where(mask.bool(), 3 * x + 2, 0.5 * x - 1)
    near(layer(changed, mask), layer(x, mask), "changed", 1e-12)


def test_the_mask_is_resized() -> None:
    x, layer = randn(2, 3, 8, 8), basic()
    small = square(2, 4, 4)
    near(layer(x, small), layer(x, small.repeat_interleave(2, 2).repeat_interleave(2, 3)), "resized")
    with pytest.raises(BadInput, match="mask"):
        layer(x, small[:, 0])


def test_the_learned_mask() -> None:
    """By unfolded windows in place of convolutions; the threshold cuts where some are above, some below."""
    layer = RegionNormL(3, 0.5, 3, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=30 + number))
    x = randn(2, 3, 6, 5)

    def window(conv: nn.Conv2d, image: torch.Tensor) -> torch.Tensor:
        found = conv.weight.flatten(1) @ functional.unfold(image, 3, padding=1)
        return found.unflatten(2, (6, 5)) + (0 if conv.bias is None else conv.bias)

    a = torch.sigmoid(window(layer.attention, torch.stack((x.mean(1), x.max(1).values), 1)))
    mask = (a >= 0.5).double()
    assert 0 < mask.mean() < 1
    z = filled(x, mask, 1e-5) + filled(x, 1 - mask, 1e-5)
    near(layer(x), z * (1 + window(layer.gain, a)) + window(layer.shift, a), "learned")
    layer(x).sum().backward()
    assert layer.attention.weight.grad.abs().max() > 0
    with pytest.raises(BadInput, match="odd"):
        RegionNormL(3, kernel=4)


def test_nothing_folds() -> None:
    for layer in (RegionNormB(3), RegionNormL(3)):
        with pytest.raises(Refused, match="does not collapse"):
            layer.eval().fold()
