"""Scale-invariant parameters: every claim is checked by scaling, and the obvious cases are all found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regauge.certify.run import run
from regauge.hf import load_meta
from regauge.optim import View, scale_invariant
from regauge.optim.invariant import invariant_in
from regauge.optim.views import in_units
from regauge.trace import trace
from zoo.configs import CONFIGS
from zoo.parts import Fn, split_heads

EPS = 1e-30


def scaled_apart(model: nn.Module, run: Callable[[nn.Module], Tensor], views: dict[str, View]) -> float:
    """The largest relative change of the output when every unit gets a scale of its own."""
    before = run(model)
    random = torch.Generator().manual_seed(1)
    worst = 0.0
    for name, view in views.items():
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        scale = torch.exp(torch.randn(1, view.blocks, 1, generator=random, dtype=torch.float64))
        with torch.no_grad():
            parameter.copy_((in_units(kept, (view.axis, view.blocks)) * scale).reshape(kept.shape))
            worst = max(worst, float((run(model) - before).norm() / before.norm()))
            parameter.copy_(kept)
    return worst


def generic(model: nn.Module) -> nn.Module:
    """In float64, random parameters, and every eps next to nothing."""
    model.double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64) / 2)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, EPS)
    return model


def checked(model: nn.Module, x: Tensor, *, train: bool = True, **options: Any) -> dict[str, tuple[int, int]]:
    """What is claimed, after it has been checked."""
    x = x.double() if x.is_floating_point() else x
    views = scale_invariant(generic(model), (x,), **options)
    model.train(train)
    assert scaled_apart(model, lambda m: m(x).detach(), views) < 1e-10
    return {name: (view.axis, view.blocks) for name, view in views.items()}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# --- what must be found, and what must not -------------------------------------------------------------

IMAGE, ROWS = noise(3, 4, 6, 6), noise(5, 6)


def conv_batch() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def test_rows_before_a_batch_norm_with_the_bias_it_takes_away() -> None:
    assert checked(conv_batch(), IMAGE) == {"0.weight": (0, 6), "3.weight": (0, 4)}


def test_stored_statistics_do_not_follow_a_scale() -> None:
    assert checked(conv_batch(), IMAGE, train=False, batch_norm="stored") == {}
    with pytest.raises(ValueError, match="batch_norm"):
        scale_invariant(conv_batch(), (IMAGE,), batch_norm="eval")


def test_a_matrix_before_a_layer_norm_and_not_with_a_bias() -> None:
    def net(bias: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.LayerNorm(8), nn.Linear(8, 2))

    assert checked(net(False), ROWS) == {"0.weight": (0, 1)}
    assert checked(net(True), ROWS) == {}


def test_groups_are_units_of_their_own() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(216, 2))
    assert checked(net, IMAGE) == {"0.weight": (0, 3)}


def test_groups_and_holes_of_a_transposed_convolution() -> None:
    end = (nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    dilated = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, dilation=2), *end)
    assert checked(dilated, IMAGE) == {"0.weight": (1, 6)}
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2), *end)
    assert checked(grouped, IMAGE)["0.weight"] == (0, 2)


def test_two_maps_with_something_homogeneous_between() -> None:
    def net(between: nn.Module) -> nn.Module:
        ends = nn.RMSNorm(7, eps=EPS), nn.Linear(7, 2)
        return nn.Sequential(nn.Linear(6, 8, bias=False), between, nn.Linear(8, 7, bias=False), *ends)

    both = {"0.weight": (0, 1), "2.weight": (0, 1)}
    for between in (nn.ReLU(), nn.LeakyReLU(0.2), nn.Identity()):
        assert checked(net(between), ROWS) == both
    for between in (nn.GELU(), nn.Tanh(), nn.ReLU6(), nn.Softmax(-1)):
        assert checked(net(between), ROWS) == {"2.weight": (0, 1)}


def test_a_gain_is_invariant_where_only_norms_read_it() -> None:
    net = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 8, bias=False), nn.RMSNorm(8), nn.Linear(8, 2))
    assert checked(net, ROWS) == {"0.weight": (0, 1), "1.weight": (0, 1)}


def branch(body: Callable[..., Tensor], **more: nn.Module) -> nn.Module:
    parts = {"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 6, bias=False), "n": nn.RMSNorm(6, eps=EPS)}
    return Fn(body, **parts, **more, end=nn.Linear(6, 2))


def test_a_residual_sum_ends_it_unless_all_summands_scale() -> None:
    assert checked(branch(lambda m, x: m.end(m.n(x + m.b(m.a(x))))), ROWS) == {}
    assert checked(branch(lambda m, x: m.end(x + m.n(m.b(m.a(x))))), ROWS) == {
        "a.weight": (0, 1),
        "b.weight": (0, 1),
    }
    shared = branch(lambda m, x: m.end(m.n(m.a(x) + m.a(x.flip(0)))))
    assert checked(shared, ROWS) == {"a.weight": (0, 1)}
    squared = branch(lambda m, x: m.end(m.n(m.a(x) + m.b(m.a(m.a(x))))))
    assert checked(squared, ROWS) == {}


def test_a_map_that_is_used_elsewhere_is_not_invariant() -> None:
    assert checked(branch(lambda m, x: m.end(m.n(m.a(x))) + m.end(m.a(x))), ROWS) == {}


def test_queries_and_keys_that_are_normed_head_by_head() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (split_heads(p(x), 3) for p in (m.q, m.k, m.v))
        q = F.normalize(q, dim=-1, eps=EPS)
        k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + EPS)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return m.end(x + m.n(m.o(y)))

    maps = {name: nn.Linear(6, 6, bias=False) for name in "qkvo"}
    net = Fn(body, **maps, n=nn.LayerNorm(6), end=nn.Linear(6, 2))
    found = checked(net, noise(2, 5, 6))
    assert found == {"q.weight": (0, 3), "k.weight": (0, 3), "v.weight": (0, 1), "o.weight": (0, 1)}


def test_a_weight_norm_and_a_standardised_kernel() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        w = m.a.weight
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True, correction=0)
        return m.end(F.linear(x, w))

    assert checked(branch(body), ROWS) == {"a.weight": (0, 6)}
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    assert checked(nn.Sequential(normed, nn.Tanh()), ROWS)["0.parametrizations.weight.original1"] == (0, 4)


def test_units_lie_along_the_second_axis_where_outputs_do() -> None:
    net = Fn(lambda m, x: m.end(F.batch_norm(x @ m.w, None, None, training=True, eps=EPS)),
             w=nn.Parameter(torch.zeros(6, 5)), end=nn.Linear(5, 2))  # fmt: skip
    assert checked(net, ROWS) == {"w": (1, 5)}


def test_rows_that_are_only_in_part_normed_are_not_claimed() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        u, v = m.a(x).chunk(2, -1)
        return m.end(torch.cat([F.rms_norm(u, (3,), eps=EPS), v], -1))

    assert checked(branch(body), ROWS) == {}


def test_a_norm_over_what_scales_and_what_does_not() -> None:
    assert checked(branch(lambda m, x: m.end(m.n(torch.cat([m.a(x)[:, :3], x[:, :3]], -1)))), ROWS) == {}


def test_attention_mixes_the_positions_of_its_values() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.end(m.n(F.scaled_dot_product_attention(x, x, m.w.unsqueeze(0))))

    net = Fn(body, w=nn.Parameter(torch.zeros(5, 6)), n=nn.RMSNorm(6), end=nn.Linear(6, 2))
    assert checked(net, noise(1, 5, 6)) == {"w": (0, 1)}


def test_a_large_number_added_to_squares_is_no_guard() -> None:
    def net(eps: float) -> nn.Module:
        return branch(lambda m, x: m.end(m.a(x) * torch.rsqrt(m.a(x).pow(2).mean(-1, keepdim=True) + eps)))

    assert checked(net(EPS), ROWS) == {"a.weight": (0, 1)}
    assert scale_invariant(net(1.0), (ROWS,)) == {}
    shifted = branch(lambda m, x: m.end(m.a(x) / (m.a(x).mean(-1, keepdim=True) + EPS)))
    assert scale_invariant(shifted, (ROWS,)) == {}


def test_sorting_along_an_axis_and_rounding() -> None:
    assert checked(branch(lambda m, x: m.end(m.n(m.a(x).sort(dim=0, stable=True)[0]))), ROWS) == {
        "a.weight": (0, 1)
    }
    floored = branch(lambda m, x: m.end(m.n(torch.div(m.a(x), 0.1, rounding_mode="floor"))))
    assert checked(floored, ROWS) == {}
    cast = branch(lambda m, x: m.end(m.n(m.a(x).long().double())))
    assert checked(cast, ROWS) == {}


# --- the zoo: real architectures -----------------------------------------------------------------------

EXPECTED = {
    "gemma3": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"},
    "qwen3": {"q_proj", "k_proj"},
    "llama": set(),
    "bert": set(),
    "resnet": {"convolution"},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_models_of_the_zoo(name: str) -> None:
    held = load_meta(CONFIGS[name]())
    model = type(held.model)(held.config)
    generic(model).train()
    generic(held.model)
    inputs = held.real_inputs(batch=3, length=7, seed=1)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    views = scale_invariant(held.model, held.inputs)
    assert {key.removesuffix(".weight") for key in views} == {
        path for path, _ in model.named_modules() if any(path.endswith(end) for end in EXPECTED[name])
    }
    traced = trace(held.model, (), held.inputs)

    def logits(m: nn.Module) -> Tensor:
        """In true float64: models of text cast inside of their norms. A batch norm is run as in training."""
        if name == "resnet":
            return m(**inputs).logits.detach()
        return run(traced, m.state_dict().__getitem__, held.buffers(), inputs)[0]

    assert scaled_apart(model, logits, views) < 1e-10


def test_only_the_parameters_that_are_named() -> None:
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2))
    traced = trace(net, (ROWS,))
    assert list(invariant_in(traced, ["0.weight"])) == ["0.weight"]
    assert invariant_in(traced, ["2.weight"]) == {}
    assert invariant_in(traced, ["0.weight"])["0.weight"].norms == ("1",)
