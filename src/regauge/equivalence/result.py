"""The result of a comparison on a text: plain frozen data, JSON with a schema, and a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from regauge.certify.certificate import Subject
from regauge.equivalence.models import Measure
from regauge.equivalence.verdict import Decision, Finding, Need
from regauge.errors import EXIT_CERTIFICATE, EXIT_OK, EXIT_UNDECIDED

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from rich.console import RenderableType

VERSION = 1

_UNITS = {
    Measure.LOSS: "nats per token",
    Measure.ACCURACY: "of the items",
    Measure.DISTANCE: "cosine distance",
}
_COLOURS = {Finding.EQUIVALENT: "green", Finding.DIFFERENT: "red", Finding.UNDECIDED: "yellow"}
_EXITS = {
    Finding.EQUIVALENT: EXIT_OK,
    Finding.DIFFERENT: EXIT_CERTIFICATE,
    Finding.UNDECIDED: EXIT_UNDECIDED,
}


@dataclass(frozen=True)
class Sample:
    """The part of the text that was scored.

    Attributes:
        digest: SHA-256 of the whole text.
        rule: how it was cut into documents.
        documents: how many it has.
        drawn: how many were drawn, without replacement.
        tokens: of text in these.
        rows: they make.
        length: tokens in a row at most.
        seed: of the draw.
    """

    digest: str
    rule: str
    documents: int
    drawn: int
    tokens: int
    rows: int
    length: int
    seed: int


@dataclass(frozen=True)
class Equivalence:
    """Whether two models are equivalent on a text within a margin, and on what evidence.

    Attributes:
        finding: see :mod:`regauge.equivalence.verdict`.
        measure: what was compared.
        margin, level, power: what was asked.
        mean_a, mean_b: loss per token, or accuracy; None for vectors.
        decision: every figure.
        sample: what was scored.
        a, b: the original and the other.
        computed: dtype in which both ran.
        software: package -> version.
        version: of this format.
    """

    finding: Finding
    measure: Measure
    margin: float
    level: float
    power: float
    mean_a: float | None
    mean_b: float | None
    decision: Decision
    sample: Sample
    a: Subject
    b: Subject
    computed: str
    software: dict[str, str]
    version: int = VERSION

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "ser_json_inf_nan": "strings"}

    @property
    def exit_code(self) -> int:
        return _EXITS[self.finding]

    @property
    def verdict(self) -> str:
        """The finding in words, with the margin."""
        words = str(self.finding)
        return words if self.finding is not Finding.EQUIVALENT else f"{words} within ±{self.margin:g}"

    @property
    def reason(self) -> str:
        """One sentence with the figures that decided."""
        found, unit = self.decision, _UNITS[self.measure]
        shown = f"mean difference {found.mean:+.2g} {unit}, {self._interval(found.low, found.high)}"
        place = {
            Finding.EQUIVALENT: "inside",
            Finding.DIFFERENT: "outside",
            Finding.UNDECIDED: "neither inside nor outside",
        }[self.finding]
        return f"{shown} is {place} ±{self.margin:g}"

    def _interval(self, low: float, high: float) -> str:
        return f"{100 * (1 - 2 * self.level):g}% interval [{low:+.2g}, {high:+.2g}]"

    def to_json(self, indent: int | None = 2) -> str:
        """JSON as described by :func:`schema`."""
        return _adapter().dump_json(self, indent=indent).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Equivalence:
        """Inverse of ``to_json``. Raises ``ValueError`` if it is not of this version."""
        found = _adapter().validate_json(text)
        if found.version != VERSION:
            raise ValueError(f"equivalence version {found.version}, expected {VERSION}")
        return found


def _adapter() -> TypeAdapter[Equivalence]:
    from pydantic import TypeAdapter

    return TypeAdapter(Equivalence)


def schema() -> dict[str, Any]:
    """The JSON schema of a result."""
    return _adapter().json_schema()


def render(result: Equivalence) -> RenderableType:
    """A table of the figures with the verdict above and the conditions below, for ``rich``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found, sample = result.decision, result.sample
    head = Text.assemble((result.verdict, f"bold {_COLOURS[result.finding]}"), f": {result.reason}")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    confidence = f"{100 * (1 - 2 * result.level):g}%"
    if result.mean_a is not None and result.mean_b is not None:
        table.add_row(f"{result.measure} of a, of b", f"{result.mean_a:.6g}, {result.mean_b:.6g}")
    df = "normal" if found.df is None else f"{found.df:.3g} degrees of freedom"
    table.add_row("mean difference", f"{found.mean:+.3e}, standard error {found.standard_error:.2e} ({df})")
    table.add_row(f"{confidence} interval", f"[{found.low:+.3e}, {found.high:+.3e}]")
    table.add_row(
        f"{confidence} bootstrap interval", f"[{found.bootstrap_low:+.3e}, {found.bootstrap_high:+.3e}]"
    )
    table.add_row("p, equivalent (two one-sided tests)", f"{found.p_equivalent:.2g}")
    table.add_row("p, beyond the margin", f"{found.p_beyond:.2g}")
    if found.p_zero is not None:
        name = "McNemar" if result.measure is Measure.ACCURACY else "sign flips by document"
        table.add_row(f"p, not zero ({name})", f"{found.p_zero:.2g}")
    if found.effect is not None:
        table.add_row("effect size", f"{found.effect:+.3f} standard deviations of a document")
    table.add_row("smallest margin that passes", f"{found.smallest_margin:.3g}")
    for need in found.needs or ():
        table.add_row(f"needed if it is {need.difference:+.2g}", _needed(need, result.power))
    lines = [
        f"text: {sample.tokens:,} tokens in {sample.drawn:,} of {sample.documents:,} documents, seed"
        f" {sample.seed}; {sample.rule}",
        f"computed in {result.computed} from the stored weights",
        *(
            f"{label}: {subject.name} ({subject.architecture}, {subject.parameters:,} parameters,"
            f" {', '.join(subject.dtypes)}, sha256 {subject.digest[:16]})"
            for label, subject in (("a", result.a), ("b", result.b))
        ),
    ]
    return Group(head, Text(), table, Text(), Text("\n".join(lines), style="dim"))


def _needed(need: Need, power: float) -> str:
    if need.documents is None or need.members is None:
        return "more than can be had: it is too close to the margin"
    return f"{need.documents:,} documents, {need.members:,} tokens or items, for a power of {power:g}"
