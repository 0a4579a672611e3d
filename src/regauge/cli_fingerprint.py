"""``regauge fingerprint`` and ``regauge index``: which model is this, and have I seen it before?"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from regauge.cli_options import AsJson, Source
from regauge.cli_support import outcome, print_json, progress_bar, show
from regauge.errors import BadInput

index = typer.Typer(
    name="index",
    no_args_is_help=True,
    help="A registry of fingerprints in one SQLite file: which model is this, under whatever disguise?",
)

Database = Annotated[Path, typer.Argument(metavar="DB", help="The SQLite file.", show_default=False)]
Sources = Annotated[
    list[str],
    typer.Argument(metavar="SRC...", help="Models, as for inspect; or files of fingerprints (.json)."),
]
Replace = Annotated[bool, typer.Option("--replace", help="Replace entries of the same name.")]
NoRun = Annotated[bool, typer.Option("--no-run", help="Leave out what the model does on fixed inputs.")]


def fingerprint(source: Source, no_run: NoRun = False, json: AsJson = False) -> None:
    """Compute what identifies a model, whatever its gauge and its encoding: a few kilobytes.

    The vector is made of products of weights that no symmetry of the model
    changes; fine-tuning and rounding change it a little. The digest tells what
    the model does on fixed inputs: it is equal for equal functions only.
    Tokens count by their place in the vocabulary.

    \b
    Examples:
      regauge fingerprint packaged:minilm
      regauge fingerprint ./llama --json > llama.json
    """
    with outcome(as_json=json):
        from regauge.provenance import fingerprint as run

        with progress_bar(quiet=json) as progress:
            found = run(source, run=not no_run, progress=progress)
        if json:
            print_json(found.to_json())
            return
        from regauge.show_provenance import fingerprint_view

        show(fingerprint_view(found, source))


@index.command()
def add(
    database: Database,
    sources: Sources,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the entry, for a single SRC. Default: SRC.")
    ] = None,
    replace: Replace = False,
    no_run: NoRun = False,
    json: AsJson = False,
) -> None:
    """Add models to an index, which is made if it is not there.

    Each model is stored when its fingerprint is ready, so that an interrupted
    run keeps what is done.

    \b
    Examples:
      regauge index add models.db packaged:minilm ./llama
      regauge index add models.db ./checkpoint-500 --name run7/500
    """
    with outcome(as_json=json):
        from regauge.provenance import Index

        if name is not None and len(sources) > 1:
            raise BadInput("--name is for a single SRC", found=f"{len(sources)} sources")
        added: list[str] = []
        with Index.open(database, create=True) as opened:
            for source in sources:
                found = _fingerprint(source, no_run, quiet=json)
                opened.add([(name or source, found)], replace=replace)
                added.append(name or source)
            total = len(opened)
        if json:
            print_json({"added": added, "entries": total})
        else:
            print(f"{len(added)} added, {total} in {database}")


@index.command()
def search(
    database: Database,
    source: Source,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many neighbours.")] = 10,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Through a graph of neighbours; needs the extra 'index'.")
    ] = False,
    no_run: NoRun = False,
    json: AsJson = False,
) -> None:
    """Find the entries nearest to a model.

    The distance is 1 − cosine: near 0 for the same weights in whatever gauge or
    rounding, near 1 for unrelated models. SRC may also be a file that
    `regauge fingerprint --json` wrote.

    \b
    Examples:
      regauge index search models.db ./unknown
      regauge index search models.db unknown.json -n 3 --json
    """
    with outcome(as_json=json):
        from regauge.provenance import Index

        with Index.open(database) as opened:
            wanted = _fingerprint(source, no_run, quiet=json)
            hits = opened.search(wanted, count, approximate=approximate)
        if json:
            print_json([vars(hit) for hit in hits])
            return
        from regauge.show_provenance import hits_view

        show(hits_view(hits, source))


@index.command("list")
def list_(database: Database, json: AsJson = False) -> None:
    """List the entries of an index, in the order in which they were added.

    \b
    Examples:
      regauge index list models.db
      regauge index list models.db --json
    """
    with outcome(as_json=json):
        from regauge.provenance import Index

        with Index.open(database) as opened:
            rows = tuple(opened.rows())
        if json:
            print_json([vars(row) for row in rows])
            return
        from regauge.show_provenance import rows_view

        show(rows_view(rows))


@index.command("export")
def export_(
    database: Database,
    out: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="New file; default: stdout.", show_default=False)
    ] = None,
) -> None:
    """Write every entry as one line of JSON.

    \b
    Examples:
      regauge index export models.db models.jsonl
      regauge index export models.db | gzip > models.jsonl.gz
    """
    with outcome():
        from regauge.provenance import Index

        with Index.open(database) as opened, _written(out) as stream:
            for line in opened.dump():
                stream.write(line + "\n")


@index.command("import")
def import_(
    database: Database,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What export wrote; - for stdin.", show_default=False)
    ],
    replace: Replace = False,
    json: AsJson = False,
) -> None:
    """Add every entry of an exported file, or, if one cannot be added, none.

    \b
    Examples:
      regauge index import models.db theirs.jsonl
      zcat models.jsonl.gz | regauge index import models.db -
    """
    with outcome(as_json=json):
        from regauge.provenance import Index

        with _read(file) as stream, Index.open(database, create=True) as opened:
            added = opened.load(stream, replace=replace)
            total = len(opened)
        if json:
            print_json({"added": added, "entries": total})
        else:
            print(f"{added} added, {total} in {database}")


def _fingerprint(source: str, no_run: bool, *, quiet: bool) -> Any:
    """Of a model; or the one in a file of JSON."""
    from regauge.provenance import Fingerprint
    from regauge.provenance import fingerprint as run

    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        with _read(path) as stream:
            return Fingerprint.from_json("".join(stream))
    with progress_bar(quiet=quiet) as progress:
        return run(source, run=not no_run, progress=progress)


@contextmanager
def _written(path: Path | None) -> Generator[Any]:
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("x", encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        raise BadInput(f"cannot write {path}", found=error.strerror or str(error)) from error


@contextmanager
def _read(path: Path) -> Generator[Any]:
    if str(path) == "-":
        yield sys.stdin
        return
    try:
        with path.open(encoding="utf-8") as stream:
            yield stream
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}", found=str(error)) from error
