"""Everything a report shows, as plain data; nothing here knows how it will look."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from regauge.api import inspect
from regauge.atlas import Atlas
from regauge.certify import Certificate
from regauge.report.activations import Activation, Output, activations
from regauge.report.figures import one_thread
from regauge.report.manifest import Manifest, read_manifest
from regauge.report.names import role, shown
from regauge.report.weights import Spectrum, Stored, Weight, check_digest, spectra, weights
from regauge.show import NAMES, limit_of, rows
from regauge.stages import Progress, silent


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        parameters: entries of its parameters, tied ones once.
        dtypes: storage dtype -> entries.
        tensor_bytes: bytes of all tensors; None if not known.
        tensors: number of tensors in its files; None if not known.
        file_bytes: bytes of its weight files, headers included; None if not known.
    """

    parameters: int
    dtypes: dict[str, int]
    tensor_bytes: int | None
    tensors: int | None
    file_bytes: int | None


@dataclass(frozen=True)
class Group:
    """Spaces of the rewritten model that differ only in the numbers of their layers.

    Attributes:
        label: modules whose parameters have the space.
        layers: how many there are.
        size: size of each.
        per: sizes of the factors that an element may depend on (heads).
        admits: names of the groups that act on it.
        folded: the same after every foldable gain has been folded; None if nothing can be folded.
        limited: the kind of group that explains most of what it does not admit; empty if none.
        limit: why not, in plain words.
        module: where.
    """

    label: str
    layers: int
    size: int
    per: tuple[int, ...]
    admits: tuple[str, ...]
    folded: tuple[str, ...] | None
    limited: str
    limit: str
    module: str


@dataclass(frozen=True)
class Report:
    """What a page is made of.

    Attributes:
        name: of the directory, printable.
        source: name of the source, if it was given; then every ``before`` is known.
        manifest, certificate: what ``regauge.json`` says.
        before, after: sizes.
        groups: the atlas of the result, alike layers together; left_alone: operations not understood.
        weights: outliers of every matrix.
        spectra: singular values of a few.
        activations, outputs: of both models on the same inputs, in float32.
        inputs: name -> shape of these inputs.
    """

    name: str
    source: str | None
    manifest: Manifest
    certificate: Certificate
    before: Size
    after: Size
    groups: tuple[Group, ...]
    left_alone: tuple[str, ...]
    weights: tuple[Weight, ...]
    spectra: tuple[Spectrum, ...]
    activations: tuple[Activation, ...]
    outputs: tuple[Output, ...]
    inputs: dict[str, tuple[int, ...]]


def gather(directory: Path, source: Path | None, progress: Progress | None = None) -> Report:
    """Read, run and measure.

    Args:
        directory: written by ``regauge rewrite``.
        source: what it was made from; None leaves out everything that compares.
        progress: see :data:`regauge.stages.Progress`.

    Raises:
        BadInput: no manifest, weights that are not those it certifies, another source, a model that does
            not run; CheckpointError: damaged files.
    """
    tell = progress or silent
    manifest, certificate = read_manifest(directory)
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        tell("reading", 0, 1)
        after = stack.enter_context(Stored(directory))
        check_digest(
            after,
            manifest.output.digest,
            "the certificate",
            "run `regauge certify` on the original and these",
        )
        before = None
        if source is not None:
            before = stack.enter_context(Stored(source))
            check_digest(
                before,
                manifest.source.digest,
                "the source that was rewritten",
                "give the directory that `regauge rewrite` was given",
            )
        tell("inspecting", 0, 1)
        atlas = inspect(directory)
        modules, outputs, inputs = activations(
            directory, source, manifest.seed, lambda done, total: tell("running", done, total)
        )
        return Report(
            name=shown(directory),
            source=None if source is None else shown(source),
            manifest=manifest,
            certificate=certificate,
            before=Size(
                certificate.a.parameters,
                certificate.a.dtypes,
                manifest.source.bytes,
                None if before is None else len(before.files.names),
                None if before is None else before.file_bytes(),
            ),
            after=Size(
                certificate.b.parameters,
                certificate.b.dtypes,
                after.files.size_bytes,
                len(after.files.names),
                after.file_bytes(),
            ),
            groups=_groups(atlas),
            left_alone=tuple(
                dict.fromkeys(
                    f"{refusal.reason}" + (f" (in {role(refusal.module)})" if refusal.module else "")
                    for refusal in atlas.refusals
                )
            ),
            weights=weights(after, before, lambda done, total: tell("measuring weights", done, total)),
            spectra=spectra(after, before, lambda done, total: tell("singular values", done, total)),
            activations=modules,
            outputs=outputs,
            inputs=inputs,
        )


def _groups(atlas: Atlas) -> tuple[Group, ...]:
    found: list[Group] = []
    for row in rows(atlas):
        space, limit = row.space, limit_of(row.space)
        star = role if row.layers > 1 else str
        found.append(
            Group(
                label=row.label,
                layers=row.layers,
                size=space.size,
                per=tuple(size for _, size in space.copies),
                admits=tuple(NAMES[kind] for kind in space.admits),
                folded=tuple(NAMES[kind] for kind in space.admits_folded) if atlas.folded else None,
                limited="" if limit is None else NAMES[limit.kind],
                limit="" if limit is None else star(limit.reason),
                module="" if limit is None else star(limit.module),
            )
        )
    return tuple(found)
