"""What a module is read as computes what the module computes; what is no plain norm is refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from nn_laws import SIZE, distance, tokens
from regauge import norms_regauge as core
from regauge.errors import Refused
from regauge.modeling_regauge import Norm
from regauge.nn import PlainNorm, read_norm
from regauge.nn.entry import generic
from regauge.nn.plain import LayerNorm, RMSNorm
from regauge.nn.seednorm import SeeDNorm
from regauge.nn.vectors import MagnitudeNorm, ScaledNorm


class Plainly(nn.Module):
    """An RMSNorm with an offset gain and a shift, written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (1 + self.gain) * (x * inverse) + self.shift


class Twice(Plainly):
    """The gain is the shift too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.gain * (x * inverse) + self.gain


class Before(Plainly):
    """The shift comes before the gain."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.gain * (x * inverse + self.shift)


class Function(Plainly):
    """The RMSNorm of torch with a shift."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (12,), eps=1e-4) * self.gain + self.shift


class Branching(Plainly):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.rms_norm(x, (12,), self.gain, 1e-4)
        return y + self.shift if x.shape[1] < 100 else y


READ: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "torch layer": ("layer", lambda: nn.LayerNorm(SIZE, eps=1e-3)),
    "torch rms": ("rms", lambda: nn.RMSNorm(SIZE)),
    "torch rms, no gain": ("rms", lambda: nn.RMSNorm(SIZE, 1e-3, elementwise_affine=False)),
    "layer": ("layer", lambda: LayerNorm(SIZE, 1e-3)),
    "layer, gain only": ("layer", lambda: LayerNorm(SIZE, bias=False)),
    "layer, offset": ("layer", lambda: LayerNorm(SIZE, offset=1.0)),
    "rms": ("rms", lambda: RMSNorm(SIZE, 1e-3)),
    "rms, shift": ("rms", lambda: RMSNorm(SIZE, bias=True)),
    "rms, offset": ("rms", lambda: RMSNorm(SIZE, offset=1.0, bias=True)),
    "scaled": ("rms", lambda: ScaledNorm(SIZE, scale=0.3, bias=True)),
    "scaled layer": ("layer", lambda: core.ScaledNorm(SIZE, scale=-2.0, form="layer", offset=1.0)),
    "scaled, no gain": ("rms", lambda: core.ScaledNorm(SIZE, weight=False, bias=True, scale=0.3)),
    "magnitude": ("rms", lambda: MagnitudeNorm(SIZE)),
    "magnitude layer": ("layer", lambda: core.MagnitudeNorm(SIZE, form="layer", bias=True)),
    "norm": ("rms", lambda: Norm("rms", SIZE, 1e-3, True, True)),
    "norm layer": ("layer", lambda: Norm("layer", SIZE, 1e-3, False, True)),
    "written out": ("rms", lambda: Plainly(SIZE)),
    "function": ("rms", lambda: Function(SIZE)),
}


def computed(plain: PlainNorm, x: torch.Tensor) -> torch.Tensor:
    """What the reading says, from its definition."""
    z = x - x.mean(-1, keepdim=True) if plain.form == "layer" else x
    y = z / torch.sqrt((z * z).mean(-1, keepdim=True) + plain.eps)
    y = y if plain.gain is None else plain.gain * y
    return y if plain.shift is None else y + plain.shift


def given(name: str) -> nn.Module:
    return generic(READ[name][1](), torch.Generator().manual_seed(1)).train()


@pytest.mark.parametrize("name", READ)
def test_it_computes_what_was_read(name: str) -> None:
    norm, x = given(name), tokens()
    before = copy.deepcopy(norm.state_dict())
    plain = read_norm(norm, SIZE)
    assert (plain.form, plain.size, plain.training) == (READ[name][0], SIZE, True)
    assert distance(computed(plain, x), norm(x)) < 1e-13 * float(norm(x).detach().abs().max())
    near = 1e-3 * x
    assert distance(computed(plain, near), norm(near)) < 1e-12
    assert not any(held.requires_grad for held in (plain.gain, plain.shift) if held is not None)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_an_eps_left_to_torch_is_that_of_the_dtype() -> None:
    for dtype, allowed in (
        (torch.float64, 1e-13),
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-2),
        (torch.float16, 2e-3),
    ):
        norm = nn.RMSNorm(SIZE, dtype=dtype)
        plain = read_norm(norm)
        x = (tokens() / 30 * plain.eps**0.5).to(dtype)
        error = (computed(plain, x.double()) - norm(x).double()).detach().abs().max()
        assert float(error) < allowed, dtype
    assert read_norm(nn.RMSNorm(SIZE).double()).eps != read_norm(nn.RMSNorm(SIZE)).eps


@pytest.mark.parametrize("name", ["rms, shift", "scaled", "magnitude", "written out"])
def test_layers_take_over_what_is_read(name: str) -> None:
    norm, x = given(name), tokens()
    layer = SeeDNorm.upgrade_from(norm)
    assert distance(layer(x), norm(x)) < 1e-12 * float(norm(x).detach().abs().max())


def hooked() -> nn.Module:
    norm = nn.LayerNorm(SIZE)
    norm.register_forward_hook(lambda module, given, y: y if y.shape[1] < 100 else 2 * y)
    return norm


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, SIZE),
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "branching": lambda: Branching(SIZE),
    "hooks": hooked,
    "one parameter twice": lambda: Twice(SIZE),
    "outside": lambda: RMSNorm(SIZE, outside=True),
    "fraction": lambda: RMSNorm(SIZE, fraction=0.5),
    "seednorm": lambda: SeeDNorm(SIZE),
    "two norms": lambda: nn.Sequential(nn.LayerNorm(SIZE), nn.RMSNorm(SIZE)),
    "crms": lambda: Norm("crms", SIZE, 1e-5, True, True),
    "gelu": nn.GELU,
    "eps of an unknown dtype": lambda: nn.RMSNorm(SIZE, elementwise_affine=False),
    "shift before the gain": lambda: Before(SIZE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(Refused):
        read_norm(generic(REFUSED[name](), torch.Generator().manual_seed(1)), SIZE)


def test_inputs_that_do_not_fit_are_not_logged() -> None:
    lines: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lines.append
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        for name in ("linear", "group norm"):
            with pytest.raises(Refused):
                read_norm(REFUSED[name]())
    finally:
        logger.removeHandler(handler)
    assert not lines


def test_log_levels_are_as_before() -> None:
    names = ["torch", *(name for name in logging.root.manager.loggerDict if name.startswith("torch."))]
    before = {name: logging.getLogger(name).level for name in names}
    with pytest.raises(Refused):
        read_norm(nn.Linear(SIZE, SIZE))
    assert {name: logging.getLogger(name).level for name in names} == before
