"""The loop: what it logs is true, it repeats itself, and being killed does not change it."""

from __future__ import annotations

import copy
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from regauge.errors import BadInput, CheckpointError
from regauge.lab import RunConfig, build, parse_run, train
from regauge.lab.data import loss_of, prepare
from regauge.lab.glyphs import digits, font
from regauge.lab.measure import Moments, part
from regauge.lab.optimizers import OPTIMIZERS, factor, optimizer_of
from regauge.lab.train import digest

BASE: dict[str, Any] = {
    "model": {"width": 16, "depth": 2, "heads": 2, "context": 8, "expansion": 2},
    "data": {"batch": 4, "characters": 20000, "digits": 40, "held_out": 2},
    "optimizer": {"lr": 3e-3, "warmup": 3},
    "steps": 12,
    "log_every": 5,
    "checkpoint_every": 4,
    "device": "cpu",
}


def config(**changes: Any) -> RunConfig:
    data = copy.deepcopy(BASE)
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return parse_run(data)


class Killed(Exception):
    pass


def killer(at: int) -> Any:
    def progress(done: int, steps: int) -> None:
        assert done <= steps
        if done == at:
            raise Killed

    return progress


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamp": {"optimizer": {"name": "adamp", "weight_decay": 0.1, "clip": 0.5}},
    "ldog": {"optimizer": {"name": "ldog", "lr": 1}},
    "swan": {"optimizer": {"name": "swan"}},
    "powernorm": {"model": {"norm": "powernorm", "norm_options": {"warmup": 6}}, "statistics": True},
    "unified": {"model": {"norm": "unified", "norm_options": {"warmup": 6}}},
    "prepbn": {"model": {"norm": "prepbn", "norm_options": {"warm": 2, "steps": 8}}},
    "dropout": {"model": {"norm": "seednorm", "norm_options": {"dropout": 0.3}}},
    "vit": {"model": {"kind": "vit", "norm": "layernorm"}},
    "cnn": {"model": {"kind": "cnn", "norm": "evonorm-b0"}},
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_as_if_it_had_not_been(case: str, tmp_path: Path) -> None:
    run = config(**CASES[case])
    whole = train(run, tmp_path / "whole")
    for at in (3, 6):  # before the first checkpoint, and behind it
        with pytest.raises(Killed):
            train(run, tmp_path / "parts", killer(at))
    ended = train(run, tmp_path / "parts")
    assert ended.records == whole.records
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    a, b = whole.model.state_dict(), ended.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = build(run.model, run.seed).state_dict()
    assert any(not torch.equal(a[name], start[name]) for name in a)


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    run = config(steps=4000, checkpoint_every=20)
    code = "from regauge.lab import *; train(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}", run.model_dump_json(), str(tmp_path / "killed")]
    )
    point, limit = tmp_path / "killed" / "checkpoint.pt", time.monotonic() + 60
    while not point.exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(point, weights_only=True)["step"]
    assert 0 < reached < 4000
    log = (tmp_path / "killed" / "log.jsonl").read_bytes()
    with (tmp_path / "killed" / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 99')  # half a line
    for name in ("killed", "whole"):
        with pytest.raises(Killed):
            train(run, tmp_path / name, killer(reached + 30))
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert len(log) > 0


def test_a_directory_belongs_to_one_run(tmp_path: Path) -> None:
    train(config(), tmp_path)
    with pytest.raises(BadInput, match="holds another run"):
        train(config(seed=1), tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        train(config(), tmp_path)


def test_seeds_and_settings_change_the_log() -> None:
    logs = [json.dumps(train(run).records) for run in (config(), config(), config(seed=1))]
    assert logs[0] == logs[1] != logs[2]


def test_the_first_record_is_what_autograd_says() -> None:
    run = config(optimizer={"clip": 1e-3})
    first = train(run).records[0]
    data, model = prepare(run), build(run.model, run.seed)
    tokens, targets = data.draw(torch.Generator().manual_seed(run.seed))
    streams: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _args, output: streams.append(output.detach()))
    loss = functional.cross_entropy(model(tokens).transpose(1, 2), targets)
    loss.backward()
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, value in first["gradient"].items():
        grads = [p.grad for n, p in model.named_parameters() if f"{n}.".startswith(f"{name}.")]
        assert value == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-5)
    assert [*first["variance"].values()] == pytest.approx([float(s.var(correction=0)) for s in streams])
    weights = [p.detach() for n, p in model.named_parameters() if n.startswith("layers.1.") and p.dim() > 1]
    length = math.sqrt(sum(float(w.square().sum()) for w in weights))
    assert first["weights"]["layers.1"] == pytest.approx(length, rel=1e-6)
    model.eval()
    with torch.no_grad():
        held = [loss_of(model(x), y).item() for x, y in data.held()]
    assert first["held_out"] == pytest.approx(sum(held) / len(held), rel=1e-6)
    assert first["lr"] == pytest.approx(3e-3 / 3)


def test_records_move_nothing(tmp_path: Path) -> None:
    """After twelve steps with records, the last at the end, the state is that of a longer run without any."""
    run = config(model={"norm": "batch"}, statistics=True, optimizer={"schedule": "constant"})
    ended = train(run).model.state_dict()
    quiet = {"steps": 14, "log_every": 100, "checkpoint_every": 12, "statistics": False}
    train(run.model_copy(update=quiet), tmp_path)
    between = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert any(name.endswith("running_var") for name in between)
    assert all(torch.equal(ended[name], between[name]) for name in ended)


