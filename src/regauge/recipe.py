"""Recipes: which moves to make, in which order, with which options. From YAML or from ``--move``.

Unknown keys, moves and options are errors that name the nearest known ones; nothing is ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from regauge.errors import RecipeError

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class MoveSpec(BaseModel):
    """One move of a recipe.

    Attributes:
        name: a name of ``regauge moves``.
        options: its options; those left out have their default values.
        optional: the move is left out where it is refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    optional: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: object) -> object:
        """``permute`` and ``{name: rotate, style: hadamard}`` stand for name and options."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "options" not in value:
            given: dict[Any, Any] = dict(cast(Mapping[Any, Any], value))
            name, optional = given.pop("name", None), given.pop("optional", False)
            return {"name": name, "options": given, "optional": optional}
        return value

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


class Recipe(BaseModel):
    """Moves in the order they are made.

    Attributes:
        moves: at least one.
        seed: for everything drawn at random; None leaves it to the caller.
        dtype: storage of the result; None keeps that of the source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    moves: tuple[MoveSpec, ...] = Field(min_length=1)
    seed: int | None = None
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None


def parse_move(text: str) -> MoveSpec:
    """A move as written on the command line: ``name`` or ``name:key=value,key=value``.

    Raises:
        RecipeError: not of that form, or the move, an option or a value is unknown.
    """
    name, colon, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals or key in options:
            raise RecipeError(
                f"cannot read the move {text!r}",
                expected="NAME or NAME:key=value,key=value, each key once",
                found=repr(item),
                way_out="for example --move rotate:style=hadamard",
            )
        options[key] = value
    return check_move(MoveSpec(name=name, options=options))


def parse_recipe(data: Any, where: str = "the recipe") -> Recipe:
    """A recipe from plain data, as ``yaml.safe_load`` returns it.

    Raises:
        RecipeError: an unknown key, move, option or value; no moves.
    """
    if not isinstance(data, Mapping):
        found = "nothing" if data is None else type(data).__name__
        raise RecipeError(
            f"{where} is not a recipe",
            expected="a mapping with the key 'moves'",
            found=found,
            way_out="write 'moves: [fold-scales, permute]'",
        )
    given = dict(cast(Mapping[Any, Any], data))
    unknown = [str(key) for key in given if key not in Recipe.model_fields]
    if unknown:
        raise RecipeError(
            f"{where} has an unknown key {unknown[0]!r}{_nearest(unknown[0], Recipe.model_fields)}",
            expected=" or ".join(Recipe.model_fields),
            found=unknown[0],
            way_out="remove it",
        )
    try:
        recipe = Recipe.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{where} has a bad value at {place!r}",
            expected=first["msg"],
            found=repr(first["input"])[:120],
            way_out="docs/recipes.md describes every key",
        ) from error
    return recipe.model_copy(update={"moves": tuple(check_move(spec) for spec in recipe.moves)})


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file (YAML, UTF-8).

    Raises:
        RecipeError: the file is missing, is not YAML, or is not a recipe; see ``docs/recipes.md``.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {path}", expected="a YAML file", found=error.strerror or str(error)
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} is not YAML",
            expected="for example 'moves: [fold-scales, permute]'",
            found=" ".join(str(error).split())[:200],
        ) from error
    return parse_recipe(data, str(path))


def check_move(spec: MoveSpec) -> MoveSpec:
    """The same move with its options checked and converted to their types.

    Raises:
        RecipeError: an unknown move, an unknown option, or a value of the wrong kind.
    """
    from regauge.cuts import CUTS
    from regauge.moves import MOVES

    described = MOVES.get(spec.name) or CUTS.get(spec.name)
    if described is None:
        known = f"one of {', '.join((*MOVES, *CUTS))}"
        raise RecipeError(
            f"there is no move {spec.name!r}{_nearest(spec.name, (*MOVES, *CUTS))}",
            expected=known,
            found=repr(spec.name),
            way_out="`regauge moves` describes them",
        )
    known_options = described.options
    values: dict[str, Any] = {}
    for key, value in spec.options.items():
        if key not in known_options:
            raise RecipeError(
                f"the move {spec.name!r} has no option {key!r}{_nearest(key, known_options)}",
                expected=" or ".join(known_options) or "no options",
                found=repr(key),
                way_out="`regauge moves` lists the options",
            )
        values[key] = _convert(spec.name, key, value, known_options[key])
    return MoveSpec(name=spec.name, options=values, optional=spec.optional)


def _convert(move: str, key: str, value: Any, option: Any) -> Any:
    """The value as the option's type; a number may be written as text, nothing else is coerced."""
    kind: type = option.type
    choices: tuple[Any, ...] = tuple(option.choices or ())
    if value is None and option.default is None:
        return None
    result = _as(kind, value)
    if result is None or (choices and result not in choices):
        texts = [str(choice) for choice in choices]
        raise RecipeError(
            f"bad value for option {key!r} of the move {move!r}{_nearest(str(value), texts)}",
            expected=" or ".join(texts) or _article(kind),
            found=repr(value),
            way_out="`regauge moves` lists the options",
        )
    return result


def _as(kind: type, value: Any) -> Any:
    """None if the value is not of that type."""
    if kind is bool:
        text = str(value).lower()
        return True if text in _TRUE else False if text in _FALSE else None
    if kind is str and type(value) is int:
        return str(value)
    if kind not in (int, float):
        return value if isinstance(value, kind) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return None
    exact = isinstance(value, str) or number == value
    return number if exact and math.isfinite(number) else None


def _article(kind: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, kind.__name__)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(other) for other in close)}?" if close else ""
