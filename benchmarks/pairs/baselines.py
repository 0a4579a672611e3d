"""Simple ways to compare two models, none of which undoes a change of gauge.

Each gives a number, 1 for a model and itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pairs.families import Family


def common(a: nn.Module, b: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters of one name, in float64."""
    theirs = dict(b.named_parameters(remove_duplicate=False))
    held = a.named_parameters(remove_duplicate=False)
    return [(p.detach().double(), theirs[name].detach().double()) for name, p in held if name in theirs]


def cosine(a: nn.Module, b: nn.Module) -> float:
    """⟨a, b⟩ / (‖a‖ ‖b‖) of all parameters of two and more axes with one name and shape, as one vector."""
    both = [(x, y) for x, y in common(a, b) if x.shape == y.shape and x.dim() > 1]
    if not both:
        return 0.0
    x, y = (torch.cat([pair[side].flatten() for pair in both]) for side in (0, 1))
    return torch.cosine_similarity(x, y, dim=0).item()


def _spectra(a: nn.Module, b: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sorted singular values of each matrix of one name, rows along the first axis; zeros are appended."""
    found = []
    for x, y in common(a, b):
        if x.dim() > 1 and y.dim() > 1:
            values = [torch.linalg.svdvals(tensor.flatten(1)) for tensor in (x, y)]
            longest = max(len(value) for value in values)
            padded = [nn.functional.pad(value, (0, longest - len(value))) for value in values]
            found.append((padded[0], padded[1]))
    return found


def singular_values(a: nn.Module, b: nn.Module) -> float:
    """1 − ‖σ(a) − σ(b)‖ / (‖σ(a)‖ + ‖σ(b)‖), the mean over matrices."""
    found = [1 - (x - y).norm() / (x.norm() + y.norm()).clamp_min(1e-300) for x, y in _spectra(a, b)]
    return float(sum(found) / len(found)) if found else 0.0


def spectral_shape(a: nn.Module, b: nn.Module) -> float:
    """As :func:`singular_values`, of σ / ‖σ‖, which does not see the scale of a matrix."""
    found = [
        1 - (x / x.norm().clamp_min(1e-300) - y / y.norm().clamp_min(1e-300)).norm() / 2
        for x, y in _spectra(a, b)
    ]
    return float(sum(found) / len(found)) if found else 0.0


@torch.no_grad()
def activations(family: Family, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What each of the family's layers gives, float64 [samples · places, features]."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        value = output if isinstance(output, torch.Tensor) else output[0]
        value = value.movedim(1, -1) if value.dim() == 4 else value
        found.append(value.reshape(-1, value.shape[-1]).double())

    hooks = [model.get_submodule(path).register_forward_hook(keep) for path in family.layers]
    try:
        family.logits(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def cka(family: Family, a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) of centred activations on the same inputs, the mean over layers.

    Source: Kornblith et al. (arXiv 1905.00414, section 3): linear CKA.
    """
    found = []
    for p, q in zip(activations(family, a, x), activations(family, b, x), strict=True):
        p, q = p - p.mean(0), q - q.mean(0)
        own = (p.T @ p).norm() * (q.T @ q).norm()
        found.append(((p.T @ q).square().sum() / own.clamp_min(1e-300)).item())
    return sum(found) / len(found)


Baseline = Callable[[Family, nn.Module, nn.Module, torch.Tensor], float]
BASELINES: Mapping[str, Baseline] = {
    "cosine of weights": lambda family, a, b, x: cosine(a, b),
    "singular values": lambda family, a, b, x: singular_values(a, b),
    "shape of the spectra": lambda family, a, b, x: spectral_shape(a, b),
    "linear CKA": cka,
}
"""Name -> (family, a, b, inputs) -> number."""
