"""What a run is, and what a sweep of runs is. From YAML or plain data; unknown keys are errors."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from regauge.errors import BadInput
from regauge.lab.nearest import nearest


def _numbers(value: object) -> object:
    """Texts such as ``1e-3``, which YAML does not take for a number, as numbers."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list):
        return [_numbers(item) for item in cast(list[Any], value)]
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Part):
    """One model.

    Attributes:
        kind: ``decoder``, ``vit`` or ``cnn``.
        width, depth, heads, expansion: of the stream, layers, of attention, of the MLP over ``width``.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``.
        norm, norm_options: a name of :data:`regauge.lab.norms.TOKENS` or ``IMAGES``, or ``none``.
        placement, placement_options: see :func:`regauge.nn.placement.placements`.
        qk_norm: RMSNorms of queries and keys.
        positions: ``rotary``, ``learned`` or ``none``; by default rotary for a decoder, learned for a ViT.
        bias: of the linear maps inside the layers.
        init, init_options: see :func:`regauge.lab.start.initialise`.
        context, vocabulary: of a decoder.
        image, patch, classes: of a ViT or CNN.
    """

    kind: Literal["decoder", "vit", "cnn"] = "decoder"
    width: int = Field(default=64, ge=1)
    depth: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    expansion: int = Field(default=4, ge=1)
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    norm: str = "rmsnorm"
    norm_options: dict[str, Any] = Field(default_factory=dict)
    placement: str = "pre"
    placement_options: dict[str, Any] = Field(default_factory=dict)
    qk_norm: bool = False
    positions: Literal["rotary", "learned", "none"] | None = None
    bias: bool = False
    init: str = "default"
    init_options: dict[str, Any] = Field(default_factory=dict)
    context: int = Field(default=64, ge=2)
    vocabulary: int = Field(default=256, ge=2)
    image: int = Field(default=8, ge=4)
    patch: int = Field(default=2, ge=1)
    classes: int = Field(default=10, ge=2)

    @property
    def placed(self) -> str:
        """``positions``, with its default."""
        return self.positions or ("rotary" if self.kind == "decoder" else "learned")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind != "cnn":
            if self.width % self.heads:
                raise ValueError(f"heads must divide width: {self.heads}, {self.width}")
            if self.placed == "rotary" and self.width // self.heads % 2:
                raise ValueError(f"rotary positions need heads of even size, not {self.width // self.heads}")
        if self.kind == "vit" and self.image % self.patch:
            raise ValueError(f"patch must divide image: {self.patch}, {self.image}")
        return self


class OptimizerConfig(_Part):
    """One optimizer and its schedule.

    Attributes:
        name: a name of :data:`regauge.lab.optimizers.OPTIMIZERS`.
        lr: peak rate, after ``warmup`` steps of lr · (step + 1) / warmup.
        weight_decay: where above zero, of the parameters that :func:`regauge.optim.groups` decays.
        options: further arguments of the class.
        schedule: ``cosine``, down to ``final`` · lr at the last step, or ``constant``.
        clip: largest gradient norm; None for any.
    """

    name: str = "adamw"
    lr: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = Field(default=20, ge=0)
    final: float = Field(default=0.1, ge=0)
    clip: float | None = Field(default=None, gt=0)


class DataConfig(_Part):
    """What is learnt: bytes of a text by a decoder, digits by the others.

    Attributes:
        batch: samples a step.
        text: ``kjv`` or ``python``; None for the first that is installed, see :func:`regauge.packaged.text`.
        characters: of the text; the last tenth is held out.
        digits: images to learn from, and a quarter as many to be held out.
        noise: standard deviation of what is added to an image.
        held_out: batches of held-out samples that are evaluated.
    """

    batch: int = Field(default=16, ge=1)
    text: Literal["kjv", "python"] | None = None
    characters: int = Field(default=400_000, ge=1000)
    digits: int = Field(default=2000, ge=10)
    noise: float = Field(default=0.2, ge=0)
    held_out: int = Field(default=8, ge=1)


