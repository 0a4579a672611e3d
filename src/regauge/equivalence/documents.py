"""A text cut into documents, some of them drawn, each turned into one or more rows of tokens.

Documents are the units that are drawn and compared; tokens of one document depend on each other. Without a
rule, lines that follow each other are joined until they hold about a row of text, and only the first row of
each such document is used. With a regular expression, the text between its matches is one document, used as a
whole. Where every line carries a label, every line is a document.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regauge.errors import BadInput

CHARACTERS = 4
"""Characters of plain English that make about one token."""


@dataclass(frozen=True)
class Documents:
    """A text in documents.

    Attributes:
        texts: the documents, in order.
        rule: how the text was cut, in words.
        whole: whether all of a document is to be scored, or only its first row.
        digest: SHA-256 of the text in UTF-8.
    """

    texts: tuple[str, ...]
    rule: str
    whole: bool
    digest: str


@dataclass(frozen=True)
class Rows:
    """Tokens of the documents that were drawn.

    Attributes:
        tokens: ids of each row, special ones included; at most as long as asked.
        first: of each row, the position of the first token of the text.
        last: of each row, the position after the last token of the text.
        document: of each row, the index of its document among those drawn.
        drawn: indices of the documents drawn, in the text, ascending.
    """

    tokens: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    last: tuple[int, ...]
    document: tuple[int, ...]
    drawn: tuple[int, ...]

    @property
    def length(self) -> int:
        return max(map(len, self.tokens))


def read_text(path: str | Path) -> str:
    """A UTF-8 file. Raises ``BadInput`` if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path} cannot be read as UTF-8 text", found=f"{type(error).__name__}: {error}"
        ) from error


def cut(text: str, length: int, *, pattern: str | None = None, lines: bool = False) -> Documents:
    """Cut a text into documents; see the top of this module.

    Args:
        text: plain text.
        length: tokens in a row.
        pattern: regular expression (``re``, multi-line) that matches what stands between documents.
        lines: every line that is not blank is a document.

    Raises:
        BadInput: an expression that cannot be compiled, or no text.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    if lines:
        rule, parts = "every line", text.splitlines()
    elif pattern is not None:
        rule, parts = f"between matches of {pattern}", _between(text, pattern)
    else:
        size = CHARACTERS * length
        rule, parts = f"lines joined to {size} characters, the first row of each", _joined(text, size)
    texts = tuple(part.strip() for part in parts if part.strip())
    if not texts:
        raise BadInput("there is no text to compare on", way_out="a file with text in it")
    return Documents(texts, rule, pattern is not None and not lines, digest)


def _between(text: str, pattern: str) -> list[str]:
    try:
        found = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise BadInput(
            "this is no regular expression", expected="one of Python's re", found=str(error)
        ) from error
    parts, start = list[str](), 0
    for match in found.finditer(text):
        parts.append(text[start : match.start()])
        start = match.end()
    return [*parts, text[start:]]


def _joined(text: str, size: int) -> list[str]:
    parts, held, characters = list[str](), list[str](), 0
    for line in text.splitlines():
        held.append(line)
        characters += len(line) + 1
        if characters >= size:
            parts.append("\n".join(held))
            held, characters = [], 0
    return [*parts, "\n".join(held)]


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer in a directory. Raises ``BadInput`` if transformers cannot load one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise BadInput(
            f"{directory.name} has no tokenizer that transformers can load",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            way_out="copy the tokenizer's files into it",
        ) from error


def draw(documents: Documents, tokenizer: Any, *, length: int, tokens: int, seed: int) -> Rows:
    """Draw documents without replacement until they hold the number of tokens wanted, and cut them into rows.

    Args:
        documents: what to draw from.
        tokenizer: called with a text, gives ``input_ids``.
        length: tokens in a row at most, special ones included.
        tokens: number of tokens of text at least, if the text has them.
        seed: of the draw.

    Raises:
        BadInput: no document has two tokens, or a row has no room for text.
    """
    before, after = _special(tokenizer)
    room = length - len(before) - len(after)
    if room < 1:
        raise BadInput("a row has no room for text", expected="more tokens in a row", found=str(length))
    chosen: dict[int, list[list[int]]] = {}
    held = 0
    for index in np.random.default_rng(seed).permutation(len(documents.texts)).tolist():
        if held >= tokens:
            break
        text = documents.texts[index]
        if not documents.whole:
            text = text[: 16 * length]  # more characters than any row of plain text has
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        rows = [ids[start : start + room] for start in range(0, len(ids), room)]
        rows = rows if documents.whole else rows[:1]
        rows = [row for row in rows if len(before) + len(row) >= 2]
        if rows:
            chosen[index] = rows
            held += sum(map(len, rows))
    if not chosen:
        raise BadInput("the text is too short", expected="a document of two tokens", found="none")
    drawn = sorted(chosen)
    pairs = [(place, row) for place, index in enumerate(drawn) for row in chosen[index]]
    return Rows(
        tuple((*before, *row, *after) for _, row in pairs),
        tuple(len(before) for _ in pairs),
        tuple(len(before) + len(row) for _, row in pairs),
        tuple(place for place, _ in pairs),
        tuple(drawn),
    )


def check_same_tokens(documents: Documents, rows: Rows, a: Any, b: Any) -> None:
    """Refuse two tokenizers that read the documents drawn in different ways."""
    for index in rows.drawn:
        text = documents.texts[index]
        if list(a(text)["input_ids"]) != list(b(text)["input_ids"]):
            raise BadInput(
                "the two models read this text as different tokens",
                expected="one tokenizer",
                found=f"different tokens for the document that begins {text[:40]!r}",
                way_out="losses per token can be compared on the same tokens only",
            )


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    for probe in ("a", "the", "1"):
        plain = [int(i) for i in tokenizer(probe, add_special_tokens=False)["input_ids"]]
        dressed = [int(i) for i in tokenizer(probe, add_special_tokens=True)["input_ids"]]
        places = [
            start
            for start in range(len(dressed) - len(plain) + 1)
            if plain and dressed[start : start + len(plain)] == plain
        ]
        if len(places) == 1:
            start = places[0]
            return dressed[:start], dressed[start + len(plain) :]
    raise BadInput(
        "cannot tell which tokens this tokenizer adds to a text",
        expected="the tokens of the text, with others before or after",
        way_out="another tokenizer",
    )
