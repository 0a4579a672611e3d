"""What can happen to a model: each change takes a model and gives a changed copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pairs.families import Family, Hidden
from pairs.training import train

GROUP = 64


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.dim() > 1)


@torch.no_grad()
def rounded(model: nn.Module, bits: int = 4) -> nn.Module:
    """Weights of two and more axes rounded to the nearest of 2^bits evenly spaced values.

    The values span a group of 64 entries of a row, or the row where 64 does not divide it.
    """
    model = copy.deepcopy(model)
    for _, p in _matrices(model):
        rows = p.flatten(1)
        groups = rows.reshape(-1, GROUP if rows.shape[1] % GROUP == 0 else rows.shape[1]).double()
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-30)
        p.copy_((((groups - low) / step).round() * step + low).reshape(p.shape))
    return model


@torch.no_grad()
def half(model: nn.Module) -> nn.Module:
    """Every floating tensor rounded to bfloat16, and stored as before."""
    model = copy.deepcopy(model)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.copy_(value.to(torch.bfloat16))
    return model


def least(model: nn.Module, hidden: Hidden, share: float = 0.2) -> torch.Tensor:
    """The neurons of a layer with the smallest product of the norms of what makes and what reads them."""
    total = torch.ones(())
    for places in (hidden.writers, hidden.readers):
        energy = torch.zeros(())
        for name, axis in places:
            if not name.endswith(("running_mean", "running_var")):
                value = model.get_parameter(name).detach().double()
                energy = (
                    energy + value.transpose(0, axis).flatten(1).square().sum(1)
                    if value.dim() > 1
                    else energy
                )
        total = total * energy
    return total.argsort(stable=True)[: round(share * len(total))].sort().values


@torch.no_grad()
def silenced(model: nn.Module, family: Family, share: float = 0.2) -> nn.Module:
    """A share of the hidden neurons of every layer set to zero: what makes them and what reads them."""
    model = copy.deepcopy(model)
    for hidden in family.hidden:
        gone = least(model, hidden, share)
        for name, axis in (*hidden.writers, *hidden.readers):
            value = _held(model, name)
            if not name.endswith("running_var"):
                value.index_fill_(axis, gone, 0.0)
    return model


def removed(model: nn.Module, family: Family, share: float = 0.2) -> nn.Module:
    """The neurons that :func:`silenced` sets to zero taken out, so that the tensors are smaller."""
    kept = {}
    for hidden in family.hidden:
        gone = set(least(model, hidden, share).tolist())
        size = _held(model, hidden.writers[0][0]).shape[hidden.writers[0][1]]
        kept[hidden] = torch.tensor([i for i in range(size) if i not in gone])
    return narrowed(model, family, kept)


def first(model: nn.Module, family: Family, like: nn.Module) -> nn.Module:
    """As many neurons of every layer as another model has, the first ones, and its width likewise."""
    kept = {}
    for hidden in (*family.hidden, *((family.stream,) if family.stream else ())):
        name, axis = hidden.writers[0]
        kept[hidden] = torch.arange(_held(like, name).shape[axis])
    return narrowed(model, family, kept)


@torch.no_grad()
def narrowed(model: nn.Module, family: Family, kept: dict[Hidden, torch.Tensor]) -> nn.Module:
    """Only the given neurons of each layer."""
    model = copy.deepcopy(model)
    for hidden, index in kept.items():
        for name, axis in (*hidden.writers, *hidden.readers):
            path, _, last = name.rpartition(".")
            module, value = model.get_submodule(path), _held(model, name)
            value = value.index_select(axis, index).contiguous()
            if last in module._parameters:
                setattr(module, last, nn.Parameter(value, requires_grad=value.is_floating_point()))
            else:
                setattr(module, last, value)
            _resize(module)
    if family.sizes:
        sizes = {len(index) for index in kept.values()}
        assert len(sizes) == 1
        for key in family.sizes:
            setattr(model.config, key, sizes.pop())
    return model


def _resize(module: nn.Module) -> None:
    """The sizes that a module remembers, as its weight has them."""
    weight = module.get_parameter("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[:2]
    elif hasattr(module, "num_features"):
        module.num_features = len(weight)
    elif hasattr(module, "nf"):
        module.nx, module.nf = weight.shape


def _held(model: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last).data


@torch.no_grad()
def averaged(one: nn.Module, other: nn.Module) -> nn.Module:
    """The mean of every floating tensor of two models of one shape."""
    model = copy.deepcopy(one)
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(theirs[name]).div_(2)
    return model


def in_place(model: nn.Module, change: Callable[[nn.Module], None]) -> nn.Module:
    """A copy to which a change was made in place."""
    model = copy.deepcopy(model)
    change(model)
    return model


def tuned(family: Family, seed: int, steps: int = 300) -> Callable[[nn.Module], None]:
    """Training in place on part ``c``, at a thirtieth of the rate and without decay."""

    def make(model: nn.Module) -> None:
        train(family, model, "c", seed, steps, family.rate / 30, 0.0)

    return make


class _Added(nn.Module):
    """W + (B A) in the shape of W, with A [rank, columns] and B [rows, rank] learnt."""

    def __init__(self, weight: torch.Tensor, rank: int, random: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=random) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.b @ self.a).reshape(weight.shape)


def adapted(family: Family, seed: int, steps: int = 300, rank: int = 2) -> Callable[[nn.Module], None]:
    """Low-rank summands of the maps inside the layers, learnt on part ``c`` at a tenth of the rate, added in
    place.

    Source: LoRA (arXiv 2106.09685, section 4.1).
    """

    def make(model: nn.Module) -> None:
        random = torch.Generator().manual_seed(seed)
        ends = {id(module.weight) for module in _ends(model)}
        with _frozen(model):
            places = [
                module
                for module in model.modules()
                if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
                and weight.dim() > 1
                and min(weight.flatten(1).shape) > 4 * rank
                and id(weight) not in ends
            ]
            for module in places:
                parametrize.register_parametrization(module, "weight", _Added(module.weight, rank, random))
            train(family, model, "c", seed, steps, family.rate / 10, 0.0)
            for module in places:
                parametrize.remove_parametrizations(module, "weight")

    return make


def _ends(model: nn.Module) -> list[Any]:
    """Embeddings of symbols, and the last linear map of a language model that reads the vocabulary."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    sizes = {module.num_embeddings for module in found}
    return found + [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in sizes]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of what the model has when this begins."""
    held = [p for p in model.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in model.parameters():
            p.requires_grad_(True)
