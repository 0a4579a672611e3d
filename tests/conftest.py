"""One thread: the networks here are small, and sums must not depend on the machine."""

from __future__ import annotations

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
