"""The reader: agrees with the safetensors library on good files, and refuses every damaged one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regauge.checkpoint import Checkpoint, all_finite
from regauge.errors import CheckpointError

KINDS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator).abs() * 3).to(dtype)


def sharded(path: Path) -> dict[str, torch.Tensor]:
    path.mkdir()
    tensors = {name: values((4, 3), torch.float32, seed) for seed, name in enumerate("abcd")}
    save_file({name: tensors[name] for name in "ab"}, path / "m-1.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in "cd"}, path / "m-2.safetensors", metadata={"format": "pt"})
    weight_map = {name: f"m-{1 + (name in 'cd')}.safetensors" for name in "abcd"}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 192}, "weight_map": weight_map})
    )
    (path / "config.json").write_text('{"size": 3}')
    return tensors


def by_hand(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refuses(path: Path, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    for word in words:
        assert word in str(caught.value)
    return caught.value


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {f"t{index}": values((3, 5), dtype, index) for index, dtype in enumerate(KINDS)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "cube": values((2, 3, 4), torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names) == sorted(tensors)
        assert checkpoint.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert checkpoint.shards[0].metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert (checkpoint.dtype(name), checkpoint.shape(name)) == (tensor.dtype, tuple(tensor.shape))
            assert bytes(checkpoint.raw(name)) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_rows_are_slices(tmp_path: Path, axis: int) -> None:
    cube = values((4, 5, 6), torch.bfloat16)
    save_file({"pad": values((7,), torch.bfloat16), "cube": cube}, tmp_path / "one.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read_rows("cube", 1, 3, axis), cube.narrow(axis, 1, 2))
    with pytest.raises(IndexError):
        checkpoint.read_rows("cube", 1, 99)


def test_reading_never_writes(tmp_path: Path) -> None:
    save_file({"a": values((8,), torch.float32)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint.open(tmp_path).read("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_misaligned_and_unreadable_kinds(tmp_path: Path) -> None:
    numbers = values((3,), torch.float64)
    header = {
        "odd": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F64", "shape": [3], "data_offsets": [1, 25]},
        "packed": {"dtype": "F4", "shape": [2, 4], "data_offsets": [25, 29]},
    }
    data = b"\x05" + bytes(numbers.view(torch.uint8).numpy()) + b"abcd"
    checkpoint = Checkpoint.open(by_hand(tmp_path / "x.safetensors", header, data))
    assert torch.equal(checkpoint.read("x"), numbers)
    assert bytes(checkpoint.raw("packed")) == b"abcd"
    with pytest.raises(CheckpointError, match="F4"):
        checkpoint.read("packed")


def test_shards_side_files_and_stale_weights(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tensors = sharded(path)
    (path / "pooling").mkdir()
    (path / "pooling" / "config.json").write_text("{}")
    (path / ".cache").mkdir()
    (path / ".cache" / "junk").write_text("x")
    for stale in ("pytorch_model.bin", "other.safetensors", "pytorch_model.bin.index.json"):
        (path / stale).write_bytes(b"not read")
    checkpoint = Checkpoint.open(path)
    assert checkpoint.names == tuple("abcd")
    assert [shard.file for shard in checkpoint.shards] == ["m-1.safetensors", "m-2.safetensors"]
    assert checkpoint.side_files == ("config.json", "pooling/config.json")
    assert checkpoint.skipped == ("other.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_digest_is_of_contents_only(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "m")
    digest = Checkpoint.open(tmp_path / "m").digest()
    save_file(tensors, tmp_path / "one.safetensors", metadata={"note": "x"})
    checkpoint = Checkpoint.open(tmp_path / "one.safetensors")
    assert checkpoint.digest() == digest
    assert checkpoint.digest({name: checkpoint.tensor_digest(name) for name in "bd"}) == digest
    tensors["c"][0, 0] += 1
    save_file(tensors, tmp_path / "two.safetensors")
    assert Checkpoint.open(tmp_path / "two.safetensors").digest() != digest


def test_digest_by_its_definition(tmp_path: Path) -> None:
    big = torch.arange((17 << 20) // 4, dtype=torch.int32)
    save_file({"big": big}, tmp_path / "one.safetensors")
    data = bytes(big.view(torch.uint8).numpy())
    pieces = b"".join(
        hashlib.sha256(data[at : at + (8 << 20)]).digest() for at in range(0, len(data), 8 << 20)
    )
    tensor = hashlib.sha256(pieces).hexdigest()
    checkpoint = Checkpoint.open(tmp_path / "one.safetensors")
    assert checkpoint.tensor_digest("big") == tensor
    line = f'["big","I32",[{len(big)}],"{tensor}"]\n'
    assert checkpoint.digest() == hashlib.sha256(line.encode()).hexdigest()


def test_finite(tmp_path: Path) -> None:
    weights = torch.zeros(3000, 2000)
    weights[2999, 7] = float("nan")
    weights[2500, 1] = float("-inf")
    save_file({"good": torch.zeros(3), "bad": weights, "n": torch.arange(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check_finite("good")
    checkpoint.check_finite("n")
    with pytest.raises(CheckpointError, match=r"2 value.*\[2500, 1\]") as caught:
        checkpoint.check_finite("bad")
    assert caught.value.parameter == "bad"


@pytest.mark.parametrize("dtype", [d for d in KINDS if d.is_floating_point or d.is_complex])
def test_all_finite(dtype: torch.dtype) -> None:
    good = values((5,), dtype)
    assert all_finite(good)
    assert all_finite(good[:0])
    bad = good.clone().to(torch.complex64)
    bad[3] = float("nan")
    assert not all_finite(bad.to(dtype) if dtype.is_complex else bad.real.to(dtype))


def test_unknown_name_suggests(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    with pytest.raises(CheckpointError, match="nearest"):
        Checkpoint.open(tmp_path / "m").read("aa")


def test_nothing_there(tmp_path: Path) -> None:
    refuses(tmp_path / "no", "missing")
    refuses(tmp_path, "empty")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuses(tmp_path, "model.gguf")
    refuses(tmp_path / "model.gguf", "another kind of file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refuses(tmp_path, "pickled", name, "safe_serialization")
    refuses(tmp_path / name, "pickled")


def test_several_files_need_an_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    refuses(tmp_path, "a.safetensors", "b.safetensors", "index")
    save_file({"c": torch.zeros(2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == ("c",)
    assert checkpoint.skipped == ("a.safetensors", "b.safetensors")


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    (tmp_path / "m" / "m-2.safetensors").unlink()
    refuses(tmp_path / "m", "m-2.safetensors", "index.json", "missing")


def test_index_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "m-1.safetensors"
    index.write_text(json.dumps(content))
    assert refuses(tmp_path / "m", "m-1.safetensors").parameter == "ghost"


def test_duplicate_tensor(tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "m")
    save_file({name: tensors[name] for name in "bcd"}, tmp_path / "m" / "m-2.safetensors")
    assert refuses(tmp_path / "m", "m-1.safetensors", "m-2.safetensors").parameter == "b"


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/x.safetensors", "pytorch_model-1.bin", ""])
def test_index_stays_in_its_directory(tmp_path: Path, file: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    refuses(tmp_path, "not a shard beside it", repr(file))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 7}}', "\xff"]
)
def test_garbage_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    refuses(tmp_path, "index is not readable")


@pytest.mark.parametrize(
    ("keep", "word"),
    [(-1, "truncated"), (-40, "truncated"), (60, "inside its header"), (8, "inside its header"), (3, "ends")],
)
def test_truncated(tmp_path: Path, keep: int, word: str) -> None:
    save_file({"a": torch.zeros(8), "b": torch.zeros(8)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    refuses(tmp_path, word, "model.safetensors", f"{len(data[:keep])} bytes")


def test_file_that_shrinks_later(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8), "b": torch.zeros(4096)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check_unchanged()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.read("b")
    with pytest.raises(CheckpointError, match="shorter"):
        checkpoint.tensor_digest("b")
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.check_unchanged()


def tensor(begin: int, end: int, kind: str = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": kind, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, "overlaps"),
        ({"a": tensor(0, 4), "b": tensor(8, 12)}, "hole"),
        ({"a": tensor(4, 12)}, "hole"),
        ({"a": tensor(0, 16)}, "truncated"),
        ({"a": tensor(0, 8)}, "after the last"),
        ({"a": tensor(0, 12, "F32", [4])}, "does not fill"),
        ({"a": tensor(0, 12, "F32", [-3])}, "bad shape"),
        ({"a": tensor(0, 12, "F32", [True, 3])}, "bad shape"),
        ({"a": tensor(-4, 8, "F32", [3])}, "bad shape"),
        ({"a": tensor(0, 12, "Q4")}, "unknown dtype"),
        ({"a": {"dtype": "U8"}}, "not readable"),
        ({"a": 3}, "not readable"),
        ([], "not readable"),
        (b'{"a": ', "not readable"),
        (b"\xff\xfe" * 20, "not readable"),
        (b'{"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},"a":{}}', "twice"),
    ],
)
def test_bad_headers(tmp_path: Path, header: object, word: str) -> None:
    refuses(by_hand(tmp_path / "x.safetensors", header, bytes(12)), word, "x.safetensors")


def test_garbage_and_pointer_files(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x02}q\x00X\x05\x00\x00\x00 some pickle")
    refuses(tmp_path / "x.safetensors", "not a safetensors file")
    (tmp_path / "x.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    refuses(tmp_path / "x.safetensors", "LFS", "git lfs pull")
