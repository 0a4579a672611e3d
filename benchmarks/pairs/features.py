"""What a change leaves after alignment: numbers that tell the kinds of change apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

RANK_SHARE = 0.99
SAME = 1e-5


def tensor_features(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Of a tensor ``a`` and its counterpart ``b`` in the same gauge, two and more axes, equal shapes.

    Keys:
        residual: ‖a − b‖ / ‖a‖.
        slope: ⟨a, b⟩ / ⟨a, a⟩; 1 where what was added does not know of ``a``, below 1 where it shrank.
        cosine: ⟨a, b⟩ / (‖a‖ ‖b‖).
        zero rows, zero columns: share of rows and columns of ``b`` that are zero and are not in ``a``.
        same rows: share of rows with ‖a − b‖ ≤ 1e-5 ‖a‖.
        rank: singular values that hold 99 % of ‖a − b‖², over the number of singular values.
        flatness: entropy of the squared singular values of a − b, over that of as many equal ones.
        kurtosis: E d⁴ / (E d²)², d the entries of a − b in units of each row's root mean square; 1.8 for a
            uniform distribution, 3 for a normal one.
        noise: |⟨a, a − b⟩| / (‖a‖ ‖a − b‖); near 0 where the difference does not know of ``a``.
    """
    a, b = a.detach().double().flatten(1), b.detach().double().flatten(1)
    d = a - b
    norm_a, norm_b = a.norm().clamp_min(1e-300), b.norm().clamp_min(1e-300)
    values = torch.linalg.svdvals(d).square()
    share = values / values.sum().clamp_min(1e-300)
    held = int((share.cumsum(0) < RANK_SHARE).sum()) + 1 if float(values.sum()) > 0 else 0
    entropy = -(share * share.clamp_min(1e-300).log()).sum() / torch.tensor(max(2, len(share))).log()
    unit = d / d.square().mean(1, keepdim=True).sqrt().clamp_min(1e-300)
    unit = unit[d.norm(dim=1) > SAME * a.norm(dim=1)]
    tiny_rows, tiny_columns = b.norm(dim=1) <= SAME * norm_a, b.norm(dim=0) <= SAME * norm_a
    return {
        "residual": (d.norm() / norm_a).item(),
        "slope": ((a * b).sum() / norm_a.square()).item(),
        "cosine": ((a * b).sum() / (norm_a * norm_b)).item(),
        "zero rows": (tiny_rows & (a.norm(dim=1) > SAME * norm_a)).double().mean().item(),
        "zero columns": (tiny_columns & (a.norm(dim=0) > SAME * norm_a)).double().mean().item(),
        "same rows": (d.norm(dim=1) <= SAME * a.norm(dim=1)).double().mean().item(),
        "rank": held / len(share),
        "flatness": entropy.item(),
        "kurtosis": unit.pow(4).mean().item() if len(unit) else 0.0,
        "noise": ((a * d).sum().abs() / (norm_a * d.norm().clamp_min(1e-300))).item(),
    }


def storage_features(tensors: Iterable[torch.Tensor]) -> dict[str, float]:
    """Of the matrices of a model as they are stored, in whatever gauge.

    Keys:
        levels: distinct values in 64 entries of a row that follow each other (or the whole row), over the
            number of entries; the median over groups, the mean over matrices.
        bfloat16: share of entries that bfloat16 can hold.
    """
    levels, exact = [], []
    for tensor in tensors:
        rows = tensor.detach().flatten(1)
        groups = rows.reshape(-1, 64 if rows.shape[1] % 64 == 0 else rows.shape[1])
        found = groups.sort(dim=1).values
        distinct = 1 + ((found[:, 1:] - found[:, :-1]).abs() > 1e-6 * found.abs().amax(1, keepdim=True)).sum(
            1
        )
        levels.append((distinct.double() / groups.shape[1]).median().item())
        exact.append((rows == rows.to(torch.bfloat16).to(rows.dtype)).double().mean().item())
    return {"levels": sum(levels) / len(levels), "bfloat16": sum(exact) / len(exact)}


def pair_features(
    both: Iterable[tuple[torch.Tensor, torch.Tensor]], stored: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Means over the matrices of a pair, ``unchanged``: the share of matrices with a residual below 1e-5,
    ``resized``: the share whose shapes differ, and :func:`storage_features` of the second model.

    Means of what a difference looks like are over the matrices that differ.

    Args:
        both: matrices of the first model and their counterparts in its gauge.
        stored: matrices of the second model as they are stored.
    """
    found, resized, count = [], 0, 0
    for a, b in both:
        count += 1
        if a.shape == b.shape:
            found.append(tensor_features(a, b))
        else:
            resized += 1
    changed = [item for item in found if item["residual"] > SAME]
    result = {"resized": resized / max(1, count), **storage_features(stored)}
    result["unchanged"] = 1 - len(changed) / max(1, len(found))
    for key in found[0] if found else ():
        held = changed if key in ("rank", "flatness", "kurtosis", "noise", "slope") and changed else found
        result[key] = sum(item[key] for item in held) / len(held)
    result["largest zero rows"] = max((max(i["zero rows"], i["zero columns"]) for i in found), default=0.0)
    return result


def spread(values: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Feature -> least, median, largest."""
    found = {}
    for key in values[0]:
        held = torch.tensor([value[key] for value in values if key in value], dtype=torch.float64)
        found[key] = [held.min().item(), held.median().item(), held.max().item()]
    return found
