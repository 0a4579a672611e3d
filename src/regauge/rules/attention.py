"""Scaled dot-product attention: scores, softmax over keys, average of values."""

from __future__ import annotations

from typing import Any

from regauge.facts import Law, Value
from regauge.interpret import Walk
from regauge.rules.elementwise import first
from regauge.rules.table import Table

RULES = Table()


@RULES.op("aten.scaled_dot_product_attention", "aten._scaled_dot_product_flash_attention_for_cpu")
def attention(walk: Walk, node: Any, q: Value, k: Value, v: Value, mask: Value | None = None,
              dropout: float = 0.0, causal: bool = False, **kwargs: Any) -> Any:  # fmt: skip
    """o[…, t, :] = Σ_s softmax_s(q_t · k_s + mask) v_s. Queries and keys are dual; the weights of a
    query sum to one; with ``enable_gqa`` every key head serves a group of consecutive query heads."""
    if dropout > 0:
        raise ValueError("dropout that is not switched off in eval mode")
    lead = [f"b{i}" for i in range(q.rank - 2)]
    if kwargs.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        group = q.shape[-3] // k.shape[-3]
        k, v = (_repeat(walk, x, group) for x in (k, v))
    scores = walk.contract(q, k, [*lead, "t", "d"], [*lead, "s", "d"], [*lead, "t", "s"])
    if mask is None and causal:
        mask = walk.given(scores.shape[-2:])
    if mask is not None:
        both_given = scores.given or mask.given
        scores = walk.pointwise([scores, mask], Law.SHIFT if both_given else Law.SUM)
    weights = walk.softmax(scores, -1)
    if mask is not None and mask.varies:
        weights.normalised = None  # a row whose keys are all masked averages nothing: it gives zero
    out = walk.contract(weights, v, [*lead, "t", "s"], [*lead, "s", "e"], [*lead, "t", "e"])
    return first(walk, node, q, out) if isinstance(node.meta["val"], (list, tuple)) else out


def _repeat(walk: Walk, x: Value, group: int) -> Value:
    """Every head repeated ``group`` times in place: heads × group with the group innermost."""
    axis = x.rank - 3
    wide = walk.reshape(x, (*x.shape[: axis + 1], 1, *x.shape[axis + 1 :]))
    wide = walk.expand(wide, (*x.shape[: axis + 1], group, *x.shape[axis + 1 :]))
    return walk.reshape(wide, (*x.shape[:axis], x.shape[axis] * group, *x.shape[axis + 1 :]))
