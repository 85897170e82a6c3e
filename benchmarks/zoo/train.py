"""python -m benchmarks.zoo.train NAME ...: trains networks of the zoo one after another and writes their fp16 weights.

One thread, `--seconds` each: learning rate and end follow the clock, so weights differ from run to run. Each is
followed by its figures, of the weights as written: the velocity MSE beside that of a constant and of the best linear
prediction of each pixel, the samples' root mean square beside the data's, the time of an evaluation.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dss_fast import sample
from examples.mnist.train import LABEL_DROPOUT, draw_flow_times, make_optimizers

from . import TRAINED, WEIGHTS, ZOO, data, target

EMA = 0.997


def learning_rate_factor(part: float) -> float:
    """Linear over the first twentieth of the run, 1 until half of it, then half a cosine to 0."""
    return min(1.0, part / 0.05 + 0.01) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, 2 * part - 1))))


def noised(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, t (B,) and the velocity at x."""
    t = draw_flow_times("flow", len(images), generator)
    noise = torch.randn(images.shape, generator=generator)
    mix = t[:, None, None, None]
    return mix * images + (1 - mix) * noise, t, images - noise


def train(name: str, seconds: float, batch: int, lr: float, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model, classes = ZOO[name].build(), ZOO[name].classes
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, lr)
    generator = torch.Generator().manual_seed(seed)
    start, step, part, smooth = time.monotonic(), 0, 0.0, 0.0
    while part < 1:
        images, labels = data.batch(name, batch, generator)
        x, t, velocity = noised(images, generator)
        if labels is None:
            loss = F.mse_loss(model(x, t), velocity)
        else:
            dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
            loss = F.mse_loss(model(x, t, torch.where(dropped, classes, labels)), velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_factor(part)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA, (1 + step) / (10 + step))
        for average, value in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(value.detach(), 1 - decay)
        smooth = loss.item() if step == 0 else 0.99 * smooth + 0.01 * loss.item()
        if step % 200 == 0:
            print(f"{name}: step {step}, {time.monotonic() - start:.0f} s, training loss {smooth:.4f}", flush=True)
        step += 1
        part = (time.monotonic() - start) / seconds
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{name}.safetensors"
    save_file({key: value.half().contiguous() for key, value in ema.state_dict().items()}, path)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {step} steps, {count:,} parameters, {path.stat().st_size / 1000:.0f} kB", flush=True)


@torch.no_grad()
def report(name: str, n: int = 512) -> str:
    """The figures of the weights that are there, on draws that no training saw (of the same images)."""
    found = target(name)
    images, labels = data.batch(name, n, torch.Generator().manual_seed(12345))
    x, t, velocity = noised(images, torch.Generator().manual_seed(54321))
    given = () if labels is None else (labels,)
    output = torch.cat([found.model(*part) for part in zip(*(a.split(64) for a in (x, t, *given)), strict=True)])
    mean, variance = images.mean(0), images.var(0)
    mix = t[:, None, None, None]
    scaled = (x - mix * mean) / (mix**2 * variance + (1 - mix) ** 2)
    linear = mean + mix * variance * scaled - (1 - mix) * scaled
    constant, linear, own = (F.mse_loss(guess, velocity).item() for guess in (mean.expand_as(x), linear, output))
    samples = sample(found, 128, "ab2/24", generator=torch.Generator().manual_seed(0))
    fastest = math.inf
    for _ in range(10):
        begin = time.process_time()
        found.model(*(a[:64] for a in (x, t, *given)))
        fastest = min(fastest, (time.process_time() - begin) / 64)
    return (
        f"{name}: velocity MSE {own:.4f} (constant {constant:.4f}, linear {linear:.4f}), "
        f"RMS of samples {samples.square().mean().sqrt():.3f}, of data {images.square().mean().sqrt():.3f}, "
        f"std over samples {samples.std(0).mean():.3f}, of data {images.std(0).mean():.3f}, "
        f"{1000 * fastest:.3f} ms a sample"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.train", description=__doc__)
    parser.add_argument("names", nargs="+", choices=TRAINED, metavar="NAME", help=", ".join(TRAINED))
    parser.add_argument("--seconds", type=float, default=200, help="of training, each (default 200; 0: figures only)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak (default 2e-3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        if args.seconds:
            train(name, args.seconds, args.batch, args.lr, args.seed)
        print(report(name), flush=True)


if __name__ == "__main__":
    main()
