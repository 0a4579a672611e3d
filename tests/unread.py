"""Networks without the parts their function does not use: what is not read may be met on other inputs."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from regauge.trace import trace

Model = TypeVar("Model", bound=nn.Module)


def without_unread(module: Model, *inputs: torch.Tensor) -> Model:
    """The module, parts of which no parameter is read left out, in place."""
    traced = trace(module, inputs)
    nodes = [node for node in traced.graph.nodes if node.users]
    read = {traced.parameters[node.name] for node in nodes if node.name in traced.parameters}
    read |= {traced.parameters[node.name] for node in traced.outputs if node.name in traced.parameters}
    names = {alias for name in read for alias in traced.aliases[name]}
    for part in {name.split(".")[0] for name, _ in module.named_parameters(remove_duplicate=False)}:
        if not any(name == part or name.startswith(f"{part}.") for name in names):
            delattr(module, part)
    return module
