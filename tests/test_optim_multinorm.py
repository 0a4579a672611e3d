"""SinkGD and SWAN: their normal forms, their symmetries, and what every optimizer keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim_laws import check_laws, equal, state, train
from optim_laws import net as mixed_net
from regauge.errors import BadInput
from regauge.optim import SWAN, MultiNorm, SinkGD, with_adam
from regauge.optim.multinorm import columns, normalised, rows, whiten


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sinkhorn(x: Tensor, iterations: int = 5) -> Tensor:
    return normalised(x, ("rows", "columns"), iterations)


def test_lengths_of_rows_and_columns() -> None:
    x = noise(6, 10)
    assert torch.allclose(rows(x).square().mean(1), torch.ones(6, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(columns(x).square().mean(0), torch.ones(10, dtype=torch.float64), atol=1e-14)
    found = [float((sinkhorn(x, n).square().mean(1).sqrt() - 1).abs().max()) for n in (1, 5, 30)]
    assert found[0] > 5 * found[1] > 50 * found[2]
    assert torch.allclose(sinkhorn(x).norm(), torch.tensor(60.0, dtype=torch.float64).sqrt())


def test_an_independent_reference() -> None:
    """Written out with loops."""
    x = noise(4, 3)
    wanted = [list(map(float, row)) for row in x]
    for _ in range(5):
        for row in wanted:
            length = sum(v * v for v in row) ** 0.5
            row[:] = [v * 3**0.5 / length for v in row]
        for j in range(3):
            length = sum(row[j] ** 2 for row in wanted) ** 0.5
            for row in wanted:
                row[j] *= 4**0.5 / length
    assert torch.allclose(sinkhorn(x), torch.tensor(wanted, dtype=torch.float64), atol=1e-14)


def test_symmetries_of_sinkgd() -> None:
    x = noise(6, 10)
    p, q = torch.randperm(6), torch.randperm(10)
    signs = noise(6, 1, seed=3).sign(), noise(1, 10, seed=4).sign()
    assert torch.allclose(sinkhorn(x[p][:, q]), sinkhorn(x)[p][:, q], atol=1e-13)
    assert torch.allclose(sinkhorn(signs[0] * x * signs[1]), signs[0] * sinkhorn(x) * signs[1], atol=1e-13)
    scales = noise(6, 1, seed=5).exp(), noise(1, 10, seed=6).exp()
    assert torch.allclose(sinkhorn(scales[0] * x * scales[1], 300), sinkhorn(x, 300), atol=1e-10)
    turn = torch.linalg.qr(noise(6, 6, seed=7))[0]
    assert not torch.allclose(sinkhorn(turn @ x), turn @ sinkhorn(x), atol=1e-2)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (5, 5), (1, 4)])
def test_whitening_is_the_polar_factor(shape: tuple[int, int]) -> None:
    x = noise(*shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(whiten(x), u @ v, atol=1e-12)
    turn = torch.linalg.qr(noise(shape[0], shape[0], seed=7))[0]
    assert torch.allclose(whiten(turn @ x), turn @ whiten(x), atol=1e-12)


@pytest.mark.parametrize("projections", [("rows", "columns"), ("rows", "whiten")])
def test_zeros_stay_zero_and_small_numbers_do_not_matter(projections: tuple[str, ...]) -> None:
    x = noise(6, 10).float()
    for tiny in (1e-30, 1e30):
        assert torch.allclose(
            normalised(x * tiny, projections, 2), normalised(x, projections, 2), rtol=1e-4, atol=1e-6
        )
    x[2], x[:, 3] = 0, 0
    found = normalised(x, projections, 5)
    assert bool(found.isfinite().all())
    assert bool((found[2] == 0).all())
    assert bool((found[:, 3] == 0).all())
    left = x[[0, 1, 3, 4, 5]][:, [0, 1, 2, *range(4, 10)]]
    ratio = found[[0, 1, 3, 4, 5]][:, [0, 1, 2, *range(4, 10)]] / normalised(left, projections, 5)
    assert float(ratio.max() / ratio.min()) < 1 + 1e-4
    assert torch.equal(normalised(torch.zeros(3, 4), projections, 5), torch.zeros(3, 4))


def test_a_step() -> None:
    for make, wanted in ((SinkGD, sinkhorn(noise(4, 3, seed=1))), (SWAN, whiten(rows(noise(4, 3, seed=1))))):
        w = nn.Parameter(noise(4, 3))
        w.grad = noise(4, 3, seed=1)
        make([w], lr=0.1, weight_decay=0.5).step()
        assert torch.allclose(w, noise(4, 3) * (1 - 0.05) - 0.1 * wanted, atol=1e-13)


def _with_rest(make: Any) -> Any:
    """Matrices by their projections, vectors with Adam."""

    def made(named: Any, **options: Any) -> MultiNorm:
        held = list(named)
        split = [[p for p in held if (p[1].dim() == 2) == matrix] for matrix in (True, False)]
        groups = [{"params": split[0]}, {"params": split[1], "adam": True, "lr": 1e-2}]
        return make([group for group in groups if group["params"]], **options)

    return made


@pytest.mark.parametrize("make", [SinkGD, SWAN])
def test_laws(make: Any) -> None:
    check_laws(_with_rest(make), lr=1e-3)
    check_laws(_with_rest(make), lr=1e-3, weight_decay=0.1)


def test_the_rest_is_adamw() -> None:
    a, b = mixed_net(), mixed_net()
    train(a, SinkGD([{"params": a.parameters(), "adam": True}], lr=1e-2, weight_decay=0.1), range(6))
    train(b, torch.optim.AdamW(b.parameters(), lr=1e-2, weight_decay=0.1), range(6))
    assert equal(state(a), state(b), 1e-13)


def test_which_parameters_are_matrices_of_linear_maps() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 9)
            self.grid = nn.Parameter(torch.zeros(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.table(x) + self.places(torch.arange(5)) + self.grid
            return self.head(torch.tanh(self.inner(y)))

    model = Small()
    made = with_adam(model, (torch.zeros(2, 5, dtype=torch.long),), lr=0.05, adam_lr=0.001)
    assert [name for name, _ in made[0]["params"]] == ["inner.weight"]
    assert len(made[1]["params"]) == 6
    assert SinkGD(made, lr=1.0).param_groups[0]["lr"] == 0.05


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="matrices"):
        SinkGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(BadInput, match="projection"):
        MultiNorm([nn.Parameter(torch.ones(3, 3))], lr=0.1, projections=("circles",))
    with pytest.raises(BadInput, match="range"):
        SinkGD([nn.Parameter(torch.ones(3, 3))], lr=0.1, iterations=0)
