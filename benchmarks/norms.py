"""What another normalisation is worth, layer by layer: LayerNorm, RMSNorm, CRMSNorm, with and without gain.

Ratios to LayerNorm with gain and shift, see ``timing.py``; eager and compiled. Many rows change from call to
call, so that no cache holds them; a few do not. Whole blocks are in ``blocks.py``.

    python benchmarks/norms.py --device cuda
    python benchmarks/norms.py --quick           # does it run; nothing is written
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from regauge.modeling_regauge import Norm
from timing import BEYOND_CACHE, Bench, Variants, compiler, keep, parser

MODES = ("eager", "compiled")
LAYERS: dict[str, dict[str, Any]] = {
    "layer": {"form": "layer", "weight": True, "bias": True},
    "layer-plain": {"form": "layer"},
    "rms": {"form": "rms", "weight": True},
    "rms-plain": {"form": "rms"},
    "crms": {"form": "crms"},
    "chart": {"form": "chart"},
}


def layer_case(bench: Bench, width: int, rows: int) -> list[dict[str, Any]]:
    sets, times = 1, 32
    if rows > 8 and not bench.quick:
        sets, times = max(3, math.ceil(BEYOND_CACHE / (rows * width * bench.dtype.itemsize))), 1
    inputs = [
        [torch.randn(1, rows, size, **bench.here) for _ in range(sets)] * times for size in (width, width - 1)
    ]

    def build(mode: str) -> Variants:
        variants: Variants = {}
        for name, options in LAYERS.items():
            less = options["form"] in ("crms", "chart")
            norm = Norm(size=width - less, eps=1e-5, **options, **bench.here)
            variants[name] = compiler(mode)(norm), inputs[less]
        return variants

    return bench.case({"width": width, "rows": rows, "dtype": str(bench.dtype)[6:]}, build, MODES)


def main() -> None:
    given = parser(__doc__).parse_args()
    bench = Bench(given.device, given.quick, given.seconds)
    torch.manual_seed(0)
    widths = (768,) if given.quick else (768, 1024, 2048, 4096, 8192)
    rows = (1, 512) if given.quick else (1, 8, 4096, 16384) if bench.gpu else (1, 8, 512)
    with torch.no_grad():
        cases = [case for shape in product(widths, rows) for case in layer_case(bench, *shape)]
    keep("norms", bench, "layers", cases)


if __name__ == "__main__":
    main()
