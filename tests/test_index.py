"""An index finds what is nearest, whoever writes at the same time, and whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from regauge.cli import app
from regauge.errors import BadInput
from regauge.provenance import Fingerprint, Index, distance
from regauge.provenance.fingerprint import VERSION
from regauge.provenance.sketch import LENGTH


def made(vector: np.ndarray, version: int = VERSION) -> Fingerprint:
    unit = (vector / np.linalg.norm(vector)).astype(np.float32)
    return Fingerprint(unit, None, None, {"products": {}}, "Some", 7, 0.5, version)


def many(count: int, seed: int = 0) -> list[Fingerprint]:
    return [made(row) for row in np.random.default_rng(seed).standard_normal((count, LENGTH))]


def fill(path: Path, prints: list[Fingerprint], start: int = 0) -> None:
    with Index.open(path, create=True) as index:
        index.add((f"m{start + place}", found) for place, found in enumerate(prints))


@pytest.mark.parametrize("approximate", [False, True])
def test_neighbours_are_those_of_a_plain_scan(tmp_path: Path, approximate: bool) -> None:
    if approximate:
        pytest.importorskip("usearch")
    prints = many(300)
    fill(tmp_path / "db", prints)
    near = [made(prints[7].vector + 0.02 * k * prints[8].vector + 0.01 * prints[9].vector) for k in range(9)]
    with Index.open(tmp_path / "db") as index:
        for wanted in near:
            order = sorted((round(distance(wanted, found), 12), k) for k, found in enumerate(prints))
            hits = index.search(wanted, 3, approximate=approximate)
            assert hits[0].name == "m7"
            assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)
            if not approximate:
                assert [hit.name for hit in hits] == [f"m{k}" for _, k in order[:3]]
                assert [hit.distance for hit in hits] == [d for d, _ in order[:3]]


@pytest.mark.parametrize("approximate", [False, True])
def test_an_open_index_sees_what_others_add_and_replace(tmp_path: Path, approximate: bool) -> None:
    if approximate:
        pytest.importorskip("usearch")
    prints = many(6)
    fill(tmp_path / "db", prints[:3])
    with Index.open(tmp_path / "db") as reader, Index.open(tmp_path / "db") as writer:
        assert len(reader.search(prints[0], 10, approximate=approximate)) == 3
        writer.add([("m3", prints[3])])
        assert reader.search(prints[3], 1, approximate=approximate)[0].distance < 1e-6
        writer.add([("m0", prints[4])], replace=True)
        hits = reader.search(prints[4], 10, approximate=approximate)
        assert (hits[0].name, len(hits)) == ("m0", 4)
        assert all(hit.distance > 0.5 for hit in reader.search(prints[0], 10, approximate=approximate))
        assert [row.name for row in reader.rows()] == ["m1", "m2", "m3", "m0"]


def test_a_graph_left_by_another_index_is_not_used(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    first, second = many(60, 1), many(60, 2)
    for prints in (first, second):
        fill(tmp_path / "db", prints)
        with Index.open(tmp_path / "db") as index:
            assert [index.search(p, 1, approximate=True)[0].name for p in prints] == [
                f"m{k}" for k in range(60)
            ]
        for name in ("db", "db-wal", "db-shm"):
            (tmp_path / name).unlink(missing_ok=True)


def test_adding_is_all_or_nothing(tmp_path: Path) -> None:
    prints = many(4)
    fill(tmp_path / "db", prints[:2])
    with Index.open(tmp_path / "db") as index:
        with pytest.raises(BadInput, match="entry of this name"):
            index.add([("new", prints[2]), ("m1", prints[3])])
        with pytest.raises(BadInput, match="version"):
            index.add([("new", prints[2]), ("newer", made(prints[3].vector, version=VERSION + 1))])
        assert [row.name for row in index.rows()] == ["m0", "m1"]


def test_an_empty_index_has_no_neighbours(tmp_path: Path) -> None:
    with Index.open(tmp_path / "db", create=True) as index:
        assert index.search(many(1)[0]) == ()
        with pytest.raises(BadInput):
            index.search(many(1)[0], 0)


def test_export_and_import_give_the_same(tmp_path: Path) -> None:
    fill(tmp_path / "db", many(5))
    with Index.open(tmp_path / "db") as one, Index.open(tmp_path / "other", create=True) as two:
        lines = list(one.dump())
        assert two.load(lines) == 5
        assert list(two.dump()) == lines
        with pytest.raises(BadInput, match="line 2"):
            two.load([lines[0].replace("m0", "n0"), "{}"], replace=True)
        assert len(two) == 5


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such index"):
        Index.open(tmp_path / "none")
    (tmp_path / "text").write_text("hello " * 1000)
    with pytest.raises(BadInput):
        Index.open(tmp_path / "text")
    with sqlite3.connect(tmp_path / "strange") as other:
        other.execute("CREATE TABLE t (x)")
    with pytest.raises(BadInput, match="schema"):
        Index.open(tmp_path / "strange", create=True)
    fill(tmp_path / "db", many(1))
    with sqlite3.connect(tmp_path / "db") as later:
        later.execute("PRAGMA user_version = 99")
    with pytest.raises(BadInput, match="schema"):
        Index.open(tmp_path / "db")


WRITER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    from test_index import many
    from regauge.provenance import Index
    start = int(sys.argv[2])
    with Index.open(sys.argv[1], create=True) as index:
        print("ready", flush=True)
        for place, found in enumerate(many(int(sys.argv[4]), seed=start)):
            index.add([(f"w{start}-{place}", found)])
"""
READER = """
    import sys
    sys.path.insert(0, sys.argv[3])
    from test_index import many
    from regauge.provenance import Index
    wanted, seen = many(1, seed=int(sys.argv[2]))[0], 0
    with Index.open(sys.argv[1]) as index:
        while seen < int(sys.argv[4]):
            hits = index.search(wanted, 1000)
            assert len(hits) >= seen, (len(hits), seen)
            seen = len(hits)
    print(seen)
"""


