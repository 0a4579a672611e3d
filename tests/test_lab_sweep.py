"""Configurations, sweeps, the command line and the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import browser
from regauge.cli import app
from regauge.errors import BadInput
from regauge.lab import load_sweep, parse_run, parse_sweep
from regauge.lab.page import render
from regauge.lab.sweep import interval, log, results, run_sweep, summary

SWEEP = """
name: small
base:
  model: {width: 16, depth: 2, heads: 2, context: 8, expansion: 2}
  data: {batch: 4, characters: 20000, held_out: 1}
  optimizer: {lr: 3e-3, warmup: 2}
  steps: 6
  log_every: 3
  device: cpu
cases:
  plain: {model.norm: rmsnorm}
  wild: {model.norm: none, optimizer.name: sgd, optimizer.lr: 1e30}
grid:
  model.placement: [pre, post]
seeds: [0, 1]
"""
NAMES = [
    f"{case},placement={placement},seed={seed}"
    for case in ("plain", "wild")
    for placement in ("pre", "post")
    for seed in (0, 1)
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep as the command makes it."""
    path = tmp_path_factory.mktemp("lab")
    (path / "sweep.yaml").write_text(SWEEP)
    ended = CliRunner().invoke(app, ["lab", "run", str(path / "sweep.yaml"), str(path / "out"), "--json"])
    assert ended.exit_code == 0, ended.output
    told = json.loads(ended.stdout)
    assert [result["name"] for result in told["results"]] == NAMES
    return path


def test_runs_have_stable_names_and_an_order(done: Path) -> None:
    sweep = load_sweep(done / "sweep.yaml")
    runs = sweep.runs()
    assert [run.name for run in runs] == NAMES
    assert runs == sweep.runs()
    assert runs[0].config.optimizer.lr == 3e-3  # YAML takes this for a text
    assert runs[4].config.optimizer.lr == 1e30
    assert [run.config.model.placement for run in runs[:4]] == ["pre", "pre", "post", "post"]
    assert [run.config.seed for run in runs[:2]] == [0, 1]
    assert parse_sweep({"name": "one"}).runs()[0].name == "one,seed=0"
    long = parse_sweep({"name": "x", "grid": {"model.init": ["small"], "optimizer.lr": [1e-2, 0.1]}})
    assert [run.group for run in long.runs()] == ["init=small,lr=0.01", "init=small,lr=0.1"]
    both = {"model.norm_options.eps": [1e-3], "optimizer.options.eps": [1e-4]}
    assert "optimizer.options.eps=0.0001" in parse_sweep({"name": "x", "grid": both}).runs()[0].name


