"""Unit-scaled operations: their constants, the scale of values and gradients, and exact conversion."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regauge.errors import BadInput, Refused
from regauge.param import (
    UnitLinear,
    learning_rate_factor,
    residual,
    scale,
    stream_scales,
    transformer_tau,
    unit_factor,
)
from regauge.param import unit_scaling as U


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()


def ratio(
    scaled: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> list[float]:
    """Constants: of the output, then of the gradient of each input, with the same upstream gradient.

    A value that is no constant multiple of the plain one fails.
    """
    y, z = scaled(*inputs), plain(*inputs)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    pairs = [(y.detach(), z.detach())]
    grads = (torch.autograd.grad(part, inputs, upstream) for part in (y, z))
    pairs += zip(*grads, strict=True)
    found = []
    for a, b in pairs:
        factor = float((a * b).sum() / (b * b).sum())
        assert (a - factor * b).abs().max() < 1e-12 * max(1.0, float(a.abs().max()))
        found.append(factor)
    return found


# --- constants ----------------------------------------------------------------------------------------


def test_a_scale_acts_on_the_value_or_on_the_gradient() -> None:
    x = normal(5)
    y = scale(x, forward=3.0, backward=0.5)
    assert y.equal(3 * x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.equal(torch.full_like(x, 0.5))
    half = torch.ones(3, dtype=torch.bfloat16)
    assert scale(half, forward=torch.tensor(2.0)).dtype == torch.bfloat16
    # A scale on the value alone has second derivatives of zero for itself, and passes others on.
    assert torch.autograd.gradgradcheck(lambda z: scale(z**3, backward=2.0), (x,))


@pytest.mark.parametrize("constrained", [True, False])
def test_constants_of_linear_operations(constrained: bool) -> None:
    x, w, b = normal(3, 7, 5), normal(11, 5, seed=1), normal(11, seed=2)
    back = 5**-0.5 if constrained else 11**-0.5
    found = ratio(lambda *a: U.linear(*a, constrained=constrained), F.linear, x, w, b)
    # ∂x has the constant given; the value and ∂W, ∂b are each scaled on their own.
    assert found == pytest.approx([5**-0.5, back, 21**-0.5, 21**-0.5], rel=1e-12)
    back = 1 / 5 if constrained else 11**-0.5
    found = ratio(lambda *a: U.readout(*a, constrained=constrained), F.linear, x, w, b)
    assert found == pytest.approx([1 / 5, back, 21**-0.5, 21**-0.5], rel=1e-12)
    left, right = normal(2, 3, 7), normal(2, 7, 5, seed=1)
    sides = [7**-0.5, 7**-0.5] if constrained else [5**-0.5, 3**-0.5]
    found = ratio(lambda *a: U.matmul(*a, constrained=constrained), torch.matmul, left, right)
    assert found == pytest.approx([7**-0.5, *sides], rel=1e-12)
    x, w, b = normal(4, 6, 13), normal(8, 3, 3, seed=1), normal(8, seed=2)
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    forms = [
        lambda *a: U.conv1d(*a, **options, constrained=constrained),
        lambda *a: F.conv1d(*a, **options),
    ]
    back = 9**-0.5 if constrained else (2 * 2 / (8 * 3)) ** 0.5
    found = ratio(*forms, x, w, b)
    tokens = F.conv1d(x, w, b, **options).shape[-1] * 4
    assert found == pytest.approx([9**-0.5, back, tokens**-0.5, tokens**-0.5], rel=1e-12)
    a, c = normal(4, 6), normal(6, seed=1)
    sides = [2**-0.5, 2**-0.5] if constrained else [1.0, 0.5]
    found = ratio(lambda *a: U.add(*a, constrained=constrained), torch.add, a, c)
    assert found == pytest.approx([2**-0.5, *sides], rel=1e-12)
    assert U.add(a, torch.tensor(2.0)).equal(a + 2)


@pytest.mark.parametrize("mult", [0.3, 1.0, 4.0])
def test_constants_of_functions(mult: float) -> None:
    x, g = normal(6, 9), normal(6, 9, seed=1)
    soft = 1 / (1 + 0.25 / mult**2)
    hard = 1 / (1 + 1 / mult**2)
    sharp = 1 / (1 + 4 / mult**2)
    relu = math.sqrt(2 / (1 - 1 / math.pi))
    out = math.exp((1 - soft) * math.log(2) + soft * math.log(relu))
    cases = {
        "gelu": (
            lambda z, c: U.gelu(z, mult, constrained=c),
            lambda z: F.gelu(z * mult) / mult,
            out,
            2 ** (1 - soft) * 2 ** (soft / 2),
        ),
        "silu": (
            lambda z, c: U.silu(z, mult, constrained=c),
            lambda z: z * torch.sigmoid(mult * z),
            out,
            2 ** (1 - hard / 2),
        ),
        "softmax": (
            lambda z, c: U.softmax(z, 1, mult, constrained=c),
            lambda z: torch.softmax(mult * z, 1),
            9 ** (1 - sharp / 2),
            (9 / mult) ** (1 - sharp / 2),
        ),
    }
    for scaled, plain, forward, backward in cases.values():
        free = ratio(lambda z, s=scaled: s(z, False), plain, x)
        assert free == pytest.approx([forward, backward], rel=1e-12)
        bound = ratio(lambda z, s=scaled: s(z, True), plain, x)
        assert bound == pytest.approx([forward, forward], rel=1e-12)
    found = ratio(lambda a, b: U.silu_glu(a, b, mult), lambda a, b: a * b * torch.sigmoid(mult * b), x, g)
    assert found == pytest.approx([2 ** (1 - hard / 2)] * 3, rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_constants_of_attention(causal: bool) -> None:
    q, k, v = normal(2, 3, 10, 4), normal(2, 3, 10, 4, seed=1), normal(2, 3, 10, 4, seed=2)
    share = 1 / (1 + 4 * 4 / 2.25)
    factor = 1 / math.sqrt((math.log(10) if causal else 1) / 10) ** (1 - share)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()

    def plain(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        logits = 1.5 / 4 * a @ b.mT
        return torch.softmax(logits.masked_fill(~mask, -torch.inf) if causal else logits, -1) @ c

    found = ratio(lambda *a: U.attention(*a, causal=causal, mult=1.5), plain, q, k, v)
    assert found == pytest.approx([factor] * 4, rel=1e-10)
    # One position attends to itself alone.
    one = [part[..., :1, :] for part in (q, k, v)]
    assert torch.allclose(U.attention(*one, causal=causal), v[..., :1, :])


def test_constants_of_norms_embedding_and_loss() -> None:
    x, g, b = normal(3, 7, 5), normal(5, seed=1), normal(5, seed=2)
    forms = [lambda z, *a, f=f: f(z, (5,), *a) for f in (U.layer_norm, F.layer_norm)]
    found = ratio(*forms, x, g, b)
    assert found == pytest.approx([1, 1, 21**-0.5, 21**-0.5], rel=1e-10)
    found = ratio(
        lambda *a: U.rms_norm(a[0], (5,), a[1]),
        lambda *a: a[0] / (a[0].square().mean(-1, keepdim=True) + 1e-5).sqrt() * a[1],
        x,
        g,
    )
    assert found == pytest.approx([1, 1, 21**-0.5], rel=1e-10)
    tokens = torch.arange(24).reshape(4, 6) % 10
    w = normal(10, 3)
    found = ratio(lambda a: U.embedding(tokens, a), lambda a: a[tokens], w)
    assert found == pytest.approx([1, math.sqrt(10 / 24)], rel=1e-12)


def test_cross_entropy_has_the_gradient_of_the_sum() -> None:
    x, target = normal(12, 7), torch.arange(12) % 7
    target[3] = -100
    loss = U.cross_entropy(x, target, 0.5)
    value = float(loss.detach())
    assert value == pytest.approx(float(F.cross_entropy(0.5 * x.detach(), target)), rel=1e-12)
    all_of_them = U.cross_entropy(x.detach(), target, 0.5, divide_by_all=True)
    assert float(all_of_them) == pytest.approx(value * 11 / 12, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, x)
    wanted = torch.softmax(0.5 * x.detach(), 1)
    wanted[torch.arange(12), target.clamp(min=0)] -= 1
    wanted[3] = 0
    assert (grad - wanted * 7 / math.sqrt(6)).abs().max() < 1e-12
    with pytest.raises(BadInput):
        U.cross_entropy(x, target[:3])


# --- the law: unit scale ------------------------------------------------------------------------------

N = 256


def scales(operation: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[float]:
    """Standard deviation of the output, then of every gradient for a normal upstream gradient."""
    y = operation(*inputs)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [float(part.detach().std()) for part in (y, *torch.autograd.grad(y, inputs, upstream))]


LAWS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], float]] = {
    "linear": (
        lambda *a: U.linear(*a, constrained=False),
        (normal(N, 128), normal(512, 128, seed=1), normal(512, seed=2)),
        # The bias of zero would not add; that of N(0, 1) adds 1/i to the variance.
        0.1,
    ),
    "matmul": (
        lambda *a: U.matmul(*a, constrained=False),
        (normal(3, 64, 128), normal(3, 128, 256, seed=1)),
        0.05,
    ),
    "conv1d": (
        lambda *a: U.conv1d(*a, constrained=False),
        (normal(16, 32, 256), normal(64, 32, 5, seed=1)),
        0.05,
    ),
    "strided grouped conv1d": (
        lambda *a: U.conv1d(*a, stride=2, groups=4, constrained=False),
        (normal(16, 64, 256), normal(128, 16, 4, seed=1)),
        0.05,
    ),
    "gelu": (lambda x: U.gelu(x, constrained=False), (normal(N, N),), 0.06),
    "gelu, sharp": (lambda x: U.gelu(x, 4.0, constrained=False), (normal(N, N),), 0.06),
    "silu": (lambda x: U.silu(x, constrained=False), (normal(N, N),), 0.13),
    "silu, sharp": (lambda x: U.silu(x, 8.0, constrained=False), (normal(N, N),), 0.06),
    "silu_glu": (U.silu_glu, (normal(N, N), normal(N, N, seed=1)), 0.2),
    "add": (lambda *a: U.add(*a, constrained=False), (normal(N, N), normal(N, seed=1)), 0.1),
    "layer_norm": (
        lambda x, g: U.layer_norm(x, (N,), g),
        (normal(N, N), torch.ones(N, dtype=torch.float64).requires_grad_()),
        0.1,
    ),
    "rms_norm": (
        lambda x, g: U.rms_norm(x, (N,), g),
        (normal(N, N), torch.ones(N, dtype=torch.float64).requires_grad_()),
        0.1,
    ),
    "embedding": (lambda w: U.embedding(torch.arange(4 * N) % N, w), (normal(N, N),), 0.05),
}


@pytest.mark.parametrize("name", LAWS)
def test_outputs_and_gradients_have_unit_scale(name: str) -> None:
    operation, inputs, tolerance = LAWS[name]
    assert scales(operation, *inputs) == pytest.approx([1.0] * (1 + len(inputs)), abs=tolerance)


def test_the_gradient_of_the_loss_has_unit_scale() -> None:
    x = (1e-3 * normal(512, 50).detach()).requires_grad_()
    (grad,) = torch.autograd.grad(U.cross_entropy(x, torch.arange(512) % 50), x)
    assert float(grad.square().mean().sqrt()) == pytest.approx(1, rel=1e-2)


def test_a_stack_has_unit_scale_forwards_and_backwards() -> None:
    """Residual branches of two layers each, as a whole; gradients inside branches too."""
    depth, found = 12, {}
    weights = [normal(N, N, seed=k + 1) for k in range(2 * depth)]
    x = first = normal(512, N)

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        value.register_hook(lambda grad: found.__setitem__(name, float(grad.square().mean().sqrt())))
        found[f"value {name}"] = float(value.detach().square().mean().sqrt())
        return value

    for k in range(depth):

        def branch(z: torch.Tensor, k: int = k) -> torch.Tensor:
            z = keep(f"{k}.in", U.linear(U.rms_norm(z, (N,)), weights[2 * k]))
            return keep(f"{k}.out", U.linear(torch.tanh(z) * 1.593, weights[2 * k + 1]))

        x = keep(f"{k}", residual(branch, x, transformer_tau(k, depth)))
    upstream = normal(512, N, seed=99).detach()
    grads = torch.autograd.grad(x, [first, *weights], upstream)
    rms = [float(grad.square().mean().sqrt()) for grad in grads]
    assert all(0.7 < value < 1.5 for value in (*found.values(), *rms)), (found, rms)
    assert len(found) == 6 * depth


# --- residual streams ---------------------------------------------------------------------------------


def test_a_residual_sum_has_a_true_gradient_and_unscaled_gradients_inside() -> None:
    x, tau, inside = normal(6), 0.4, []

    def branch(z: torch.Tensor) -> torch.Tensor:
        y = torch.sin(z)
        y.register_hook(lambda grad: inside.append(grad))
        return y

    y = residual(branch, x, tau)
    plain = (tau * torch.sin(x) + x) / math.sqrt(1 + tau**2)
    assert (y - plain).abs().max() < 1e-14
    upstream = normal(6, seed=3).detach()
    (a,), (b,) = (torch.autograd.grad(part, x, upstream) for part in (y, plain))
    assert (a - b).abs().max() < 1e-14
    assert inside[0].equal(upstream)


@pytest.mark.parametrize(("mult", "ratio"), [(1.0, 1.0), (0.5, 2.0), (3.0, 0.25)])
def test_branches_of_a_transformer_add_what_the_rule_says(mult: float, ratio: float) -> None:
    """With independent branches of unit scale, shares of the last stream follow from τ alone."""
    layers = 14
    shares, embedding = [0.0] * layers, 1.0
    for k in range(layers):
        tau = transformer_tau(k, layers, mult, ratio)
        shares = [share / (1 + tau**2) for share in shares]
        embedding /= 1 + tau**2
        shares[k] = tau**2 / (1 + tau**2)
    attention, mlp = shares[::2], shares[1::2]
    assert attention == pytest.approx([attention[0]] * 7, rel=1e-12)
    assert mlp == pytest.approx([mlp[0]] * 7, rel=1e-12)
    assert attention[0] / mlp[0] == pytest.approx(ratio**2, rel=1e-12)
    assert (sum(attention) + sum(mlp)) / 2 / embedding == pytest.approx(mult**2, rel=1e-12)
    with pytest.raises(BadInput):
        transformer_tau(14, layers)


def test_learning_rates() -> None:
    assert learning_rate_factor("weight", 64) == pytest.approx(1 / 8)
    assert learning_rate_factor("weight", 64, 4) == pytest.approx(1 / 16)
    assert learning_rate_factor("bias", 64, 4) == pytest.approx(1 / 2)
    assert learning_rate_factor("norm") == learning_rate_factor("output", 64) == 1
    assert learning_rate_factor("weight", 64, None, "sgd", readout_constrained=True) == 8
    assert learning_rate_factor("norm", 64, None, "sgd", readout_constrained=True) == 64
    for wrong in (("embedding", 1, None, "adam"), ("weight", 1, None, "sgd"), ("weight", 1, None, "rmsprop")):
        with pytest.raises(BadInput):
            learning_rate_factor(*wrong)  # type: ignore[arg-type]


# --- conversion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_maps_convert_there_and_back(readout: bool, bias: bool) -> None:
    linear = nn.Linear(24, 7, bias, dtype=torch.float64).eval()
    linear.weight.requires_grad_(False)
    unit = UnitLinear.from_linear(linear, readout=readout)
    x = normal(5, 24).detach()
    assert (unit(x) - linear(x)).abs().max() < 1e-13
    assert not unit.training
    assert not unit.weight.requires_grad
    back = unit.to_linear()
    assert (back.weight - linear.weight).abs().max() < 1e-15
    assert (back(x) - linear(x)).abs().max() < 1e-13
    power = UnitLinear.from_linear(nn.Linear(16, 3), readout=readout)
    assert power.to_linear().weight.equal(UnitLinear.from_linear(power.to_linear()).to_linear().weight)
    with pytest.raises(Refused):
        UnitLinear.from_linear(nn.Bilinear(2, 2, 2))


# The compiler makes an object of every custom gradient it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_unit_weights_are_normal_and_compile() -> None:
    layer = UnitLinear(200, 300, generator=torch.Generator().manual_seed(0))
    assert float(layer.weight.detach().std()) == pytest.approx(1, abs=0.02)
    assert not layer.bias.any()
    x = torch.randn(8, 200, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def model(z: torch.Tensor) -> torch.Tensor:
        y = residual(lambda t: U.gelu(layer(t))[..., :200], z, 0.5)
        return U.cross_entropy(U.silu(y), torch.arange(8))

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (a,), (b,) = (torch.autograd.grad(part(x), x) for part in (model, compiled))
    assert torch.allclose(model(x), compiled(x))
    assert torch.allclose(a, b)


def test_roles_have_their_factors() -> None:
    assert unit_factor((8, 4, 4)) == 4
    assert unit_factor((8, 16), "readout") == 16
    assert unit_factor((100, 16), "embedding") == 1
    with pytest.raises(BadInput):
        unit_factor((8, 16), "head")  # type: ignore[arg-type]
    with pytest.raises(Refused):
        unit_factor((8,))


def test_a_plain_transformer_converts_to_unit_scaled_form() -> None:
    """Pre-norm attention and MLP by turns, embedding and readout; every constant is undone in a weight."""
    torch.manual_seed(0)
    d, heads, length, eps, layers = 12, 3, 6, 1e-3, 4
    k = d // heads
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (20, d), "down": (d, 20)}
    w = [
        {key: torch.randn(shape, dtype=torch.float64) / 3 for key, shape in shapes.items()}
        for _ in range(layers)
    ]
    table, head = torch.randn(9, d, dtype=torch.float64), torch.randn(9, d, dtype=torch.float64)
    tokens = torch.randint(9, (2, length))

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, k)).transpose(1, 2)

    def join(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2)

    x = table[tokens]
    for i in range(layers):
        z, p = F.rms_norm(x, (d,), eps=eps), w[i]
        if i % 2 == 0:
            y = F.scaled_dot_product_attention(*(split(z @ p[n].T) for n in "qkv"), is_causal=True)
            x = x + join(y) @ p["o"].T
        else:
            x = x + F.gelu(z @ p["up"].T) @ p["down"].T
    plain = F.rms_norm(x, (d,), eps=eps) @ head.T

    taus = [transformer_tau(i, layers, 0.7, 1.3) for i in range(layers)]
    stream, last = stream_scales(taus)
    attention = U.attention_scale(length, k, math.sqrt(k), causal=True)
    undo = {"o": 1 / attention, "down": 1 / U.gelu_scales()[0]}
    unit = [
        {
            key: value * unit_factor(value.shape) * (undo[key] * part.branch if key in undo else 1)
            for key, value in p.items()
        }
        for p, part in zip(w, stream, strict=True)
    ]
    s = U.embedding(tokens, table)
    for i in range(layers):

        def branch(z: torch.Tensor, i: int = i) -> torch.Tensor:
            z, p = U.rms_norm(z, (d,), eps=eps * stream[i].eps), unit[i]
            if i % 2 == 0:
                parts = (split(U.linear(z, p[n])) for n in "qkv")
                return U.linear(join(U.attention(*parts, causal=True, mult=math.sqrt(k))), p["o"])
            return U.linear(U.gelu(U.linear(z, p["up"])), p["down"])

        s = residual(branch, s, taus[i])
    assert (s * last - x).abs().max() < 1e-12
    z = U.rms_norm(s, (d,), eps=eps / last**2)
    scaled = U.readout(z, head * unit_factor(head.shape, "readout"))
    assert (scaled - plain).abs().max() < 1e-12
    with pytest.raises(BadInput):
        stream_scales([0.5, 0.0])
