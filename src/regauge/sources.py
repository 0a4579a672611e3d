"""What a user may name as a source: a directory, a GGUF file, or a model that a package ships."""

from __future__ import annotations

from pathlib import Path

from regauge.errors import BadInput


def resolve(source: str | Path) -> Path:
    """A directory for any SRC: a directory itself, ``packaged:NAME``, or a GGUF file (converted once).

    Raises:
        BadInput, CheckpointError: it does not exist or cannot be converted.
    """
    if isinstance(source, str) and source.startswith("packaged:"):
        from regauge import packaged

        return packaged.directory(source.removeprefix("packaged:"))
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors":
        from regauge.gguf import open_gguf

        return open_gguf(path)
    if not path.exists():
        raise BadInput(
            "the source does not exist",
            expected="a Hugging Face directory, a GGUF file or packaged:NAME",
            found=str(path),
        )
    return path
