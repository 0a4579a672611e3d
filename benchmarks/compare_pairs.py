"""Do two checkpoints have a common origin? Pairs of which it is known, the library and simple baselines.

Seven families of small models are trained from several seeds; copies in a random gauge are made of them, and
copies that are changed as well; models trained apart are paired too. Every pair gets a number from each way
to compare, and the numbers are judged: area under the ROC curve, confusion, a threshold with a stated rate of
false positives. What each kind of change leaves behind is measured where the gauge is known, and after
alignment.

    python benchmarks/compare_pairs.py --store DIR              # trains what DIR lacks, some 30 minutes
    python benchmarks/compare_pairs.py --store DIR --family mlp # one family; nothing is written
    python benchmarks/compare_pairs.py --manifest              # the pairs as JSON

DIR keeps models and what was measured; remove DIR/scores/aligned when the library's alignment has changed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from harness import RESULTS, machine, table
from pairs import baselines, scores
from pairs.alignment import aligned, aligned_models
from pairs.barrier import barrier, line
from pairs.disguise import example
from pairs.families import FAMILIES
from pairs.kinds import GROUPS
from pairs.makers import Store
from pairs.manifest import Pair, pairs
from pairs.recipes import Made, Source
from pairs.training import held_out
from regauge.comparing.features import pair_features, spread
from regauge.comparing.kinds import kind
from regauge.errors import RegaugeError

REGAUGE = "regauge"
UNTRAINED = "never trained"
CALIBRATION = Path(__file__).parent.parent / "src" / "regauge" / "comparing" / "calibration.json"
BARRIERS = ("mlp", "decoder-rms", "llama")


def bare(made: Made) -> Made:
    """Without its disguises: in the gauge it was trained in."""
    return Made(made.source, tuple(step for step in made.steps if step[0] != "disguised"))


def measure(store: Store, pair: Pair, align: bool) -> dict[str, Any]:
    """Every score of a pair, and what is left of it where the gauge is known and after alignment."""
    result = {**pair.plain(), **store.kept(f"baselines/{pair.name}", lambda: _baselines(store, pair))}
    if align:
        found = store.kept(f"aligned/{pair.name}", lambda: _aligned(store, pair))
        result["scores"] = {**result["scores"], REGAUGE: found.pop("similarity")}
        result |= found
    return result


def _baselines(store: Store, pair: Pair) -> dict[str, Any]:
    family, x = FAMILIES[pair.family], example(FAMILIES[pair.family])
    a, b = store.model(pair.a), store.model(pair.b)
    result: dict[str, Any] = {"scores": {n: way(family, a, b, x) for n, way in baselines.BASELINES.items()}}
    result["losses"] = [held_out(family, model, "a") for model in (a, b)]
    if pair.derived:
        plain = (store.model(bare(made)) for made in (pair.a, pair.b))
        both = [(p, q) for p, q in baselines.common(*plain) if p.dim() > 1]
        result["known gauge"] = pair_features(both, _stored(b))
    return result


def _aligned(store: Store, pair: Pair) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        held = aligned(FAMILIES[pair.family], store, pair.a, pair.b)
    except RegaugeError as error:
        return {"similarity": 0.0, "refused": str(error).splitlines()[0]}
    seconds = round(time.perf_counter() - start, 2)
    a, b = store.model(pair.a), store.model(pair.b)
    left = pair_features(held.both, _stored(b))
    sizes = [p.shape != q.shape for p, q in baselines.common(a, b) if p.dim() > 1]
    left["resized"] = sum(sizes) / max(1, len(sizes))  # As stored: alignment may pad.
    return {"similarity": held.similarity, "relative": held.relative, "seconds": seconds, "aligned": left}


def _stored(model: nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.dim() > 1]


def sources(found: Sequence[Pair]) -> list[Source]:
    """Every model trained from scratch that the pairs are made of, in their order."""

    def of(made: Made) -> list[Source]:
        return [made.source, *(s for _, value in made.steps if isinstance(value, Made) for s in of(value))]

    every = [source for pair in found for made in (pair.a, pair.b) for source in of(made)]
    return [source for source in dict.fromkeys(every) if source.part != "new"]


def judge(results: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """One way to compare, over all pairs."""
    derived: dict[str, list[float]] = {}
    unrelated: dict[str, list[float]] = {}
    for result in results:
        held = derived if result["derived"] else unrelated
        held.setdefault(result["kind"], []).append(result["scores"][name])
    apart = [value for values in unrelated.values() for value in values]
    trained = [value for kind, values in unrelated.items() if kind != UNTRAINED for value in values]
    return {
        **scores.judged(derived, apart),
        "threshold": scores.threshold(trained),
        "by kind": {
            kind: [min(values), sorted(values)[len(values) // 2], max(values)]
            for kind, values in (derived | unrelated).items()
        },
        "by family": {
            family: _ends([r for r in results if r["family"] == family], name)
            for family in dict.fromkeys(result["family"] for result in results)
        },
    }


def _ends(results: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """The scores that come closest to the wrong side."""
    copies = [r["scores"][name] for r in results if r["kind"] == "copy"]
    derived = [r["scores"][name] for r in results if r["derived"]]
    unrelated = [r["scores"][name] for r in results if not r["derived"] and r["kind"] != UNTRAINED]
    z = torch.tensor(unrelated, dtype=torch.float64).atanh()
    return {
        "lowest copy": min(copies),
        "lowest derived": min(derived),
        "highest unrelated": max(unrelated),
        "mean of z": z.mean().item(),
        "deviation of z": z.std().item(),
    }


def named(results: Sequence[dict[str, Any]], gauge: str) -> dict[str, Any]:
    """What the rules call each kind of change, and how often that is right."""
    counts: dict[str, dict[str, int]] = {}
    right = total = 0
    for result in results:
        if result["derived"] and gauge in result:
            called = kind(result[gauge])
            row = counts.setdefault(result["kind"], {})
            row[called] = row.get(called, 0) + 1
            right, total = right + (result["kind"] in GROUPS[called]), total + 1
    return {"right": right, "pairs": total, "called": counts}


def left(results: Sequence[dict[str, Any]], gauge: str) -> dict[str, Any]:
    """Kind -> feature -> least, median, largest."""
    found: dict[str, list[dict[str, float]]] = {}
    for result in results:
        if gauge in result:
            found.setdefault(result["kind"], []).append(result[gauge])
    return {kind: spread(values) for kind, values in found.items()}


def barriers(store: Store, families: Sequence[str], align: bool) -> dict[str, Any]:
    """Losses along the line between two models of different seeds, and from a model to its disguised copy."""
    found: dict[str, Any] = {}
    for name in families:
        one, two = Made(Source(name, 0)), Made(Source(name, 1))
        copy = next(p for p in pairs([name]) if p.kind == "copy")
        for what, a, b in (("two seeds", one, two), ("disguised copy", copy.a, copy.b)):
            before = store.kept(f"baselines/line: {name}, {what}", partial(_line, store, name, a, b))
            found[f"{name}, {what}"] = before | {"barrier before": barrier(before["before"])}
            if align:
                after = store.kept(f"aligned/line: {name}, {what}", partial(_line, store, name, a, b, True))
                found[f"{name}, {what}"] |= after | {"barrier after": barrier(after["after"])}
    return found


def _line(store: Store, name: str, a: Made, b: Made, align: bool = False) -> dict[str, list[float]]:
    family = FAMILIES[name]
    if align:
        return {"after": line(family, *aligned_models(family, store, a, b))}
    return {"before": line(family, store.model(a), store.model(b))}


def show(content: dict[str, Any]) -> None:
    """The tables."""
    rows = []
    for name, found in content["methods"].items():
        every, copies = found["all"], found["copies"]
        best, none = every["best"], every["no false positive"]
        alone = copies["no false positive"]
        rows.append(
            [
                name, f"{every['auc']:.3f}", f"{best['found']}/{best['found'] + best['missed']}",
                f"{best['false']}/{best['false'] + best['rejected']}",
                f"{none['found']}/{none['found'] + none['missed']}",
                f"{copies['auc']:.3f}",
                f"{alone['found']}/{alone['found'] + alone['missed']}",
            ]
        )  # fmt: skip
    head = ["", "AUC", "found", "false", "found, none false", "AUC copies", "copies, none false"]
    print(table(head, rows), end="\n\n")
    for gauge in ("known gauge", "aligned"):
        held = content["left"][gauge]
        if not held:
            continue
        keys = [
            "unchanged", "residual", "slope", "noise", "largest zero rows", "rank", "flatness", "kurtosis",
            "levels", "bfloat16",
        ]  # fmt: skip
        rows = [
            [kind, *(f"{values[key][1]:.3g}" if key in values else "" for key in keys)]
            for kind, values in held.items()
        ]
        print(table([f"{gauge}, medians", *keys], rows))
        rules = content["rules"][gauge]
        print(f"rules right in {rules['right']} of {rules['pairs']}\n")
    for name, found in content["barriers"].items():
        shown = {key: round(found[key], 3) for key in ("barrier before", "barrier after") if key in found}
        print(name, shown)


def rounded(value: Any) -> Any:
    """With six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(content: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """The results, a pair a line."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(rounded(content), indent=1)
    lines = ",\n".join(json.dumps(rounded(result), ensure_ascii=False) for result in results)
    path = RESULTS / "compare-pairs.json"
    path.write_text(f'{text.rstrip()[:-1].rstrip()},\n "pairs": [\n{lines}\n]}}\n')
    print(f"\nwritten to {path}")


RATE = 1e-3
"""Of false positives, by the law fitted, at the threshold that the library takes."""


def calibration(content: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the library needs: a threshold with its rate of false positives, and the spread by kind."""
    held = content["methods"][REGAUGE]
    chosen = held["threshold"]["at false-positive rate"]["normal"][f"{RATE:g}"]
    sides: dict[bool, list[float]] = {True: [], False: []}
    for result in results:
        sides[bool(result["derived"])].append(result["scores"][REGAUGE])
    return {
        "version": 1,
        "how": "benchmarks/compare_pairs.py: similarity after alignment of pairs of small trained models; "
        "see benchmarks/README.md",
        "families": list(FAMILIES),
        "unrelated": held["threshold"],
        "chosen": {
            "false-positive rate": RATE,
            **asdict(scores.confusion(sides[True], sides[False], chosen)),
        },
        "by family": held["by family"],
        "by kind": held["by kind"],
        "left": content["left"]["aligned"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", help="directory for models; default: one that is deleted at the end")
    parser.add_argument(
        "--family", action="append", choices=list(FAMILIES), help="only these; writes nothing"
    )
    parser.add_argument("--no-alignment", action="store_true", help="baselines only")
    parser.add_argument("--manifest", action="store_true", help="print the pairs and train nothing")
    options = parser.parse_args()
    listed = pairs(options.family)
    if options.manifest:
        print(json.dumps([pair.plain() for pair in listed], indent=1))
        return
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    align = not options.no_alignment
    with tempfile.TemporaryDirectory() as folder:
        store = Store(options.store or folder)
        held = sources(listed)
        for source in track(held, "training"):
            store.source(source)
        results = [measure(store, pair, align) for pair in track(listed, "comparing")]
        names = [*baselines.BASELINES, *([REGAUGE] if align else [])]
        lines = [name for name in BARRIERS if options.family is None or name in options.family]
        content = {
            "machine": machine(),
            "sources": {source.name: store.note(source) for source in held},
            "methods": {name: judge(results, name) for name in names},
            "left": {gauge: left(results, gauge) for gauge in ("known gauge", "aligned")},
            "rules": {gauge: named(results, gauge) for gauge in ("known gauge", "aligned")},
            "barriers": barriers(store, lines, align),
        }
    show(content)
    if options.family is None:
        write(content, results)
        if align:
            CALIBRATION.parent.mkdir(exist_ok=True)
            CALIBRATION.write_text(json.dumps(rounded(calibration(content, results)), indent=1) + "\n")


if __name__ == "__main__":
    main()
