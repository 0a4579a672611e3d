"""The certificate of a comparison: plain frozen data, JSON with a schema, and a table for people."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

from regauge.certify.measure import Figures, FunctionEvidence, Verdict

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from rich.console import RenderableType

CERTIFICATE_VERSION = 1


@dataclass(frozen=True)
class Subject:
    """One of the two functions.

    Attributes:
        name: last part of its path, or the class of a module.
        architecture: class name of the model.
        digest: SHA-256 of the contents (names, dtypes, shapes, bytes), independent of shards.
        parameters: number of parameter entries, tied ones once.
        dtypes: storage dtype -> number of entries.
    """

    name: str
    architecture: str
    digest: str
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Tokens:
    """Where the two number their tokens differently: what both have in common, which is all that is compared.

    Attributes:
        common: tokens that both have.
        renumbered: how many of them have another id.
        only_a, only_b: tokens that only one of the two has.
    """

    common: int
    renumbered: int
    only_a: int
    only_b: int


@dataclass(frozen=True)
class Inputs:
    """What both were run on.

    Attributes:
        source: ``random`` (drawn from ``seed``), ``text`` or ``given``.
        digest: SHA-256 of the input tensors in order; of nothing else.
        seed: of random inputs.
        batches: number of runs; each has the shapes of ``shapes``.
        shapes: input name -> shape.
        positions: tokens, or items, compared in all.
        rows: for tables that the inputs index: parameter -> rows looked up and rows in all. What the
            certificate says of other rows rests on every row being treated alike.
        tokens: the tokens compared, where the two number theirs differently; else None.
    """

    source: str
    digest: str
    seed: int
    batches: int
    shapes: dict[str, tuple[int, ...]]
    positions: int
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Certificate:
    """Evidence that two functions agree, or that they do not. Made on the inputs named, and no others.

    Attributes:
        verdict: see :func:`regauge.certify.measure.judge`.
        reason: why, in one sentence with the figure that decided.
        a, b: the original and the other.
        inputs: what they were run on.
        evidence: every figure measured.
        exact_threshold: relative error in float64 below which functions count as the same.
        floor_factor: rounding floors that still count as rounding.
        floor_dtype: dtype that the floor rounds to.
        floor_seed: seed of the floor's noise.
        software: package -> version.
        version: of this format.
    """

    verdict: Verdict
    reason: str
    a: Subject
    b: Subject
    inputs: Inputs
    evidence: FunctionEvidence
    exact_threshold: float
    floor_factor: float
    floor_dtype: str
    floor_seed: int
    software: dict[str, str]
    version: int = CERTIFICATE_VERSION

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "ser_json_inf_nan": "strings"}

    @property
    def passed(self) -> bool:
        return self.verdict is not Verdict.DIFFERENT

    def to_json(self, indent: int | None = 2) -> str:
        """JSON as described by :func:`schema`; infinite figures are the string ``"Infinity"``."""
        return _adapter().dump_json(self, indent=indent).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Certificate:
        """Inverse of ``to_json``. Raises ``ValueError`` if it is not a certificate of this version."""
        certificate = _adapter().validate_json(text)
        if certificate.version != CERTIFICATE_VERSION:
            raise ValueError(f"certificate version {certificate.version}, expected {CERTIFICATE_VERSION}")
        return certificate


def _adapter() -> TypeAdapter[Certificate]:
    from pydantic import TypeAdapter

    return TypeAdapter(Certificate)


def schema() -> dict[str, Any]:
    """The JSON schema of a certificate."""
    return _adapter().json_schema()


def software() -> dict[str, str]:
    """Versions of what a certificate depends on."""
    versions = {"python": platform.python_version()}
    for package in ("regauge", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def render(certificate: Certificate) -> RenderableType:
    """A table of the figures with the verdict above and the conditions below, for ``rich``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colour = "green" if certificate.passed else "red"
    head = Text.assemble((str(certificate.verdict), f"bold {colour}"), f": {certificate.reason}")
    evidence, floor = certificate.evidence, certificate.floor_dtype
    logits = evidence.float64.kl_mean is not None or evidence.floor.kl_mean is not None
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    names = ("relative", "max abs", "KL mean", "KL max", "top-1")
    for name in names if logits else names[:2]:
        table.add_column(name, justify="right")
    for label, figures in (
        ("float64, before rounding", evidence.exact),
        ("float64, weights as stored", evidence.float64),
        (f"  floor: original re-rounded to {floor}", evidence.floor),
        ("  floor: the other re-rounded", evidence.floor_b),
        ("in the stored dtype", evidence.stored),
        (f"  floor: original re-rounded to {floor}", evidence.stored_floor),
    ):
        if figures is not None:
            table.add_row(label, *cells(figures, logits))
    given = certificate.inputs
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in given.shapes.items())
    size = f"{given.positions} positions in {given.batches} × ({shapes})"
    lines = [
        f"inputs: {given.source}, seed {given.seed}, {size}",
        *(f"rows looked up: {read:,} of {total:,} of {name}" for name, (read, total) in given.rows.items()),
        *(
            f"{label}: {subject.name} ({subject.architecture}, {subject.parameters:,} parameters,"
            f" sha256 {subject.digest[:16]})"
            for label, subject in (("a", certificate.a), ("b", certificate.b))
        ),
    ]
    return Group(head, Text(), table, Text(), Text("\n".join(lines), style="dim"))


def cells(figures: Figures, logits: bool) -> list[str]:
    """One row of a table of figures: two cells, or five for logits."""
    cells = [f"{figures.relative:.2e}", f"{figures.max_abs:.2e}"]
    if logits:
        cells += ["-" if v is None else f"{v:.2e}" for v in (figures.kl_mean, figures.kl_max)]
        cells.append("-" if figures.top1 is None else f"{100 * figures.top1:.2f}%")
    return cells
