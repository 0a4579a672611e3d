"""Linear maps in widely linear complex form: one matrix for z and one for its conjugate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from regauge.errors import Refused
from regauge.moves.base import Change, Move, Preserves, Scene
from regauge.patches import Patch, replaceable
from regauge.plan import Made

PARTS = ("u_re", "u_im", "w_re", "w_im")


def widely_linear(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """R x = U z + W conj(z), z = x_top + i·x_bottom, for R = [[A, B], [C, D]] in blocks of one size:

    U = ½ ((A + D) + i·(C − B)),  W = ½ ((A − D) + i·(B + C)).  Every real R has exactly one such form.

    Source: PKULab1806/Fairy2i-W2, model_module/qat_modules.py; Picinbono and Chevalier, Widely linear
    estimation with complex data (IEEE Trans. Signal Processing 43, 1995), for the form.

    Args:
        matrix: [outputs, inputs], both even, floating.

    Returns:
        Re U, Im U, Re W, Im W; each [outputs / 2, inputs / 2], in the same dtype.

    Raises:
        ValueError: an odd size.
    """
    rows, columns = matrix.shape
    if rows % 2 or columns % 2:
        raise ValueError(f"a matrix of {rows} by {columns} has no halves")
    (a, b), (c, d) = ((part[:, : columns // 2], part[:, columns // 2 :]) for part in matrix.tensor_split(2))
    return (a + d) / 2, (c - b) / 2, (a - d) / 2, (b + c) / 2


def real_form(u_re: torch.Tensor, u_im: torch.Tensor, w_re: torch.Tensor, w_im: torch.Tensor) -> torch.Tensor:
    """The inverse: R = [[Re(U + W), Im(W − U)], [Im(U + W), Re(U − W)]], [outputs, inputs]."""
    return torch.cat([torch.cat([u_re + w_re, w_im - u_im], 1), torch.cat([u_im + w_im, u_re - w_re], 1)])


def plan_complex(scene: Scene, options: Mapping[str, Any]) -> Change:
    """R x + b = U z + W conj(z) + b with z = x[:n] + i·x[n:], for every linear map with even sizes 2m × 2n.

    U and W as in :func:`widely_linear`, stored as four real matrices; as many numbers as before.
    """
    patches: list[Patch] = []
    made: dict[str, Made] = {}
    drops: set[str] = set()
    odd = 0
    for module in replaceable(scene.trace).values():
        if module.patch["module"] != "linear" or module.weight is None:
            continue
        sizes = {key: module.patch[key] for key in ("inputs", "outputs")}
        if any(size % 2 for size in sizes.values()):
            odd += 1
            continue
        shape = (sizes["outputs"] // 2, sizes["inputs"] // 2)
        bias = {"bias": module.patch["bias"]}
        patches.append({"path": module.path, "module": "complex-linear", **sizes, **bias})
        drops.add(module.weight)
        for place, part in enumerate(PARTS):
            build = partial(_part, scene.read, module.weight, bool(module.patch["transposed"]), place)
            made[f"{module.path}.{part}"] = Made(shape, module.weight, build)
    if not patches:
        raise Refused(
            "no linear map here has a complex form",
            expected="a module that is one linear map with even sizes, whose parameters are its own",
            found=f"{odd} with an odd size" if odd else "none",
        )
    return Change(made=made, drops=frozenset(drops), patches=tuple(patches))


def _part(
    current: Callable[[str], torch.Tensor], name: str, transposed: bool, place: int, original: Any
) -> torch.Tensor:
    """One of the four matrices, of the weight as the moves before leave it, float64."""
    matrix = current(name).to(torch.float64)
    return widely_linear(matrix.T if transposed else matrix)[place].contiguous()


COMPLEX = Move(
    "complex",
    "R x → U z + W conj(z), z = x[:n] + i·x[n:]: U = ½((A + D) + i(C − B)), W = ½((A − D) + i(B + C))",
    "linear maps with even sizes that are modules of their own; changes the structure",
    Preserves.OUTPUT,
    plan_complex,
    {},
)
