"""Mimetic products, weight selection, simplices and S4D modes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regauge.cuts.select import indices
from regauge.errors import BadInput, Refused
from regauge.nn import init

DATA = Path(__file__).parent / "data"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def golden(name: str) -> dict:
    return torch.load(DATA / f"{name}_golden.pt", weights_only=True)


def empty(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


# --- mimetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [16, 24])
def test_the_product_of_value_and_output_is_the_target(inner: int) -> None:
    value, output = empty(inner, 16), empty(16, inner)
    init.mimetic_value_(value, output, generator=seeded())
    product = value.T @ output.T
    z = torch.randn(16, 16, generator=seeded(), dtype=torch.float64) / 4
    assert (product - (0.7 * z - 0.7 * torch.eye(16, dtype=torch.float64))).abs().max() < 1e-12
    # What nn.Linear computes from it: the stream loses most of itself where attention looks at itself.
    x = torch.randn(5, 16, generator=seeded(1), dtype=torch.float64)
    assert (F.linear(F.linear(x, value), output) - x @ product).abs().max() < 1e-12


def test_queries_and_keys_of_a_head_are_the_best_of_their_rank() -> None:
    heads, k, d = 3, 4, 16
    query, key = empty(heads * k, d), empty(heads * k, d)
    init.mimetic_query_(query, key, heads, generator=seeded())
    random = seeded()
    for head in range(heads):
        z = torch.randn(d, d, generator=random, dtype=torch.float64) / math.sqrt(d)
        target = 0.4 * z + 0.4 * torch.eye(d, dtype=torch.float64)
        rows = slice(head * k, (head + 1) * k)
        product = query[rows].T @ key[rows]
        u, s, vh = torch.linalg.svd(target)
        assert (product - (u[:, :k] * s[:k]) @ vh[:k]).abs().max() < 1e-12
        # Balanced: both factors have the same singular values.
        assert (torch.linalg.svdvals(query[rows]) - torch.linalg.svdvals(key[rows])).abs().max() < 1e-12
        assert float(product.trace()) > 0


def test_mimetic_weights_may_be_parts_of_a_fused_weight() -> None:
    fused = empty(48, 16)
    query, key, value = fused.chunk(3)
    output = empty(16, 16)
    init.mimetic_query_(query, key, 4, generator=seeded())
    init.mimetic_value_(value, output, generator=seeded())
    assert fused.isfinite().all()
    with pytest.raises(Refused):
        init.mimetic_query_(query, key[:8], 4)
    with pytest.raises(Refused):
        init.mimetic_query_(query, key, 5)
    with pytest.raises(Refused):
        init.mimetic_value_(value, empty(8, 16))


def test_a_mimetic_state_space_layer_is_linear_attention() -> None:
    states, d, length = 4, 6, 12
    log_decay, step_bias, step = empty(d, states), empty(d), empty(d, 2)
    write, read, conv = empty(states, d), empty(states, d), empty(d, 1, 3)
    init.mimetic_ssm_(log_decay, step_bias, step, write, read, conv, generator=seeded())
    u = torch.randn(length, d, generator=seeded(1), dtype=torch.float64)
    assert F.conv1d(F.pad(u.T, (2, 0)), conv, groups=d).equal(u.T)
    delta = F.softplus(step_bias + (u @ torch.randn(d, 2, dtype=torch.float64)) @ step.T)
    assert (delta - 1).abs().max() < 1e-12
    state = torch.zeros(d, states, dtype=torch.float64)
    seen = torch.zeros(d, d, dtype=torch.float64)
    for t in range(length):
        decay = torch.exp(-delta[t, :, None] * log_decay.exp())
        state = decay * state + delta[t, :, None] * (write @ u[t]) * u[t][:, None]
        seen += torch.outer(u[t], u[t])
        attention = seen @ (write.T @ read) @ u[t]
        assert (state @ (read @ u[t]) - attention).abs().max() < 0.02 * attention.abs().max()
    projector = write.T @ read
    assert (projector @ projector - projector).abs().max() < 1e-12
    assert float(projector.trace()) == pytest.approx(states)
    with pytest.raises(Refused):
        init.mimetic_ssm_(log_decay, step_bias, step, write, read[:, :3])


# --- weight selection ---------------------------------------------------------------------------------


def test_selection_agrees_with_the_authors() -> None:
    cases = [(c["big"], c["out"]) for c in golden("weight_selection")["cases"]]
    second = golden("weight_selection_2")
    cases += [(second["inputs"][key], second["outputs"][key]) for key in second["inputs"]]
    assert len(cases) == 9
    for teacher, out in cases:
        assert init.select_(torch.empty_like(out), teacher).equal(out)


def net(width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(6, width)]
    for _ in range(depth):
        layers += [nn.BatchNorm1d(width), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def test_a_student_takes_the_first_layers_and_even_distances() -> None:
    torch.manual_seed(0)
    teacher, student = net(10, 3), net(4, 1)
    head = student[-1].weight.detach().clone()
    skipped = {"3.weight", "3.bias"}
    names = init.select_module_(student, teacher, skip=skipped)
    assert set(names) == set(student.state_dict()) - skipped
    at = indices(10, 4)
    assert student[2].weight.equal(teacher[2].weight[at][:, at])
    assert student[0].weight.equal(teacher[0].weight[at])
    assert student[1].running_var.equal(teacher[1].running_var[at])
    assert student[-1].weight.equal(head)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for wrong in (net(3, 1), net(10, 0)):
        with pytest.raises(Refused):
            init.select_module_(student, wrong)
    assert all(tensor.equal(before[name]) for name, tensor in student.state_dict().items())


# --- simplices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_the_simplex_agrees_with_the_authors_and_is_regular(classes: int) -> None:
    rows = init.simplex(classes)
    assert (rows - golden("dsimplex")["outputs"][str(classes)]).abs().max() < 1e-7
    cosines = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    assert (rows @ rows.T - cosines).abs().max() < 1e-12
    assert rows.sum(0).abs().max() < 1e-12
    for rotated in (False, True):
        wide = init.simplex_(empty(classes, classes + 4), rotated=rotated, generator=seeded())
        assert (wide @ wide.T - cosines).abs().max() < 1e-12
        assert bool((wide != 0).any(0).all()) == rotated


def test_vectors_are_as_far_apart_as_asked() -> None:
    w = init.equiangular_(empty(40, 20), 0.25, generator=seeded())
    cosines = (w @ w.T).fill_diagonal_(0)
    assert (w.norm(dim=1) - 1).abs().max() < 1e-12
    assert cosines.abs().max() <= 0.25 + 1e-4
    few = init.equiangular_(empty(20, 40), generator=seeded())
    assert (few @ few.T - torch.eye(20)).abs().max() < 1e-12
    assert init.welch_bound(40, 20) == pytest.approx(0.160, abs=5e-4)
    kept = torch.zeros(40, 20)
    with pytest.raises(Refused, match="no such vectors"):
        init.equiangular_(kept, 0.15, generator=seeded())
    with pytest.raises(Refused, match="not found"):
        init.equiangular_(kept, 0.161, steps=20, generator=seeded())
    assert not kept.any()
    with pytest.raises(Refused):
        init.simplex_(empty(5, 3))
    with pytest.raises(BadInput):
        init.simplex(1)


# --- S4D ----------------------------------------------------------------------------------------------

KINDS = ("lin", "inv", "legs", "real", "inv2", "quad")


@pytest.mark.parametrize("states", [8, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_agree_with_the_authors(states: int, kind: str) -> None:
    case = golden("s4d")[f"{kind}_N{states}"]
    modes, b = (torch.view_as_complex(case[key])[0] for key in ("A", "B"))
    ours = init.s4d_modes(states, kind)  # type: ignore[arg-type]
    # The stored values are accurate to float32.
    assert ((ours - modes).abs() / modes.abs()).max() < 3e-6
    if kind != "legs":
        assert init.s4d_input(states, kind).equal(b)  # type: ignore[arg-type]
        return
    # With the phases of the stored values, where these were not cut off at an imaginary part of 2.
    free = b.imag.abs() < 2 - 1e-6
    again = init.s4d_input(states, "legs", phase=b.angle(), limit=2.0)
    assert free.sum() >= states // 8
    assert (again - b)[free].abs().max() < 1e-5
    assert init.s4d_input(states, "legs").imag.abs().max() < 1e-12
    assert init.s4d_input(states, "legs", phase=1.5, limit=2.0).imag.abs().max() <= 2


def test_legs_modes_diagonalise_the_matrix() -> None:
    """Σ_n over all modes of |B_n|² (s − A_n)^{−1} = bᵀ (s − (−I/2 + S))^{−1} b, from the matrix itself."""
    states, s = 12, 0.7
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    skew = torch.zeros(states, states, dtype=torch.float64)
    for j in range(states):
        for k in range(states):
            sign = 0 if j == k else (-1 if j > k else 1)
            skew[j, k] = sign * 0.5 * math.sqrt((2 * j + 1) * (2 * k + 1))
    matrix = (s + 0.5) * torch.eye(states, dtype=torch.float64) - skew
    exact = root @ torch.linalg.solve(matrix, root)
    a, b = init.s4d_modes(states, "legs"), init.s4d_input(states, "legs")
    assert float(2 * (b.abs().square() / (s - a)).sum().real) == pytest.approx(float(exact), rel=1e-12)


def test_the_kernel_is_that_of_the_recurrence_and_has_its_gauges() -> None:
    modes, b = init.s4d_modes(8, "legs"), init.s4d_input(8, "legs")
    c = init.s4d_output_(torch.empty(4, dtype=torch.complex128), generator=seeded())
    step = torch.tensor(0.05, dtype=torch.float64)
    kernel = init.s4d_kernel(modes, b, c, step, 30)
    state, u = torch.zeros(4, dtype=torch.complex128), [1.0] + [0.0] * 29
    for t in range(30):
        # Zero-order hold: x(t + Δ) of x' = A x + B u with u constant, solved exactly.
        state = torch.exp(step * modes) * state + (torch.exp(step * modes) - 1) / modes * b * u[t]
        assert float(2 * (c * state).sum().real) == pytest.approx(float(kernel[t]), abs=1e-12)
    turn = torch.polar(torch.full((4,), 1.7, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64))
    assert (init.s4d_kernel(modes, b * turn, c / turn, step, 30) - kernel).abs().max() < 1e-12
    assert (init.s4d_kernel(modes / 3, b, c / 3, 3 * step, 30) - kernel).abs().max() < 1e-12


def test_s4d_parameters_are_filled() -> None:
    log_decay, frequency = torch.empty(3, 8), torch.empty(3, 8)
    init.s4d_(log_decay, frequency, "inv")
    modes = init.s4d_modes(16, "inv")
    assert torch.allclose(torch.complex(-log_decay.exp(), frequency), modes.to(torch.complex64).expand(3, 8))
    step = init.log_step_(torch.empty(4000), generator=seeded())
    assert math.log(1e-3) <= float(step.min()) < float(step.max()) <= math.log(1e-1)
    assert float(step.mean()) == pytest.approx(math.log(1e-2), abs=0.05)
    pairs = init.s4d_output_(torch.empty(5000, 2), generator=seeded())
    assert float(pairs.square().sum(1).mean()) == pytest.approx(1, abs=0.05)
    for bad in (lambda: init.s4d_modes(7), lambda: init.s4d_modes(8, "x"), lambda: init.log_step_(step, 0.0)):
        with pytest.raises(BadInput):
            bad()
    for bad in (lambda: init.s4d_(torch.empty(3), torch.empty(4)), lambda: init.s4d_output_(torch.empty(3))):
        with pytest.raises(Refused):
            bad()
