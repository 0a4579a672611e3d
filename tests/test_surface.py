"""What others rely on: public names, documents whose programs run, and every word that must be documented."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regauge
from regauge import errors
from regauge.atlas import Atlas, Kind
from regauge.moves import MOVES
from zoo import NAMES, Bench, atlas, distance, folded, original, specimen, weights

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def programs(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


# --- a stranger with docs/atlas.md, numpy and the JSON ------------------------------------------------


@pytest.fixture(scope="module")
def stranger() -> dict[str, Any]:
    space: dict[str, Any] = {}
    for program in programs(DOCS["atlas.md"]):
        exec(compile(program, "docs/atlas.md", "exec"), space)
    return space


def _settings(name: str) -> Iterator[tuple[Atlas, dict[str, torch.Tensor], Bench]]:
    """The atlas as the model stands and its folded form, each with weights and what runs them."""
    after = atlas(name).folded
    yield atlas(name), dict(weights(name)), Bench(specimen(name))
    if after is not None:
        moved = folded(name)
        yield after, dict(moved.weights), moved.bench


def _changed(
    stranger: dict[str, Any], state: dict[str, torch.Tensor], generator: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The state after a random element that is not the identity."""
    verb = stranger["shift" if generator["kind"] in ("translation", "null") else "apply"]
    for seed in range(20):
        arrays = {key: value.double().numpy().copy() for key, value in state.items()}
        verb(arrays, generator, np.random.default_rng(seed))
        changed = {key: torch.from_numpy(value) for key, value in arrays.items()}
        if any(not torch.equal(changed[key], state[key].double()) for key in state):
            return changed
    raise AssertionError(f"{generator['id']} changes nothing")


STRANGE = (
    "tied_head",
    "gain_one_plus_both_sides",
    "mean_and_bias",
    "turned_and_shared",
    "fused_interleaved",
    "experts_best_two",
    "groups_normed",
    "picture_stack",
    "llama",
    "gemma3",
    "gpt2",
    "neox",
    "whisper",
)


@pytest.mark.parametrize("name", STRANGE)
def test_the_programs_of_the_document_apply_every_generator(name: str, stranger: dict[str, Any]) -> None:
    for found, state, bench in _settings(name):
        for generator in json.loads(found.to_json())["generators"]:
            changed = _changed(stranger, state, generator)
            assert distance(original(name), bench.run(changed)) < 1e-10, generator


# --- nothing public is undocumented -------------------------------------------------------------------


def test_the_programs_of_the_other_documents_run() -> None:
    found = [
        (name, program) for name, text in DOCS.items() if name != "atlas.md" for program in programs(text)
    ]
    assert found
    spaces: dict[str, dict[str, Any]] = {}
    torch.manual_seed(0)
    for name, program in found:
        exec(compile(program, f"docs/{name}", "exec"), spaces.setdefault(name, {}))


def test_every_public_name_exists_is_sorted_and_is_documented() -> None:
    assert sorted(regauge.__all__) == regauge.__all__
    for name in regauge.__all__:
        assert getattr(regauge, name) is not None
        assert re.search(rf"\b{name}\b", DOCS["reference.md"]), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = regauge.nonsense


def test_certify_is_a_function_and_still_a_package() -> None:
    code = (
        "import sys, regauge\nassert 'torch' not in sys.modules\n"
        "from regauge.certify.certificate import Certificate\n"
        "try: regauge.certify('a', 'b')\nexcept regauge.BadInput as error: print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("BadInput", "CheckpointError")


def test_every_error_and_its_exit_code_is_documented() -> None:
    tree = DOCS["reference.md"].split("## Errors")[1].split("##")[0]
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.RegaugeError):
            assert error.__name__ in tree
            assert f"| {error.exit_code} |" in DOCS["reference.md"]
            assert f"| {error.exit_code} |" in README


def test_every_field_of_the_atlas_is_documented() -> None:
    def keys(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield key
                yield from keys(item)
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    for name in ("gpt2", "gemma3", "fused_interleaved"):
        for key in set(keys(json.loads(atlas(name).to_json()))):
            assert f"`{key}`" in DOCS["atlas.md"] or f"`through.{key}`" in DOCS["atlas.md"], key
    for kind in Kind:
        assert f"| `{kind}` |" in DOCS["atlas.md"]


def test_every_field_of_a_certificate_is_documented() -> None:
    from regauge.certify import schema

    whole = schema()
    for part in (whole, *whole["$defs"].values()):
        for key in part.get("properties", ()):
            assert f"`{key}`" in DOCS["certificate.md"], key


def test_every_move_and_option_is_documented() -> None:
    rows = {
        row.split("|")[1].strip(): row for row in DOCS["recipes.md"].splitlines() if row.startswith("| `")
    }
    for name, move in MOVES.items():
        row = rows[f"`{name}`"]
        assert f"| `{name}` |" in README
        for key, option in move.options.items():
            assert f"`{key}`" in row
            assert all(f"`{choice}`" in row for choice in option.choices)
    assert set(rows) == {f"`{name}`" for name in MOVES}


def _reasons() -> list[re.Pattern[str]]:
    table = DOCS["reference.md"].split("## What limits a space")[1].split("##")[0]
    first = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines() if row.startswith("| ")][1:]
    return [re.compile(re.sub("OPERATION|NAME", ".+", re.escape(row))) for row in first]


@pytest.mark.parametrize("name", NAMES)
def test_every_reason_for_a_limit_is_documented(name: str) -> None:
    patterns = _reasons()
    for found in (atlas(name), atlas(name).folded):
        for space in found.spaces if found is not None else ():
            for limit in space.limits:
                assert any(pattern.fullmatch(limit.reason) for pattern in patterns), limit


def test_links_between_documents_lead_somewhere() -> None:
    for place, text in {"README.md": README, **{f"docs/{name}": text for name, text in DOCS.items()}}.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert ((ROOT / place).parent / target).exists(), (place, target)
