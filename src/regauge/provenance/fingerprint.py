"""Fingerprints: a few kilobytes that say which model this is, whatever its gauge and its encoding."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, Refused, RegaugeError
from regauge.model import CheckpointModel
from regauge.provenance.behaviour import behaviour, digest
from regauge.provenance.network import network
from regauge.provenance.normal_form import normal_form
from regauge.provenance.sketch import LENGTH, sketches
from regauge.sources import resolve
from regauge.stages import Progress, silent

VERSION = 2
SAME = 1e-6
"""Largest difference of behaviour within which two models count as one function."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a model.

    Attributes:
        vector: float32 [LENGTH], of norm one: sketches of composed maps, invariant under the whole gauge.
        behaviour: float64 [64]: outputs on fixed inputs, see :mod:`regauge.provenance.behaviour`; None if
            they were not asked for.
        digest: hexadecimal digest of ``behaviour``, equal for equal functions up to rounding; None with it.
        details: products by sort, parameters that are in none, and why there is no behaviour.
        architecture: class named in the configuration; only for the reader.
        parameters: number of stored numbers.
        seconds: wall time it took.
        version: fingerprints of different versions cannot be compared.
    """

    vector: np.ndarray
    behaviour: np.ndarray | None
    digest: str | None
    details: Mapping[str, Any]
    architecture: str
    parameters: int
    seconds: float
    version: int = VERSION

    def to_json(self) -> str:
        """One line of JSON; numbers little-endian in base64."""
        plain = {
            "version": self.version,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "digest": self.digest,
            "vector": _text(self.vector, "<f4"),
            "behaviour": None if self.behaviour is None else _text(self.behaviour, "<f8"),
            "details": dict(self.details),
            "seconds": self.seconds,
        }
        return json.dumps(plain, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Fingerprint:
        """Inverse of ``to_json``. Raises ``BadInput`` on anything else, another version included."""
        try:
            plain = json.loads(text)
            found = Fingerprint(
                vector=_array(plain["vector"], "<f4").astype(np.float32),
                behaviour=None if plain["behaviour"] is None else _array(plain["behaviour"], "<f8"),
                digest=plain["digest"],
                details=dict(plain["details"]),
                architecture=str(plain["architecture"]),
                parameters=int(plain["parameters"]),
                seconds=float(plain["seconds"]),
                version=int(plain["version"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput("this is no fingerprint", found=f"{type(error).__name__}: {error}") from error
        check_vector(found.vector)
        check_version(found.version)
        return found


def fingerprint(
    source: str | Path,
    *,
    run: bool = True,
    progress: Progress | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint. Weights are read block by block, in float64; nothing is written.

    Tokens count by their place in the vocabulary: with the vocabulary reordered it is another model here.

    Args:
        source: see :func:`regauge.sources.resolve`.
        run: also run the model on fixed inputs, for ``behaviour`` and ``digest``.
        progress: called with (what is being done, done, total).

    Raises:
        Refused: nothing of the model can be told apart from its gauge.
        BadInput, CheckpointError, TraceError: unusable input.

    Source: the idea of weight statistics that no symmetry changes, as in HuRef (arXiv 2312.04828, section 4);
    here for every generator of the atlas.
    """
    begin = time.perf_counter()
    tell = progress or silent
    path = resolve(source)
    with Checkpoint.open(path) as files:
        tell("finding the gauge", 0, 1)
        model = CheckpointModel.of(path, files)
        found = sketches(network(normal_form(model)), lambda done, total: tell("sketching", done, total))
        details: dict[str, Any] = {"products": dict(found.counts), "missing": list(found.missing)}
        numbers: np.ndarray | None = None
        if run:
            tell("running", 0, 1)
            try:
                numbers = behaviour(model)
            except Refused:
                raise
            except RegaugeError as error:
                details["not run"] = error.message
        parameters = sum(math.prod(files.shape(name)) for name in files.names)
        named = model.config.get("architectures") or ["unknown"]
    return Fingerprint(
        vector=found.vector.astype(np.float32),
        behaviour=numbers,
        digest=None if numbers is None else digest(numbers),
        details=details,
        architecture=str(named[0]),
        parameters=parameters,
        seconds=round(time.perf_counter() - begin, 3),
    )


def distance(a: Fingerprint, b: Fingerprint) -> float:
    """1 − cosine of the two vectors: 0 for the same weights in any gauge, about 1 for unrelated ones.

    Raises:
        BadInput: fingerprints of different versions.
    """
    check_version(a.version, b.version)
    return max(0.0, 1.0 - float(np.dot(a.vector.astype(np.float64), b.vector.astype(np.float64))))


def same_function(a: Fingerprint, b: Fingerprint, tolerance: float = SAME) -> bool | None:
    """Whether the two did the same on the fixed inputs, up to a difference of ``tolerance`` in each number.

    Evidence, not proof: :func:`regauge.certify` is the proof. None if one of the two was not run.
    """
    check_version(a.version, b.version)
    if a.behaviour is None or b.behaviour is None:
        return None
    return bool(np.abs(a.behaviour - b.behaviour).max() <= tolerance)


def check_version(*versions: int) -> None:
    if any(version != VERSION for version in versions):
        raise BadInput(
            "fingerprints of another version cannot be compared",
            expected=str(VERSION),
            found=", ".join(map(str, versions)),
            way_out="make them again with this version",
        )


def check_vector(vector: np.ndarray) -> None:
    """Raises ``BadInput`` unless it is a finite vector of the right length and of norm one."""
    if vector.shape != (LENGTH,) or not bool(np.isfinite(vector).all()):
        raise BadInput(
            "this is not the vector of a fingerprint",
            expected=f"{LENGTH} finite numbers",
            found=f"shape {vector.shape}",
        )
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if abs(norm - 1) > 1e-3:
        raise BadInput("this is not the vector of a fingerprint", expected="norm 1", found=f"norm {norm:g}")


def _text(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(kind).tobytes()).decode()


def _array(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind).astype(kind[1:])
