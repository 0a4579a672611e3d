"""S4D: initial modes of diagonal state space layers."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from regauge.errors import BadInput, Refused
from regauge.nn.init.weights import fill, normal

Kind = Literal["lin", "inv", "legs", "real", "inv2", "quad"]


def s4d_modes(states: int, kind: Kind = "lin") -> torch.Tensor:
    """A [N/2], complex128: one of each conjugate pair of N modes, with Im A ≤ 0; n = 0 … N/2 − 1.

    lin −1/2 − iπn; inv −1/2 − i(N/π)(N/(2n+1) − 1); inv2 −1/2 − i(N/π)(N/(n+1) − 1); quad −1/2 − i(1+2n)²/π;
    real −(n+1); legs −1/2 − iω, ω the positive eigenvalues of the skew part of HiPPO-LegS, largest first.

    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (arXiv
    2206.11893, section 4); inv2, quad and real are in their code.

    Raises:
        BadInput: N is odd or not positive, or another kind.
    """
    if states < 2 or states % 2:
        raise BadInput("modes come in pairs", expected="an even number of states", found=str(states))
    n = torch.arange(states // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    scale = states / math.pi
    if kind == "lin":
        return torch.complex(half, -math.pi * n)
    if kind == "inv":
        return torch.complex(half, -scale * (states / (2 * n + 1) - 1))
    if kind == "inv2":
        return torch.complex(half, -scale * (states / (n + 1) - 1))
    if kind == "quad":
        return torch.complex(half, -((1 + 2 * n) ** 2) / math.pi)
    if kind == "real":
        return torch.complex(-(n + 1), torch.zeros_like(n))
    if kind == "legs":
        return _legs(states)[0]
    raise BadInput("there is no such kind", expected=", ".join(get_args(Kind)), found=repr(kind))


def s4d_input(
    states: int,
    kind: Kind = "lin",
    *,
    phase: float | torch.Tensor = 0.0,
    limit: float | None = None,
) -> torch.Tensor:
    """B [N/2], complex128: 1, or for legs e^{iφ} |V* b| with b_n = √(2n+1).

    Eigenvectors V have no phase of their own, and only B ⊙ C enters, so B is real here unless phases are
    given. The authors' code has the phases that their LAPACK returns, and cuts the imaginary part off at ±2:
    with the same phases and ``limit=2`` this is their B, whose size then depends on the phases.

    Source: as of :func:`s4d_modes`.

    Args:
        phase: φ [N/2] or one number, of legs.
        limit: of |Im B| of legs; None for none.

    Raises:
        BadInput: as of :func:`s4d_modes`.
    """
    modes = s4d_modes(states, kind)
    if kind != "legs":
        return torch.ones_like(modes)
    size = _legs(states)[1]
    b = torch.polar(size, torch.as_tensor(phase, dtype=size.dtype).expand(size.shape))
    return b if limit is None else torch.complex(b.real, b.imag.clamp(-limit, limit))


def s4d_(
    log_decay: torch.Tensor,
    frequency: torch.Tensor,
    kind: Kind = "lin",
) -> None:
    """log(−Re A) and Im A of :func:`s4d_modes`, the same for all channels.

    Args:
        log_decay, frequency: [..., N/2], filled in place.
        kind: of modes. These and the step want no weight decay and a small learning rate.

    Raises:
        Refused: the shapes differ.
    """
    if log_decay.shape != frequency.shape or not log_decay.dim():
        raise Refused(
            "every mode has one decay and one frequency",
            expected="two tensors [..., N/2]",
            found=f"{tuple(log_decay.shape)} and {tuple(frequency.shape)}",
        )
    modes = s4d_modes(2 * log_decay.shape[-1], kind)
    fill(log_decay, (-modes.real).log().expand(log_decay.shape))
    fill(frequency, modes.imag.expand(frequency.shape))


def log_step_(
    tensor: torch.Tensor,
    low: float = 1e-3,
    high: float = 1e-1,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """log Δ uniform on [log low, log high], one per channel.

    Raises:
        BadInput: not 0 < low ≤ high.
    """
    if not 0 < low <= high:
        raise BadInput("no such range of steps", expected="0 < low ≤ high", found=f"{low}, {high}")
    device = "cpu" if generator is None else generator.device
    share = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device=device)
    return fill(tensor, math.log(low) + share * (math.log(high) - math.log(low)))


def s4d_output_(tensor: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """C [..., N/2], complex with E |C|² = 1, or its two parts as a last axis of 2 with variance 1/2 each.

    Raises:
        Refused: a real tensor whose last axis is not 2.
    """
    if not tensor.is_complex() and tensor.shape[-1:] != (2,):
        raise Refused(
            "C is complex",
            expected="a complex tensor, or a last axis of two parts",
            found=f"{tensor.dtype}, {tuple(tensor.shape)}",
        )
    parts = (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)
    values = normal(parts, generator) / math.sqrt(2)
    return fill(tensor, torch.view_as_complex(values) if tensor.is_complex() else values)


def s4d_kernel(
    modes: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor, step: torch.Tensor, length: int
) -> torch.Tensor:
    """K[…, l] = 2 Re Σ_n C_n B_n (e^{Δ A_n} − 1)/A_n · e^{Δ A_n l}, zero-order hold, l = 0 … length − 1.

    Args:
        modes, inputs, outputs: A, B, C [..., N/2], complex.
        step: Δ [...].
    """
    a = modes * step.unsqueeze(-1)
    weight = outputs * inputs * torch.expm1(a) / modes
    times = torch.arange(length, dtype=step.dtype, device=step.device)
    return 2 * (weight.unsqueeze(-1) * torch.exp(a.unsqueeze(-1) * times)).sum(-2).real


def _legs(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Modes and |V* b| of HiPPO-LegS plus its rank-one part, a normal matrix −I/2 + S with S skew."""
    n = torch.arange(states, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    outer = root[:, None] * root / 2
    skew = outer.triu(1) - outer.tril(-1)
    # −iS is Hermitian with eigenvalues Im A: in rising order, the negative half comes first.
    omega, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    half = states // 2
    b = vectors[:, :half].mH @ root.to(torch.complex128)
    return torch.complex(torch.full((half,), -0.5, dtype=torch.float64), omega[:half]), b.abs()
