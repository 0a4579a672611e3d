"""DoG and LDoG: a step size from the distance travelled and the gradients met; averaging of the iterates."""

# PyTorch documents its functions on lists of tensors under names that begin with an underscore.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from regauge.errors import BadInput
from regauge.optim.base import Group, GroupedOptimizer, check, norm_dtype, together


class DoG(GroupedOptimizer):
    """x ← x − η g, η = lr · r / sqrt(G), r = max over past steps of ‖x − x₀‖, G = eps + Σ ‖g‖² over steps.

    r starts as reps_rel · (1 + ‖x₀‖). Norms are over all parameters of a group: each group has its own step
    size. There is no schedule; evaluate an average of the iterates, see :class:`PolynomialAverage`.

    Args:
        params: parameters, named parameters or groups.
        reps_rel: first distance, relative; 1e-4 is advised for models with batch norms.
        lr: a factor of the step size; best left at 1.
        weight_decay: added to the gradient, wd · x.
        eps: added to G once.
        init_eta: the first step size; then reps_rel is not used.
        maximize, foreach: see :class:`regauge.optim.base.GroupedOptimizer`.

    Raises:
        BadInput: a number out of range; in ``step`` a sparse gradient.

    A parameter without a gradient counts in ‖x₀‖, does not move, and adds nothing to the sums. Norms are
    taken in float32 at least.

    Source: Ivgi, Hinder, Carmon, DoG is SGD's Best Friend, arXiv 2302.12022.
    """

    layerwise = False

    def __init__(
        self,
        params: Iterable[Any],
        reps_rel: float = 1e-6,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        init_eta: float | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        infinite, tiny = float("inf"), 5e-324
        check(reps_rel=(reps_rel, tiny, infinite), lr=(lr, tiny, infinite), eps=(eps, tiny, infinite))
        check(weight_decay=(weight_decay, 0, infinite))
        if init_eta is not None:
            check(init_eta=(init_eta, tiny, infinite))
        defaults = {
            "reps_rel": reps_rel,
            "lr": lr,
            "weight_decay": weight_decay,
            "eps": eps,
            "init_eta": init_eta,
            "maximize": maximize,
            "foreach": foreach,
            "distance": None,
            "squares": None,
        }
        super().__init__(params, defaults)

    def _group(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        fast = together(group, params)
        everything: list[Tensor] = group["params"]
        device = everything[0].device
        if group["weight_decay"] > 0:
            decay = group["weight_decay"]
            if fast:
                grads = list(torch._foreach_add(grads, params, alpha=decay))
            else:
                grads = [g.add(p, alpha=decay) for g, p in zip(grads, params, strict=True)]
        first = group["distance"] is None
        if first:
            lengths = self._joined(_norms(everything, fast), device)
            rate = 0.0 if group["init_eta"] is not None else group["reps_rel"]
            group["distance"], group["squares"] = rate * (1 + lengths), torch.full_like(lengths, group["eps"])
            for param in everything:
                self.state[param]["initial"] = param.clone()
        else:
            away = _differences(everything, [self.state[p]["initial"] for p in everything], fast)
            lengths = self._joined(_norms(away, fast), device)
            group["distance"] = torch.maximum(group["distance"].to(lengths), lengths)
        place = {param: index for index, param in enumerate(everything)}
        of_all = [torch.zeros((), dtype=norm_dtype(param), device=param.device) for param in everything]
        for param, norm in zip(params, _norms(grads, fast), strict=True):
            of_all[place[param]] = norm
        group["squares"] = group["squares"].to(lengths) + self._joined(of_all, device).square()
        rate = group["lr"] * group["distance"] / group["squares"].sqrt()
        if first and group["init_eta"] is not None:
            rate = torch.full_like(rate, group["init_eta"])
        rates = [rate[place[param]] if self.layerwise else rate for param in params]
        if fast:
            moves = [-r.to(p.device, p.dtype) for r, p in zip(rates, params, strict=True)]
            torch._foreach_add_(params, torch._foreach_mul(grads, moves))
        else:
            for param, grad, r in zip(params, grads, rates, strict=True):
                param.add_(grad * -r.to(param.device, param.dtype))

    def _joined(self, norms: list[Tensor], device: torch.device) -> Tensor:
        """One norm of all, or each by itself."""
        dtype = max((norm.dtype for norm in norms), key=lambda kind: kind.itemsize)
        stacked = torch.stack([norm.to(device, dtype) for norm in norms])
        return stacked if self.layerwise else torch.linalg.vector_norm(stacked)


class LDoG(DoG):
    """DoG with r, G and η for each tensor by itself; everything else as in :class:`DoG`.

    Source: Ivgi, Hinder, Carmon, arXiv 2302.12022.
    """

    layerwise = True


def _norms(tensors: list[Tensor], fast: bool) -> list[Tensor]:
    if fast and len({norm_dtype(x) for x in tensors}) == 1:
        return list(torch._foreach_norm(tensors, 2, norm_dtype(tensors[0])))
    return [torch.linalg.vector_norm(x, dtype=norm_dtype(x)) for x in tensors]


def _differences(left: list[Tensor], right: list[Tensor], fast: bool) -> list[Tensor]:
    if fast:
        return list(torch._foreach_sub(left, right))
    return [a - b for a, b in zip(left, right, strict=True)]


class PolynomialAverage:
    """x̄ ← (1 − w) x̄ + w x with w = (γ + 1) / (γ + t), t = 1, 2, …: later iterates count more.

    Call :meth:`step` after every step of the optimizer, and evaluate :attr:`model`. Floating-point
    parameters and buffers are averaged, all else is copied.

    Args:
        model: whose state dict is averaged.
        gamma: γ ≥ 0; 0 is the plain mean.

    Raises:
        BadInput: γ is negative.

    Source: Shamir, Zhang, arXiv 1212.1824; γ = 8 as in Ivgi et al., arXiv 2302.12022.
    """

    def __init__(self, model: nn.Module, gamma: float = 8.0) -> None:
        if gamma < 0:
            raise BadInput("gamma is out of range", expected="gamma ≥ 0", found=str(gamma))
        self.source = model
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.gamma = gamma
        self.count = 0

    @torch.no_grad()
    def step(self) -> None:
        """Take in the present state of the model."""
        self.count += 1
        weight = (self.gamma + 1) / (self.gamma + self.count)
        current = self.source.state_dict()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() or value.is_complex():
                value.mul_(1 - weight).add_(current[name].to(value.device), alpha=weight)
            else:
                value.copy_(current[name])

    def state_dict(self) -> dict[str, Any]:
        """The count and the average."""
        return {"count": self.count, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.count = state["count"]
        self.model.load_state_dict(state["model"])
