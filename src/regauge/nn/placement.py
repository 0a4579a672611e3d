"""Where norms stand around a sublayer, and how its output is added to the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput


@dataclass(frozen=True)
class Placement:
    """y = N_sum(skip · x + branch · N_after(f(scale · N_before(x)))), where each norm may be absent.

    Attributes:
        before, after, around: whether N_before, N_after and N_sum exist.
        skip: factor of x.
        branch: factor of what the sublayer f adds; f is not called where it is 0 and not learned.
        scale: factor of what the norm before f gives.
        learned: ``branch`` is a parameter [1] that starts at the number given.
    """

    before: bool = False
    after: bool = False
    around: bool = False
    skip: float = 1.0
    branch: float = 1.0
    scale: float = 1.0
    learned: bool = False


KINDS = (
    *("pre", "post", "peri", "mix-ln", "lns", "deepnorm"),
    *("inverse-depth", "inverse-root", "skipinit"),
)


def placements(
    kind: str,
    depth: int,
    *,
    sublayers: int = 2,
    post: int | None = None,
    skip: float | None = None,
    as_published: bool = False,
) -> tuple[Placement, ...]:
    """The placement of each of ``depth`` layers; all sublayers of a layer have the same.

    ============= ==========================================================================================
    kind          layer ℓ = 1 … depth, h the stream
    ============= ==========================================================================================
    pre           h + f(N(h))
    post          N(h + f(h)) (Vaswani et al., arXiv 1706.03762)
    peri          h + N(f(N(h))) (Peri-LN, arXiv 2502.02732, which also has a norm behind the embedding)
    mix-ln        post in the first ``post`` layers, pre in the others (Mix-LN; pixeli99/MixLN)
    lns           h + f(N(h) / √ℓ) (LayerNorm Scaling; lmsdss/LayerNorm-Scaling)
    deepnorm      N(skip · h + f(h)), skip = (2 · depth)^(1/4) (DeepNet, arXiv 2203.00555)
    inverse-depth h + f(h) / n, n = depth · sublayers (arXiv 2510.03470)
    inverse-root  h + f(h) / √n
    skipinit      h + a · f(h), a learned from 0 (De and Smith, 2020)
    ============= ==========================================================================================

    Streams of pre, peri and lns need a norm behind the last layer.

    Args:
        kind: row of the table.
        depth: layers.
        sublayers: of a layer.
        post: for ``mix-ln``, by default ⌊depth / 4⌋.
        skip: for ``deepnorm``, in the place of the formula; the code of Mix-LN has √8 for any depth.
        as_published: for ``lns``, what the published code does: no branch of it is reached, h stays as it is.

    Raises:
        BadInput: an unknown kind, a number out of range, or an option of another kind.
    """
    given = {"post": post is not None, "skip": skip is not None, "as_published": as_published}
    belongs = {"mix-ln": "post", "deepnorm": "skip", "lns": "as_published"}.get(kind)
    wrong = [option for option, is_given in given.items() if is_given and option != belongs]
    if kind not in KINDS or wrong:
        raise BadInput(
            "no such placement" if kind not in KINDS else f"{kind} has no option {wrong[0]}",
            expected=", ".join(KINDS) if kind not in KINDS else str(belongs),
            found=kind if kind not in KINDS else wrong[0],
        )
    first = depth // 4 if post is None else post
    if depth < 1 or sublayers < 1 or not 0 <= first <= depth:
        raise BadInput("numbers of layers", found=f"depth {depth}, sublayers {sublayers}, post {first}")
    n = depth * sublayers
    before, around = Placement(before=True), Placement(around=True)
    every: dict[str, Callable[[int], Placement]] = {
        "pre": lambda layer: before,
        "post": lambda layer: around,
        "peri": lambda layer: Placement(before=True, after=True),
        "mix-ln": lambda layer: around if layer <= first else before,
        "lns": lambda layer: Placement(branch=0.0) if as_published else Placement(True, scale=layer**-0.5),
        "deepnorm": lambda layer: Placement(around=True, skip=(2 * depth) ** 0.25 if skip is None else skip),
        "inverse-depth": lambda layer: Placement(branch=1 / n),
        "inverse-root": lambda layer: Placement(branch=n**-0.5),
        "skipinit": lambda layer: Placement(branch=0.0, learned=True),
    }
    return tuple(every[kind](layer) for layer in range(1, depth + 1))


def deepnorm_gain(depth: int) -> float:
    """(8 · depth)^(−1/4): DeepNorm's factor of the initial weights of value, output and MLP projections.

    Source: DeepNet (arXiv 2203.00555), for a decoder alone.
    """
    return (8 * depth) ** -0.25


class Residual(nn.Module):
    """One sublayer with its norms and its addition to the stream, see :class:`Placement`.

    Args:
        sublayer: f, called with the normalised stream and all further arguments; gives one tensor.
        norm: makes one norm, called once for each that the placement has; None where it has none.
        placement: what stands where.

    Raises:
        BadInput: the placement has a norm and none can be made.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        norm: Callable[[], nn.Module] | None = None,
        placement: Placement | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kept = Placement(before=True) if placement is None else placement
        self.placement = kept
        self.sublayer = sublayer
        needed = {"before": kept.before, "after": kept.after, "around": kept.around}
        if norm is None and any(needed.values()):
            raise BadInput(
                "this placement has norms", expected="norm: a function that makes one", found="None"
            )
        self.before, self.after, self.around = (
            norm() if wanted and norm is not None else nn.Identity() for wanted in needed.values()
        )
        self.branch = None
        if kept.learned:
            self.branch = nn.Parameter(torch.full((1,), kept.branch, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """y, of the shape and dtype of the stream ``input`` [..., size]."""
        kept = self.placement
        x = input if kept.skip == 1 else kept.skip * input
        if self.branch is not None or kept.branch != 0:
            z = self.before(input)
            added = self.after(self.sublayer(z if kept.scale == 1 else kept.scale * z, *args, **kwargs))
            if self.branch is not None:
                added = self.branch.to(added.dtype) * added
            elif kept.branch != 1:
                added = kept.branch * added
            x = x + added
        return self.around(x)

    def extra_repr(self) -> str:
        kept = self.placement
        return f"skip={kept.skip:.4g}, branch={kept.branch:.4g}, scale={kept.scale:.4g}"
