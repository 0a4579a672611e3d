"""What every normalisation layer here offers: its exact form at inference, and what can become it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from regauge.errors import Refused


class Normalisation(nn.Module):
    """A layer that knows what it collapses to and which existing layers can be turned into it."""

    def fold(self) -> nn.Module:
        """The simplest module that computes the same in evaluation mode, with parameters of its own.

        It is made of :class:`regauge.nn.Affine`, ``nn.Identity``, a plain norm without gain and shift, or
        ``nn.Sequential`` of these. This layer is left as it is.

        Raises:
            Refused: the layer does not collapse, it is still training, or it is in the middle of a schedule.
        """
        raise Refused(
            f"a {type(self).__name__} does not collapse to a simpler layer",
            expected="a layer that is affine at inference, or a plain norm with a gain",
            found="statistics or a gate that depend on every input",
        )

    @classmethod
    def upgrade_from(cls, norm: nn.Module, **options: Any) -> Self:
        """A layer of this class that computes what ``norm`` computes, with its dtype, device and mode.

        Args:
            norm: any module that is one LayerNorm, RMSNorm or batch norm; it is left as it is. What it is
                follows from its operations, see :func:`regauge.nn.read_norm`.
            options: the further arguments of the class.

        Raises:
            Refused: ``norm`` is of another kind, or no parameters of this class give its function.
        """
        raise Refused(
            f"no existing norm becomes a {cls.__name__} without another function",
            expected="a layer with parameters that give LayerNorm, RMSNorm or batch norm",
            found=f"{cls.__name__}",
            way_out="train it from scratch",
        )

    def _settled(self) -> None:
        """Refuse in training mode: what is folded is the function of evaluation mode."""
        if self.training:
            raise Refused(
                f"a {type(self).__name__} in training mode is not folded",
                expected="evaluation mode, in which statistics are constants",
                found="training mode",
                way_out="call eval() before it",
            )


@dataclass(frozen=True)
class PlainNorm:
    """y[…, c] = gain[c] · z[…, c] / sqrt(s + eps) + shift[c], as read from a module.

    Attributes:
        form: ``layer`` (z = x − mean, s = mean z²), ``rms`` (z = x, s = mean x²), or ``batch`` (constants:
            z = x − mean[c], s = variance[c]).
        size: entries of c: the last axis, for ``batch`` axis 1.
        eps: added to s.
        gain, shift: [size], detached, as they act (an offset gain 1 + w is stored here as 1 + w); None where
            there is none.
        mean, variance: [size], for ``batch``.
        momentum: of the running statistics, for ``batch``.
        like: a tensor with the dtype and device of the module.
        training: mode of the module.
    """

    form: str
    size: int
    eps: float
    gain: torch.Tensor | None
    shift: torch.Tensor | None
    like: torch.Tensor
    training: bool
    mean: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    momentum: float | None = None

    def need(self, forms: tuple[str, ...], target: str, *, shift: bool = True) -> PlainNorm:
        """Itself, if it is one of these forms, and without a shift unless ``shift`` is allowed.

        Raises:
            Refused: otherwise.
        """
        if self.form not in forms or (not shift and self.shift is not None):
            raise Refused(
                f"this norm cannot become a {target}",
                expected=" or ".join(forms) + ("" if shift else ", without a shift"),
                found=self.form + ("" if self.shift is None else ", with a shift"),
                way_out="make a LayerNorm an RMSNorm first: regauge rewrite --move center:norm=rms"
                if self.form == "layer"
                else None,
            )
        return self
