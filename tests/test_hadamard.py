"""Hadamard matrices: the defining identity in integers, the fast transform, and published cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from regauge.errors import Refused
from regauge.hadamard import factor, fast_hadamard, hadamard, hadamard_exists

MODEL_WIDTHS = (640, 768, 896, 1152, 360, 672, 720, 1344, 1440, 1056)
PRIME_POWERS = {28: 27, 52: 25, 100: 49, 244: 243, 344: 343}  # order -> the field used
WILLIAMSON = (92, 116, 156, 172)
GOLDEN = Path(__file__).parent / "data" / "hadamard_golden.pt"


def gram(matrix: torch.Tensor) -> np.ndarray:
    """Exact: integers below 2^24 are exact in float32, whatever the order of summation."""
    entries = matrix.numpy().astype(np.float32)
    return (entries @ entries.T).astype(np.int64)


def is_hadamard(matrix: torch.Tensor) -> bool:
    n = len(matrix)
    return bool((matrix.abs() == 1).all()) and np.array_equal(gram(matrix), n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 36, 256, *PRIME_POWERS, *WILLIAMSON, *MODEL_WIDTHS])
def test_rows_are_orthogonal_in_integers(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == torch.int8
    assert is_hadamard(matrix)


def test_a_single_wrong_sign_is_noticed() -> None:
    matrix = hadamard(28)
    matrix[3, 5] *= -1
    assert not is_hadamard(matrix)
    assert is_hadamard(hadamard(28)), "the caller's copy is its own"


@pytest.mark.parametrize("n", [2304, 4864])
def test_large_orders_on_sampled_rows(n: int) -> None:
    """Every row of the core meets every row of the power-of-two part somewhere in the sample."""
    rows = hadamard(n)[:: n // 64].numpy().astype(np.float32)
    whole = hadamard(n).numpy().astype(np.float32)
    expected = np.zeros((len(rows), n), dtype=np.float32)
    expected[np.arange(len(rows)), np.arange(0, n, n // 64)] = n
    assert np.array_equal(rows @ whole.T, expected)


def test_every_order_claimed_below_300_is_one() -> None:
    claimed = [n for n in range(1, 300) if hadamard_exists(n)]
    assert all(n <= 2 or n % 4 == 0 for n in claimed)
    assert set(range(4, 300, 4)) - set(claimed) == {188, 236, 260, 268, 292}
    for n in claimed:
        assert is_hadamard(hadamard(n)), n


@pytest.mark.parametrize("n", [0, -4, 3, 6, 18, 98, 188])
def test_an_order_out_of_reach_is_refused_and_neighbours_are_named(n: int) -> None:
    assert not hadamard_exists(n)
    with pytest.raises(Refused) as caught:
        hadamard(n)
    way_out = caught.value.way_out or ""
    named = [int(word) for word in way_out.replace(":", " ").split() if word.isdigit()]
    assert named
    assert all(hadamard_exists(k) for k in named)
    assert not any(hadamard_exists(k) for k in range(min(named) + 1, max(named)))
    with pytest.raises(Refused):
        fast_hadamard(torch.zeros(max(n, 0), 1), 0)


@pytest.mark.parametrize("n", [1, 2, 12, 64, 360, 768, 4864, 11008, 14336])
def test_factor_is_a_core_times_a_power_of_two(n: int) -> None:
    core, power = factor(n)
    assert core * power == n
    assert power & (power - 1) == 0
    assert core == 1 or (core % 4 == 0 and hadamard_exists(core))


@pytest.mark.parametrize("n", [1, 2, 16, 12, 24, 36, 96, 92, 640])
@pytest.mark.parametrize("transpose", [False, True])
def test_fast_transform_is_the_matrix(n: int, transpose: bool) -> None:
    x = torch.randn(3, n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    matrix = hadamard(n).to(torch.float64) / n**0.5
    expected = torch.einsum("ji,aib->ajb", matrix.T if transpose else matrix, x)
    torch.testing.assert_close(fast_hadamard(x, 1, transpose=transpose), expected, rtol=0, atol=1e-13)
    last = fast_hadamard(x.movedim(1, -1), -1, transpose=transpose)
    torch.testing.assert_close(last.movedim(-1, 1), expected, rtol=0, atol=1e-13)


def test_the_inverse_is_the_transpose_and_not_the_matrix_again() -> None:
    x = torch.randn(768, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = fast_hadamard(x, 0)
    torch.testing.assert_close(fast_hadamard(once, 0, transpose=True), x, rtol=0, atol=1e-13)
    assert (fast_hadamard(once, 0) - x).abs().max() > 0.1


def test_fast_transform_leaves_its_argument_and_answers_in_float64() -> None:
    x = torch.ones(8, 3, dtype=torch.bfloat16)
    y = fast_hadamard(x, 0)
    assert y.dtype == torch.float64
    assert y.is_contiguous()
    assert bool((x == 1).all())
    torch.testing.assert_close(y[0], torch.full((3,), 8**0.5, dtype=torch.float64))
    assert float(y[1:].abs().max()) == 0.0


def test_power_of_two_part_does_not_depend_on_how_the_rest_is_cut() -> None:
    x = torch.randn(256, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pieces = [fast_hadamard(piece, 0) for piece in x.split((1, 7, 29), dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), fast_hadamard(x, 0))


def test_published_matrices_are_hadamard_and_the_doubling_is_the_same() -> None:
    signs = torch.load(GOLDEN, weights_only=True)["signs"]
    assert all(is_hadamard(matrix) for matrix in signs.values())
    assert torch.equal(signs[64], hadamard(64))