def test_a_clipped_step_has_the_length_that_was_asked_for() -> None:
    run = config(optimizer={"name": "sgd", "lr": 1.0, "warmup": 0, "clip": 0.01}, steps=1)
    after, before = train(run).model.state_dict(), build(run.model, run.seed).state_dict()
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_runs_that_diverge_say_so() -> None:
    nan = train(config(optimizer={"name": "sgd", "lr": 1e30, "warmup": 0}))
    assert nan.diverged is not None
    assert nan.records[-1] == {"step": nan.diverged, "diverged": "the loss is no finite number"}
    above = train(config(optimizer={"lr": 30.0, "warmup": 0}, patience=3, steps=40))
    assert above.diverged is not None
    assert "above that of the start for 3 steps" in above.records[-1]["diverged"]
    json.dumps(nan.records, allow_nan=False)
    assert train(config()).diverged is None


def test_training_learns() -> None:
    for changes in (
        {},
        {"model": {"kind": "vit", "norm": "rmsnorm"}},
        {"model": {"kind": "cnn", "norm": "batch"}},
    ):
        data = {"batch": 16, "digits": 400}
        run = config(**changes, data=data, steps=80, optimizer={"lr": 1e-2}, log_every=80, checkpoint_every=0)
        first, last = train(run).records
        assert last["held_out"] < 0.8 * first["held_out"], changes


def test_moments_are_those_of_the_batches() -> None:
    model = build({**BASE["model"], "norm": "layernorm"})
    watched = Moments(model, (torch.nn.LayerNorm,), -1)
    inputs = [torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(i)) for i in range(5)]
    for tokens in inputs:
        model(tokens)
    expected = torch.stack([model.embedding(x).double().square().mean((0, 1)) for x in inputs]).detach()
    ratio = (expected.var(0) / expected.mean(0).square()).mean()
    state = copy.deepcopy(watched.state_dict())
    assert watched.report()["layers.0.attention.before"] == pytest.approx(float(ratio), rel=1e-9)
    assert watched.report() == {}
    watched.load_state_dict(state)
    model.eval()(inputs[0])
    assert watched.report()["layers.0.attention.before"] == pytest.approx(float(ratio), rel=1e-9)
    watched.close()
    model.train()(inputs[0])
    assert watched.report() == {}


def test_schedules() -> None:
    settings = config(optimizer={"warmup": 4, "final": 0.1}).optimizer
    rates = [factor(settings, step, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = settings.model_copy(update={"schedule": "constant"})
    assert {factor(constant, step, 24) for step in range(4, 24)} == {1.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_a_step(name: str) -> None:
    run = config(optimizer={"name": name})
    model = build(run.model)
    tokens, targets = next(prepare(run).held())
    optimizer = optimizer_of(run.optimizer, model, tokens)
    before = copy.deepcopy(model.state_dict())
    loss_of(model(tokens), targets).backward()
    optimizer.step()
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_decay_follows_roles_and_views_follow_operations() -> None:
    run = config(optimizer={"name": "adamp", "weight_decay": 0.1})
    model = build({**BASE["model"], "qk_norm": True})
    optimizer = optimizer_of(run.optimizer, model, next(prepare(run).held())[0])
    decays = {
        name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]
    }
    assert decays["layers.0.mlp.sublayer.up.weight"] == 0.1
    assert decays["embedding.weight"] == 0
    cuts = {
        name: cut
        for group in optimizer.param_groups
        for name, cut in zip(group["param_names"], group["views"], strict=True)
    }
    assert cuts["layers.0.attention.sublayer.query.weight"] == (0, 2)  # each head by itself
    assert cuts["layers.0.attention.sublayer.value.weight"] is None
    for options, text in (({"veiws": "cosine"}, "did you mean 'views'"), ({"views": "x"}, "no such views")):
        with pytest.raises(BadInput, match=text):
            optimizer_of(run.optimizer.model_copy(update={"options": options}), model, TOKENS)
    with pytest.raises(BadInput, match="did you mean 'adamw'"):
        optimizer_of(run.optimizer.model_copy(update={"name": "adamww"}), model, TOKENS)


TOKENS = torch.zeros(1, 8, dtype=torch.long)


def test_texts_are_split_by_position() -> None:
    data = prepare(config())
    whole = torch.cat([data.train, data.held_out])
    assert len(data.train) == len(whole) * 9 // 10
    tokens, targets = data.draw(torch.Generator().manual_seed(0))
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    text = bytes(data.train.tolist())
    assert all(
        bytes([*row.tolist(), int(end)]) in text for row, end in zip(tokens, targets[:, -1], strict=True)
    )
    held = bytes(data.held_out.tolist())
    batches = list(data.held())
    assert len(batches) == 2
    assert all(bytes(row.tolist()) in held for tokens, _ in batches for row in tokens)
    assert bytes(batches[0][0][0].tolist()) == held[:8]
    assert bytes(batches[-1][1][-1].tolist()) == held[-8:]


def test_digits_are_drawn_the_same_every_time() -> None:
    images, labels = digits(300, seed=4)
    again, labels_again = digits(300, seed=4)
    assert torch.equal(images, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(images, digits(300, seed=5)[0])
    assert images.shape == (300, 1, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10))
    # Noise apart, an image is closest to the mean of its own digit far more often than one in ten.
    clean, of = digits(2000, noise=0.0, seed=6)
    means = torch.stack([clean[of == digit].mean(0) for digit in range(10)])
    nearest = (clean[:, None] - means).square().sum((2, 3, 4)).argmin(1)
    assert float((nearest == of).float().mean()) > 0.6
    rows = ["".join(".#"[int(bit)] for bit in row) for row in font()[7, 0]]
    assert rows[:2] == ["#####", "....#"]


def test_names_of_parts() -> None:
    assert [part(name) for name in ("layers.3.mlp.up.weight", "head.weight", "positions")] == [
        "layers.3",
        "head",
        "positions",
    ]
    assert digest(config()) != digest(config(seed=1))
