"""Are two directories equivalent on a text, within a stated margin?"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from regauge.certify.certificate import software
from regauge.certify.run import held_bytes
from regauge.checkpoint import Checkpoint
from regauge.equivalence.documents import (
    Documents,
    Rows,
    check_same_tokens,
    cut,
    draw,
    read_text,
    tokenizer_of,
)
from regauge.equivalence.models import Measure, TextModel, open_model
from regauge.equivalence.paired import Vector
from regauge.equivalence.result import Equivalence, Sample
from regauge.equivalence.scores import (
    UNSCORED,
    check_causal,
    check_padding,
    class_of,
    cosine_distance,
    not_finite,
    token_losses,
    vector_of,
)
from regauge.equivalence.verdict import Decision, Terms, decide, decide_accuracy
from regauge.errors import BadInput
from regauge.stages import Progress

TOKENS = 8192
LENGTH = 256
AT_ONCE = 1024
"""Tokens of one run."""

MEMORY = 1 << 30


def equivalence(
    a: str | Path,
    b: str | Path,
    text: str | Path,
    margin: float,
    *,
    level: float = 0.05,
    power: float = 0.8,
    tokens: int = TOKENS,
    length: int = LENGTH,
    document: str | None = None,
    labels: str | Path | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Equivalence:
    """Score both models on documents drawn from a text, and test whether they differ by less than a margin.

    Language models are compared by their loss per token, embedding models by 1 - the cosine of the two
    vectors of a document, classifiers by their accuracy. The text is taken as a sample of what the models are
    for: the statement is about the mean over texts like it, by documents. Schuirmann's two one-sided tests
    decide; see :mod:`regauge.equivalence.verdict`.

    Args:
        a, b: the original and the other Hugging Face directory.
        text: a UTF-8 file, read with a's tokenizer.
        margin: nats per token; 1 - cosine; or a share of the items.
        level: error rate of either test.
        power: chance of a decision that the data still missing shall have.
        tokens: of text, at least; documents are drawn at random until they hold as many.
        length: tokens in a row; capped by what the models admit.
        document: regular expression for what stands between two documents.
        labels: a file with the number of the right class of each line of the text; classifiers only.
        seed: of the draw, the bootstrap and the permutations.
        max_memory: bytes that the outputs of one run may take, about; default 1 GiB.
        progress: called with a stage, how much is done, and of how much.

    Raises:
        BadInput: a file or option that cannot be used, different tokenizers, or one document only.
        Refused: what these models give on text cannot be scored; see :mod:`regauge.equivalence.models`.
        NotEquivalent: an output is NaN or infinite.
    """
    terms = Terms(margin, level, power, seed)
    terms.check()
    if tokens < 2 or length < 2:
        raise BadInput("at least two tokens are needed", found=f"{min(tokens, length)}")
    documents = cut(read_text(text), length, pattern=document, lines=labels is not None)
    right = None if labels is None else _labels(Path(labels), len(documents.texts))
    tokenizer = tokenizer_of(Path(a))
    with Checkpoint.open(a) as files_a, Checkpoint.open(b) as files_b:
        while True:
            rows = draw(documents, tokenizer, length=length, tokens=tokens, seed=seed)
            count = min(max(1, AT_ONCE // rows.length), len(rows.tokens))
            first = open_model(Path(a), files_a, count, rows.length)
            held = held_bytes(first.side.trace) // 2  # of float32
            if held > (max_memory or MEMORY) // 2 and count > 1:
                count = max(1, count * ((max_memory or MEMORY) // 2) // held)
                first = open_model(Path(a), files_a, count, rows.length)
            second = open_model(Path(b), files_b, *first.shape, like=first)
            admitted = min(first.shape[1], second.shape[1])
            if admitted >= rows.length:
                break
            length = admitted
        if _has_tokenizer(Path(b)):
            check_same_tokens(documents, rows, tokenizer, tokenizer_of(Path(b)))
        _check_comparable(first, second, labelled=right is not None)
        scored = _Scored(first, second, documents, rows, progress)
        decision, means = scored.decide(terms, right)
        return Equivalence(
            finding=decision.finding,
            measure=first.measure,
            margin=margin,
            level=level,
            power=power,
            mean_a=means[0],
            mean_b=means[1],
            decision=decision,
            sample=Sample(
                documents.digest,
                documents.rule,
                len(documents.texts),
                len(rows.drawn),
                sum(last - start for start, last in zip(rows.first, rows.last, strict=True)),
                len(rows.tokens),
                rows.length,
                seed,
            ),
            a=first.side.subject(),
            b=second.side.subject(),
            computed="float32",
            software=software(),
        )


@dataclass(frozen=True)
class _Scored:
    a: TextModel
    b: TextModel
    documents: Documents
    rows: Rows
    progress: Progress | None

    def decide(
        self, terms: Terms, labels: list[int] | None
    ) -> tuple[Decision, tuple[float | None, float | None]]:
        """The decision, and the means of a and b where they have one."""
        if self.a.measure is Measure.LOSS:
            losses, sizes = self._losses()
            means = losses.sum(1) / sizes.sum()
            return decide(losses[1] - losses[0], sizes, terms), (float(means[0]), float(means[1]))
        if self.a.measure is Measure.DISTANCE:
            distances = self._distances()
            return decide(distances, np.ones(len(distances)), terms, signed=False), (None, None)
        right = self._right(labels or [])
        return decide_accuracy(right[0], right[1], terms), (float(right[0].mean()), float(right[1].mean()))

    def _losses(self) -> tuple[Vector, Vector]:
        """Losses of a and b added up by document, (2, documents), and the tokens scored in each."""
        count = len(self.rows.drawn)
        sums, sizes = np.zeros((2, count)), np.zeros(count)
        for number, (places, ids, _) in enumerate(self._batches()):
            targets = self._targets(places, ids)
            where = targets.ne(UNSCORED).sum(1)[: len(places)].tolist()
            owner = np.repeat([self.rows.document[place] for place in places], where)
            for index, model in enumerate((self.a, self.b)):
                losses = token_losses(model, ids, targets)
                if not bool(torch.isfinite(losses).all()):
                    raise not_finite(model)
                if number == 0:
                    check_causal(model, ids, targets, losses)
                np.add.at(sums[index], owner, np.asarray(losses.tolist()))
            np.add.at(sizes, owner, 1.0)
        return sums, sizes

    def _targets(self, places: list[int], ids: torch.Tensor) -> torch.Tensor:
        targets = torch.full_like(ids, UNSCORED)
        for line, place in enumerate(places):
            start, stop = max(1, self.rows.first[place]), self.rows.last[place]
            targets[line, start - 1 : stop - 1] = ids[line, start:stop]
        return targets

    def _distances(self) -> Vector:
        vectors: list[list[torch.Tensor]] = [[], []]
        weights = list[torch.Tensor]()
        for number, (places, ids, mask) in enumerate(self._batches()):
            for index, model in enumerate((self.a, self.b)):
                if number == 0:
                    check_padding(model, ids, mask)
                vectors[index].append(vector_of(model, ids, mask)[: len(places)])
            weights.append(mask.sum(1)[: len(places)].double())
        weight = torch.cat(weights)[:, None]
        owner = torch.tensor(self.rows.document)
        means: list[torch.Tensor] = []
        for parts in vectors:
            rows = torch.cat(parts) * weight
            total = torch.zeros((len(self.rows.drawn), rows.shape[1]), dtype=torch.float64)
            means.append(total.index_add_(0, owner, rows))
        return cosine_distance(means[0], means[1])

    def _right(self, labels: list[int]) -> Vector:
        """Whether a and b are right, (2, documents); every document is one row."""
        wanted = torch.tensor([labels[index] for index in self.rows.drawn])
        classes = self.a.side.trace.outputs[0].meta["val"].shape[1]
        if bool((wanted >= classes).any()):
            raise BadInput(
                "a label is not a class of these models",
                expected=f"0 to {classes - 1}",
                found=str(int(wanted.max())),
            )
        found: list[list[torch.Tensor]] = [[], []]
        for number, (places, ids, mask) in enumerate(self._batches()):
            for index, model in enumerate((self.a, self.b)):
                if number == 0:
                    check_padding(model, ids, mask)
                found[index].append(class_of(model, ids, mask)[: len(places)])
        return np.asarray([(torch.cat(parts) == wanted).double().tolist() for parts in found])

    def _batches(self) -> Generator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Rows by their places, their ids and their mask, in runs of the shape traced."""
        rows, length = self.a.shape
        total = len(self.rows.tokens)
        for start in range(0, total, rows):
            places = list(range(start, min(start + rows, total)))
            ids = torch.zeros((rows, length), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            mask[len(places) :] = 1  # rows that nobody reads; with nothing to attend to they would be NaN
            for line, place in enumerate(places):
                held = self.rows.tokens[place]
                ids[line, : len(held)] = torch.tensor(held)
                mask[line, : len(held)] = 1
            if self.progress is not None:
                self.progress("scoring", start, total)
            yield places, ids, mask
        if self.progress is not None:
            self.progress("scoring", total, total)


def _check_comparable(a: TextModel, b: TextModel, *, labelled: bool) -> None:
    if a.measure is not b.measure:
        raise BadInput("the two models give different things", expected=str(a.measure), found=str(b.measure))
    if labelled is not (a.measure is Measure.ACCURACY):
        raise BadInput(
            "classifiers need labels, and nothing else does",
            expected="labels" if a.measure is Measure.ACCURACY else "no labels",
            found=f"models that give a {a.measure}" + (", and labels" if labelled else ", and no labels"),
            way_out="--labels FILE, the number of the right class of each line of the text",
        )
    shapes = [tuple(model.side.trace.outputs[0].meta["val"].shape) for model in (a, b)]
    if a.measure is not Measure.LOSS and shapes[0] != shapes[1]:
        raise BadInput("the two models have different outputs", expected=str(shapes[0]), found=str(shapes[1]))


def _labels(path: Path, count: int) -> list[int]:
    try:
        found = [int(line) for line in read_text(path).split()]
    except ValueError as error:
        raise BadInput(f"{path} holds something that is not a number", found=str(error)) from error
    if len(found) != count or min(found) < 0:
        raise BadInput(
            "there must be one label for each line of the text that is not blank",
            expected=f"{count} numbers from 0",
            found=f"{len(found)}, the least {min(found)}" if found else "none",
        )
    return found


def _has_tokenizer(directory: Path) -> bool:
    return any(directory.glob("tokenizer*")) or any(directory.glob("vocab*"))
