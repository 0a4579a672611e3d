"""Group elements: the axioms on random elements, membership, and what each kind must preserve."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from regauge.atlas import Kind
from regauge.elements import (
    DIAGONAL,
    Diagonal,
    Element,
    Householder,
    Matrix,
    Permutation,
    Product,
    RandomHadamard,
    Style,
    carry,
    compose,
    identity,
    is_subgroup,
    random_element,
    require_member,
    residual,
)
from regauge.errors import BadInput, Refused, RegaugeError

LINEAR = [kind for kind in Kind if kind not in (Kind.TRANSLATION, Kind.NULL)]
STYLES: tuple[Style, ...] = ("default", "hadamard", "householder")
CASES = [
    pytest.param(kind, style, count, id=f"{kind}-{style}-{count}")
    for kind in LINEAR
    for style in (STYLES if is_subgroup(Kind.ORTHOGONAL_ONES, kind) else STYLES[:1])
    for count in (1, 3)
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(kind: Kind, style: Style = "default", count: int = 3, seed: int = 0, n: int = 12) -> Element:
    return random_element(kind, 2 if kind is Kind.COMPLEX else n, count, seeded(seed), style)


def columns(element: Element, m: int = 4, seed: int = 99) -> torch.Tensor:
    return torch.randn(element.count, element.n, m, dtype=torch.float64, generator=seeded(seed))


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "style", "count"), CASES)
def test_axioms(kind: Kind, style: Style, count: int) -> None:
    g, h = draw(kind, style, count, 1), draw(kind, style, count, 2)
    x, y = columns(g), columns(g, seed=98)
    kept = x.clone()
    assert (g.kind, g.count, g.n) == (kind, count, x.shape[1])
    assert g.inverse().kind == kind
    close(g.inverse().forward(g.forward(x)), x)
    close(g.forward(g.inverse().forward(x)), x)
    close(g.inverse().inverse().forward(x), g.forward(x))
    close(g.inverse().inverse_transpose(g.inverse_transpose(x)), x)
    close(g.forward(x).mT @ g.inverse_transpose(y), x.mT @ y, atol=1e-11)
    close(torch.linalg.inv(g.matrix()).mT @ x, g.inverse_transpose(x))
    close(g.matrix() @ x, g.forward(x))
    close(g.forward(x + 2 * y), g.forward(x) + 2 * g.forward(y))
    gh = compose(g, h)
    assert (gh.kind, gh.count, gh.n) == (kind, count, g.n)
    close(gh.forward(x), g.forward(h.forward(x)))
    close(gh.inverse_transpose(x), g.inverse_transpose(h.inverse_transpose(x)))
    close(gh.inverse().forward(gh.forward(x)), x)
    close(compose(g, identity(kind, g.n, count)).forward(x), g.forward(x))
    close(compose(g, g.inverse()).forward(x), x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("kind", "style", "count"), CASES)
def test_a_random_element_is_a_member_and_no_identity_and_repeats(
    kind: Kind, style: Style, count: int
) -> None:
    g = draw(kind, style, count)
    assert residual(g) < 1e-13
    assert residual(compose(g, draw(kind, style, count, 5))) < 1e-12
    require_member(g)
    x = columns(g)
    assert torch.equal(draw(kind, style, count).forward(x), g.forward(x))
    assert (draw(kind, style, count, 1).forward(x) - g.forward(x)).abs().max() > 0.05
    assert (g.forward(x) - x).abs().max() > 0.05
    if count > 1:
        same = columns(g)[:1].expand_as(x).contiguous()
        assert (g.forward(same)[0] - g.forward(same)[1]).abs().max() > 0.05, "one element for each copy"


@pytest.mark.parametrize("kind", LINEAR)
def test_identity(kind: Kind) -> None:
    e = identity(kind, 2 if kind is Kind.COMPLEX else 5, 3)
    x = columns(e)
    assert (e.kind, e.count) == (kind, 3)
    assert torch.equal(e.forward(x), x)
    assert torch.equal(e.inverse_transpose(x), x)
    assert residual(e) == 0.0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("n", [1, 2, 4, 12])
def test_the_ones_vector_is_fixed_exactly_when_it_must_be(style: Style, n: int) -> None:
    for seed in range(4):
        fixing = draw(Kind.ORTHOGONAL_ONES, style, 2, seed, n)
        ones = torch.ones(2, n, 1, dtype=torch.float64)
        close(fixing.forward(ones), ones)
        assert residual(fixing) < 1e-13
        assert residual(fixing, Kind.ORTHOGONAL) < 1e-13
    if n > 2:
        free = draw(Kind.ORTHOGONAL, style, 2, 0, n)
        assert residual(free, Kind.ORTHOGONAL_ONES) > 0.1


@pytest.mark.parametrize("gap", [0.0, 1e-16, 1e-12, 1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_carrying_a_unit_vector_loses_no_digits_when_it_is_near_or_opposed(gap: float, turn: float) -> None:
    unit = torch.full((1, 9, 1), 1 / 3, dtype=torch.float64)
    source = turn * unit + gap * columns(identity(Kind.ORTHOGONAL, 9), 1)
    source /= source.norm()
    reflections = carry(source, unit)
    close(reflections.forward(source), unit, atol=1e-14)
    assert residual(reflections) < 1e-14


def test_the_inverse_transpose_of_a_given_matrix_is_found() -> None:
    values = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]], dtype=torch.float64)
    g = Matrix(values)
    x = columns(g)
    close(g.inverse_transpose(x), torch.tensor([[[1.0, 0.0], [-2.0, 1.0]]], dtype=torch.float64) @ x)
    assert residual(g) == 0.0


def test_random_hadamard_spreads_every_coordinate_equally() -> None:
    g = draw(Kind.ORTHOGONAL, "hadamard", 2, n=28)
    close(g.matrix().abs(), torch.full((2, 28, 28), 28**-0.5, dtype=torch.float64))


def test_hadamard_style_is_refused_where_no_matrix_exists() -> None:
    with pytest.raises(Refused):
        draw(Kind.ORTHOGONAL, "hadamard", n=6)
    with pytest.raises(BadInput):
        draw(Kind.ORTHOGONAL, "fourier")  # type: ignore[arg-type]


def test_permutation_takes_the_indexed_entries() -> None:
    g = Permutation(torch.tensor([[2, 0, 1], [0, 2, 1]]))
    x = torch.tensor([[[10], [11], [12]], [[20], [21], [22]]])
    assert g.forward(x).flatten().tolist() == [12, 10, 11, 20, 22, 21]
    assert g.inverse().forward(x).flatten().tolist() == [11, 12, 10, 20, 22, 21]


def test_complex_elements_multiply_like_complex_numbers() -> None:
    g, h = draw(Kind.COMPLEX, count=5, seed=1), draw(Kind.COMPLEX, count=5, seed=2)

    def number(m: torch.Tensor) -> torch.Tensor:
        return torch.complex(m[:, 0, 0], m[:, 1, 0])

    close(number(compose(g, h).matrix()), number(g.matrix()) * number(h.matrix()))
    close(number(g.inverse().matrix()), 1 / number(g.matrix()))
    x = columns(g, 1)
    z = torch.complex(x[:, 0, 0], x[:, 1, 0])
    image = g.forward(x)
    close(torch.complex(image[:, 0, 0], image[:, 1, 0]), number(g.matrix()) * z)


def test_general_linear_is_well_conditioned_and_not_orthogonal() -> None:
    for style in STYLES:
        g = draw(Kind.GENERAL_LINEAR, style, 4)
        condition = torch.linalg.cond(g.matrix())
        assert float(condition.max()) < 7.5
        assert float(condition.min()) > 2.0


def test_haar_draws_have_both_determinants_and_centred_diagonals() -> None:
    q = random_element(Kind.ORTHOGONAL, 3, 2000, seeded(0)).matrix()
    assert abs(float((torch.linalg.det(q) > 0).double().mean()) - 0.5) < 0.05
    assert float(q.mean(dim=0).abs().max()) < 0.06  # five standard errors of 1/sqrt(3 * 2000)
    assert float((q.square().mean(dim=0) - 1 / 3).abs().max()) < 0.04


@pytest.mark.parametrize(
    "exponent", [Fraction(1), Fraction(-1), Fraction(2), Fraction(-1, 2), Fraction(2, 3)]
)
def test_diagonal_powers_add_up(exponent: Fraction) -> None:
    g = draw(Kind.POSITIVE)
    assert isinstance(g, Diagonal)
    x = columns(g)
    close(g.apply(x, exponent), x * g.vector[:, :, None] ** float(exponent))
    close(g.apply(g.apply(x, exponent), 1 - exponent), g.forward(x))
    close(g.inverse().apply(x, exponent), g.apply(x, -exponent))


def test_powers_of_negative_scales() -> None:
    g = Diagonal(torch.tensor([[-8.0, 4.0]], dtype=torch.float64))
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    close(g.apply(one, Fraction(1, 3)).flatten(), torch.tensor([-2.0, 4.0 ** (1 / 3)], dtype=torch.float64))
    close(g.apply(one, 2).flatten(), torch.tensor([64.0, 16.0], dtype=torch.float64))
    close(g.apply(one, Fraction(-2, 3)).flatten()[0], torch.tensor(0.25, dtype=torch.float64))
    with pytest.raises(RegaugeError, match="even root"):
        g.apply(one, Fraction(1, 2))


def test_groups_have_no_other_powers() -> None:
    for kind in (Kind.PERMUTATION, Kind.ORTHOGONAL, Kind.GENERAL_LINEAR, Kind.COMPLEX):
        g = draw(kind)
        with pytest.raises(RegaugeError, match="no power"):
            g.apply(columns(g), Fraction(1, 2))
        close(g.apply(columns(g), Fraction(-1)), g.inverse_transpose(columns(g)))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8],
)
@pytest.mark.parametrize("kind", [Kind.PERMUTATION, Kind.SIGN])
def test_moves_keep_dtype_and_bits(kind: Kind, dtype: torch.dtype) -> None:
    g = draw(kind)
    assert g.moves_only
    values = torch.arange(-24, 24).reshape(1, 12, 4).repeat(3, 1, 1)
    x = values.to(dtype) if dtype is torch.int8 else (values.double() / 8).to(dtype)
    y = g.forward(x)
    assert y.dtype == dtype
    close(y.double(), g.forward(x.double()), atol=0)
    close(y.double(), g.matrix() @ x.double(), atol=0)
    back = g.inverse().forward(y)
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_sign_of_an_unsigned_dtype_is_an_error() -> None:
    with pytest.raises(RegaugeError, match="sign"):
        draw(Kind.SIGN).forward(torch.ones(3, 12, 1, dtype=torch.uint8))


def test_only_permutations_and_signs_move_without_arithmetic() -> None:
    assert {kind for kind in LINEAR if draw(kind).moves_only} == {Kind.PERMUTATION, Kind.SIGN}
    assert compose(draw(Kind.PERMUTATION), draw(Kind.SIGN)).moves_only
    assert not compose(draw(Kind.PERMUTATION), draw(Kind.POSITIVE)).moves_only


def test_composition_finds_the_smallest_common_group() -> None:
    pairs = {
        (Kind.PERMUTATION, Kind.SIGN): Kind.ORTHOGONAL,
        (Kind.PERMUTATION, Kind.ORTHOGONAL_ONES): Kind.ORTHOGONAL_ONES,
        (Kind.SIGN, Kind.POSITIVE): Kind.SCALE,
        (Kind.SIGN, Kind.ORTHOGONAL_ONES): Kind.ORTHOGONAL,
        (Kind.POSITIVE, Kind.ORTHOGONAL): Kind.GENERAL_LINEAR,
    }
    for (first, second), expected in pairs.items():
        for g in (compose(draw(first), draw(second)), compose(draw(second), draw(first))):
            assert g.kind == expected
            assert residual(g) < 1e-12
    with pytest.raises(RegaugeError):
        compose()
    with pytest.raises(RegaugeError):
        compose(draw(Kind.SIGN, count=1), draw(Kind.SIGN, count=2))


def test_subgroups_are_transitive_and_a_member_of_the_small_is_one_of_the_large() -> None:
    for small in LINEAR:
        for large in LINEAR:
            if not is_subgroup(small, large):
                continue
            assert all(is_subgroup(small, k) for k in LINEAR if is_subgroup(large, k))
            assert residual(draw(small), large) < 1e-12
    assert [k for k in LINEAR if is_subgroup(k, Kind.GENERAL_LINEAR)] == LINEAR


def _nudged(values: torch.Tensor, amount: float = 1e-6) -> torch.Tensor:
    result = values.clone()
    result.view(-1)[1] += amount
    return result


def _dense(kind: Kind) -> torch.Tensor:
    return draw(kind).matrix()


NEAR_MISSES: dict[str, Callable[[], Element]] = {
    "permutation with a repeated index": lambda: Permutation(torch.tensor([[0, 1, 1]])),
    "sign off by a millionth": lambda: Diagonal(_nudged(torch.ones(1, 3).double()), Kind.SIGN),
    "positive with a zero": lambda: Diagonal(torch.tensor([[1.0, 0.0]]).double(), Kind.POSITIVE),
    "positive with a negative": lambda: Diagonal(torch.tensor([[1.0, -1e-9]]).double(), Kind.POSITIVE),
    "scale with a zero": lambda: Diagonal(torch.tensor([[1.0, 0.0]]).double(), Kind.SCALE),
    "scale that is infinite": lambda: Diagonal(torch.tensor([[1.0, torch.inf]]).double(), Kind.SCALE),
    "orthogonal off by a millionth": lambda: Matrix(_nudged(_dense(Kind.ORTHOGONAL)), Kind.ORTHOGONAL),
    "orthogonal called fixing ones": lambda: Matrix(_dense(Kind.ORTHOGONAL), Kind.ORTHOGONAL_ONES),
    "ones fixed, not orthogonal": lambda: Matrix(
        torch.tensor([[[1.5, -0.5], [-0.5, 1.5]]]).double(), Kind.ORTHOGONAL_ONES
    ),
    "complex off by a millionth": lambda: Matrix(_nudged(_dense(Kind.COMPLEX)), Kind.COMPLEX),
    "complex conjugation": lambda: Matrix(torch.diag(torch.tensor([1.0, -1.0]).double())[None], Kind.COMPLEX),
    "complex pair exchanged": lambda: Matrix(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]).double(), Kind.COMPLEX),
    "complex zero": lambda: Matrix(torch.zeros(1, 2, 2).double(), Kind.COMPLEX),
    "reflections that move the ones": lambda: Householder(
        torch.eye(3).double()[None, :1], Kind.ORTHOGONAL_ONES
    ),
    "hadamard with a wrong sign": lambda: RandomHadamard(_nudged(torch.ones(1, 12).double())),
    "wrong inverse": lambda: Matrix(
        _dense(Kind.GENERAL_LINEAR), Kind.GENERAL_LINEAR, _dense(Kind.GENERAL_LINEAR)
    ),
    "product with a bad part": lambda: Product(
        (draw(Kind.ORTHOGONAL, count=1, n=3), Diagonal(_nudged(torch.ones(1, 3).double()), Kind.SIGN)),
        Kind.ORTHOGONAL,
    ),
    "product that leaves the group": lambda: Product(
        (draw(Kind.ORTHOGONAL), draw(Kind.POSITIVE)), Kind.ORTHOGONAL
    ),
    "not a number": lambda: Matrix(torch.full((1, 3, 3), torch.nan).double(), Kind.ORTHOGONAL),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_rejected(name: str) -> None:
    g = NEAR_MISSES[name]()
    assert residual(g) > 1e-7
    with pytest.raises(BadInput, match="residual"):
        require_member(g)


def test_an_element_of_the_wrong_form_is_no_member() -> None:
    assert residual(draw(Kind.ORTHOGONAL), Kind.PERMUTATION) == float("inf")
    assert residual(draw(Kind.ORTHOGONAL), Kind.SIGN) == float("inf")
    assert residual(draw(Kind.POSITIVE), Kind.ORTHOGONAL) > 0.1
    assert residual(draw(Kind.SCALE, seed=3), Kind.POSITIVE) == float("inf")
    assert residual(draw(Kind.ORTHOGONAL), Kind.COMPLEX) == float("inf")
    assert residual(draw(Kind.GENERAL_LINEAR), Kind.ORTHOGONAL) > 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Permutation(torch.zeros(3, dtype=torch.int64)),
        lambda: Permutation(torch.zeros(1, 3, dtype=torch.int32)),
        lambda: Diagonal(torch.ones(1, 3)),
        lambda: Diagonal(torch.ones(1, 3).double(), Kind.ORTHOGONAL),
        lambda: Matrix(torch.ones(1, 2, 3).double()),
        lambda: Matrix(torch.ones(1, 2, 2).double(), Kind.SIGN),
        lambda: Matrix(torch.ones(1, 2, 2).double()),
        lambda: Matrix(torch.eye(3).double()[None], Kind.COMPLEX),
        lambda: Householder(torch.ones(1, 3).double()),
        lambda: Householder(torch.ones(1, 1, 3).double(), Kind.SIGN),
        lambda: RandomHadamard(torch.ones(3).double()),
        lambda: Product(()),
        lambda: identity(Kind.TRANSLATION, 3),
        lambda: random_element(Kind.NULL, 3, 1, seeded(0)),
    ],
)
def test_data_of_the_wrong_shape_or_kind_is_an_error(make: Callable[[], Element]) -> None:
    with pytest.raises(RegaugeError):
        make()


def test_diagonal_kinds() -> None:
    assert {kind for kind in LINEAR if isinstance(draw(kind), Diagonal)} == DIAGONAL
