"""What ``regauge.json`` of a rewritten directory says, read strictly: it may come from anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regauge.certify import Certificate
from regauge.errors import BadInput

NAME = "regauge.json"
_WAY_OUT = "give a directory written by `regauge rewrite`"


class Used(BaseModel):
    """A generator that a move acted on; fields as in :class:`regauge.moves.Used`."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: str
    size: int
    count: int
    membership: float
    pairing: float
    place: int


class Source(BaseModel):
    """The original: digest of its contents, and bytes of its tensors."""

    digest: str
    bytes: int


class Output(BaseModel):
    """The result: digest of its contents."""

    digest: str


class Parameters(BaseModel):
    """State-dict names that the result has and the original has not, and the other way round."""

    made: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class Written(BaseModel):
    """How many tensors were read again, and the largest difference from the plan in last places."""

    model_config = ConfigDict(allow_inf_nan=False)

    tensors: int
    worst_ulps: float


class Manifest(BaseModel):
    """The content of ``regauge.json``; directories of earlier versions may lack what has a default."""

    format: Literal[1]
    recipe: tuple[dict[str, Any], ...]
    seed: int
    source: Source
    output: Output
    algebra: tuple[Used, ...] = ()
    patches: tuple[dict[str, Any], ...] = ()
    parameters: Parameters = Field(default_factory=Parameters)
    written: Written
    certificate: dict[str, Any]
    software: dict[str, str] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)


def read_manifest(directory: Path) -> tuple[Manifest, Certificate]:
    """The manifest of a directory and the certificate in it.

    Raises:
        BadInput: no directory, no ``regauge.json`` in it, or one of another format.
    """
    path = directory / NAME
    try:
        manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
        certificate = Certificate.from_json(json.dumps(manifest.certificate))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(
            "nothing to report on",
            expected=f"a directory with {NAME}",
            found=f"{directory}" + (" without it" if directory.is_dir() else ", which is no directory"),
            way_out=_WAY_OUT,
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"{path} is not what this version of regauge writes",
            found=f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
            way_out=_WAY_OUT,
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{path} cannot be read", found=f"{type(error).__name__}: {error}", way_out=_WAY_OUT
        ) from error
    return manifest, certificate
