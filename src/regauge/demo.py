"""``regauge demo``: a real model from a package, inspected, rewritten, certified, and run elsewhere."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from regauge.atlas import Atlas, Kind
from regauge.cli_support import console, progress_bar, wide
from regauge.errors import CheckpointError, Refused
from regauge.recipe import Recipe, parse_recipe
from regauge.show import atlas_view, error_view, result_view

MODELS = ("whisper-tiny.en", "minilm")
_TURNS = {Kind.ORTHOGONAL, Kind.ORTHOGONAL_ONES}


def run(out: Path | None) -> None:
    """Run the demo and print it. About two minutes and 1 GB of memory on two cores.

    Args:
        out: where to keep the rewritten model; None throws it away.

    Raises:
        CheckpointError: none of the packages is installed.
        NotEquivalent: the certificate failed.
    """
    from regauge import packaged
    from regauge.api import inspect, rewrite
    from regauge.report import report

    begin = time.perf_counter()
    screen = console()
    name = _first_installed()
    _head(screen, f"1. inspect {name}: which changes of its parameters keep the function?")
    directory = packaged.directory(name)
    start = time.perf_counter()
    atlas = inspect(directory)
    screen.print(atlas_view(atlas, name, wide=wide()))
    screen.print(Text(f"found in {time.perf_counter() - start:.1f} s, without reading a weight", style="dim"))

    recipe = choose(atlas)
    moves = " ".join(f"--move {spec}" for spec in recipe.moves)
    with tempfile.TemporaryDirectory(prefix="regauge-demo-") as place:
        target = out if out is not None else Path(place) / "model"
        _head(screen, "2. a change that does not exist is refused, and what stands in its way is named")
        _refusal(screen, directory, Path(place) / "never")
        _head(screen, "3. rewrite it by changes that do exist, and certify that it is the same function")
        screen.print(Text(f"regauge rewrite packaged:{name} {out or 'OUT'} {moves}\n", style="dim"))
        with progress_bar(quiet=False) as progress:
            result = rewrite(directory, target, recipe, progress=progress)
        screen.print(result_view(result, str(target)))
        _head(screen, "4. the result as an ordinary transformers model")
        screen.print(Text(_elsewhere(name, directory, target)))
        _head(screen, "5. what was done, as one page to look at")
        place_of_report = target.parent if out is not None else Path(tempfile.mkdtemp(prefix="regauge-demo-"))
        page = report(target, _free(place_of_report, target.name), source=directory)
        screen.print(Text(f"open {page} in a browser; it loads nothing from anywhere"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    seconds = time.perf_counter() - begin
    screen.print(Text(f"\n{seconds:.0f} s in all, peak memory {peak:,.0f} MiB (with torch and transformers)"))
    if out is not None:
        screen.print(Text(f"check it again, from the files alone: regauge certify packaged:{name} {out}"))


def choose(atlas: Atlas) -> Recipe:
    """Moves that the atlas says exist: untie, fold, LayerNorm to RMSNorm, rotate what turns, permute."""
    after = atlas.folded or atlas
    whole = {generator.kind for generator in after.generators if not generator.copies}
    turns = bool(whole & _TURNS)
    centred = Kind.ORTHOGONAL_ONES in whole  # a space that only LayerNorms read
    moves: list[object] = ["untie"] if atlas.aliases else []
    moves += ["add-bias"] if centred else []
    moves += ["fold-shifts"] if Kind.TRANSLATION in whole else []
    moves += ["fold-scales"] if atlas.folds else []
    moves += (
        ["fold-value-bias", "drop-key-bias", {"name": "center", "norm": "rms"}, "strip"] if centred else []
    )
    moves += [{"name": "rotate", "style": "hadamard"}] if turns else []
    return parse_recipe({"moves": [*moves, "permute"]})


def _first_installed() -> str:
    from regauge import packaged

    rows = {row.name: row for row in packaged.available()}
    for name in MODELS:
        if rows[name].installed:
            return name
    raise CheckpointError(
        "the demo needs a real model, and no package that carries one is installed",
        expected=" or ".join(rows[name].package for name in MODELS),
        way_out=rows[MODELS[0]].install,
    )


def _free(place: Path, name: str) -> Path:
    """A file that does not exist."""
    names = (f"{name}-report{number}.html" for number in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(place / name for name in names if not (place / name).exists())


def _head(screen: Console, title: str) -> None:
    screen.print()
    screen.print(Rule(Text(title, style="bold"), align="left"))


def _refusal(screen: Console, directory: Path, target: Path) -> None:
    """Rotate the model as it stands. Where that works after all, say so."""
    from regauge.api import rewrite

    try:
        rewrite(directory, target, parse_recipe({"moves": ["rotate"]}))
    except Refused as refusal:
        screen.print(error_view(refusal))
    else:
        screen.print("this model can be rotated as it stands")


def _norms(path: Path) -> str:
    """How many norms of which sort, and how many parameters they hold."""
    from torch import nn

    from regauge.hf import load_meta
    from regauge.modeling_regauge import Norm

    found = [m for m in load_meta(path).model.modules() if isinstance(m, (nn.LayerNorm, Norm))]
    kinds = Counter("RMSNorm" if isinstance(m, Norm) and m.form == "rms" else "LayerNorm" for m in found)
    held = sum(p.numel() for m in found for p in m.parameters())
    text = " and ".join(f"{count} {kind}s" for kind, count in sorted(kinds.items())) or "no LayerNorms"
    return f"{text} with {held:,} parameters"


def _elsewhere(name: str, first: Path, second: Path) -> str:
    """Both directories loaded and run by transformers in float32 on the same input."""
    import torch
    import transformers

    from regauge import packaged
    from regauge.api import load

    outputs: list[torch.Tensor] = []
    transformers.utils.logging.disable_progress_bar()
    for path in (first, second):
        model = load(path).eval()
        with torch.no_grad():
            result = model(**packaged.example(name))
        outputs.append(result.logits if hasattr(result, "logits") else result[0])
    a, b = (output.double() for output in outputs)
    difference = float((a - b).norm() / a.norm())
    largest = float((a - b).abs().max())
    same = float((a.argmax(-1) == b.argmax(-1)).double().mean())
    return (
        f"{_norms(first)} before, {_norms(second)} after.\n"
        f"In float32, outputs of shape {tuple(a.shape)} differ by {difference:.1e} relative,"
        f" {largest:.1e} at most;"
        f" the largest entry is the same at {100 * same:.1f} % of positions"
    )
