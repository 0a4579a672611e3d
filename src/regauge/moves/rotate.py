"""Rotations and general linear maps: the largest groups a space admits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regauge.act import read_block
from regauge.atlas import Generator, Kind
from regauge.elements import Matrix, random_element
from regauge.errors import Refused
from regauge.moves.base import Builder, Change, Move, Option, Preserves, Scene, refuse_kinds

ROTATIONS = (Kind.ORTHOGONAL_ONES, Kind.ORTHOGONAL)


def plan_rotate(scene: Scene, options: Mapping[str, Any]) -> Change:
    """writers W[c, …] ← Q W, readers W[…, c] ← W Qᵀ, with QᵀQ = 1 (and Q·1 = 1 where a mean is taken).

    Heads: values v[h, d] ← Q_h v, outputs o[…, h, d] ← o Q_hᵀ; rotary pairs of queries and keys turn by
    a random angle each. Source: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406): R1 and R2.
    """
    builder = Builder(scene)
    want, style = options["space"], options["style"]
    residual = [g for g in scene.atlas.generators if g.kind in ROTATIONS and not g.copies]
    heads = [g for g in scene.atlas.generators if g.kind is Kind.GENERAL_LINEAR]
    heads += [g for g in scene.atlas.generators if g.kind in ROTATIONS and g.copies]
    pairs = list(scene.atlas.of_kind(Kind.COMPLEX))
    if want in ("residual", "all"):
        if not residual and want == "residual":
            raise refuse_kinds(scene, ROTATIONS, "rotation")
        for generator in residual:
            builder.apply(generator, _rotation(scene, generator, style))
    if want in ("heads", "all"):
        for generator in heads:
            builder.apply(generator, _rotation(scene, generator, style))
        for generator in pairs:
            builder.apply(generator, _phases(scene, generator))
    if not builder.used:
        raise refuse_kinds(scene, (*ROTATIONS, Kind.GENERAL_LINEAR), "rotation")
    return builder.change()


def _rotation(scene: Scene, generator: Generator, style: str) -> Any:
    kind = generator.kind if generator.kind is Kind.ORTHOGONAL_ONES else Kind.ORTHOGONAL
    chosen = "default" if style == "random" else style
    return random_element(kind, generator.size, generator.count, scene.random, chosen)  # type: ignore[arg-type]


def _phases(scene: Scene, generator: Generator) -> Matrix:
    angle = 2 * torch.pi * torch.rand(generator.count, generator=scene.random, dtype=torch.float64)
    a, b = angle.cos(), angle.sin()
    return Matrix(torch.stack([a, -b, b, a], dim=1).view(-1, 2, 2), Kind.COMPLEX)


def plan_balance_heads(scene: Scene, options: Mapping[str, Any]) -> Change:
    """A = writers [n, ·], B = readers [n, ·] of one head, BᵀA = U S Vᵀ (thin):  gA = S^½ Vᵀ, g⁻ᵀB = S^½ Uᵀ.

    Unique up to signs, and of smallest ‖gA‖² + ‖g⁻ᵀB‖². Rotary pairs: |c|² = ‖k‖ / ‖q‖ for each pair.
    Source: TransformerLens, "refactor_factored_attn_matrices"; general linear gauge of a head.
    """
    builder = Builder(scene)
    for generator in scene.atlas.generators:
        if generator.kind is Kind.GENERAL_LINEAR:
            builder.apply(generator, _balanced(scene, generator))
        elif generator.kind is Kind.COMPLEX:
            builder.apply(generator, _balanced_pairs(scene, generator))
    if not builder.used:
        raise Refused(
            "no head admits a linear map of its own",
            expected="general-linear or complex generators",
            found=", ".join(sorted({str(g.kind) for g in scene.atlas.generators})) or "no generator at all",
        )
    return builder.change()


def _sides(scene: Scene, generator: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Writers and readers as [K, n, ·]."""
    copies = tuple(name for name, _ in generator.copies)
    sides: dict[int, list[torch.Tensor]] = {1: [], -1: []}
    for action in generator.actions:
        block = read_block(scene.read(action.parameter), action, copies)
        sides[1 if action.exponent > 0 else -1].append(block)
    empty = torch.zeros(generator.count, generator.size, 0, dtype=torch.float64)
    return torch.cat([empty, *sides[1]], 2), torch.cat([empty, *sides[-1]], 2)


def _triangle(block: torch.Tensor) -> torch.Tensor:
    """L [K, n, n] with L Lᵀ = block blockᵀ, through QR so that no square is formed."""
    n = block.shape[1]
    if block.shape[2] < n:
        pad = torch.zeros(*block.shape[:2], n - block.shape[2], dtype=block.dtype)
        block = torch.cat([block, pad], 2)
    return torch.linalg.qr(block.mT, mode="r").R.mT


def _balanced(scene: Scene, generator: Generator) -> Matrix:
    writers, readers = _sides(scene, generator)
    low_a, low_b = _triangle(writers), _triangle(readers)
    u, s, vt = torch.linalg.svd(low_b.mT @ low_a)
    if bool((s[:, -1] <= s[:, 0] * 1e-12).any()):
        raise Refused(
            "a head uses fewer directions than it has: its balanced form would not be invertible",
            parameter=generator.actions[0].parameter,
            expected="full rank of the reader · writer product",
            found=f"singular values down to {float(s[:, -1].min()):.1e}",
        )
    root = s.rsqrt()[:, :, None]
    return Matrix(root * (u.mT @ low_b.mT), Kind.GENERAL_LINEAR, root * (vt @ low_a.mT))


def _balanced_pairs(scene: Scene, generator: Generator) -> Matrix:
    writers, readers = _sides(scene, generator)
    up, down = writers.square().sum((1, 2)), readers.square().sum((1, 2))
    usable = (up > 0) & (down > 0)
    modulus = torch.where(usable, (down / up.clamp_min(1e-300)) ** 0.25, torch.ones_like(up))
    eye = torch.eye(2, dtype=torch.float64)
    return Matrix(modulus[:, None, None] * eye, Kind.COMPLEX)


ROTATE = Move(
    "rotate",
    "writers W ← Q W, readers W ← W Qᵀ, with QᵀQ = 1 (and Q·1 = 1 where a mean is taken)",
    "no entrywise function, gain or bias between writers and readers; fold-scales first",
    Preserves.OUTPUT,
    plan_rotate,
    {
        "style": Option(str, "random", "how Q is drawn", ("random", "hadamard", "householder")),
        "space": Option(str, "residual", "which spaces turn", ("residual", "heads", "all")),
    },
)
BALANCE_HEADS = Move(
    "balance-heads",
    "value-output (and query-key) product of a head = U S Vᵀ, split as S^½ on both sides",
    "a general linear or complex gauge for each head",
    Preserves.OUTPUT,
    plan_balance_heads,
    {},
)
