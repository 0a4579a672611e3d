"""Recipes: what is written is what is planned, and nothing unknown is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from regauge.errors import RecipeError
from regauge.moves import MOVES
from regauge.recipe import MoveSpec, Recipe, load_recipe, parse_move, parse_recipe


def test_command_line_and_yaml_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "moves:\n  - fold-scales\n  - {name: rotate, style: hadamard, space: all}\n"
        "  - {name: permute, options: {signs: true}}\nseed: 3\ndtype: bfloat16\n"
    )
    recipe = load_recipe(file)
    written = ("fold-scales", "rotate:style=hadamard,space=all", "permute:signs=yes")
    assert recipe.moves == tuple(parse_move(text) for text in written)
    assert recipe.moves[2].options == {"signs": True}
    assert (recipe.seed, recipe.dtype) == (3, "bfloat16")


@pytest.mark.parametrize("name", sorted(MOVES))
def test_every_default_of_every_move_can_be_written_out(name: str) -> None:
    options = {key: option.default for key, option in MOVES[name].options.items()}
    spec = MoveSpec(name=name, options=options)
    assert parse_recipe({"moves": [{"name": name, **options}]}).moves == (spec,)
    given = {key: value for key, value in options.items() if value != ""}
    assert parse_move(str(MoveSpec(name=name, options=given))).options == given


@pytest.mark.parametrize("name", sorted(MOVES))
def test_every_move_refuses_an_option_it_does_not_have(name: str) -> None:
    with pytest.raises(RecipeError, match="has no option 'colour'"):
        parse_move(f"{name}:colour=red")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fold-scale", "did you mean 'fold-scales'"),
        ("", "there is no move ''"),
        ("rotate:style", "cannot read the move"),
        ("rotate:", "cannot read the move"),
        ("rotate:style=hadamard,style=random", "cannot read the move"),
        ("rotate:styel=hadamard", "did you mean 'style'"),
        ("rotate:style=hadamrd", "did you mean 'hadamard'"),
        ("permute:signs=perhaps", "bad value for option 'signs'"),
    ],
)
def test_what_the_command_line_refuses(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_move(text)
    assert says in caught.value.message
    assert caught.value.expected
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a recipe"),
        ("- fold-scales", "is not a recipe"),
        ("moves: []", "bad value at 'moves'"),
        ("seed: 1", "bad value at 'moves'"),
        ("moves: [permute]\nmove: [permute]", "unknown key 'move'; did you mean 'moves'"),
        ("moves: [permute]\nseed: many", "bad value at 'seed'"),
        ("moves: [permute]\ndtype: int4", "bad value at 'dtype'"),
        ("moves: [{style: hadamard}]", "bad value at 'moves.0.name'"),
        ("moves: [{name: rotate, styel: hadamard}]", "has no option 'styel'"),
        ("moves: [{name: permute, signs: 2}]", "bad value for option 'signs'"),
        ("moves: [{name: rotate, options: {}, extra: 1}]", "bad value at 'moves.0.extra'"),
        ("moves: [turn]", "there is no move 'turn'"),
        ("moves: [permute", "is not YAML"),
        ("moves: !!python/object/apply:os.system [echo]", "is not YAML"),
    ],
)
def test_what_a_recipe_file_refuses(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert says in caught.value.message
    assert caught.value.found


def test_a_missing_or_binary_file_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00moves")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe(moves=(MoveSpec(name="permute"),))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