def test_unknown_keys_are_errors_that_name_the_nearest() -> None:
    for data, text in (
        ({"model": {"nrom": "rmsnorm"}}, "unknown key 'model.nrom'; did you mean 'norm'"),
        ({"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"steps": 0}, "bad value at 'steps'"),
        ({"model": {"kind": "mlp"}}, "bad value at 'model.kind'"),
        ([], "not a mapping"),
    ):
        with pytest.raises(BadInput, match=re.escape(text)):
            parse_run(data)
    for data, text in (
        ({"name": "x", "grd": {}}, "did you mean 'grid'"),
        ({"name": "x", "grid": {"model.widht": [1]}}, "did you mean 'width'"),
        ({"name": "x", "grid": {"steps.model": [1]}, "base": {"steps": 3}}, "does not lead to a value"),
        ({"name": "x", "grid": {"steps": []}}, "no values for steps"),
        ({"name": "x", "grid": {"steps": [3, 3]}}, "two runs of a sweep have one name"),
    ):
        with pytest.raises(BadInput, match=re.escape(text)):
            parse_sweep(data)


def test_a_sweep_is_checked_before_its_first_run(tmp_path: Path) -> None:
    for key, value, text in (
        ("model.norm", "batchh", "did you mean 'batch'"),
        ("optimizer.name", "adan", "did you mean 'adam'"),
        ("optimizer.options.momentun", 0.9, "has no option"),
        ("model.init", "vi3", "did you mean 'vi3nr'"),
    ):
        sweep = parse_sweep({"name": "x", "cases": {"good": {}, "bad": {key: value}}})
        with pytest.raises(BadInput, match=text):
            run_sweep(sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_runs_are_left_out_and_others_refused(done: Path) -> None:
    out = done / "out"
    before = (out / "results.jsonl").read_text()
    stages: list[str] = []
    run_sweep(load_sweep(done / "sweep.yaml"), out, progress=lambda stage, *_: stages.append(stage))
    assert stages == []
    assert (out / "results.jsonl").read_text() == before
    other = parse_sweep({**load_sweep(done / "sweep.yaml").model_dump(), "base": {"steps": 3}})
    with pytest.raises(BadInput, match="holds another run"):
        run_sweep(other, out)
    assert (out / "results.jsonl").read_text() == before


def test_two_processes_give_what_one_gives(done: Path, tmp_path: Path) -> None:
    sweep = load_sweep(done / "sweep.yaml").model_copy(update={"cases": {"plain": {"model.norm": "rmsnorm"}}})
    done_by_two = run_sweep(sweep, tmp_path / "out", jobs=2)
    for result, name in zip(done_by_two, NAMES, strict=False):
        assert result["name"] == name
        assert log(tmp_path / "out", name) == log(done / "out", name)


def test_results_say_what_the_logs_say(done: Path) -> None:
    found = results(done / "out")
    for result in found:
        records = log(done / "out", result["name"])
        if result["name"].startswith("wild"):
            assert result["diverged"] == records[-1]["step"]
            assert result["held_out"] is None
        else:
            assert result["held_out"] == records[-1]["held_out"]
            assert [record["step"] for record in records] == [0, 3, 6]
    rows = {row["group"]: row for row in summary(found)}
    assert rows["wild,placement=pre"]["diverged"] == 2
    assert rows["wild,placement=pre"]["held_out"] is None
    plain = [result["held_out"] for result in found[:2]]
    row = rows["plain,placement=pre"]
    assert row["held_out"] == pytest.approx(sum(plain) / 2)
    assert row["held_out_half"] == pytest.approx(12.706204736 * abs(plain[0] - plain[1]) / 2, rel=1e-6)


def test_intervals_are_those_of_the_table() -> None:
    # Student's t, 97.5 %: 4.3027 for 2 degrees of freedom.
    found = interval([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.30265273 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    assert interval([]) is None
    one = interval([3.0])
    assert one is not None
    assert (one.mean, one.half) == (3.0, None)


def test_the_commands_show_a_table_and_errors(done: Path, tmp_path: Path) -> None:
    command = ["lab", "run", str(done / "sweep.yaml"), str(done / "out")]
    run = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert run.exit_code == 0
    assert "plain,placement=pre" in run.stdout
    assert "±" in run.stdout
    bad = CliRunner().invoke(app, ["lab", "run", str(tmp_path / "none.yaml"), str(tmp_path / "o"), "--json"])
    assert bad.exit_code == 2
    assert "cannot read" in json.loads(bad.stderr)["message"]
    empty = CliRunner().invoke(app, ["lab", "report", str(tmp_path)])
    assert empty.exit_code == 2
    assert "holds no results" in empty.stderr


def test_an_interrupted_sweep_says_how_to_go_on(done: Path, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regauge.lab.sweep.run_one", stop)
        ended = CliRunner().invoke(app, ["lab", "run", str(done / "sweep.yaml"), str(tmp_path / "out")])
    assert ended.exit_code == 130
    assert "the same command again" in ended.stderr


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_the_figures_of_the_logs(done: Path) -> None:
    out = done / "out"
    made = CliRunner().invoke(app, ["lab", "report", str(out), "--json"])
    assert made.exit_code == 0, made.output
    page = Path(json.loads(made.stdout)["report"]).read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    charts = embedded(page)
    runs = [log(out, name) for name in NAMES[:2]]
    held = charts["curves"]["metrics"][0]["values"]["g0"]
    assert charts["curves"]["index"] == [1, 4, 7]
    assert held == pytest.approx([(a["held_out"] + b["held_out"]) / 2 for a, b in zip(*runs, strict=True)])
    assert "g2" not in charts["curves"]["metrics"][0]["values"]  # all of them diverged
    assert charts["gradient"]["names"] == ["embedding", "layers.0", "layers.1", "last", "head"]
    first = [(a + b) / 2 for a, b in zip(*(r[0]["gradient"].values() for r in runs), strict=True)]
    assert charts["gradient"]["metrics"][1]["values"]["g0"] == pytest.approx(first)
    found = results(out)
    logs = {name: log(out, name) for name in NAMES}
    assert render("small", found, logs, summary(found)) == page
    assert "<b>" not in render("<b>", found, logs, summary(found))


@pytest.mark.skipif(browser.find() is None, reason="no browser")
def test_the_page_draws_itself(done: Path) -> None:
    CliRunner().invoke(app, ["lab", "report", str(done / "out")])
    program = browser.find()
    assert program is not None
    with browser.Browser(program) as shown:
        shown.open(done / "out" / "report.html")
        count = "document.querySelectorAll('[data-chart={}] {}').length"
        assert shown.run(count.format("curves", "path.series")) == 2
        assert shown.run(count.format("gradient", "circle")) >= 8
        assert shown.errors == []
        assert [url for url in shown.requests if not url.startswith("file:")] == []
