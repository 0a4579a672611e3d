"""Compare two directories: align them, run them, and say how they are related."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from regauge.atlas import Kind
from regauge.certify import Certificate, Verdict, certify
from regauge.checkpoint import Checkpoint
from regauge.comparing.calibration import Calibration, calibration
from regauge.comparing.changes import changes_of
from regauge.comparing.comparison import Change, Comparison, Moved, Relation, Renumbering
from regauge.elements import DIAGONAL, Diagonal, Element, Permutation
from regauge.errors import BadInput, Refused
from regauge.matching import Alignment, align_sides
from regauge.matching.sides import sides_compared
from regauge.model import CheckpointModel
from regauge.renaming import named_again
from regauge.sources import resolve
from regauge.stages import Clock, Progress, silent
from regauge.vocabulary import Vocabulary, shared_vocabulary

SAME = 1e-6


def compare(
    a: str | Path,
    b: str | Path,
    *,
    text: str | Path | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """How is b related to a?

    Args:
        a, b: sources, see :func:`regauge.sources.resolve`.
        text: a UTF-8 file for the certificate; default random inputs.
        seed: of random inputs and of the rounding floor.
        max_memory: bytes that the certificate stays near.
        progress: called with (what is being done, done, total).

    Returns:
        the verdict. *Equivalent* rests on a certificate: both run on the same inputs. *Derived* rests on the
        similarity after alignment, against the calibration.

    Raises:
        BadInput, CheckpointError, TraceError: a source that cannot be used.
        Refused: the models can neither be aligned nor run on the same inputs; or b's tensors have names that
            its architecture does not have, and their contents do not tell all of them apart.
    """
    tell = progress or silent
    path_a, path_b = resolve(a), resolve(b)
    tell("tracing", 0, 1)
    with Checkpoint.open(path_a) as files_a, Checkpoint.open(path_b) as files_b:
        first = CheckpointModel.of(path_a, files_a)
        with named_again(first, path_b, files_b) as (second, names):
            found = _compared(first, second, text=text, seed=seed, max_memory=max_memory, tell=tell)
    if names is None:
        return found
    if names.unsure and not found.equivalent:
        raise Refused(
            "the tensors have names that the architecture does not have, and contents do not tell them apart",
            parameter=names.unsure[0],
            expected="one tensor that is more like the parameter of a than all others of its shape",
            found=f"several for {len(names.unsure)} parameters; as named by likeness: {found.reason}",
            way_out="rename the tensors as save_pretrained does",
        )
    certificate = found.certificate
    if certificate is not None:
        certificate = replace(certificate, b=replace(certificate.b, name=path_b.name))
    return replace(found, b=path_b.name, certificate=certificate, renamed=names.count)


def _compared(
    a: CheckpointModel,
    b: CheckpointModel,
    *,
    text: str | Path | None,
    seed: int,
    max_memory: int | None,
    tell: Progress,
) -> Comparison:
    path_a, path_b = a.files.path, b.files.path
    clock = Clock()
    alignment, pair, refused, changes = None, None, None, ()
    certificate, unlike = None, None
    known = calibration()
    shared, common = shared_vocabulary(path_a, path_b), False
    try:
        first, second = sides_compared(a, b, (path_a.name, path_b.name), shared)
        common = first.common
        alignment, pair = align_sides(first, second, tell)
    except Refused as error:
        refused = error
    clock.lap("align")
    tell("running both", 0, 1)
    try:
        certificate = certify(path_a, path_b, text=text, seed=seed, max_memory=max_memory, vocabulary=shared)
    except BadInput as error:
        unlike = error
    clock.lap("certify")
    same = certificate is not None and certificate.passed and not common
    if alignment and pair and not same and alignment.similarity >= known.threshold:
        changes = changes_of(alignment, pair, path_b)
        clock.lap("kinds of change")
    if alignment is None and certificate is None:
        assert refused is not None
        raise refused from unlike
    common = common or (certificate is not None and certificate.inputs.tokens is not None)
    numbering = None if shared is None else _renumbered(shared, common)
    relation, reason = _judge(alignment, certificate, known, numbering)
    equivalent = relation in (Relation.EQUIVALENT, Relation.WITHIN_ROUNDING)
    return Comparison(
        relation=relation,
        reason=reason,
        a=path_a.name,
        b=path_b.name,
        similarity=None if alignment is None else alignment.similarity,
        threshold=known.threshold,
        false_positive=known.false_positive,
        relative=None if alignment is None else alignment.relative,
        gauge=() if alignment is None else _moved(alignment),
        changes=() if equivalent else (*_tokens_changed(numbering), *changes),
        tensors=() if alignment is None else alignment.tensors,
        only_a=() if alignment is None else alignment.only_a,
        only_b=() if alignment is None else alignment.only_b,
        not_aligned=None if refused is None else refused.message,
        certificate=certificate,
        vocabulary=numbering,
        seconds=clock.seconds,
    )


def _judge(
    alignment: Alignment | None,
    certificate: Certificate | None,
    known: Calibration,
    numbering: Renumbering | None,
) -> tuple[Relation, str]:
    if certificate is not None and certificate.passed:
        if numbering is not None and numbering.common and (numbering.only_a or numbering.only_b):
            return Relation.DERIVED, f"on the tokens that both have: {certificate.reason}"
        exact = certificate.verdict is Verdict.EQUIVALENT
        return Relation.EQUIVALENT if exact else Relation.WITHIN_ROUNDING, certificate.reason
    if alignment is None:
        return Relation.UNRELATED, "they are built differently, and their outputs differ on the same inputs"
    figure = f"similarity {alignment.similarity:.4f} after alignment"
    if alignment.similarity >= known.threshold:
        why = "" if certificate is None else f"; as functions they differ: {certificate.reason}"
        return Relation.DERIVED, f"{figure}, unrelated models stay below {known.threshold:.3f}{why}"
    return Relation.UNRELATED, f"{figure}, derived models are above {known.threshold:.3f}"


def _renumbered(shared: Vocabulary, common: bool) -> Renumbering | None:
    """What is said of the tokens: nothing where both number them alike."""
    if not common and shared.alike and not shared.renumbered:
        return None
    return Renumbering(shared.shared, shared.renumbered, shared.only_a, shared.only_b, common)


def _tokens_changed(numbering: Renumbering | None) -> Iterator[Change]:
    if numbering is not None and numbering.common and (numbering.only_a or numbering.only_b):
        yield Change(
            "tokens added or removed", f"{numbering.only_a:,} only in a, {numbering.only_b:,} only in b"
        )


def _moved(alignment: Alignment) -> tuple[Moved, ...]:
    found: dict[Kind, list[int]] = {}
    seen: dict[str, tuple[Kind, int, int, torch.Tensor]] = {}
    for generator, element in alignment.elements:
        moved = _displaced(element)
        kind, count, size, before = seen.get(
            generator.id, (generator.kind, generator.count, generator.size, torch.zeros_like(moved))
        )
        seen[generator.id] = (kind, count, size, before | moved)
    for kind, count, size, moved in seen.values():
        row = found.setdefault(kind, [0, 0, 0, 0])
        row[0] += 1
        row[1] += count
        row[2] += int(moved.sum())
        row[3] = max(row[3], size)
    return tuple(Moved(str(kind), *found[kind]) for kind in Kind if kind in found)


def _displaced(element: Element) -> torch.Tensor:
    """Which of the K elements are not the identity, bool [K]."""
    if isinstance(element, Permutation):
        return (element.index != torch.arange(element.n)).any(1)
    if isinstance(element, Diagonal) and element.kind in DIAGONAL:
        return (element.vector - 1).abs().amax(1) > SAME
    eye = torch.eye(element.n, dtype=torch.float64)
    return (element.matrix() - eye).abs().amax(dim=(1, 2)) > SAME
