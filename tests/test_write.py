"""The writer: what it writes is whole, equal to what was asked for, or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError
from regauge.layout import plan_layout
from regauge.write import StagedOutput


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    """Two shards, an index, side files, an older manifest."""
    path = tmp_path / "source"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(6, 5, generator=generator) for name in "abc"}
    save_file({"a": tensors["a"], "b": tensors["b"]}, path / "m-1.safetensors", metadata={"format": "pt"})
    save_file(
        {"c": tensors["c"].half(), "n": torch.arange(3), "s": torch.tensor(1.5), "z": torch.empty(0, 2)},
        path / "m-2.safetensors",
        metadata={"format": "pt", "note": "é"},
    )
    weight_map = {name: "m-1.safetensors" for name in "ab"} | {name: "m-2.safetensors" for name in "cnsz"}
    metadata = {"total_size": 328, "total_parameters": 94}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": metadata, "weight_map": weight_map})
    )
    (path / "config.json").write_text('{"b": 1, "a": [1, 2], "name": "é"}')
    (path / "regauge.json").write_text('{"old": true}')
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("x\n")
    return Checkpoint.open(path)


def copy_all(staged: StagedOutput) -> None:
    names = {name: staged.copies.get(name, name) for name in staged.entries if not staged.finished(name)}
    staged.copy(names)


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.regauge-partial"


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def test_copy_is_byte_identical(source: Checkpoint, tmp_path: Path) -> None:
    out, before, seen = tmp_path / "out", contents(source.path), [0]

    def progress(count: int) -> None:
        seen[0] += count

    with StagedOutput(out, source, key="k") as staged:
        assert not out.exists()
        staged.copy({name: name for name in source.names}, progress)
        assert seen[0] == staged.size_bytes == source.size_bytes
        assert Checkpoint.open(staged.directory).digest() == staged.digest() == source.digest()
        staged.commit({"new": 1})
    expected = before | {"regauge.json": b'{\n  "new": 1\n}\n'}
    assert contents(out) == expected
    assert contents(source.path) == before
    assert not partial(out).exists()


def test_large_tensors_are_copied_in_pieces(tmp_path: Path) -> None:
    tensors = {"big": torch.arange((17 << 20) // 8), "small": torch.ones(3)}
    save_file(tensors, tmp_path / "one.safetensors")
    with StagedOutput(tmp_path / "out", Checkpoint.open(tmp_path / "one.safetensors"), key="") as staged:
        copy_all(staged)
        digest = staged.digest()
        staged.commit({})
    assert (tmp_path / "out" / "one.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    assert Checkpoint.open(tmp_path / "out").digest() == digest


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_make_the_tensor(tmp_path: Path, axis: int, dtype: torch.dtype) -> None:
    cube = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"cube": torch.zeros(5, 6, 7).to(dtype)}, tmp_path / "one.safetensors")
    with StagedOutput(tmp_path / "out", Checkpoint.open(tmp_path / "one.safetensors"), key="") as staged:
        staged.write("cube", cube.split(2, axis), axis)
        digest = staged.digest()
        staged.commit({})
    result = Checkpoint.open(tmp_path / "out")
    assert bytes(result.raw("cube")) == bytes(cube.reshape(-1).view(torch.uint8).numpy())
    assert result.digest() == digest


def test_blocks_that_do_not_fit(source: Checkpoint, tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", source, key="") as staged:
        for block in (torch.zeros(7, 5), torch.zeros(6, 4), torch.zeros(6, 5).half(), torch.zeros(5, 5)):
            with pytest.raises(ValueError, match="a:"):
                staged.write("a", [block])
        assert not staged.finished("a")
        with pytest.raises(ValueError, match="cannot be copied"):
            staged.copy({"a": "c"})
        with pytest.raises(CheckpointError, match="not written"):
            staged.commit({})
    assert not (tmp_path / "out").exists()


def test_untied_tensor_goes_to_its_shard_and_the_index(source: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedOutput(out, source, key="", copies={"head": "b", "n": "n"}) as staged:
        copy_all(staged)
        staged.commit({})
    result = Checkpoint.open(out)
    assert [entry.name for entry in result.shards[0].entries] == ["a", "b", "head"]
    assert result.shards[1].header == source.shards[1].header
    assert torch.equal(load_file(out / "m-1.safetensors")["head"], source.read("b"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["head"] == "m-1.safetensors"
    assert index["metadata"] == {"total_size": result.size_bytes, "total_parameters": 124}
    with pytest.raises(CheckpointError, match="another shape"):
        StagedOutput(tmp_path / "no", source, key="", copies={"s": "b"})


def test_recast_keeps_integers_and_alignment(source: Checkpoint, tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", source, key="", dtype=torch.bfloat16) as staged:
        for name in staged.entries:
            tensor = source.read(name)
            staged.write(name, [tensor.bfloat16() if tensor.is_floating_point() else tensor])
        staged.commit({})
    result = Checkpoint.open(tmp_path / "out")
    assert {name: result.dtype(name) for name in "abcnsz"} == dict.fromkeys("abcsz", torch.bfloat16) | {
        "n": torch.int64
    }
    loaded = load_file(tmp_path / "out" / "m-2.safetensors")
    assert torch.equal(loaded["n"], torch.arange(3))
    for shard in result.shards:
        assert all(entry.start % result.dtype(entry.name).itemsize == 0 for entry in shard.entries)
        assert len(shard.header) % 8 == 0
    assert [shard.metadata for shard in result.shards] == [shard.metadata for shard in source.shards]


def test_recast_reorders_rather_than_misalign(tmp_path: Path) -> None:
    number = torch.arange(2, dtype=torch.int32)
    save_file({"a": torch.ones(3, dtype=torch.float64), "n": number}, tmp_path / "one.safetensors")
    source = Checkpoint.open(tmp_path / "one.safetensors")
    assert source.names == ("a", "n")
    with StagedOutput(tmp_path / "out", source, key="", dtype=torch.float16) as staged:
        staged.write("a", [torch.ones(3).half()])
        staged.copy({"n": "n"})
        staged.commit({})
    result = Checkpoint.open(tmp_path / "out")
    assert result.names == ("n", "a")
    assert torch.equal(result.read("n"), number)


def test_recast_refusals(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="int8"):
        StagedOutput(tmp_path / "out", source, key="", dtype=torch.int8)
    save_file({"q": torch.zeros(4).to(torch.float8_e5m2)}, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match="F8_E5M2"):
        StagedOutput(
            tmp_path / "out", Checkpoint.open(tmp_path / "q.safetensors"), key="", dtype=torch.float16
        )
    assert not (tmp_path / "out").exists()
    assert not partial(tmp_path / "out").exists()


def test_config_is_edited_at_top_level(source: Checkpoint, tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", source, key="", config={"a": 7, "tie": False}) as staged:
        copy_all(staged)
        staged.commit({})
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [("b", 1), ("a", 7), ("name", "é"), ("tie", False)]
    single = Checkpoint.open(source.path / "m-1.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        StagedOutput(tmp_path / "no", single, key="", config={"a": 7})
    assert not partial(tmp_path / "no").exists()


def test_output_must_be_free(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "source", "full/x", "link"):
        with pytest.raises(BadInput, match="exists already"):
            StagedOutput(tmp_path / name, source, key="")
    with pytest.raises(BadInput, match="mkdir"):
        StagedOutput(tmp_path / "no" / "out", source, key="")
    with pytest.raises(BadInput, match="inside the source"):
        StagedOutput(tmp_path / "source" / "out", source, key="")
    (tmp_path / "empty").mkdir()
    with StagedOutput(tmp_path / "empty", source, key="") as staged:
        copy_all(staged)
        staged.commit({})
    assert Checkpoint.open(tmp_path / "empty").digest() == source.digest()


def test_output_taken_in_the_meantime(source: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedOutput(out, source, key="") as staged:
        copy_all(staged)
        out.mkdir()
        (out / "mine").write_text("precious")
        with pytest.raises(BadInput, match="exists already"):
            staged.commit({})
    assert contents(out) == {"mine": b"precious"}


def test_one_writer_at_a_time(source: Checkpoint, tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", source, key="") as staged:
        with pytest.raises(BadInput, match="another process"):
            StagedOutput(tmp_path / "out", source, key="")
        copy_all(staged)
        staged.commit({})


def test_discard_leaves_nothing(source: Checkpoint, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with StagedOutput(tmp_path / "out", source, key="") as staged:
        copy_all(staged)
        staged.discard()
    assert sorted(tmp_path.iterdir()) == before


def stage_two(source: Checkpoint, out: Path) -> Path:
    with StagedOutput(out, source, key="k") as staged:
        staged.copy({"a": "a"})
        staged.copy({"c": "c"})
    return partial(out) / "journal.jsonl"


def resumed(source: Checkpoint, out: Path, key: str = "k") -> set[str]:
    with StagedOutput(out, source, key=key) as staged:
        found = set(staged.resumed)
        copy_all(staged)
        staged.commit({})
    assert Checkpoint.open(out).digest() == source.digest()
    return found


def test_resume(source: Checkpoint, tmp_path: Path) -> None:
    stage_two(source, tmp_path / "out")
    assert resumed(source, tmp_path / "out") == {"a", "c"}


def test_another_key_or_layout_starts_again(source: Checkpoint, tmp_path: Path) -> None:
    stage_two(source, tmp_path / "out")
    assert resumed(source, tmp_path / "out", key="other") == set()
    stage_two(source, tmp_path / "two")
    with StagedOutput(tmp_path / "two", source, key="k", copies={"head": "b"}) as staged:
        assert staged.resumed == set()


@pytest.mark.parametrize("key", ["k", "other"])
def test_leftovers_do_not_get_in(source: Checkpoint, tmp_path: Path, key: str) -> None:
    staged = stage_two(source, tmp_path / "out").parent / "files"
    (staged / "old").mkdir()
    (staged / "old" / "x").write_text("x")
    (staged / "m-3.safetensors").write_text("x")
    resumed(source, tmp_path / "out", key)
    assert contents(tmp_path / "out").keys() == contents(source.path).keys()


@pytest.mark.parametrize("cut", [1, 5])
def test_torn_last_line_is_dropped(source: Checkpoint, tmp_path: Path, cut: int) -> None:
    journal = stage_two(source, tmp_path / "out")
    journal.write_bytes(journal.read_bytes()[:-cut])
    assert resumed(source, tmp_path / "out") == {"a"}


@pytest.mark.parametrize("text", [b"", b"garbage\n", b"\xff\xfe\n{}\n", b"[1]\n"])
def test_garbage_journal_starts_again(source: Checkpoint, tmp_path: Path, text: bytes) -> None:
    stage_two(source, tmp_path / "out").write_bytes(text)
    assert resumed(source, tmp_path / "out") == set()


def test_claims_are_checked_against_the_bytes(source: Checkpoint, tmp_path: Path) -> None:
    journal = stage_two(source, tmp_path / "out")
    shard = source.shards[0]
    with (journal.parent / "files" / shard.file).open("r+b") as file:
        file.seek(next(entry.start for entry in shard.entries if entry.name == "a") + 5)
        file.write(b"\x55")
    assert resumed(source, tmp_path / "out") == {"c"}


def test_disk_full_for_real(source: Checkpoint, tmp_path: Path) -> None:
    """A file size limit of the operating system, in a process of its own."""
    big = tmp_path / "big"
    big.mkdir()
    save_file({"a": torch.zeros(1 << 18)}, big / "model.safetensors")
    before = Checkpoint.open(big).digest()
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from regauge.checkpoint import Checkpoint\n"
        "from regauge.errors import CheckpointError\n"
        "from regauge.write import StagedOutput\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))\n"
        "try:\n"
        "    StagedOutput(sys.argv[2], Checkpoint.open(sys.argv[1]), key='')\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, big, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert "disk is full" in run.stdout
    assert "1.0 MB" in run.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "source"]
    assert Checkpoint.open(big).digest() == before


def test_a_disk_without_room_is_refused_before_anything_is_written(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sum(target.size for target in plan_layout(source, {}, None))
    real = shutil.disk_usage(tmp_path)
    written: list[object] = []
    monkeypatch.setattr(os, "pwrite", lambda *args: written.append(args))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=need - 1))
    with pytest.raises(CheckpointError, match="disk is full"):
        StagedOutput(tmp_path / "out", source, key="")
    assert not written
    assert [path.name for path in tmp_path.iterdir()] == [source.path.name]


@pytest.mark.parametrize("call", ["pwrite", "write", "fsync", "ftruncate", "rename"])
def test_disk_full_anywhere(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whichever system call meets a full disk, at whichever tensor: a clear error, nothing at OUT."""
    out, before = tmp_path / "out", contents(source.path)
    real = getattr(os, call)

    for allowed in range(12):
        left = [allowed]

        def limited(*args: object, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, limited)
            message = ""
            try:
                with StagedOutput(out, source, key="") as staged:
                    copy_all(staged)
                    staged.commit({})
            except CheckpointError as error:
                message = str(error)
        if out.exists():
            break
        assert "disk is full" in message
        assert contents(source.path) == before
    assert allowed > 0
    if not out.exists():
        resumed(source, out, key="")
    assert contents(source.path) == before
    assert Checkpoint.open(out).digest() == source.digest()
