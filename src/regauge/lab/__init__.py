"""Small models to try claims about normalisation on: built, trained and compared from configurations."""

from regauge.lab.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    RunConfig,
    SweepConfig,
    load_sweep,
    parse_model,
    parse_run,
    parse_sweep,
)
from regauge.lab.saved import build, load, save
from regauge.lab.train import Trained, train

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Run",
    "RunConfig",
    "SweepConfig",
    "Trained",
    "build",
    "load",
    "load_sweep",
    "parse_model",
    "parse_run",
    "parse_sweep",
    "save",
    "train",
]
