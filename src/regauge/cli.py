"""The command line. Thin: it reads options, calls the library, and prints data objects."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from regauge.cli_compare import align, compare
from regauge.cli_equivalence import (
    DocumentRule,
    Labels,
    Level,
    Margin,
    Power,
    Tokens,
    compare_on_text,
)
from regauge.cli_fingerprint import fingerprint, index
from regauge.cli_grow import grow
from regauge.cli_lab import lab
from regauge.cli_lr import lr
from regauge.cli_merge import merge
from regauge.cli_norms import fold, norms, upgrade
from regauge.cli_options import AsJson, Memory, Out, Source, Storage, TextFile, write_and_show
from regauge.cli_support import (
    described,
    exported,
    outcome,
    packaged_module,
    parse_size,
    print_json,
    progress_bar,
    show,
    wide,
)
from regauge.errors import EXIT_CERTIFICATE, BadInput, RecipeError

app = typer.Typer(
    name="regauge",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    ONNX = "onnx"
    PT2 = "pt2"


def _version(wanted: bool) -> None:
    if wanted:
        from regauge import __version__

        print(f"regauge {__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Change the parameters of a neural network without changing its function, and prove it.

    Start with [bold]regauge demo[/bold], or [bold]regauge inspect SRC[/bold] on a model of yours.

    \b
    Exit codes:
      0    done, and certified
      1    the certificate failed; nothing was kept
      2    bad input or usage
      3    refused: the symmetry asked for does not exist in this model
      4    not enough data to decide
      130  interrupted
    """


@app.command()
def inspect(
    source: Source,
    json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the atlas as JSON to this file.")
    ] = None,
) -> None:
    """Show the spaces of a model, the groups that act on them, and their limits.

    Each row is a class of tensor axes that must transform together; alike
    layers share a row. It admits the groups whose elements keep the function:
    now, and after norm scales are folded. No weights are read.

    \b
    Examples:
      regauge inspect ./llama
      regauge inspect packaged:gemma-3-270m --json > atlas.json
      regauge inspect model.gguf --out atlas.json
    """
    with outcome(as_json=json):
        from regauge.api import inspect as run

        module = packaged_module(source)
        atlas = run(*module) if module is not None else run(source)
        text = atlas.to_json(indent=2)
        if out is not None:
            try:
                out.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise BadInput(f"cannot write {out}", found=error.strerror or str(error)) from error
        if json:
            print_json(text)
        else:
            from regauge.show import atlas_view

            show(atlas_view(atlas, source, wide=wide()))


