"""Models of the zoo with random weights, and models moved by random elements of every generator."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regauge import hf
from regauge.act import act
from regauge.api import given_inputs
from regauge.elements import Element, random_element
from regauge.matching.order import LINEAR
from regauge.matching.sides import Rows, Side, side_of_module
from regauge.module_model import ModuleModel
from zoo.configs import CONFIGS


def drawn(name: str, seed: int = 0, **fields: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the zoo in float64 and its inputs; gains lie about one, maps keep the size of a vector."""
    config = CONFIGS[name]()
    for key, value in fields.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.model_class_of(config)(config).eval().to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            gain = value.dim() < 2 and bool((value == 1).all())
            value.copy_(noise / math.sqrt(value[0].numel()) if value.dim() > 1 else gain + 0.3 * noise)
    model.config.use_cache = False
    inputs = hf.example_inputs(model, config, batch=3, length=7, device="cpu", seed=0)
    return model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def side(model: nn.Module, inputs: Any) -> Side:
    return side_of_module(ModuleModel.of(model, *given_inputs(inputs)))


def elements_of(given: Side, seed: int) -> dict[str, Element]:
    """A random element for the id of every generator."""
    generator = torch.Generator().manual_seed(seed)
    return {
        g.id: random_element(g.kind, g.size, g.count, generator)
        for g in given.atlas.generators
        if g.kind in LINEAR
    }


def moved(given: Side, elements: dict[str, Element]) -> Side:
    """The same function in another gauge."""
    values = {name: given.read(name) for name in given.shapes}
    for g in given.atlas.generators:
        if g.id in elements:
            for action in g.actions:
                copies = tuple(name for name, _ in g.copies)
                values[action.parameter] = act(values[action.parameter], action, elements[g.id], copies)

    def read(name: str, rows: Rows = None) -> torch.Tensor:
        return values[name] if rows is None else values[name][rows[0] : rows[1]]

    return replace(given, values=read)
