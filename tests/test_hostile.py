"""Hostile input, end to end: a clear error, the right exit code, the source intact, nothing at OUT.

One test for each way to go wrong. The layers below have their own: checkpoints, staging, applying, recipes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from regauge.atlas import Kind
from regauge.checkpoint import Checkpoint
from regauge.cli import app
from zoo import CONFIGS

OK = ["--move", "permute"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint of a tiny model, saved by transformers."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hostile") / "model"
    Qwen2ForCausalLM(CONFIGS["qwen2"]()).save_pretrained(path, max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(original, tmp_path / "source"))


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def run(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(arg) for arg in args])


def fails(
    source: Path, code: int, *words: str, args: list[str] | None = None, left: tuple[str, ...] = ()
) -> str:
    """Rewriting ends with this code and these words, and leaves the source and its surroundings alone."""
    before, around = contents(source), sorted(p.name for p in source.parent.iterdir())
    out = source.parent / "out"
    existed = contents(out) if out.exists() else None
    result = run("rewrite", source, out, *(OK if args is None else args))
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == code, result.output
    assert "Traceback" not in said
    for word in words:
        assert word.lower() in said.lower(), said
    assert contents(source) == before
    assert (contents(out) if out.exists() else None) == existed
    assert sorted(p.name for p in source.parent.iterdir()) == sorted((*around, *left))
    return said


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def change(source: Path, name: str, value: torch.Tensor) -> None:
    for shard in shards(source):
        state = load_file(shard)
        if name in state:
            save_file({**state, name: value}, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def index(source: Path) -> Iterator[dict[str, object]]:
    path = source / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))


def test_it_works_when_nothing_is_wrong(source: Path) -> None:
    result = run("rewrite", source, source.parent / "out", *OK)
    assert result.exit_code == 0, result.output


def test_truncated_shard(source: Path) -> None:
    with shards(source)[1].open("rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 7)
    fails(source, 2, shards(source)[1].name, "truncated")


def test_missing_shard(source: Path) -> None:
    shards(source)[0].unlink()
    fails(source, 2, "model-00001-of", "missing")


def test_index_names_a_tensor_that_is_not_there(source: Path) -> None:
    for data in index(source):
        data["weight_map"]["model.ghost.weight"] = shards(source)[0].name  # type: ignore[index]
    fails(source, 2, "model.ghost.weight")


def test_nan(source: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    bad = next(load_file(s)[name] for s in shards(source) if name in load_file(s))
    bad[2, 3] = float("nan")
    change(source, name, bad)
    fails(source, 2, name, "nan")


def test_float16_overflow(source: Path) -> None:
    """A scale of 1e7 is exact in float64 and has no place in float16: refused, not stored as infinity."""
    from regauge.api import inspect

    scale = next(g for g in inspect(source).of_kind(Kind.SCALE) if "up_proj" in g.parameters[0])
    vector = source.parent / "vector.npy"
    np.save(vector, np.full(scale.size, 1e7))
    move = f"rescale:vector={vector},generator={scale.id}"
    said = fails(source, 2, "overflows float16", args=["--move", move, "--dtype", "float16"])
    assert "up_proj" in said
    ok = run("rewrite", source, source.parent / "wide", "--move", move)
    assert ok.exit_code == 0, ok.output


def test_unknown_recipe_key(source: Path) -> None:
    recipe = source.parent / "recipe.yaml"
    recipe.write_text("moves: [permute]\nseeed: 3\n")
    fails(source, 2, "seeed", "seed", args=["--recipe", str(recipe)])


def test_unknown_move(source: Path) -> None:
    fails(source, 2, "rotat", "rotate", args=["--move", "rotat"])


def test_pickle(source: Path) -> None:
    """A pickle would run this on loading: it must never be opened."""
    for shard in shards(source):
        shard.unlink()
    (source / "model.safetensors.index.json").unlink()
    planted = source.parent / "planted"
    code = f"cposix\nsystem\n(Vtouch {planted}\ntR.".encode()
    (source / "pytorch_model.bin").write_bytes(code)
    fails(source, 2, "pytorch_model.bin", "safetensors")
    assert not planted.exists()


def test_output_exists(source: Path) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "precious").write_text("keep me")
    fails(source, 2, "out", "exists")


def test_output_is_the_source(source: Path) -> None:
    before = contents(source)
    assert run("rewrite", source, source, *OK).exit_code == 2
    assert contents(source) == before


def test_header_that_claims_too_much(source: Path) -> None:
    shards(source)[0].write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    fails(source, 2, shards(source)[0].name)


def test_a_tensor_of_another_shape_than_the_config_says(source: Path) -> None:
    name = "model.norm.weight"
    change(source, name, torch.ones(25))
    fails(source, 2, name, "shape")


def test_a_tensor_the_model_needs_is_not_there(source: Path) -> None:
    name = "model.norm.weight"
    for shard in shards(source):
        state = load_file(shard)
        if state.pop(name, None) is not None:
            save_file(state, shard, metadata={"format": "pt"})
    for data in index(source):
        del data["weight_map"][name]  # type: ignore[attr-defined]
    fails(source, 2, name)


SCRIPT = """
import sys
from regauge.cli import main
sys.argv = ["regauge", "rewrite", sys.argv[1], sys.argv[2], "--move", "permute", "--seed", "4"]
"""


def test_disk_full(source: Path) -> None:
    """A file size limit of the operating system stands in for the full disk, in a process of its own."""
    before = contents(source)
    limit = max(shard.stat().st_size for shard in shards(source)) // 2
    script = (
        SCRIPT + f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\nmain()\n"
    )
    command = [sys.executable, "-c", script, str(source), str(source.parent / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    )
    assert done.returncode == 2, done.stderr
    assert "disk is full" in " ".join(done.stderr.replace("│", " ").split())
    assert contents(source) == before
    assert [p.name for p in source.parent.iterdir()] == ["source"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_control_c_and_on(source: Path) -> None:
    """SIGINT after half of the tensors are written: 130, nothing at OUT; the same command then goes on."""
    before, out = contents(source), source.parent / "out"
    assert run("rewrite", source, source.parent / "whole", "--move", "permute", "--seed", 4).exit_code == 0
    script = SCRIPT + textwrap.dedent(
        """
        import time
        import regauge.write
        finish, done = regauge.write.StagedOutput._finish, []
        def slow(self, name, digest):
            finish(self, name, digest)
            done.append(name)
            if len(done) == 6:
                print("now", flush=True)
                time.sleep(60)
        regauge.write.StagedOutput._finish = slow
        main()
        """
    )
    # A background job inherits an ignored SIGINT; a person at a terminal does not.
    script = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + script
    command = [sys.executable, "-c", script, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130
    assert "Interrupted" in said
    assert not out.exists()
    assert contents(source) == before
    result = run("rewrite", source, out, "--move", "permute", "--seed", 4, "--json")
    assert result.exit_code == 0, result.output
    for shard in shards(out):
        assert shard.read_bytes() == (source.parent / "whole" / shard.name).read_bytes()
    assert sorted(p.name for p in source.parent.iterdir()) == ["out", "source", "whole"]
    assert Checkpoint.open(out).digest() == Checkpoint.open(source.parent / "whole").digest()
