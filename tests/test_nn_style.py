"""AdaIN and the colouring of GDWCT, against references written sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from norm_steps import near, randn
from regauge.errors import BadInput, Refused
from regauge.nn import Affine
from regauge.nn.style import AdaIN, FixedStyle, GroupColouring


def test_adain_gives_the_content_the_moments_of_the_style() -> None:
    content, style = randn(2, 3, 6, 5), 3 * randn(2, 3, 4, 4, seed=1) + 2
    y = AdaIN(0.0)(content, style)
    near(y.mean((2, 3)), style.mean((2, 3)), "mean")
    near(y.std((2, 3), unbiased=False), style.std((2, 3), unbiased=True), "spread")
    near(AdaIN(0.0)(2 * content + 5, style), y, "scaled and shifted")


def test_adain_is_an_instance_norm_with_the_style_as_affine() -> None:
    content, style = randn(2, 3, 6, 5), randn(1, 3, 4, 4, seed=1)
    plain = nn.functional.instance_norm(content, eps=1e-2)
    wanted = torch.stack(
        [plain[:, c] * style[0, c].flatten().std() + style[0, c].mean() for c in range(3)], 1
    )
    near(AdaIN(1e-2)(content, style), wanted, "instance norm")
    layer = FixedStyle(AdaIN(1e-2), style)
    with pytest.raises(Refused, match="training mode"):
        layer.fold()
    folded = layer.eval().fold()
    assert [type(module) for module in folded] == [nn.InstanceNorm2d, Affine]
    near(folded(content), wanted, "folded")


def colouring(size: int = 6, groups: int = 3) -> GroupColouring:
    torch.manual_seed(0)
    return GroupColouring(size, groups, 8, dtype=torch.float64)


def test_colouring_sample_by_sample() -> None:
    """The outer products of the columns of A over their lengths, added up: X = Σ_j a_j·a_jᵀ / |a_j|."""
    layer, content, style = colouring(), randn(2, 6, 4, 3), randn(2, 6, 1, 1, seed=1)
    y, share = layer(content, style), float(layer.share.detach())
    assert share == pytest.approx(0.6)
    mean = content.mean((0, 2, 3))
    for sample in range(2):
        s = style[sample, :, 0, 0]
        for group in range(3):
            part = slice(2 * group, 2 * group + 2)
            a = layer.colouring(s[part]).reshape(2, 2)
            x = sum(torch.outer(a[:, j], a[:, j]) / a[:, j].norm() for j in range(2))
            for h, w in torch.cartesian_prod(torch.arange(4), torch.arange(3)).tolist():
                value = content[sample, part, h, w]
                wanted = share * (x @ (value - mean[part]) + layer.mean(s)[part]) + (1 - share) * value
                near(y[sample, part, h, w], wanted, f"{sample}, {group}, {h}, {w}")


def test_the_penalties() -> None:
    layer, content, style = colouring(), randn(2, 6, 4, 3), randn(2, 6, seed=1)
    whitening, directions = layer.penalties(content, style)
    rows = content.movedim(1, 0).flatten(1)
    one = torch.eye(2, dtype=torch.float64)
    wanted = torch.stack([(torch.cov(rows[i : i + 2]) + 1e-5 * one - one).abs() for i in (0, 2, 4)]).mean()
    near(whitening, wanted, "whitening")
    a = torch.stack([layer.colouring(s[i : i + 2]).reshape(2, 2) for s in style for i in (0, 2, 4)])
    near(directions, (nn.functional.normalize(a, dim=1) - one).abs().mean(), "directions")


def test_a_column_of_zeros_adds_nothing() -> None:
    layer = colouring()
    with torch.no_grad():
        layer.colouring[-1].weight.zero_()
        layer.colouring[-1].bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    content, style = randn(2, 6, 4, 3).requires_grad_(), randn(2, 6, seed=1)
    y = layer(content, style)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_the_share_is_clamped() -> None:
    layer = colouring()
    for value, wanted in ((1.5, 1.0), (-0.5, 0.0), (0.25, 0.25)):
        layer.share.data.fill_(value)
        layer.clamp()
        assert float(layer.share.detach()) == wanted


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="divide"):
        GroupColouring(6, 4)
    with pytest.raises(BadInput, match="another size"):
        colouring()(randn(2, 6, 3, 3), randn(2, 5))
    with pytest.raises(BadInput, match="does not fit"):
        AdaIN()(randn(2, 6, 3, 3), randn(3, 6, 3, 3))
    with pytest.raises(Refused, match="does not collapse"):
        AdaIN().eval().fold()
    with pytest.raises(Refused, match="gain and a shift"):
        FixedStyle(colouring(), randn(1, 6)).eval().fold()
    with pytest.raises(Refused, match="gain and a shift"):
        FixedStyle(AdaIN(), randn(2, 6, 3, 3)).eval().fold()
