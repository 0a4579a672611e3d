"""The loop."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regauge.errors import BadInput
from regauge.lab import checkpoint, measure
from regauge.lab.config import RunConfig
from regauge.lab.data import Batch, Data, loss_of, prepare
from regauge.lab.norms import IMAGES, TOKENS, maker
from regauge.lab.optimizers import factor, optimizer_of
from regauge.lab.saved import build, save
from regauge.lab.start import Model

Record = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trained:
    """A run that has ended.

    Attributes:
        model: in training mode.
        records: of the log, see :func:`train`.
        diverged: the step from which the loss was no number, or stayed above that of the start; None if it
            did not.
    """

    model: Model
    records: tuple[Record, ...]
    diverged: int | None


def train(
    config: RunConfig, directory: str | Path | None = None, progress: Progress | None = None
) -> Trained:
    """Train one model, and go on from its last checkpoint if there is one.

    Every ``log_every`` steps, and at the end, a record is made *before* the step: ``step``, ``lr``, ``loss``
    of the batch, ``held_out`` loss in evaluation mode, and per part of the model ``gradient`` (length, before
    clipping), ``weights`` (length), ``variance`` (of the stream behind each layer). With ``statistics`` also
    ``moments`` (see :class:`regauge.lab.measure.Moments`) and ``held_out_batch``, the held-out loss in
    training mode. The record of the end is measured on a copy, so that nothing moves. A run that diverges
    ends with a record with ``diverged``, the reason.

    On the CPU one thread is used, and the same configuration gives the same bytes of the log, interrupted or
    not.

    Args:
        config: the run.
        directory: for ``log.jsonl``, ``config.json`` and ``checkpoint.pt``; None to keep nothing.
        progress: called after every step with the steps done and their number.

    Raises:
        BadInput: the directory holds another run, or a name of the configuration is unknown.
        CheckpointError: the checkpoint is damaged.
    """
    device = _device(config)
    forked: list[int] = [torch.cuda.current_device()] if device.type == "cuda" else []
    with _one_thread(), torch.random.fork_rng(devices=forked):
        torch.manual_seed(config.seed)
        run = _Run(config, device)
        try:
            return run.go(None if directory is None else Path(directory), progress)
        finally:
            run.close()


class _Run:
    """Everything that changes while a model trains."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.data: Data = prepare(config)
        self.random = torch.Generator().manual_seed(config.seed)
        self.model = build(config.model, config.seed).to(device)
        inputs = next(self.data.held())[0].to(device)
        self.optimizer = optimizer_of(config.optimizer, self.model, inputs)
        self.rates: list[float] = [float(group["lr"]) for group in self.optimizer.param_groups]
        images = config.model.kind == "cnn"
        norm = maker(
            IMAGES if images else TOKENS, config.model.norm, config.model.width, config.model.norm_options
        )
        self.moments = None
        if config.statistics and config.model.norm != "none":
            self.moments = measure.Moments(self.model, (type(norm()),), 1 if images else -1)
        self.records: list[Record] = []
        self.step = 0
        self.start: float | None = None
        self.above = 0
        self.log: Path | None = None

    def close(self) -> None:
        if self.moments is not None:
            self.moments.close()

    def go(self, directory: Path | None, progress: Progress | None) -> Trained:
        point = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            point, self.log = directory / "checkpoint.pt", directory / "log.jsonl"
            _same(directory / "config.json", self.config)
            if point.exists():
                self._restore(checkpoint.read(point))
            self._truncate()
        self.model.train()
        every = self.config.checkpoint_every
        while self.step < self.config.steps:
            reason = self._step()
            if reason is not None:
                self._note({"step": self.step, "diverged": reason})
                return Trained(self.model, tuple(self.records), self.step)
            self.step += 1
            if point is not None and every and self.step % every == 0 and self.step < self.config.steps:
                checkpoint.write(point, self._state())
            if progress is not None:
                progress(self.step, self.config.steps)
        self._last()
        return Trained(self.model, tuple(self.records), None)

    def _step(self) -> str | None:
        """One step; why the run has diverged, or None."""
        settings = self.config.optimizer
        scale = factor(settings, self.step, self.config.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        logged = self.step % self.config.log_every == 0
        self.optimizer.zero_grad(set_to_none=True)
        loss, variance = self._forward(self.model, logged)
        value = loss.item()
        self.start = value if self.start is None else self.start
        if not math.isfinite(value):
            return "the loss is no finite number"
        self.above = self.above + 1 if value > self.start else 0
        if self.above >= self.config.patience:
            return f"the loss was above that of the start for {self.above} steps"
        loss.backward()
        if logged:
            self._measure(self.model, value, settings.lr * scale, variance, self._moments())
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        return None

    def _forward(self, model: nn.Module, logged: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of the next batch, and the variances behind its layers."""
        batch = self.data.draw(self.random)
        layers = model.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        with measure.variances(layers, logged) as variance:
            return self._loss(model, batch), variance

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = (tensor.to(self.device) for tensor in batch)
        with _autocast(self.device):
            logits = model(inputs)
        return loss_of(logits, targets)

    def _measure(
        self,
        model: nn.Module,
        loss: float,
        lr: float,
        variance: dict[str, float],
        moments: dict[str, float] | None,
    ) -> None:
        record: Record = {"step": self.step, "lr": lr, "loss": loss, "held_out": self._held(model, False)}
        if self.config.statistics:
            record["held_out_batch"] = self._held(copy.deepcopy(model), True)
        if moments is not None:
            record["moments"] = moments
        record["gradient"] = measure.gradient_norms(model)
        record["weights"] = measure.weight_norms(model)
        record["variance"] = dict(variance)
        self._note(record)

    @torch.no_grad()
    def _held(self, model: nn.Module, training: bool) -> float:
        mode = model.training
        model.train(training)
        watched = self.moments.state_dict() if self.moments is not None else None
        with torch.random.fork_rng(devices=[]):
            losses = [self._loss(model, batch).item() for batch in self.data.held()]
        if self.moments is not None and watched is not None:
            self.moments.load_state_dict(watched)
        model.train(mode)
        return sum(losses) / len(losses)

    def _last(self) -> None:
        """The record of the end, on a copy: the model, its statistics and the order of the data stay."""
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        moments = self._moments()
        loss, variance = self._forward(model, True)
        loss.backward()
        rate = float(self.optimizer.param_groups[0]["lr"])
        self._measure(model, loss.item(), rate, variance, moments)

    def _moments(self) -> dict[str, float] | None:
        return None if self.moments is None else self.moments.report()

    def _note(self, record: Record) -> None:
        self.records.append(measure.plain(record))
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.records[-1]) + "\n")

    def _truncate(self) -> None:
        """The log as of the last checkpoint."""
        assert self.log is not None
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        checkpoint.write_text(self.log, text)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "torch": torch.get_rng_state(),
            "moments": None if self.moments is None else self.moments.state_dict(),
            "step": self.step,
            "start": self.start,
            "above": self.above,
            "log": json.dumps(self.records),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])
        self.step, self.start, self.above = state["step"], state["start"], state["above"]
        self.records = json.loads(state["log"])


def finish(trained: Trained, directory: str | Path) -> None:
    """Write the model of a run that has ended, and remove its checkpoint."""
    path = Path(directory)
    save(trained.model, path / "model")
    (path / "checkpoint.pt").unlink(missing_ok=True)


def digest(config: RunConfig) -> str:
    """SHA-256 of all keys and values."""
    return hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True).encode()).hexdigest()


def _same(path: Path, config: RunConfig) -> None:
    """Refuse a directory of another run; else note which run this is."""
    text = json.dumps(config.model_dump(), indent=2) + "\n"
    if not path.exists():
        checkpoint.write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise BadInput(
            f"{path.parent} holds another run",
            found="another config.json",
            way_out="choose another directory",
        )


def _device(config: RunConfig) -> torch.device:
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise BadInput("there is no GPU", expected="device: cpu or auto", found="cuda")
    return torch.device("cuda" if there and config.device != "cpu" else "cpu")


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def _one_thread() -> Generator[None]:
    """Sums then do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
