"""μP relative to a base width: rules of microsoft/mup, and activations that do not move with the width."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from regauge.errors import BadInput, Refused
from regauge.nn.init import measure
from regauge.param import MuReadout, Widths, adam_groups, mu_normal_, rescale_, sgd_groups, widths

BASE = 64


def net(width: int, readout: Callable[..., nn.Module] = MuReadout, device: str = "cpu") -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, width, device=device),
        nn.ReLU(),
        nn.Linear(width, 2 * width, device=device),
        nn.ReLU(),
        nn.Linear(2 * width, width, device=device),
        nn.ReLU(),
        readout(width, 3, device=device),
    )


def test_axes_that_differ_from_the_base_grow() -> None:
    found = widths(net(256), net(BASE, device="meta"))
    assert found["0.weight"] == Widths((256, 8), (64, None))
    assert found["2.weight"] == Widths((512, 256), (128, 64))
    assert found["6.weight"] == Widths((3, 256), (None, 64))
    assert [found[name].infinite for name in ("0.weight", "2.weight", "2.bias", "6.bias")] == [1, 2, 1, 0]
    assert found["2.weight"].mult == found["6.weight"].mult == found["2.bias"].mult == 4
    assert found["6.bias"].mult == 1
    # As wide as the base, nothing seems to grow, unless a third model says so.
    assert not any(width.infinite for width in widths(net(BASE), net(BASE)).values())
    same = widths(net(BASE), net(BASE), net(2 * BASE))
    assert same["2.weight"].infinite == 2
    assert same["2.weight"].mult == 1
    with pytest.raises(Refused, match="same parameters"):
        widths(net(BASE), net(BASE)[:3])
    with pytest.raises(Refused, match="not meant to grow"):
        widths(net(128), net(BASE), net(BASE))


def test_standard_initialisation_becomes_mup() -> None:
    """Weights and biases of the readout × √m, other biases × √(ratio of fan-in), nothing else."""
    torch.manual_seed(0)
    model = net(256)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rescale_(model, widths(model, net(BASE)))
    ratios = {name: p.detach() / before[name] for name, p in model.named_parameters()}
    wanted = {"0": (1, 1), "2": (1, 2), "4": (1, 2), "6": (2, 2)}
    for path, (weight, bias) in wanted.items():
        assert torch.allclose(ratios[f"{path}.weight"], torch.tensor(float(weight)))
        assert torch.allclose(ratios[f"{path}.bias"], torch.tensor(float(bias)))
    x = torch.randn(5, 256)
    assert torch.allclose(model[6](x), F.linear(x / 4, model[6].weight, model[6].bias))
    again = net(256)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again[6](x), model[6](x))
    doubled = again.double()
    assert torch.allclose(doubled[6](x.double()).float(), model[6](x), atol=1e-6)
    with pytest.raises(Refused, match="already"):
        rescale_(model, widths(model, net(BASE)))
    assert torch.allclose(model[6].weight / before["6.weight"], torch.tensor(2.0))


def test_readouts_may_start_at_zero_and_compile() -> None:
    layer = MuReadout(12, 3, mult=2.0, zero=True)
    assert not any(p.any() for p in layer.parameters())
    layer = MuReadout(12, 3, mult=2.0)
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    assert layer.to(torch.bfloat16)(x).dtype == torch.bfloat16
    torch._dynamo.reset()
    layer = layer.float()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x.float()), layer(x.float()))
    assert torch.allclose(layer(x.float()), F.linear(2 * x.float(), layer.weight, layer.bias))


def test_what_is_no_mup_is_refused() -> None:
    plain = net(128, nn.Linear)
    before = [p.detach().clone() for p in plain.parameters()]
    with pytest.raises(Refused, match="leads from an axis"):
        rescale_(plain, widths(plain, net(BASE, nn.Linear)))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), before, strict=True))

    def tied(width: int) -> nn.Module:
        model = nn.ModuleList([nn.Embedding(9, width), MuReadout(width, 9)])
        model[1].weight = model[0].weight
        return model

    with pytest.raises(Refused, match="tied"):
        rescale_(tied(128), widths(tied(128), tied(BASE)))
    with pytest.raises(BadInput):
        adam_groups(plain, {}, 0.1)


def rates(groups: list[dict], model: nn.Module) -> dict[str, tuple[float, float]]:
    by = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: by[id(p)] for name, p in model.named_parameters()}


def test_groups_follow_the_published_rules() -> None:
    model = net(256)
    found = widths(
        model, nn.Sequential(*net(BASE)[:2], nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), *net(BASE)[5:])
    )
    adam = rates(adam_groups(model, found, 0.1, 0.01), model)
    assert adam["0.weight"] == adam["0.bias"] == adam["6.weight"] == adam["6.bias"] == (0.1, 0.01)
    assert adam["2.weight"] == pytest.approx((0.025, 0.04))
    assert adam["4.weight"] == pytest.approx((0.0125, 0.08))
    free = rates(adam_groups(model, found, 0.1, 0.01, decoupled=True), model)
    assert free["4.weight"] == pytest.approx((0.0125, 0.01))
    sgd = rates(sgd_groups(model, found, 0.1, 0.01), model)
    assert sgd["0.weight"] == sgd["6.weight"] == pytest.approx((0.4, 0.0025))
    assert sgd["2.bias"] == pytest.approx((0.8, 0.00125))
    assert sgd["2.weight"] == pytest.approx((0.2, 0.005))
    assert sgd["4.weight"] == pytest.approx((0.05, 0.02))
    assert sgd["6.bias"] == (0.1, 0.01)


def test_normal_weights_shrink_with_two_growing_axes_only() -> None:
    random = torch.Generator().manual_seed(0)
    for sizes, base, std in (((400, 400), (100, 100), 0.5), ((400, 400), (None, 100), 1.0)):
        w = mu_normal_(torch.empty(sizes), Widths(sizes, base), generator=random)
        assert float(w.std()) == pytest.approx(std, rel=0.02)


# --- coordinate check ---------------------------------------------------------------------------------


def moved(width: int, kind: str, optimizer: str) -> dict[str, float]:
    """Root mean square of what four steps change at each activation."""
    total: dict[str, float] = {}
    lr = 0.003 if optimizer == "adam" else 0.2
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(7))
    y = torch.arange(32) % 3
    for seed in range(3):
        torch.manual_seed(seed)
        model = net(width, MuReadout if kind == "mup" else nn.Linear)
        if kind == "mup":
            found = widths(model, net(BASE, device="meta"), net(2 * BASE, device="meta"))
            rescale_(model, found)
            groups = (adam_groups if optimizer == "adam" else sgd_groups)(model, found, lr)
        else:
            groups = [{"params": list(model.parameters()), "lr": lr}]
        made = Adam(groups) if optimizer == "adam" else SGD(groups)

        def values(model: nn.Module = model) -> dict[str, torch.Tensor]:
            kept: dict[str, torch.Tensor] = {}
            hooks = [
                module.register_forward_hook(lambda m, a, out, k=k: kept.__setitem__(k, out.detach()))
                for k, module in model.named_children()
            ]
            model(x)
            for hook in hooks:
                hook.remove()
            return kept

        first = values()
        for _ in range(4):
            made.zero_grad()
            F.cross_entropy(model(x), y).backward()
            made.step()
        for key, value in values().items():
            total[key] = total.get(key, 0.0) + float((value - first[key]).square().mean())
    return {key: math.sqrt(value / 3) for key, value in total.items() if key in ("0", "2", "4", "6")}


def slopes(kind: str, optimizer: str) -> dict[str, float]:
    """d log(change) / d log(width), from 64 to 1024."""
    small, large = moved(BASE, kind, optimizer), moved(16 * BASE, kind, optimizer)
    return {key: math.log(large[key] / small[key]) / math.log(16) for key in small}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_changes_of_activations_do_not_depend_on_the_width(optimizer: str) -> None:
    found = slopes("mup", optimizer)
    assert all(abs(slope) < 0.2 for slope in found.values()), found
    standard = slopes("standard", optimizer)
    assert max(abs(slope) for slope in standard.values()) > 0.35, standard


def test_the_readout_shrinks_at_the_start() -> None:
    """Standard: of one size. μP: logits fall as m^{−1/2}, as sums of m terms of random signs over m."""
    found = {}
    for width in (BASE, 16 * BASE):
        squares = []
        for seed in range(8):
            torch.manual_seed(seed)
            model = net(width)
            nn.init.zeros_(model[6].bias)
            rescale_(model, widths(model, net(BASE, device="meta"), net(2 * BASE, device="meta")))
            squares.append(measure(model, torch.randn(64, 8))[""].square)
        found[width] = sum(squares)
    assert found[16 * BASE] / found[BASE] == pytest.approx(1 / 16, rel=0.5)
