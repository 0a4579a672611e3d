"""A vector added to what linear maps give, at every position and call, as part of their biases."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from regauge.api import given_inputs
from regauge.certify import Certificate, certify_modules
from regauge.errors import BadInput, NotEquivalent, Refused
from regauge.patches import Patch, Replaceable, replaceable, restructured
from regauge.trace import trace


def steered(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    vectors: Mapping[str, torch.Tensor],
    *,
    scale: float = 1.0,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
) -> tuple[nn.Module, Certificate]:
    """W x + b + s·v = W x + (b + s·v): a vector v[o] added to the output of a linear map is a bias.

    This is another function than that of ``model``. The certificate compares the result with the function
    asked for: ``model`` with s·v added to the output of each module named, whenever it is called. At the head
    v is a shift of the logits. Methods that add a vector at a few positions only (Turner et al., arXiv
    2308.10248, section 3) are not of this kind.

    Args:
        model: any module; it is left as it is.
        inputs: example inputs, as of :func:`regauge.inspect`.
        vectors: path of a module -> v, [outputs of that module], floating.
        scale: s. The product s·v is rounded once, to the dtype of the module's weight.
        seed, outputs: as of :func:`regauge.rewrite_module`.

    Returns:
        a changed deep copy, in the same dtypes, and the certificate.

    Raises:
        Refused: a path is not that of a module that is one linear map with parameters of its own.
        BadInput: a vector has another shape, or is not finite; TraceError, NotEquivalent: as of
            :func:`regauge.rewrite_module`.
    """
    args, kwargs = given_inputs(inputs)
    known = replaceable(trace(model, args, kwargs, outputs=outputs))
    added: dict[str, torch.Tensor] = {}
    patches: list[Patch] = []
    for path, vector in vectors.items():
        module = _linear(known, path)
        weight = model.get_parameter(str(module.weight))
        if vector.shape != (module.patch["outputs"],) or not bool((scale * vector).isfinite().all()):
            raise BadInput(
                "a vector cannot be added here",
                parameter=path,
                expected=f"{module.patch['outputs']} finite numbers",
                found=f"shape {tuple(vector.shape)}",
            )
        added[path] = (scale * vector.detach().to(torch.float64)).to(weight.device, weight.dtype)
        if module.bias is None:
            patches.append({**module.patch, "bias": True})
    changed = restructured(model, (), patches)
    exact = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        for path, value in added.items():
            bias = exact.get(f"{path}.bias", torch.zeros_like(value))
            exact[f"{path}.bias"] = bias.to(torch.float64) + value.to(torch.float64)
            changed.get_parameter(f"{path}.weight").copy_(exact[f"{path}.weight"])
            changed.get_parameter(f"{path}.bias").copy_(exact[f"{path}.bias"])
    certificate = certify_modules(
        _reference(model, added),
        changed,
        args,
        kwargs,
        outputs=outputs,
        weights_b_exact=exact.__getitem__,
        seed=seed,
    )
    if not certificate.passed:
        raise NotEquivalent(f"the certificate failed: {certificate.reason}", found=str(certificate.verdict))
    return changed, certificate


def _linear(known: Mapping[str, Replaceable], path: str) -> Replaceable:
    module = known.get(path)
    if module is None or module.patch["module"] != "linear":
        raise Refused(
            "a vector can only be added to what a linear map gives",
            parameter=path,
            expected="a module that is one linear map, whose parameters are its own",
            found="no such module" if module is None else str(module.patch["module"]),
            way_out="untie before it, if its weight is tied",
        )
    return module


def _reference(model: nn.Module, added: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the model that adds the vectors in its code."""
    reference = copy.deepcopy(model)
    for path, value in added.items():
        reference.get_submodule(path).register_forward_hook(
            lambda module, args, output, value=value: output + value
        )
    return reference
