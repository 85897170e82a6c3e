"""What the zoo is made of: pictures and digits that ship inside Python packages, and shapes drawn here.

Images are float32 in [-1, 1]. `batch(name, n, generator)` draws what a network of the zoo is trained on.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.mnist import data as mnist

# scikit-learn's two photographs, and of scikit-image what its wheel holds, not what it downloads.
PHOTOS = ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg")
COLOURS = tuple(
    f"skimage/data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
)
TEXTURES = tuple(f"skimage/data/{name}.png" for name in ("brick", "grass", "gravel"))
INSTALLED_AS = {"sklearn": "scikit-learn", "skimage": "scikit-image"}


def installed(path: str) -> Path:
    """A file of an installed package, which is not imported; ModuleNotFoundError names the one that is missing."""
    package, _, rest = path.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{path} comes with {package}: pip install {INSTALLED_AS[package]}")
    return Path(spec.origin).parent / rest


@cache
def pictures(paths: tuple[str, ...], mode: str = "RGB", smaller: int = 1) -> tuple[Tensor, ...]:
    """Each file as (3, H, W), or (1, H, W) in mode "L": means over squares of `smaller` pixels."""
    from PIL import Image

    found = []
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(installed(path)).convert(mode), dtype=np.float32))
        image = (pixels / 127.5 - 1).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        found.append(F.avg_pool2d(image[None], smaller)[0])
    return tuple(found)


def crops(images: tuple[Tensor, ...], side: int, n: int, generator: torch.Generator) -> Tensor:
    """(n, C, side, side): squares from anywhere in any of the images, half of them mirrored."""
    draws = torch.rand(n, 4, generator=generator).tolist()
    parts = []
    for which, down, right, mirrored in draws:
        image = images[int(which * len(images))]
        top, left = (int(at * (size - side + 1)) for at, size in zip((down, right), image.shape[1:], strict=True))
        part = image[:, top : top + side, left : left + side]
        parts.append(part.flip(2) if mirrored < 0.5 else part)
    return torch.stack(parts)


def faces() -> Tensor:
    """(100, 1, 25, 25): the faces of scikit-image's part of Labeled Faces in the Wild."""
    return torch.from_numpy(np.load(installed("skimage/data/lfw_subset.npy"))[:100]).float()[:, None] * 2 - 1


def moons() -> Tensor:
    """(200, 2): two interleaved half circles of radius 1."""
    angles = torch.linspace(0, math.pi, 100)
    upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], dim=1)
    return torch.cat([upper, -upper])


def spiral() -> Tensor:
    """(200, 2): two turns, the radius from 0.2 to 2."""
    along = torch.linspace(0, 1, 200)
    angles, radius = 4 * math.pi * along.sqrt(), 0.2 + 1.8 * along.sqrt()
    return torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1)


def gaussians() -> tuple[Tensor, Tensor]:
    """Centres (20, 16) and bandwidths (16,); both fall along the axes, as principal components do, from 2 to 0.1."""
    scales = torch.logspace(math.log10(2.0), -1, 16)
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(0)) * scales, 0.3 * scales


def patches() -> Tensor:
    """(1500, 192): 8 x 8 squares of the two photographs."""
    return crops(pictures(PHOTOS), 8, 1500, torch.Generator().manual_seed(0)).flatten(1)


@cache
def small_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits (1797, 1, 8, 8) and what they are, (1797,) int64; sklearn takes a second to import."""
    table = np.loadtxt(installed("sklearn/datasets/data/digits.csv.gz"), delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8) / 8 - 1
    return images, torch.from_numpy(table[:, -1]).long()


def enlarged_digits() -> Tensor:
    """(1797, 256): `small_digits` at 16 x 16."""
    return F.interpolate(small_digits()[0], scale_factor=2.0, mode="bilinear").flatten(1)


def batch(name: str, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Images (n, *S) that a network learns from and their classes (n,) int64, None where it has none."""
    data = name.split("_")[0]
    if data == "photos16":
        return crops(pictures(PHOTOS), 16, n, generator), None
    if data == "colours16":
        return crops(pictures(COLOURS, smaller=2), 16, n, generator), None
    if data == "textures32":
        return crops(pictures(TEXTURES, "L"), 32, n, generator), None
    if data == "photos64":
        return crops(pictures(PHOTOS + COLOURS, smaller=3), 64, n, generator), None
    if data == "faces24":
        chosen = faces()[torch.randint(100, (n,), generator=generator)]
        return torch.cat([crops((face,), 24, 1, generator) for face in chosen]), None
    images, labels = small_digits() if data == "digits8" else mnist.train_split()
    picks = torch.randint(len(images), (n,), generator=generator)
    clean = images[picks]
    if data == "digits24":
        clean = mnist.shifted(clean, generator)[..., 2:-2, 2:-2]
    elif data == "digits16":
        clean = mnist.halved(mnist.shifted(clean, generator))
    return clean, labels[picks]
