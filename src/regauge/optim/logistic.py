"""Gradient descent for logistic regression, normalised by the mean probability of error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.errors import BadInput


@dataclass(frozen=True)
class Separated:
    """Where a descent ended.

    Attributes:
        weights: θ, [features].
        steps: taken until every sample was on its side, or until the limit.
        wrong: samples that are not on their side, yᵢ aᵢᵀθ ≤ 0.
    """

    weights: Tensor
    steps: int
    wrong: int


def logistic_step(weights: Tensor, samples: Tensor, step: float, *, normalised: bool = True) -> Tensor:
    """θ + γ · Σᵢ pᵢ zᵢ / Σᵢ pᵢ, or without normalisation θ + γ · Σᵢ pᵢ zᵢ / n; pᵢ = 1 / (1 + exp(zᵢᵀθ)).

    The quotient is taken as a softmax of log pᵢ, so that it stays finite when every pᵢ underflows. With
    γ = inf only the direction matters: the mean of the samples on the wrong side (margins of zero count one
    half each), which is the batch perceptron.

    Args:
        weights: θ, [features].
        samples: zᵢ = yᵢ aᵢ, [samples, features], floating-point.
        step: γ > 0.
        normalised: whether to divide by the mean of pᵢ.

    Source: Tyurin, arXiv 2412.08424 (normalised logistic regression with gradient descent).
    """
    margins = samples @ weights
    if normalised and step == float("inf"):
        share = (margins < 0).to(samples.dtype) + 0.5 * (margins == 0).to(samples.dtype)
        return weights + (share / share.sum().clamp_min(torch.finfo(samples.dtype).tiny)) @ samples
    if normalised:
        share = torch.nn.functional.logsigmoid(-margins).softmax(0)
    else:
        share = torch.sigmoid(-margins) / len(samples)
    return weights + step * (share @ samples)


def separate(
    features: Tensor, labels: Tensor, step: float, *, normalised: bool = True, limit: int = 100_000
) -> Separated:
    """Descend from θ = 0 until every sample is on its side. Full batches, no bias: give a feature of ones.

    For data of radius R with margin μ it takes at most R²/μ² + 2 log(2n − 1) / (γ μ²) steps if normalised.
    The loss says little about how far it is; count what is wrong.

    Args:
        features: aᵢ, [samples, features], floating-point.
        labels: yᵢ, [samples], of −1 and 1.
        step: γ > 0; normalised also inf.
        normalised: see :func:`logistic_step`.
        limit: largest number of steps.

    Raises:
        BadInput: shapes that do not fit, labels other than −1 and 1, a step that is not positive.

    Source: Tyurin, arXiv 2412.08424.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise BadInput(
            "features and labels do not fit",
            expected="[samples, features] and [samples]",
            found=f"{tuple(features.shape)} and {tuple(labels.shape)}",
        )
    if not bool((labels.abs() == 1).all()):
        raise BadInput("labels are −1 and 1", found=str(labels.unique().tolist()[:5]))
    if not step > 0 or (step == float("inf") and not normalised):
        raise BadInput("the step is a positive number", found=str(step))
    samples = features * labels.to(features.dtype)[:, None]
    weights = torch.zeros_like(features[0])
    steps, wrong = 0, len(samples)
    while wrong and steps < limit:
        weights = logistic_step(weights, samples, step, normalised=normalised)
        steps += 1
        wrong = int((samples @ weights <= 0).sum())
    return Separated(weights, steps, wrong)
