"""``regauge lab``: sweeps of small models, run and shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regauge.cli_options import AsJson
from regauge.cli_support import EXIT_INTERRUPTED, outcome, print_json, progress_bar, show

if TYPE_CHECKING:
    from rich.table import Table

lab = typer.Typer(
    name="lab",
    no_args_is_help=True,
    help="Train small models that differ in norm, placement, init, optimizer.",
)
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time, each with one thread.")]


@lab.command()
def run(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="What to run; see docs/lab.md.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the runs.")],
    jobs: Jobs = 1,
    json: AsJson = False,
) -> None:
    """Make all runs of a sweep that are not finished, and show what came of them.

    An interrupted run goes on from its last checkpoint when the same command is
    given again, and ends with the same weights.

    \b
    Examples:
      regauge lab run benchmarks/lab/depth.yaml out
      regauge lab run sweep.yaml out --jobs 2 --json
    """
    with outcome(as_json=json):
        from regauge.lab.config import load_sweep
        from regauge.lab.sweep import run_sweep, summary

        plan = load_sweep(sweep)
        try:
            with progress_bar(quiet=json) as progress:
                results = run_sweep(plan, out, jobs=jobs, progress=progress)
        except KeyboardInterrupt as error:
            print("\nInterrupted. Run the same command again to go on from here.", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from error
        rows = summary(results)
        if json:
            print_json({"sweep": plan.name, "out": str(out), "summary": rows, "results": list(results)})
        else:
            show(_table(rows))


@lab.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the runs.")],
    json: AsJson = False,
) -> None:
    """Write OUT/report.html: curves, and gradients and variances by layer.

    \b
    Examples:
      regauge lab report out
    """
    with outcome(as_json=json):
        from regauge.lab.checkpoint import write_text
        from regauge.lab.page import render
        from regauge.lab.sweep import log, name_of, results, summary

        found = results(out)
        logs = {str(result["name"]): log(out, str(result["name"])) for result in found}
        path = out / "report.html"
        write_text(path, render(name_of(out), found, logs, summary(found)))
        if json:
            print_json({"report": str(path)})
        else:
            print(f"written to {path}")


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    view = Table(box=SIMPLE_HEAD)
    view.add_column("setting")
    for column in ("runs", "diverged", "held-out loss", "loss", "seconds"):
        view.add_column(column, justify="right")
    for row in rows:
        losses = [_shown(row[key], row[f"{key}_half"]) for key in ("held_out", "loss")]
        view.add_row(
            str(row["group"]), str(row["runs"]), str(row["diverged"]), *losses, f"{row['seconds']:.0f}"
        )
    return view


def _shown(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.4f}" if half is None else f"{mean:.4f} ± {half:.4f}"
