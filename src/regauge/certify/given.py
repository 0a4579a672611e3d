"""What the two functions are run on: tokens of a text, their digest, and the rows of tables they look up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from regauge.errors import BadInput
from regauge.trace import Trace


def token_ids(directory: Path, text: Path, tokens: int) -> list[int]:
    from transformers import AutoTokenizer

    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{text} cannot be read as UTF-8 text", found=f"{type(error).__name__}: {error}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise BadInput(
            f"{directory.name} has no tokenizer that transformers can load",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            way_out="copy the tokenizer's files into it, or certify on random tokens (no text)",
        ) from error
    # Sixteen characters a token is more than any tokenizer needs on plain text.
    found = tokenizer(content[: 16 * tokens + 64], add_special_tokens=True)["input_ids"]
    if len(found) < 2:
        raise BadInput(f"{text} is too short", expected="at least two tokens", found=str(len(found)))
    return [int(index) for index in found]


def text_batches(
    ids: list[int], shapes: Mapping[str, tuple[int, ...]], count: int
) -> list[dict[str, torch.Tensor]]:
    unknown = set(shapes) - {"input_ids", "decoder_input_ids"}
    if unknown:
        raise BadInput(
            "this model does not take text alone",
            found=", ".join(sorted(unknown)),
            way_out="certify on random inputs (no text)",
        )
    stream = torch.tensor(ids)
    position, batches = 0, list[dict[str, torch.Tensor]]()
    for _ in range(count):
        batch: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            where = (position + torch.arange(size)) % len(stream)
            batch[name] = stream[where].reshape(shape)
            position += size
        batches.append(batch)
    return batches


def digest_inputs(batches: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            digest.update(name.encode() + b"\0")
            digest.update(tensor_bytes(value) if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def looked_up(traced: Trace, batches: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Tables indexed by an input: parameter -> (different rows the inputs look up, rows in all)."""
    found: dict[str, tuple[int, int]] = {}
    batches = list(batches)
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.aten.embedding.default:
            continue
        table, index = node.args[0], node.args[1]
        while isinstance(index, fx.Node) and index.op == "call_function" and len(index.all_input_nodes) == 1:
            index = index.all_input_nodes[0]
        if not isinstance(index, fx.Node) or not isinstance(table, fx.Node):
            continue
        name = traced.parameters.get(table.name)
        if name is not None and index.name in traced.inputs and all(index.name in batch for batch in batches):
            ids = torch.cat([torch.as_tensor(batch[index.name]).reshape(-1) for batch in batches])
            found[name] = (int(ids.unique().numel()), traced.shapes[name][0])
    return found