class RunConfig(_Part):
    """One run.

    Attributes:
        model, optimizer, data: see there.
        steps: of the optimizer.
        seed: of weights and of the order of the data.
        log_every, checkpoint_every: in steps; no checkpoints for 0.
        patience: consecutive steps with a loss above that of the first, after which the run has diverged.
        statistics: whether batch statistics are followed: the second moments of every norm's input from batch
            to batch, and the held-out loss in training mode.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one; there the forward pass runs
            under autocast to bfloat16.
    """

    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    steps: int = Field(default=200, ge=1)
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1)
    checkpoint_every: int = Field(default=100, ge=0)
    patience: int = Field(default=50, ge=1)
    statistics: bool = False
    device: Literal["cpu", "cuda", "auto"] = "auto"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its directory: ``group`` and the seed.
        group: what all seeds of one setting share.
        config: what is run.
    """

    name: str
    group: str
    config: RunConfig


class SweepConfig(_Part):
    """Runs that differ in a few keys: every case, with every combination of the grid, with every seed.

    Attributes:
        name: of the sweep.
        base: keys of a run that all have in common.
        cases: name -> dotted keys such as ``model.norm_options.warmup`` and their values.
        grid: dotted key -> the values it takes.
        seeds: of all of them.
    """

    name: str
    base: dict[str, Any] = Field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default=[0], min_length=1)

    @field_validator("cases", "grid")
    @classmethod
    def _not_empty(cls, value: dict[str, Any]) -> dict[str, Any]:
        empty = [key for key, items in value.items() if isinstance(items, list) and not items]
        if empty:
            raise ValueError(f"no values for {empty[0]}")
        return value

    def runs(self) -> tuple[Run, ...]:
        """All runs: cases outermost, then the keys of the grid with the last one fastest, then seeds.

        Raises:
            BadInput: a key that a run does not have, a value that does not fit, two runs of one name.
        """
        found: dict[str, Run] = {}
        shorts = _shorts(list(self.grid))
        for case, changes in (self.cases or {"": {}}).items():
            for values in itertools.product(*self.grid.values()):
                chosen = dict(zip(self.grid, values, strict=True))
                parts = [f"{shorts[key]}={_shown(value)}" for key, value in chosen.items()]
                group = ",".join(([case] if case else []) + parts) or self.name
                group = re.sub(r"[^A-Za-z0-9._=+,-]", "_", group)
                for seed in self.seeds:
                    data = copy.deepcopy(self.base)
                    for key, value in {**changes, **chosen, "seed": seed}.items():
                        _set(data, key, value)
                    name = f"{group},seed={seed}"
                    if name in found:
                        raise BadInput("two runs of a sweep have one name", found=name)
                    found[name] = Run(name, group, parse_run(data, f"the run {name}"))
        return tuple(found.values())


def _shorts(keys: Sequence[str]) -> dict[str, str]:
    """The last component of each key; the whole key where two would be equal."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        inside = data.setdefault(part, {})
        if not isinstance(inside, dict):
            raise BadInput(f"{key!r} does not lead to a value", found=f"{part} is {inside!r}")
        data = cast(dict[str, Any], inside)
    data[last] = copy.deepcopy(value)


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse_run(data: Any, where: str = "the run") -> RunConfig:
    """A run from plain data.

    Raises:
        BadInput: an unknown key, or a value that does not fit.
    """
    return _parsed(RunConfig, data, where)


def parse_model(data: Any, where: str = "the model") -> ModelConfig:
    """A model from plain data.

    Raises:
        BadInput: as of :func:`parse_run`.
    """
    return _parsed(ModelConfig, data, where)


def parse_sweep(data: Any, where: str = "the sweep") -> SweepConfig:
    """A sweep from plain data; all its runs are checked.

    Raises:
        BadInput: as of :func:`parse_run`.
    """
    sweep = _parsed(SweepConfig, data, where)
    sweep.runs()
    return sweep


def load_sweep(path: str | Path) -> SweepConfig:
    """A sweep from a YAML file.

    Raises:
        BadInput: the file is missing, is not YAML, or is not a sweep.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}", expected="a YAML file", found=str(error.strerror)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not YAML", found=" ".join(str(error).split())[:200]) from error
    return parse_sweep(data, str(path))


def _parsed(kind: type[Parsed], data: Any, where: str) -> Parsed:
    if not isinstance(data, Mapping):
        raise BadInput(
            f"{where} is not a mapping", expected=", ".join(kind.model_fields), found=repr(data)[:80]
        )
    try:
        return kind.model_validate(_numbers(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields(kind, place[:-1])
        raise BadInput(
            f"{where} has an unknown key {'.'.join(place)!r}{nearest(place[-1], known)}",
            expected=", ".join(known),
            found=place[-1],
            way_out="docs/lab.md describes every key",
        )
    raise BadInput(
        f"{where} has a bad value at {'.'.join(place)!r}",
        expected=first["msg"],
        found=repr(first["input"])[:120],
    )


def _fields(kind: type[BaseModel], place: Sequence[str]) -> list[str]:
    for part in place:
        inside = kind.model_fields[part].annotation
        assert isinstance(inside, type)
        assert issubclass(inside, BaseModel)
        kind = inside
    return list(kind.model_fields)