def process(code: str, *arguments: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments[:2], here, *arguments[2:]]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_many_read_and_two_write_at_the_same_time(tmp_path: Path) -> None:
    db = str(tmp_path / "db")
    fill(tmp_path / "db", many(1))
    writers = [process(WRITER, db, start, "60") for start in ("1", "2")]
    readers = [process(READER, db, str(k), "121") for k in range(2)]
    assert [reader.communicate(timeout=120)[0].split()[-1] for reader in readers] == ["121", "121"]
    assert [writer.communicate(timeout=60)[0] for writer in writers] == ["ready\n"] * 2
    assert all(found.returncode == 0 for found in (*writers, *readers))
    with Index.open(db) as index:
        assert len(index) == 121


def test_a_killed_writer_leaves_whole_entries(tmp_path: Path) -> None:
    db = tmp_path / "db"
    writer = process(WRITER, str(db), "3", "100000")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    with Index.open(db) as index:
        while len(index) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with sqlite3.connect(db) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Index.open(db) as index:
        count = len(index)
        assert count >= 20
        assert index.add([("after", many(1)[0])]) == 1
        assert [row.name for row in index.rows()] == [*(f"w3-{k}" for k in range(count)), "after"]
        assert all(found.vector.shape == (LENGTH,) for found in map(Fingerprint.from_json, index.dump()))


def test_on_the_command_line(tmp_path: Path) -> None:
    run, db = CliRunner(), str(tmp_path / "db")
    for k, found in enumerate(many(3)):
        (tmp_path / f"{k}.json").write_text(found.to_json())
    files = [str(tmp_path / f"{k}.json") for k in range(3)]
    assert run.invoke(app, ["index", "search", db, files[0]]).exit_code == 2
    assert json.loads(run.invoke(app, ["index", "add", db, *files[:2], "--json"]).stdout)["entries"] == 2
    assert run.invoke(app, ["index", "add", db, files[2], "--name", "third"]).exit_code == 0
    assert run.invoke(app, ["index", "add", db, files[0]]).exit_code == 2
    assert run.invoke(app, ["index", "add", db, *files, "--name", "x"]).exit_code == 2
    hits = json.loads(run.invoke(app, ["index", "search", db, files[2], "-n", "2", "--json"]).stdout)
    assert [hit["name"] for hit in hits][:1] == ["third"]
    assert [hit["related"] for hit in hits] == [True, False]
    assert "third" in run.invoke(app, ["index", "search", db, files[2]]).stdout
    listed = json.loads(run.invoke(app, ["index", "list", db, "--json"]).stdout)
    assert [row["name"] for row in listed] == [files[0], files[1], "third"]
    out = tmp_path / "out.jsonl"
    assert run.invoke(app, ["index", "export", db, str(out)]).exit_code == 0
    assert run.invoke(app, ["index", "export", db, str(out)]).exit_code == 2
    copied = run.invoke(app, ["index", "import", f"{db}2", str(out), "--json"])
    assert json.loads(copied.stdout) == {"added": 3, "entries": 3}
