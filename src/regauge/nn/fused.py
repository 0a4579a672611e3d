"""Normalisation layers compiled one by one in a model that otherwise runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from regauge import norms_regauge as core
from regauge.errors import Refused
from regauge.nn.base import Normalisation
from regauge.nn.read import read_norm

Model = TypeVar("Model", bound=nn.Module)
_Shape = tuple[Any, ...]


def fused(
    model: Model, *, backend: str | Callable[..., Any] = "inductor", dynamic: bool | None = True
) -> Model:
    """Compile every normalisation layer of a model, in place; returns the model.

    y of each layer stays what it was up to rounding, in both modes, and so do its parameters, buffers and
    their names. Layers of one class with equal settings and sizes share one compiled graph. What is compiled
    are the layers of :mod:`regauge.nn`, and every module without modules of its own that
    :func:`regauge.nn.read_norm` reads; a layer within another is part of that one.

    Compilation happens in the first call and again for another mode or dtype. It is worth while where a norm
    takes several operations; a model that is compiled as a whole needs none of this. Rewrite, fold, export
    and copy a model before, as what is compiled belongs to the modules it was made for.

    Args:
        model: any module, itself a norm or not.
        backend: of ``torch.compile``; the default needs a C++ compiler on a CPU and Triton on a GPU.
        dynamic: True makes one graph for all lengths of sequences and batches; None and False as in
            ``torch.compile``.

    Raises:
        Refused: the model has no normalisation layer.
    """
    found = list(norms(model))
    if not found:
        raise Refused(
            "this model has no normalisation layer",
            expected="a layer of regauge.nn, or a module that is one LayerNorm, RMSNorm or batch norm",
            found=type(model).__name__,
        )
    for norm in found:
        norm.compile(backend=backend, dynamic=dynamic)
    return model


def norms(model: nn.Module) -> Iterator[nn.Module]:
    """Every normalisation layer of a model that lies in no other, in the order of its modules."""
    read: dict[_Shape, bool] = {}

    def within(module: nn.Module) -> Iterator[nn.Module]:
        if _is_norm(module, read):
            yield module
        else:
            for child in module.children():
                yield from within(child)

    yield from dict.fromkeys(within(model))


def _is_norm(module: nn.Module, read: dict[_Shape, bool]) -> bool:
    if isinstance(module, Normalisation | core.Gained):
        return True
    held = [*module.named_parameters(), *module.named_buffers()]
    lengths = {tensor.numel() for _, tensor in held if tensor.dim()}
    if any(module.children()) or len(lengths) > 1 or any(tensor.dim() > 1 for _, tensor in held):
        return False
    key: _Shape = (type(module), module.extra_repr(), *((name, tensor.shape) for name, tensor in held))
    if key not in read:
        try:
            read_norm(module)
            read[key] = True
        except Refused:
            read[key] = False
    return read[key]