@app.command()
def rewrite(
    source: Source,
    out: Out,
    move: Annotated[
        list[str] | None,
        typer.Option("--move", metavar="NAME[:k=v,...]", help="A move; may be given many times, in order."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Moves from a YAML file instead.")] = None,
    dtype: Storage = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of everything drawn at random. Default: 0.")
    ] = None,
    max_memory: Memory = None,
    text: TextFile = None,
    allow_cuts: Annotated[
        bool, typer.Option("--allow-cuts", help="Also make cuts: another function, by a measured amount.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Apply moves to a checkpoint, certify the result, and only then put it at OUT.

    The source is never touched. If the certificate fails, or a move does not
    exist for this model, nothing is left at OUT. After Ctrl-C the same command
    goes on where it stopped.

    \b
    Examples:
      regauge rewrite ./llama ./new --move fold-scales --move rotate
      regauge rewrite packaged:minilm ./new --move permute --seed 7
      regauge rewrite ./llama ./new --recipe my.yaml --max-memory 2GB
    """
    with outcome(as_json=json, resumes=True):
        from regauge.recipe import Recipe, load_recipe, parse_move

        if bool(move) == (recipe is not None):
            raise RecipeError(
                "say what to do once",
                expected="one or more --move, or one --recipe",
                found="both" if move else "neither",
                way_out="`regauge moves` lists the moves",
            )
        plan = load_recipe(recipe) if recipe is not None else Recipe(moves=tuple(map(parse_move, move or ())))
        write_and_show(source, out, plan, dtype, seed, max_memory, text, as_json=json, cut=allow_cuts)


app.command()(grow)
app.command()(norms)
app.command()(upgrade)
app.command()(fold)
app.command()(lr)
app.command()(compare)
app.command()(merge)
app.command()(align)
app.add_typer(lab)
app.command()(fingerprint)
app.add_typer(index)


@app.command()
def certify(
    a: Annotated[str, typer.Argument(metavar="A", help="The original.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.", show_default=False)],
    text: TextFile = None,
    margin: Margin = None,
    level: Level = None,
    power: Power = None,
    tokens: Tokens = None,
    document: DocumentRule = None,
    labels: Labels = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn at random.")] = 0,
    max_memory: Memory = None,
    json: AsJson = False,
) -> None:
    """Are these two the same function, and how far apart are they as stored?

    Both run in true float64 and in their stored dtype, on the same inputs,
    beside what rounding alone would do to A. Nothing of how B was made is
    used. Exit code 1 if they differ.

    With --margin the question is another one: on texts like this, is the mean
    difference surely less than the margin? Documents drawn from --text are
    scored with both; two one-sided tests decide. The margin is in nats per
    token for language models, 1 - cosine for embeddings, a share of the items
    for classifiers. Exit code 4 if the data do not suffice; how much would is
    printed.

    \b
    Examples:
      regauge certify ./llama ./rotated
      regauge certify packaged:minilm ./mine --text book.txt --json
      regauge certify ./llama ./llama-8bit --text book.txt --margin 0.01
    """
    with outcome(as_json=json):
        asked = {"level": level, "power": power, "tokens": tokens, "document": document, "labels": labels}
        options = {name: value for name, value in asked.items() if value is not None}
        if margin is not None or options:
            compare_on_text(a, b, text, margin, options, seed, max_memory, as_json=json)
            return
        from regauge.api import resolve
        from regauge.certify import certify as run
        from regauge.certify import render

        limit = None if max_memory is None else parse_size(max_memory)
        certificate = run(resolve(a), resolve(b), text=text, seed=seed, max_memory=limit)
        if json:
            print_json(certificate.to_json())
        else:
            show(render(certificate))
        if not certificate.passed:
            raise typer.Exit(EXIT_CERTIFICATE)


@app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New file; must not exist.", show_default=False)],
    form: Annotated[Format, typer.Option("--format", help="ONNX, or a torch.export archive.")] = Format.ONNX,
    text: TextFile = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random inputs.")] = 0,
    json: AsJson = False,
) -> None:
    """Write a model as ONNX or .pt2, certify what was written, and only then put it at OUT.

    Batch and length are dynamic where the model's own code lets them be. The
    file is loaded again and run on sizes that the exporter never saw, beside
    the source. Exit code 1, and nothing at OUT, if they differ by more than
    rounding. ONNX needs the extra "export".

    \b
    Examples:
      regauge export packaged:minilm minilm.onnx
      regauge export ./rewritten model.pt2 --format pt2 --text book.txt
    """
    with outcome(as_json=json):
        from regauge.exporting import export as run

        module, inputs = packaged_module(source) or (None, None)
        with progress_bar(quiet=json) as progress:
            result = run(
                source if module is None else module,
                out,
                format=form,
                inputs=inputs,
                text=text,
                seed=seed,
                progress=progress,
            )
        if json:
            print_json(exported(result))
        else:
            from regauge.show import export_view

            show(export_view(result))


@app.command()
def report(
    directory: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A directory that `regauge rewrite` wrote.", show_default=False),
    ],
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="SRC", help="What it was made from: shows before and after."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="New HTML file. Default: DIR-report.html.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write one HTML file about a rewritten directory: moves, certificate, weights, activations.

    The file holds everything and loads nothing. With --source both models run
    on random inputs, and every figure is shown before and after.

    \b
    Examples:
      regauge report ./new
      regauge report ./new --source packaged:minilm --out new.html
    """
    with outcome(as_json=json):
        from regauge.report import report as run

        with progress_bar(quiet=json) as progress:
            path = run(directory, out, source=source, progress=progress)
        size = path.stat().st_size
        if json:
            print_json({"out": str(path), "bytes": size})
        else:
            print(f"written to {path}: {size / 1e3:,.0f} kB")


@app.command()
def moves(json: AsJson = False) -> None:
    """List every move: its identity, what it needs, what it preserves, and its options.

    Below them stand the cuts, which make another function; `rewrite` makes
    them with --allow-cuts only, and measures the difference. After --move a
    move is written NAME or NAME:key=value,key=value. Moves are made in the
    order in which they are given.

    \b
    Examples:
      regauge moves
      regauge moves --json
    """
    with outcome(as_json=json):
        from regauge.cuts import CUTS
        from regauge.moves import MOVES
        from regauge.show import cuts_view, moves_view

        if json:
            print_json([described(item) for item in (*MOVES.values(), *CUTS.values())])
        else:
            show(moves_view(MOVES))
            show(cuts_view(CUTS))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Keep the rewritten model here.")] = None,
) -> None:
    """Inspect, rewrite and certify a real model that a package ships, in minutes.

    No model hub is needed; the package is. What is made is thrown away
    unless --out is given.

    \b
    Examples:
      regauge demo
      regauge demo --out ./demo-out
    """
    with outcome():
        from regauge.demo import run

        run(out)


def main() -> None:
    """Entry point of the ``regauge`` command."""
    app()


if __name__ == "__main__":
    main()
