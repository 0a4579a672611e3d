"""Applying a rewrite: equal to the plain formula, exact where it claims to be, and never half done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from regauge.apply import ApplyReport, RewrittenView, apply_rewrite
from regauge.checkpoint import Checkpoint
from regauge.errors import BadInput, CheckpointError, RegaugeError
from regauge.jobs import Names, tensor_copies
from regauge.plan import Rewrite
from regauge.write import StagedOutput


@dataclass(frozen=True)
class Permute:
    index: torch.Tensor
    axis: int
    arithmetic: bool = False

    @property
    def axes(self) -> frozenset[int]:
        return frozenset({self.axis})

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(self.axis, self.index)


@dataclass(frozen=True)
class Flip:
    sign: torch.Tensor
    arithmetic: bool = False
    axes: frozenset[int] = frozenset({1})

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.sign.to(tensor.dtype)


@dataclass(frozen=True)
class Matrix:
    """Right factor on the last axis. Insists on float64."""

    matrix: torch.Tensor
    arithmetic: bool = True
    axes: frozenset[int] = frozenset({-1})

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == torch.float64
        return tensor @ self.matrix


@dataclass(frozen=True)
class Scale:
    factor: float
    arithmetic: bool = True
    axes: frozenset[int] = frozenset()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.factor


@dataclass(frozen=True)
class Widen:
    arithmetic: bool = True
    axes: frozenset[int] = frozenset()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=rng(seed), dtype=torch.float64))[0]


def make(path: Path, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"tie": true}')
    return Checkpoint.open(path)


def run(
    source: Checkpoint,
    rewrite: Rewrite,
    out: Path,
    *,
    names: Names | None = None,
    dtype: torch.dtype | None = None,
    key: str = "k",
    **options: object,
) -> ApplyReport:
    names = {name: name for name in source.names} if names is None else names
    copies = tensor_copies(source, rewrite, names)
    with StagedOutput(out, source, key=key, copies=copies, dtype=dtype, config=rewrite.config) as staged:
        report = apply_rewrite(source, rewrite, staged, names=names, dtype=dtype, **options)  # pyright: ignore
        staged.commit({})
    return report


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("budget", [None, 1 << 18])
def test_float64_then_one_cast(tmp_path: Path, dtype: torch.dtype, budget: int | None) -> None:
    weight = torch.randn(3000, 32, generator=rng()).to(dtype)
    source = make(tmp_path / "source", {"w": weight, "other": torch.arange(7)})
    matrix, index = rotation(32), torch.randperm(32, generator=rng(1))
    rewrite = Rewrite(steps={"w": (Matrix(matrix), Permute(index, 1), Scale(0.3))})
    report = run(source, rewrite, tmp_path / "out", max_memory=budget, measure_rounding=True)
    exact = (weight.double() @ matrix)[:, index] * 0.3
    result = load_file(tmp_path / "out" / "model.safetensors")
    spread = (result["w"].double() - exact).abs().max().item()
    assert spread <= torch.finfo(dtype).eps * exact.abs().max().item()
    assert (result["w"] != exact.to(dtype)).double().mean() < (0.9 if dtype == torch.float64 else 1e-3)
    assert report.rounding["w"] == pytest.approx(spread, abs=1e-15)
    assert (report.computed, report.copied, report.moved) == (1, 1, 0)
    assert report.peak_block_bytes == (3000 * 32 * 8 if budget is None else 256 * 32 * 8)
    assert (report.bytes_read, report.bytes_written) == (source.size_bytes, source.size_bytes)
    assert report.digest == Checkpoint.open(tmp_path / "out").digest()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("budget", [None, 1])
def test_moves_are_exact_in_any_dtype(
    tmp_path: Path, dtype: torch.dtype, axis: int, budget: int | None
) -> None:
    weight = torch.randn(20, 40, 60, generator=rng()).to(dtype)
    index = torch.randperm(weight.shape[axis], generator=rng(1))
    sign = torch.where(torch.arange(40) % 3 == 0, -1.0, 1.0)[:, None]
    source = make(tmp_path / "source", {"w": weight})
    steps = (Permute(index, axis), Flip(sign))
    report = run(source, Rewrite(steps={"w": steps}), tmp_path / "out", max_memory=budget)
    expected = weight.float().index_select(axis, index) * sign
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"].float(), expected)
    assert report.moved == 1
    assert report.peak_block_bytes <= (weight.nbytes * 4 if budget is None else 1 << 16) + 1


def test_no_free_axis_is_done_whole(tmp_path: Path) -> None:
    weight = torch.randn(200, 300, generator=rng())
    source = make(tmp_path / "source", {"w": weight})
    index = torch.randperm(200, generator=rng())
    rewrite = Rewrite(steps={"w": (Permute(index, 0), Matrix(rotation(300)))})
    assert run(source, rewrite, tmp_path / "out", max_memory=1).peak_block_bytes == weight.numel() * 8
    expected = (weight.double()[index] @ rotation(300)).float()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], expected)


def test_vectors_scalars_and_empty(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"v": torch.ones(5), "s": torch.tensor(2.0), "e": torch.empty(0, 3)})
    steps = {name: (Scale(3.0),) for name in "vse"}
    run(source, Rewrite(steps=steps), tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result["v"].tolist() == [3.0] * 5
    assert result["s"].item() == 6.0
    assert result["e"].shape == (0, 3)


def test_empty_rewrite_is_a_copy(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"w": torch.randn(50, 6), "m": torch.tensor([float("-inf")])})
    report = run(source, Rewrite(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "source" / "model.safetensors"
    ).read_bytes()
    assert (report.copied, report.peak_block_bytes) == (2, 0)


def test_recast(tmp_path: Path) -> None:
    weight = torch.randn(50, 6, generator=rng())
    source = make(tmp_path / "source", {"w": weight, "v": weight[0].clone(), "n": torch.arange(3)})
    index = torch.tensor([5, 4, 3, 2, 1, 0])
    report = run(source, Rewrite(steps={"w": (Permute(index, 1),)}), tmp_path / "out", dtype=torch.bfloat16)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(result["w"], weight[:, index].bfloat16())
    assert torch.equal(result["v"], weight[0].bfloat16())
    assert torch.equal(result["n"], torch.arange(3))
    assert (report.moved, report.recast, report.copied) == (1, 1, 1)


def test_untying_and_names(tmp_path: Path) -> None:
    embed = torch.randn(8, 4, generator=rng())
    source = make(tmp_path / "source", {"x.embed": embed, "x.norm": torch.ones(4)})
    names = {"embed": "x.embed", "norm": "x.norm"}
    rewrite = Rewrite(
        steps={"embed": (Scale(2.0),), "head": (Matrix(rotation(4)),)},
        copies={"head": "embed"},
        config={"tie": False},
    )
    run(source, rewrite, tmp_path / "out", names=names)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(result["x.embed"], 2 * embed)
    assert torch.equal(result["head"], (embed.double() @ rotation(4)).float())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"tie": False}
    view = RewrittenView(source, rewrite, names)
    assert view.names == ("embed", "norm", "head")
    assert torch.equal(view.read("head"), embed.double() @ rotation(4))


def test_parameter_stored_twice(tmp_path: Path) -> None:
    embed = torch.randn(8, 4, generator=rng())
    source = make(tmp_path / "source", {"embed": embed, "head": embed.clone()})
    names = {"embed": ("embed", "head")}
    run(source, Rewrite(steps={"embed": (Scale(2.0),)}), tmp_path / "both", names=names)
    result = load_file(tmp_path / "both" / "model.safetensors")
    assert torch.equal(result["embed"], result["head"])
    assert torch.equal(result["embed"], 2 * embed)
    rewrite = Rewrite(steps={"embed": (Scale(2.0),)}, copies={"head": "embed"})
    run(source, rewrite, tmp_path / "untied", names=names)
    result = load_file(tmp_path / "untied" / "model.safetensors")
    assert torch.equal(result["embed"], 2 * embed)
    assert torch.equal(result["head"], embed)
    other = make(tmp_path / "other", {"embed": embed, "head": embed + 1})
    with pytest.raises(CheckpointError, match="stored twice"):
        run(other, Rewrite(steps={"embed": (Scale(2.0),)}), tmp_path / "no", names=names)
    assert not (tmp_path / "no").exists()


def test_view_agrees_with_the_result(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(30, 8, generator=rng()).half(), "b": torch.randn(8), "n": torch.arange(4)}
    source = make(tmp_path / "source", tensors)
    index = torch.randperm(30, generator=rng())
    rewrite = Rewrite(steps={"p": (Matrix(rotation(8)), Permute(index, 0)), "q": ()})
    names = {"p": "w", "alias": "w", "q": "b"}
    view = RewrittenView(source, rewrite, names)
    exact = tensors["w"].double()[index] @ rotation(8)
    assert view.names == ("p", "alias", "q", "n")
    for name in ("p", "alias"):
        assert torch.allclose(view.read(name), exact, rtol=0, atol=1e-14)
        assert (view.dtype(name), view.shape(name)) == (torch.float64, (30, 8))
    assert torch.allclose(view.read_rows("p", 3, 9), exact[3:9], rtol=0, atol=1e-14)
    assert torch.equal(view.read("q"), tensors["b"])
    assert view.dtype("n") == torch.int64
    assert "b" not in view
    run(source, rewrite, tmp_path / "out", names=names)
    assert torch.equal(Checkpoint.open(tmp_path / "out").read("w"), view.read("p").half())
    rows = RewrittenView(source, Rewrite(steps={"w": (Matrix(rotation(8)),)}), {"w": "w"})
    assert torch.allclose(rows.read_rows("w", 1, 4), rows.read("w")[1:4], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rewrite", "names", "error", "word"),
    [
        (Rewrite(steps={"gone": (Scale(2.0),)}), {}, CheckpointError, "gone"),
        (Rewrite(steps={"w": (Scale(2.0),)}), {"w": "gone"}, CheckpointError, "gone"),
        (Rewrite(copies={"new": "gone"}), {}, CheckpointError, "gone"),
        (Rewrite(steps={"w": (Scale(2.0),), "v": (Scale(2.0),)}), {"w": "w", "v": "w"}, RegaugeError, "v"),
        (Rewrite(steps={"w": (Widen(),)}), {"w": "w"}, RegaugeError, "Widen"),
        (Rewrite(steps={"n": (Scale(2.0),)}), {"n": "n"}, CheckpointError, "int64"),
        (Rewrite(steps={"nan": (Scale(2.0),)}), {"nan": "nan"}, CheckpointError, r"[3, 1]"),
        (Rewrite(steps={"nan": (Permute(torch.arange(5), 0),)}), {"nan": "nan"}, CheckpointError, r"[3, 1]"),
        (Rewrite(steps={"half": (Scale(70.0),)}), {"half": "half"}, CheckpointError, "overflows float16"),
        (Rewrite(steps={"w": (Scale(1e308),) * 2}), {"w": "w"}, CheckpointError, "not finite"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path, rewrite: Rewrite, names: dict[str, str], error: type[Exception], word: str
) -> None:
    bad = torch.ones(5, 2)
    bad[3, 1] = float("nan")
    tensors = {"w": torch.ones(2, 2), "n": torch.arange(4), "nan": bad, "half": torch.full((3,), 1e3).half()}
    source = make(tmp_path / "source", tensors)
    before = source.digest()
    with pytest.raises(error) as caught:
        run(source, rewrite, tmp_path / "out", names=names)
    assert word in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert Checkpoint.open(tmp_path / "source").digest() == before


def test_overflow_by_recast_names_a_way_out(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"w": torch.full((3,), 1e6)})
    with pytest.raises(CheckpointError, match="bfloat16") as caught:
        run(source, Rewrite(), tmp_path / "out", dtype=torch.float16)
    assert caught.value.parameter == "w"
    run(source, Rewrite(), tmp_path / "out", dtype=torch.bfloat16)


def test_staging_must_match(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"w": torch.ones(2)})
    names = {"w": "w"}
    with StagedOutput(tmp_path / "out", source, key="") as staged:
        with pytest.raises(BadInput, match="another dtype"):
            apply_rewrite(source, Rewrite(), staged, names=names, dtype=torch.float16)
        with pytest.raises(BadInput, match="other copies"):
            apply_rewrite(source, Rewrite(copies={"x": "w"}), staged, names=names)


def test_source_changed_meanwhile(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"w": torch.ones(100), "v": torch.ones(100)})

    def meddle(_: int) -> None:
        save_file({"w": torch.zeros(100), "v": torch.ones(100)}, tmp_path / "source" / "model.safetensors")

    with pytest.raises(CheckpointError, match="changed"):
        run(source, Rewrite(), tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out").exists()


def big(path: Path) -> tuple[Checkpoint, Rewrite]:
    tensors = {f"w{i}": torch.randn(600, 40, generator=rng(i)).bfloat16() for i in range(6)}
    source = make(path, tensors)
    steps = {f"w{i}": (Matrix(rotation(40, i)),) for i in range(3)}
    return source, Rewrite(steps={**steps, "w3": (Permute(torch.randperm(40, generator=rng()), 1),)})


@pytest.mark.parametrize("stop", [0, 2, 3, 7, 9, 10, 11])
def test_interrupted_then_resumed_is_identical(tmp_path: Path, stop: int) -> None:
    source, rewrite = big(tmp_path / "source")
    before = source.digest()
    run(source, rewrite, tmp_path / "whole", max_memory=1 << 18)
    calls = [0]

    def interrupt(_: int) -> None:
        calls[0] += 1
        if calls[0] > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, rewrite, tmp_path / "out", max_memory=1 << 18, progress=interrupt)
    assert not (tmp_path / "out").exists()
    done: list[int] = []
    report = run(source, rewrite, tmp_path / "out", max_memory=1 << 18, progress=done.append)
    # three blocks for each of three computed tensors, one for the moved one, then two copies at once
    finished = min(stop // 3, 3) + (stop > 9)
    assert report.resumed in ({finished} if stop < 11 else {finished, finished + 1})
    assert sum(done) == source.size_bytes
    for name in ("model.safetensors", "config.json", "regauge.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert Checkpoint.open(tmp_path / "source").digest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_control_c(tmp_path: Path) -> None:
    """A real SIGINT while a tensor is being written, then a run that goes on from there."""
    source, rewrite = big(tmp_path / "source")
    run(source, rewrite, tmp_path / "whole", max_memory=1 << 18)
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_apply import Checkpoint, Matrix, Permute, Rewrite, rng, rotation, run, torch
        steps = {f"w{i}": (Matrix(rotation(40, i)),) for i in range(3)}
        steps["w3"] = (Permute(torch.randperm(40, generator=rng()), 1),)
        calls = []
        def progress(count):
            calls.append(count)
            if len(calls) == 5:
                print("now", flush=True)
                time.sleep(60)
        path = Path(sys.argv[1])
        source = Checkpoint.open(path / "source")
        run(source, Rewrite(steps=steps), path / "out", max_memory=1 << 18, progress=progress)
        """
    )
    # A background job inherits an ignored SIGINT; a person at a terminal does not.
    script = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + script
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.stderr.read()
        assert process.wait() != 0
    assert not (tmp_path / "out").exists()
    report = run(source, rewrite, tmp_path / "out", max_memory=1 << 18)
    assert report.resumed == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    source.check_unchanged()
