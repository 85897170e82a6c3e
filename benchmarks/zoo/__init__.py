"""Flows of many kinds to find and to test tables on that travel: exact mixtures, and small networks trained here.

`target(name)` returns a Target; `NAMES` are the names, `KIND[name]` is "mixture", "conv", "transformer" or "mixer", so
that whole kinds can be left out. The networks' weights are beside this file; `python -m benchmarks.zoo.train NAME` made
them. The paper's flow: velocity x0 - eps at x = t x0 + (1 - t) eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dss_fast import Flow, Target
from examples.mixture import Mixture

from . import data
from .models import MLP, Patches, UNet, WideMixture

WEIGHTS = Path(__file__).parent / "weights"
DIGITS = 10


@dataclass(frozen=True)
class Entry:
    """kind: of the model. shape: of one sample. build: the model, of untrained weights where it has some.

    classes: of which each sample has one at random; 0: the model takes none.
    """

    kind: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    classes: int = 0


ZOO = {
    "moons_mixture": Entry("mixture", (2,), lambda: Mixture(data.moons(), 0.1)),
    "spiral_mixture": Entry("mixture", (2,), lambda: Mixture(data.spiral(), 0.1)),
    "gaussians16_mixture": Entry("mixture", (16,), lambda: WideMixture(*data.gaussians())),
    "patches8_mixture": Entry("mixture", (3, 8, 8), lambda: Mixture(data.patches(), 0.3)),
    "digits16_mixture": Entry("mixture", (1, 16, 16), lambda: Mixture(data.enlarged_digits(), 0.3)),
    "photos16_conv": Entry("conv", (3, 16, 16), lambda: UNet(3, (16, 32, 48))),
    "textures32_conv": Entry("conv", (1, 32, 32), lambda: UNet(1, (16, 24, 32))),
    "photos64_conv": Entry("conv", (3, 64, 64), lambda: UNet(3, (32, 48), stem=4)),
    "colours16_dit": Entry("transformer", (3, 16, 16), lambda: Patches(3, 16, 2, width=56, depth=3, heads=2)),
    "digits24_dit": Entry(
        "transformer", (1, 24, 24), lambda: Patches(1, 24, 4, 56, 3, heads=4, classes=DIGITS), DIGITS
    ),
    "faces24_dit": Entry("transformer", (1, 24, 24), lambda: Patches(1, 24, 3, width=48, depth=4, heads=3)),
    "digits16_mixer": Entry("mixer", (1, 16, 16), lambda: Patches(1, 16, 2, 56, 3, classes=DIGITS), DIGITS),
    "digits8_mlp": Entry("mixer", (1, 8, 8), lambda: MLP(64, 80, 2, classes=DIGITS), DIGITS),
}
NAMES = tuple(ZOO)
KIND = {name: entry.kind for name, entry in ZOO.items()}
TRAINED = tuple(name for name in NAMES if KIND[name] != "mixture")


def load(name: str) -> nn.Module:
    """The frozen float32 model of a name; FileNotFoundError where it is a network without weights."""
    if name not in ZOO:
        raise ValueError(f"name={name!r}: choose one of {', '.join(NAMES)}")
    model = ZOO[name].build()
    if name in TRAINED:
        path = WEIGHTS / f"{name}.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"no weights at {path}; make them with: python -m benchmarks.zoo.train {name}")
        model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def decode(x: Tensor) -> Tensor:
    """Samples in [-1, 1] to images in [0, 1], clipped; same shape."""
    return ((x + 1) / 2).clamp(0, 1)


def target(name: str) -> Target:
    """The Target of a name, with classes drawn at random where it has some and no guidance; ValueError for no name."""
    model, entry = load(name), ZOO[name]

    def draw(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"y": torch.randint(entry.classes, (n,), generator=generator)}

    return Target(
        model,
        entry.shape,
        Flow(),
        cond=draw if entry.classes else None,
        uncond={"y": entry.classes} if entry.classes else None,
        decode=decode if len(entry.shape) == 3 else None,
        name=name,
    )
