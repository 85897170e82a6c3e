"""python -m examples.mnist.measure: the figures of README.md and the sample sheets."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dss_fast import Target, sample
from dss_fast.distance import frechet_distance

from . import data, decode, flow, flow16, load_classifier, load_flow, load_flow16, load_vp, real_features, vp
from .model import NULL_CLASS, vp_alpha_sigma

HERE = Path(__file__).parent
FINE = {"flow": "ab4/32", "flow16": "ab4/32", "vp": "dpmpp_3m/32@lambda"}
LOADERS = {"flow": load_flow, "flow16": load_flow16, "vp": load_vp}
TARGETS = {"flow": flow, "flow16": flow16, "vp": vp}


def noised(kind: str, images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Held-out points of a model: x, network time, target, and the best linear prediction of it.

    Times are uniform in the model's own time, noise is drawn from the seed. The linear prediction
    takes every pixel as Gaussian with the images' mean and variance there: what no learning gives.
    """
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    mean, variance = images.mean(0), images.var(0)
    t = 1e-3 + 0.998 * t
    alpha, sigma = vp_alpha_sigma(t) if kind == "vp" else (t, 1 - t)
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    x = alpha * images + sigma * noise
    scaled = (x - alpha * mean) / (alpha**2 * variance + sigma**2)
    linear_x0, linear_noise = mean + alpha * variance * scaled, sigma * scaled
    if kind == "vp":
        return x, 1000 * t, noise, linear_noise
    return x, t, images - noise, linear_x0 - linear_noise


@torch.no_grad()
def prediction_errors(kind: str, repeats: int = 4, count: int = 500) -> tuple[float, float, float]:
    """Held-out mean squared error: with the class, without it, and of the linear prediction."""
    model = LOADERS[kind]()
    images, labels = (part[:count] for part in data.held_out_split())
    images = data.halved(images) if kind == "flow16" else images
    errors = torch.zeros(3)
    for seed in range(repeats):
        x, t, target, linear = noised(kind, images, seed)
        null = torch.full_like(labels, NULL_CLASS)
        for k, guess in enumerate((model(x, t, labels), model(x, t, null), linear)):
            errors[k] += F.mse_loss(guess, target) / repeats
    return tuple(errors.tolist())


@torch.no_grad()
def milliseconds(target: Target, batch: int = 64, repeats: int = 10) -> float:
    """CPU time per image and evaluation, the fastest of some calls; other work does not count."""
    assert target.shape is not None
    model = target.model
    x, t, y = torch.randn(batch, *target.shape), torch.full((batch,), 0.5), torch.arange(batch) % 10
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        model(x, t, y)
        best = min(best, time.process_time() - start)
    return 1000 * best / batch


def digits_from(target: Target, solver: str, labels: Tensor, seed: int) -> Tensor:
    """One image per label, (n, *S), in parts of 100."""
    noise = torch.randn(len(labels), *target.shape, generator=torch.Generator().manual_seed(seed))
    parts = zip(noise.split(100), labels.split(100), strict=True)
    return torch.cat([sample(target, x, solver, cond={"y": y}) for x, y in parts])


def save_sheet(path: Path, images: Tensor, columns: int, zoom: int = 3) -> None:
    """A PNG of images (n, 1, H, W) in rows of `columns`."""
    from matplotlib.image import imsave

    rows = decode(images)[:, 0].unflatten(0, (-1, columns))
    sheet = rows.permute(0, 2, 1, 3).reshape(-1, columns * images.shape[-1])
    sheet = sheet.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    imsave(path, sheet.numpy(), cmap="gray", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.mnist.measure", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(FINE), help="some of flow, flow16, vp")
    parser.add_argument("--samples", type=int, default=500, help="images per model and figure")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--sheets", type=Path, default=HERE, help="folder for the PNGs")
    args = parser.parse_args()
    torch.set_num_threads(1)

    classifier = load_classifier()
    images, truth = data.held_out_split()
    accuracy = (classifier(images).argmax(1) == truth).float().mean()
    print(f"classifier: held-out accuracy {accuracy:.3f}", flush=True)
    real = real_features(flow())
    print(f"held-out against training images: Frechet {frechet_distance(real[:500], real[500:]):.2f}")
    for kind in args.kinds:
        target = TARGETS[kind](args.guidance)
        count = sum(p.numel() for p in target.model.parameters())
        print(f"{kind}: {count:,} parameters, {milliseconds(target):.2f} ms per image")
        given, null, linear = prediction_errors(kind)
        print(f"{kind}: held-out MSE {given:.4f}, {null:.4f} without class, {linear:.4f} linear")
        labels = torch.arange(args.samples) % 10
        drawn = digits_from(target, FINE[kind], labels, seed=0)
        accuracy = (target.classify(drawn).argmax(1) == labels).float().mean()
        distance = frechet_distance(target.features(drawn), real_features(target))
        print(f"{kind}: {FINE[kind]}: label accuracy {accuracy:.3f}, Frechet {distance:.2f}")
        sheet = digits_from(target, FINE[kind], torch.arange(80) // 8, seed=1)
        save_sheet(args.sheets / f"samples_{kind}.png", sheet, columns=8)


if __name__ == "__main__":
    main()
