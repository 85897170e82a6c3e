"""Small class-conditional digit models to search solvers for: a rectified flow, a VP model, and a flow of 16x16 digits.

`flow`, `flow_guided`, `flow16`, `vp` and `vp_guided` each return a Target, which `dss_fast.search`, `sample`, `compare`
and the command line (`search examples.mnist:flow`) take.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dss_fast import VP, Flow, Target
from dss_fast.schedule import Schedule

from .model import NULL_CLASS, Classifier, DiT, SmallClassifier, UNet, VPModel

WEIGHTS = Path(__file__).parent / "weights"


def _frozen(module: nn.Module, name: str) -> nn.Module:
    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        command = f"python -m examples.mnist.train {name}"
        raise FileNotFoundError(f"no weights at {path}; make them with: {command}")
    module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return module.eval().requires_grad_(False)


def load_flow() -> DiT:
    """model(x, t, y) -> velocity x0 - eps at x = t x0 + (1 - t) eps; t (B,) in [0, 1]; frozen."""
    return _frozen(DiT(), "flow")


def load_flow16() -> UNet:
    """model(x, t, y) -> velocity, as `load_flow`, of 16x16 digits by a convolutional U-Net; frozen."""
    return _frozen(UNet(), "flow16")


def load_vp() -> VPModel:
    """model(x, t, y) -> epsilon at x = alpha x0 + sigma eps; t (B,) in [1, 1000]; frozen."""
    return VPModel(_frozen(DiT(), "vp")).eval()


def load_classifier() -> Classifier:
    """classifier(images (B, 1, 28, 28)) -> logits (B, 10); `.features` -> (B, 64); frozen."""
    return _frozen(Classifier(), "classifier")


def draw_labels(n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """{"y": (n,) int64}, uniform over the ten digits."""
    return {"y": torch.randint(NULL_CLASS, (n,), generator=generator)}


def labels(cond: Mapping[str, Tensor]) -> Tensor:
    """(B,) int64: the digits that were asked for."""
    return cond["y"]


def decode(x: Tensor) -> Tensor:
    """Samples in [-1, 1] to images in [0, 1], clipped; same shape."""
    return ((x + 1) / 2).clamp(0, 1)


def real_features(target: Target) -> Tensor:
    """(5000, 64): the classifier's features of all real images at a target's size, for a Frechet distance."""
    from .data import digits, halved

    assert target.features is not None
    images = digits()[0] if target.shape == (1, 28, 28) else halved(digits()[0])
    return torch.cat([target.features(part) for part in images.split(500)])


def _target(model: nn.Module, schedule: Schedule, guidance_scale: float, side: int = 28) -> Target:
    classifier = load_classifier() if side == 28 else SmallClassifier(load_classifier()).eval()
    return Target(
        model,
        (1, side, side),
        schedule,
        cond=draw_labels,
        uncond={"y": NULL_CLASS},
        guidance_scale=guidance_scale,
        features=classifier.features,
        classify=classifier,
        labels=labels,
        decode=decode,
    )


def flow(guidance_scale: float = 1.0) -> Target:
    """The rectified flow, by default without guidance."""
    return _target(load_flow(), Flow(), guidance_scale)


def flow_guided() -> Target:
    """The rectified flow at guidance 1.5: two network evaluations per step."""
    return flow(1.5)


def flow16(guidance_scale: float = 1.0) -> Target:
    """The rectified flow of 16x16 digits, by default without guidance: another network, size and resolution."""
    return _target(load_flow16(), Flow(), guidance_scale, side=16)


def vp(guidance_scale: float = 1.0) -> Target:
    """The VP model, by default without guidance."""
    return _target(load_vp(), VP(), guidance_scale)


def vp_guided() -> Target:
    """The VP model at guidance 1.5: two network evaluations per step."""
    return vp(1.5)
