"""What the benchmarks share: a process for each case, its memory, the machine, and the table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("regauge", "torch", "transformers", "safetensors", "numpy")


def memory(field: str = "VmHWM") -> float:
    """MB of this process: ``VmHWM`` the most it ever held, ``VmRSS`` what it holds now (mapped files too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/self/status")


def forget_peak() -> None:
    """Start ``VmHWM`` anew."""
    Path("/proc/self/clear_refs").write_text("5")


def version(package: str) -> str | None:
    """Of an installed package; None if there is none, which some benchmarks do without."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(int(total.split()[1]) * 1024 / 1e9, 1),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def worker(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script again as a process of its own and read the JSON object it prints last."""
    run = subprocess.run(
        [sys.executable, script, "--worker", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def save(name: str, content: Mapping[str, Any]) -> None:
    """Merge cases into ``results/NAME.json``; each keeps the machine and date it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **content}, indent=2) + "\n")
    print(f"\nwritten to {path.relative_to(path.parent.parent.parent)}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def ratio(value: float, bar: float) -> str:
    """A figure against its bar: below one is better."""
    return f"{value / bar:.2f}"
