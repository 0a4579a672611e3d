"""Which kinds of pair a name that the library gives to a change is right for."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.comparing.kinds import Kind

GROUPS: Mapping[Kind, tuple[str, ...]] = {
    Kind.COPY: ("copy",),
    Kind.BFLOAT16: ("bf16",),
    Kind.QUANTISED: ("int4", "int4 stored"),
    Kind.ZEROED: ("neurons zeroed",),
    Kind.RESIZED: ("neurons removed",),
    Kind.TRAINED: ("fine-tuned", "average of two tuned", "tuned siblings"),
    Kind.LOW_RANK: ("low rank",),
    Kind.AVERAGED: ("average with a twin",),
}
