"""``regauge lr``: peak learning rate and batch size by the Step Law."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from regauge.cli_options import AsJson
from regauge.cli_support import outcome, packaged_module, print_json
from regauge.errors import BadInput

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def lr(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SRC]",
            help="A Hugging Face directory, a GGUF file, or packaged:NAME, whose parameters are counted.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="D", help="Tokens of the training, as 20B or 2e10.")
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params", metavar="N", help="Parameters without embeddings, as 430M; in place of SRC."
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Peak learning rate and batch size for pre-training with AdamW, by the Step Law.

    The law counts parameters without embeddings. Of a source these are counted
    from its operations: an embedding is a table that is looked up, or that gives
    the logits. No weights are read. Outside of what the law was fitted on a
    warning is printed.

    \b
    Examples:
      regauge lr --params 430M --tokens 20B
      regauge lr ./llama --tokens 1e11 --json
    """
    with outcome(as_json=json):
        from regauge.optim.steplaw import step_law

        if tokens is None or (source is None) == (params is None):
            raise BadInput(
                "say how large the model is, once, and how long it is trained",
                expected="SRC or --params, and --tokens",
                way_out="regauge lr --params 430M --tokens 20B",
            )
        total = tables = None
        if source is not None:
            total, count, tables = _counted(source)
        else:
            count = _number(params or "", "--params")
        found = step_law(count, _number(tokens, "--tokens"))
        if json:
            extra = {} if total is None else {"total_parameters": total, "embeddings": list(tables or ())}
            print_json({**found.to_dict(), **extra})
            return
        print(f"peak learning rate  {found.lr:.3e}, after warm-up, down to {found.final_lr:g} at the end")
        print(f"batch               {found.batch_tokens:,.0f} tokens")
        if total is not None:
            names = ", ".join(tables or ()) or "none"
            print(f"parameters          {count:,.0f} of {total:,} without embeddings ({names})")
        for warning in found.warnings:
            print(f"warning: {warning}")


def _counted(source: str) -> tuple[int, float, tuple[str, ...]]:
    """All parameters, those without embeddings, and the embeddings."""
    from regauge.optim.steplaw import non_embedding

    module = packaged_module(source)
    if module is None:
        from regauge.api import resolve
        from regauge.hf import load_meta

        held = load_meta(resolve(source))
        module = held.model, held.inputs
    found = non_embedding(*module)
    return found.total, float(found.rest), found.tables


def _number(text: str, option: str) -> float:
    match = re.fullmatch(
        r"\s*([0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)\s*", text, re.IGNORECASE
    )
    if match is None:
        raise BadInput(f"{option} is not a number", expected="a number such as 430M, 20B or 2e10", found=text)
    return float(match[1].replace("_", "")) * _UNITS[match[2].upper()]
