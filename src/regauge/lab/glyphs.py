"""Images of digits that nobody has to download: a 5×7 font, moved, sized, turned and covered with noise."""

from __future__ import annotations

import torch
from torch.nn import functional

_ROWS = (
    (0x0E, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0E),
    (0x04, 0x0C, 0x04, 0x04, 0x04, 0x04, 0x0E),
    (0x0E, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1F),
    (0x1F, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0E),
    (0x02, 0x06, 0x0A, 0x12, 0x1F, 0x02, 0x02),
    (0x1F, 0x10, 0x1E, 0x01, 0x01, 0x11, 0x0E),
    (0x06, 0x08, 0x10, 0x1E, 0x11, 0x11, 0x0E),
    (0x1F, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08),
    (0x0E, 0x11, 0x11, 0x0E, 0x11, 0x11, 0x0E),
    (0x0E, 0x11, 0x11, 0x0F, 0x01, 0x02, 0x0C),
)
"""Ten digits, seven rows from the top, the leftmost of five places in the highest bit."""


def font() -> torch.Tensor:
    """[10, 1, 7, 5], ones and zeros."""
    rows = torch.tensor(_ROWS)
    bits = rows[:, :, None] >> torch.arange(4, -1, -1)
    return (bits & 1).float()[:, None]


def digits(count: int, size: int = 8, noise: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 1, size, size] and what they show [count], always the same for a seed.

    Each is drawn with a random shift (up to a tenth of the image), size (0.8 to 1.1), angle (up to 0.2 in
    radians) and shear (up to 0.2), brightness 0.7 to 1, on 0, plus N(0, noise²).

    Args:
        count: images; each digit is about equally frequent.
        size: of an image.
        noise: standard deviation.
        seed: of all of it.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=random)

    labels = torch.randint(10, (count,), generator=random)
    dx, dy, scale = uniform(-0.2, 0.2), uniform(-0.2, 0.2), 1 / uniform(0.8, 1.1)
    angle, shear = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # A place of the image is looked up in the glyph, which is 5 / 7 as wide as it is high.
    wide = 7 / 5
    top = torch.stack((wide * cos, wide * (shear - sin), wide * dx), 1)
    low = torch.stack((sin, cos, dy), 1)
    grid = functional.affine_grid(torch.stack((top, low), 1), [count, 1, size, size], align_corners=False)
    images = functional.grid_sample(font()[labels], grid, align_corners=False)
    images = images * uniform(0.7, 1.0)[:, None, None, None]
    return images + noise * torch.randn(images.shape, generator=random), labels
