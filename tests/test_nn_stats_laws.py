"""Laws of all layers with statistics over several positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from norm_steps import randn
from regauge.errors import Refused
from regauge.nn import Affine, Entry, adab2n, evonorm, powernorm, region, repbn, style, unified
from regauge.nn.adab2n import AdaB2N2d
from regauge.nn.evonorm import EvoNormB0, EvoNormS0
from regauge.nn.powernorm import GroupScaling, PowerNorm
from regauge.nn.region import RegionNormB, RegionNormL
from regauge.nn.repbn import PRepBN, RepBN
from regauge.nn.style import AdaIN, FixedStyle, GroupColouring
from regauge.nn.unified import UnifiedNorm

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for module in (powernorm, unified, repbn, evonorm, adab2n, region, style)
    for entry in module.ENTRIES
}
FOLDS = ("powernorm", "unified", "repbn", "prepbn", "adab2n", "adain")
STATEFUL = ("powernorm", "unified", "repbn", "prepbn", "adab2n", "evonorm-b0")
TOKENS: dict[str, Callable[..., nn.Module]] = {
    "powernorm": lambda **kind: PowerNorm(6, 2, warmup=3, **kind),
    "unified": lambda **kind: UnifiedNorm(6, (2, 3), 3, True, **kind),
    "repbn": lambda **kind: RepBN(6, **kind),
    "prepbn": lambda **kind: PRepBN(6, "rms", warm=1, steps=6, every=2, **kind),
}
IMAGES: dict[str, Callable[..., nn.Module]] = {
    "adab2n": lambda **kind: AdaB2N2d(6, 3, 0.4, **kind),
    "evonorm-b0": lambda **kind: EvoNormB0(6, **kind),
    "evonorm-s0": lambda **kind: EvoNormS0(6, 3, **kind),
    "region-b": lambda **kind: RegionNormB(6, **kind),
    "region-l": lambda **kind: RegionNormL(6, 0.5, 3, **kind),
    "adain": lambda **kind: FixedStyle(AdaIN(), randn(1, 6, 3, 3, seed=9).to(**kind)),
    "gdwct": lambda **kind: FixedStyle(GroupColouring(6, 3, 8, **kind), randn(1, 6, seed=9).to(**kind)),
}
LAYERS = {**TOKENS, **IMAGES}


def batch(name: str, number: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = (4, 5, 6) if name in TOKENS else (4, 6, 5, 3)
    x = randn(*shape, seed=number) * (1 + 0.05 * number) + 0.2
    return (x * torch.linspace(0.5, 3.0, 6) if name in TOKENS else x).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def entry_input(entry: Entry, size: int, seed: int) -> torch.Tensor:
    return randn(*((3, 5, size) if entry.kind == "tokens" else (3, size, 4, 5)), seed=seed)


def step(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output and gradients of one training step."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    loss = (y.float() * randn(*y.shape, seed=77).to(torch.float32)).sum()
    extra = getattr(layer, "loss", None)
    (loss if extra is None else loss + 10 * extra).backward()
    grads = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    return (y.detach(), x.grad, *grads)


def equal(found: Any, wanted: Any, tolerance: float = 0.0) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=0, atol=tolerance)


# --- entries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ENTRIES))
@pytest.mark.parametrize("size", [6, 7])
def test_entries_are_as_promised(name: str, size: int) -> None:
    entry = ENTRIES[name]
    for build in (entry.make, entry.bare):
        layer, again = build(size, seeded(3)), build(size, seeded(3))
        assert not layer.training
        assert {t.dtype for t in layer.state_dict().values()} <= {torch.float64, torch.int64}
        equal(list(layer.state_dict().values()), list(again.state_dict().values()))
        x = entry_input(entry, size, 4)
        assert layer(x).shape == x.shape
    made = entry.make(size, seeded(3))
    for key, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if tensor.is_floating_point() and "ema" not in key and "buffer" not in key and "norm1" not in key:
            assert ((tensor - 1).abs() > 1e-6).all(), key
            assert (tensor.abs() > 1e-6).all() or "running_mean" in key, key


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("seed", range(3))
def test_fold_is_the_layer_in_evaluation_mode(name: str, seed: int) -> None:
    entry = ENTRIES[name]
    layer = entry.make(6, seeded(seed))
    before = copy.deepcopy(layer.state_dict())
    folded = layer.fold()
    x = entry_input(entry, 6, seed + 10)
    wanted = layer(x)
    assert torch.allclose(folded(x), wanted, rtol=0, atol=1e-12)
    assert (folded(2 * x + 1) - folded(x)).abs().max() > 0.01 or name == "adain"
    equal(list(layer.state_dict().values()), list(before.values()))
    kinds = (Affine, GroupScaling, nn.RMSNorm, nn.InstanceNorm2d, nn.Sequential)
    assert all(isinstance(module, kinds) for module in folded.modules())
    with torch.no_grad():
        for tensor in folded.parameters():
            tensor.zero_()
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_what_does_not_fold_is_refused(name: str) -> None:
    layer = ENTRIES[name].make(6, seeded(0))
    if name not in FOLDS:
        with pytest.raises(Refused, match="collapse"):
            layer.fold()
    with pytest.raises(Refused):
        layer.train().fold()


LAWS = [
    pytest.param(name, number, training, id=f"{name}-{number}-{'training' if training else 'evaluation'}")
    for name, entry in ENTRIES.items()
    for number, law in enumerate(entry.laws)
    for training in (False, True)
    if law.training or not training
]


@pytest.mark.parametrize(("name", "number", "training"), LAWS)
def test_gauges(name: str, number: int, training: bool) -> None:
    entry = ENTRIES[name]
    layer = entry.make(6, seeded(1)).train(training)
    x = entry_input(entry, 6, 2)
    old = copy.deepcopy(layer)
    new, new_x, change = entry.laws[number].act(layer, x, seeded(5))
    moved = torch.equal(new_x, x) and all(
        map(torch.equal, new.state_dict().values(), old.state_dict().values())
    )
    assert not moved
    assert torch.allclose(new(new_x), change(old(x)), rtol=0, atol=1e-12)


# --- states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_continues_from_its_state(name: str, stop: int) -> None:
    whole = LAYERS[name](dtype=torch.float64)
    for number in range(stop):
        step(whole, batch(name, number))
    part = LAYERS[name](dtype=torch.float64)
    part.load_state_dict(copy.deepcopy(whole.state_dict()))
    for number in range(stop, 8):
        equal(step(part, batch(name, number)), step(whole, batch(name, number)))
    equal(list(part.state_dict().values()), list(whole.state_dict().values()))


@pytest.mark.parametrize("name", STATEFUL)
def test_every_part_of_the_state_matters(name: str) -> None:
    """With one buffer of the state as in a new layer, the run goes on otherwise."""
    whole = LAYERS[name](dtype=torch.float64)
    for number in range(5):
        step(whole, batch(name, number))
    new = LAYERS[name](dtype=torch.float64)
    for key in (key for key, tensor in new.named_buffers() if "tracked" not in key or name == "adab2n"):
        state = copy.deepcopy(whole.state_dict())
        if torch.equal(state[key], new.state_dict()[key]):
            continue
        state[key] = new.state_dict()[key].clone()
        one, two = copy.deepcopy(new), copy.deepcopy(whole)
        one.load_state_dict(state)
        for number in range(5, 8):
            step(one, batch(name, number))
            step(two, batch(name, number))
        pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        assert not all(torch.equal(*pair) for pair in pairs), key


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_evaluation_leaves_the_state_alone(name: str) -> None:
    layer = LAYERS[name](dtype=torch.float64).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(batch(name))
    equal(list(layer.state_dict().values()), list(before.values()))


# --- compilers and precision ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_one_graph(name: str) -> None:
    """Training steps and evaluation of the compiled layer, gradients and running statistics too."""
    torch.manual_seed(0)
    eager = LAYERS[name](dtype=torch.float64)
    other = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for number in range(4):
        x = batch(name, number)
        equal(step(compiled, x), step(eager, x), 1e-12)
        equal(list(other.state_dict().values()), list(eager.state_dict().values()), 1e-12)
    x = batch(name, 9)
    assert torch.allclose(compiled.eval()(x), eager.eval()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LAYERS))
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_under_autocast(name: str, low: torch.dtype) -> None:
    """The state after steps on bfloat16 input is that after the same values in float32."""
    torch.manual_seed(0)
    one = LAYERS[name](dtype=torch.float32)
    two = copy.deepcopy(one)
    for number in range(4):
        x = batch(name, number, low).requires_grad_()
        with torch.autocast("cpu", dtype=low):
            y = one(x)
        assert y.dtype == low
        wanted = two(x.detach().float().requires_grad_())
        assert wanted.dtype == torch.float32
        limit = 0.05 if name in ("region-l", "gdwct") else 0.02  # these have products of matrices
        assert (y.float() - wanted).abs().max() <= limit * max(1.0, wanted.abs().max().item())
        y.float().sum().backward()
        wanted.sum().backward()
    for key, tensor in one.state_dict().items():
        if "gz" not in key:  # moments of the gradient, which arrives rounded
            assert torch.allclose(tensor, two.state_dict()[key], rtol=1e-6, atol=1e-6), key


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_of_low_precision(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.bfloat16)
    y = layer(batch(name, 0, torch.bfloat16).requires_grad_())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
