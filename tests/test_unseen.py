"""Parameters that the traced inputs do not reach: what they meet on other inputs stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regauge.api import load, rewrite, rewrite_module
from regauge.errors import Refused
from test_end_to_end import build


class Branch(nn.Module):
    """More than four rows are read by another map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) if len(x) < 5 else self.c(h)


@pytest.mark.parametrize("move", ["permute", "rescale", {"name": "grow", "neurons": "+2"}], ids=str)
def test_what_a_branch_reads_is_left_alone(move: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(Refused):
        rewrite_module(Branch(), (torch.randn(3, 6),), {"moves": [move]})


def test_what_lies_inside_other_modules_still_moves() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    model = nn.Sequential(inner, Branch(), nn.Linear(6, 6))
    changed, _ = rewrite_module(model, (torch.randn(3, 6),), {"moves": ["permute"]})
    assert not torch.equal(changed[0][0].weight, inner[0].weight)
    x = torch.randn(9, 6)
    assert torch.allclose(model(x), changed(x), atol=1e-5)


def llava() -> Any:
    import transformers

    sizes = {"intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=37, hidden_size=24, pad_token_id=0, **sizes)
    vision = transformers.CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, **sizes)
    return transformers.LlavaConfig(
        architectures=["LlavaForConditionalGeneration"], vision_config=vision, text_config=text,
        image_token_index=3, image_seq_length=4,
    )  # fmt: skip


def test_images_meet_the_stream_that_text_was_traced_in(tmp_path: Path) -> None:
    model = build("llava", llava())
    source = tmp_path / "source"
    model.save_pretrained(source)
    result = rewrite(source, tmp_path / "out", {"moves": ["permute", "rescale"]})
    assert result.certificate.passed
    ids = torch.tensor([[7, 3, 3, 3, 3, 9, 11]])
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        old, new = (
            m.eval()(input_ids=ids, pixel_values=pixels).logits for m in (model, load(tmp_path / "out"))
        )
    assert float((old - new).norm() / old.norm()) < 1e-5
    with pytest.raises(Refused, match="may meet"):
        rewrite(source, tmp_path / "wide", {"moves": [{"name": "grow", "residual": "+4"}]})
