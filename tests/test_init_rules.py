"""Fixup, IDInit, convolution-aware and VI3NR weights follow their rules."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regauge.errors import BadInput, Refused
from regauge.nn import init
from regauge.nn.init import gaussian
from regauge.nn.init.vi3nr import backward_ratio
from regauge.nn.init.weights import orthonormal

DATA = Path(__file__).parent / "data"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def golden(name: str) -> dict:
    return torch.load(DATA / f"{name}_golden.pt", weights_only=True)


# --- all of them --------------------------------------------------------------------------------------

INITIALISERS = {
    "idi": lambda w, g: init.idi_(w, noise=1e-6, generator=g),
    "conv_aware": lambda w, g: init.conv_aware_(w, generator=g),
    "conv_aware_real": lambda w, g: init.conv_aware_(w, spectrum="real", generator=g),
    "vi3nr": lambda w, g: init.vi3nr_(w, F.gelu, generator=g),
    "vi3nr_uniform": lambda w, g: init.vi3nr_(w, F.gelu, distribution="uniform", generator=g),
    "simplex": lambda w, g: init.simplex_(w.view(5, -1), rotated=True, generator=g),
    "fixup": lambda w, g: init.fixup_([[w, torch.empty(5, 5)]], generator=g),
    "log_step": lambda w, g: init.log_step_(w, generator=g),
}


@pytest.mark.parametrize("name", INITIALISERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_seed_gives_the_same_numbers_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Every dtype holds the rounded float64 values; nothing of the global generator is used."""
    exact = torch.full((5, 4, 3, 3), torch.nan, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        INITIALISERS[name](exact, seeded())
    other = torch.full((5, 4, 3, 3), torch.nan, dtype=dtype)
    before = torch.random.get_rng_state()
    INITIALISERS[name](other, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(other, exact.detach().to(dtype))
    assert exact.isfinite().all()
    INITIALISERS[name](other, seeded(1))
    assert not torch.equal(other, exact.detach().to(dtype)) or dtype == torch.bfloat16


def test_orthonormal_rows_are_uniform() -> None:
    q = torch.stack([orthonormal(2, 3, seeded(k)) for k in range(4000)])
    assert (q @ q.mT - torch.eye(2, dtype=torch.float64)).abs().max() < 1e-12
    assert q.mean(0).abs().max() < 0.05
    assert (q.square().mean(0) - 1 / 3).abs().max() < 0.03


# --- Fixup --------------------------------------------------------------------------------------------


def test_fixup_agrees_with_the_authors_network() -> None:
    """ResNet-20: nine blocks of two convolutions, standard deviations of what they draw."""
    stats = golden("fixup")["param_stats"]
    names = [name for name in stats if name.startswith("layer") and name.endswith("conv1.weight")]
    branches = [
        [torch.empty(stats[name]["shape"]), torch.empty(stats[name.replace("conv1", "conv2")]["shape"])]
        for name in names
    ]
    init.fixup_(branches, generator=seeded())
    assert len(branches) == 9
    for name, (first, last) in zip(names, branches, strict=True):
        n = first.numel()
        assert abs(float(first.std()) / stats[name]["std"] - 1) < 5 / math.sqrt(n)
        assert abs(first.square().mean() * first.shape[0] * 9 * 9 / 2 - 1) < 5 * math.sqrt(2 / n)
        assert not last.any()


def test_fixup_scales_with_depth_and_layers() -> None:
    assert init.fixup_scale(9, 2) == pytest.approx(1 / 3)
    assert init.fixup_scale(16, 3) == pytest.approx(0.5)
    layers = [nn.Linear(300, 200), nn.Linear(200, 400), nn.Linear(400, 100)]
    init.fixup_([layers], count=16, generator=seeded())
    for layer, fan in zip(layers, (200, 400), strict=False):
        assert float(layer.weight.detach().square().mean()) == pytest.approx(2 / fan * 0.25, rel=0.03)
    init.fixup_([layers], count=16, mode="fan_in", generator=seeded())
    assert float(layers[0].weight.detach().square().mean()) == pytest.approx(2 / 300 * 0.25, rel=0.03)
    assert not layers[2].weight.any()
    assert not any(layer.bias.any() for layer in layers)


def test_fixup_refuses_what_it_does_not_know() -> None:
    w = torch.empty(3, 3)
    for branches in ([[]], [[w], [w]], [[nn.ConvTranspose1d(2, 2, 3)]], [[torch.empty(3)]]):
        with pytest.raises(Refused):
            init.fixup_(branches)
    with pytest.raises(BadInput):
        init.fixup_([[w]], mode="fan")  # type: ignore[arg-type]


# --- IDInit -------------------------------------------------------------------------------------------


def test_idi_passes_features_on() -> None:
    x = torch.arange(1.0, 5)
    assert init.idi_(torch.empty(4, 4)).equal(torch.eye(4))
    assert (init.idi_(torch.empty(7, 4)) @ x).tolist() == [1, 2, 3, 4, 1, 2, 3]
    assert (init.idi_(torch.empty(3, 4), 2.0) @ x).tolist() == [2, 4, 6]
    noisy = init.idi_(torch.empty(200, 200, dtype=torch.float64), noise=1e-2, generator=seeded())
    assert float((noisy - torch.eye(200)).std()) == pytest.approx(1e-2, rel=0.02)


def test_idiz_cancels_repeated_features_and_leaves_no_unit_dead() -> None:
    x = torch.tensor([1.0, 2, 3, 5], dtype=torch.float64)
    wide = init.idiz_(torch.empty(6, 4, dtype=torch.float64), 1.0)
    assert (wide @ x).tolist() == [-1, -1, -2, 4, -1, -1]
    narrow = init.idiz_(torch.empty(3, 4, dtype=torch.float64), 1.0)
    assert (narrow @ x).tolist() == [1 - 5, 2 - 5, 3 - 5]
    for shape in ((6, 4), (3, 7), (3, 20), (4, 4), (5, 1), (3, 2, 3, 3)):
        w = init.idiz_(torch.empty(shape)).reshape(shape[0], -1)
        assert (w.abs().sum(1) > 0).all()
        assert w.abs().max() == pytest.approx(1e-6)
    repeated = torch.full((4,), 3.0, dtype=torch.float64)
    assert not (wide @ repeated).any()


def test_idi_keeps_all_taps_of_a_patch() -> None:
    """A 3×3 convolution with nine times the channels gives every tap of every channel."""
    x = torch.randn(1, 2, 6, 6, generator=seeded())
    w = init.idi_(torch.empty(18, 2, 3, 3))
    assert F.conv2d(x, w).reshape(1, 18, -1).equal(F.unfold(x, 3))


# --- convolution-aware --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6, 16, 3, 3), (4, 3, 5, 5), (6, 8, 3), (3, 4, 3, 3, 3)])
def test_kernels_of_a_filter_are_orthogonal(shape: tuple[int, ...]) -> None:
    w = init.conv_aware_(torch.empty(shape, dtype=torch.float64), generator=seeded())
    taps = math.prod(shape[2:])
    size = 2 / shape[1]
    for start in range(0, shape[1], taps):
        rows = w[:, start : start + taps].flatten(2)
        gram = rows @ rows.mT
        assert (gram - size * torch.eye(gram.shape[-1], dtype=torch.float64)).abs().max() < 1e-12
    # The complex spectra under the unitary transform are orthogonal too.
    axes = tuple(range(2, len(shape)))
    spectra = torch.fft.fftn(w, dim=axes, norm="ortho")[:, :taps].flatten(2)
    gram = spectra @ spectra.mH
    assert (gram - size * torch.eye(gram.shape[-1], dtype=torch.float64)).abs().max() < 1e-12
    assert float(w.square().mean()) == pytest.approx(2 / (shape[1] * taps), rel=1e-12)


def mirrored(w: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return w.flip(axes).roll((1,) * len(axes), axes)


@pytest.mark.parametrize("key", ["3x3x4x5", "3x3x16x6", "5x5x3x4", "3x8x6", "1x1x4x4"])
@pytest.mark.parametrize("noise", ["eps005", "eps0"])
def test_the_published_behaviour_has_the_properties_of_the_published_values(key: str, noise: str) -> None:
    published = golden("convaware")[noise].get(key)
    if published is None:
        return
    shape = tuple(int(part) for part in key.split("x"))
    ours = init.conv_aware_keras(shape, noise=0.05 if noise == "eps005" else 0.0, generator=seeded())
    assert ours.shape == published.shape
    *kernel, inputs, _ = shape
    axes = tuple(range(len(kernel)))
    for w in (published, ours):
        assert float(w.var(correction=0)) == pytest.approx(2 / (inputs * math.prod(kernel)), rel=1e-9)
        symmetric = float((w - mirrored(w, axes)).abs().max())
        assert symmetric < 1e-12 if noise == "eps0" or math.prod(kernel) == 1 else symmetric > 1e-2
        if kernel == [3, 3]:
            rank = int(torch.linalg.matrix_rank(w.reshape(9, -1), atol=1e-9))
            assert rank == (5 if noise == "eps0" else 9)
    straight = init.conv_aware_keras(shape, swapped=False, noise=0.0, generator=seeded())
    assert straight.shape == shape


def test_the_default_spans_what_the_published_half_spectra_do_not() -> None:
    for spectrum, rank in (("complex", 9), ("real", 5)):
        w = torch.empty(5, 4, 3, 3, dtype=torch.float64)
        init.conv_aware_(w, spectrum=spectrum, noise=0.0, generator=seeded())  # type: ignore[arg-type]
        assert int(torch.linalg.matrix_rank(w.reshape(-1, 9), atol=1e-9)) == rank
    w = init.conv_aware_(torch.empty(8, 6, dtype=torch.float64), generator=seeded())
    assert (w.T @ w - torch.eye(6, dtype=torch.float64) * 8 / 3).abs().max() < 1e-12
    with pytest.raises(BadInput):
        init.conv_aware_(w, spectrum="half")  # type: ignore[arg-type]
    with pytest.raises(Refused):
        init.conv_aware_(torch.empty(3))


# --- VI3NR --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_quadrature_agrees_with_closed_forms(sigma: float) -> None:
    cases = {
        torch.relu: sigma**2 / 2,
        lambda z: torch.sin(30 * z): (1 - math.exp(-2 * 900 * sigma**2)) / 2,
        lambda z: torch.exp(-z * z / (2 * 0.05**2)): 1 / math.sqrt(1 + 2 * sigma**2 / 0.05**2),
        torch.erf: 2 / math.pi * math.asin(2 * sigma**2 / (1 + 2 * sigma**2)),
        lambda z: z**3: 15 * sigma**6,
    }
    for f, exact in cases.items():
        assert gaussian.mean(lambda z, f=f: f(z).square(), sigma) == pytest.approx(exact, rel=1e-12)
    assert gaussian.derivative_square(torch.relu, sigma) == pytest.approx(0.5, rel=1e-12)
    assert gaussian.derivative_square(lambda z: torch.sin(3 * z), sigma) == pytest.approx(
        9 * (1 + math.exp(-18 * sigma**2)) / 2, rel=1e-12
    )


def test_gains_agree_with_the_sampled_ones() -> None:
    table = {
        torch.relu: 1.417,
        torch.tanh: 1.593,
        torch.sigmoid: 1.847,
        F.gelu: 1.537,
        lambda z: torch.sin(30 * z): 1.413,
        lambda z: torch.exp(-z * z / (2 * 0.05**2)): 5.32,
    }
    for f, sampled in table.items():
        assert init.gain(f) == pytest.approx(sampled, abs=1e-2)
    assert init.gain(torch.relu, 7.0) == pytest.approx(math.sqrt(2), rel=1e-12)
    assert init.gain(torch.tanh) ** 2 == pytest.approx(2.54, abs=5e-3)
    for f in (lambda z: 0 * z, lambda z: z.sum(), lambda z: 1 / (z - z)):
        with pytest.raises(BadInput):
            init.gain(f)
    with pytest.raises(BadInput):
        init.gain(torch.relu, -1.0)


def test_the_backward_condition_is_solved() -> None:
    found = init.backward_sigma(torch.sigmoid)
    assert found.sigma == pytest.approx(6.8, abs=0.1)
    assert backward_ratio(torch.sigmoid, found.sigma) == pytest.approx(1, abs=1e-9)
    assert init.backward_sigma(torch.tanh).sigma < 0.01
    assert init.backward_sigma(torch.relu).sigma == pytest.approx(1)


def test_vi3nr_weights_have_the_variance_asked_for() -> None:
    w = init.vi3nr_(torch.empty(400, 30, 5), torch.sigmoid, 2.0, generator=seeded())
    var = 4 / (150 * gaussian.mean(lambda z: torch.sigmoid(z).square(), 2.0))
    assert float(w.square().mean()) == pytest.approx(var, rel=0.02)
    u = init.vi3nr_(torch.empty(400, 150), torch.sigmoid, 2.0, distribution="uniform", generator=seeded())
    assert float(u.square().mean()) == pytest.approx(var, rel=0.02)
    assert float(u.abs().max()) == pytest.approx(math.sqrt(3 * var), rel=1e-3)
    first = init.vi3nr_(torch.empty(400, 150), None, 2.0, square=0.5, generator=seeded())
    assert float(first.square().mean()) == pytest.approx(4 / (150 * 0.5), rel=0.02)
    for f, square in ((None, None), (torch.relu, 1.0), (None, -1.0)):
        with pytest.raises(BadInput):
            init.vi3nr_(w, f, square=square)
