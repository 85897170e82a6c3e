"""python -m examples.mnist.train {flow,vp,flow16,classifier}: trains a model and writes its fp16 weights.

Stop it at any time; run again, it goes on from its last checkpoint. Every batch depends only on
the seed and the step, so a resumed run sees the data an uninterrupted one would have seen.
`torchrun --nproc_per_node=2 -m examples.mnist.train flow` splits each batch over processes;
`vp --start-from examples/mnist/weights/flow.safetensors` starts from another model's weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from . import data
from .model import NULL_CLASS, Classifier, DiT, UNet, vp_alpha_sigma

Optimizers = list[torch.optim.Optimizer]
LABEL_DROPOUT = 0.1
WEIGHTS = Path(__file__).parent / "weights"


def draw_flow_times(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Flow times s: half logit-normal, the rest uniform in s (a flow) or in the VP time (vp)."""
    middle = torch.randn(count, generator=generator).sigmoid()
    spread = torch.rand(count, generator=generator)
    if kind == "vp":
        alpha, sigma = vp_alpha_sigma(1e-3 + 0.999 * spread)
        spread = alpha / (alpha + sigma)
    return torch.where(torch.arange(count) % 2 == 0, middle, spread)


def velocity_loss(model: nn.Module, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """mean |model(x_t, t, y) - (x0 - eps)|^2 at x_t = t x0 + (1 - t) eps; t (B,).

    The same point read as VP has t times this error in epsilon, so one loss serves both models.
    """
    mix = t[:, None, None, None]
    return F.mse_loss(model(mix * images + (1 - mix) * noise, t, labels), images - noise)


def diffusion_batch_loss(kind: str, model: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    images, labels = data.train_split()
    picks = torch.randint(len(images), (batch,), generator=generator)
    dropped = torch.rand(batch, generator=generator) < LABEL_DROPOUT
    labels = torch.where(dropped, NULL_CLASS, labels[picks])
    clean = data.shifted(images[picks], generator)
    if kind == "flow16":
        clean = data.halved(clean)
    noise = torch.randn(clean.shape, generator=generator)
    return velocity_loss(model, clean, labels, draw_flow_times(kind, batch, generator), noise)


def classifier_batch_loss(model: nn.Module, batch: int, generator: torch.Generator) -> Tensor:
    images, labels = data.train_split()
    picks = torch.randint(len(images), (batch,), generator=generator)
    return F.cross_entropy(model(data.warped(images[picks], generator)), labels[picks], label_smoothing=0.05)


@torch.no_grad()
def held_out_report(kind: str, model: nn.Module) -> str:
    """The held-out velocity MSE at fixed noise and times, or the held-out accuracy."""
    model.eval()
    images, labels = data.held_out_split()
    if kind == "classifier":
        report = f"held-out accuracy {(model(images).argmax(1) == labels).float().mean():.4f}"
    else:
        images = data.halved(images) if kind == "flow16" else images
        generator = torch.Generator().manual_seed(1)
        times = draw_flow_times(kind, len(images), generator)
        noise = torch.randn(images.shape, generator=generator)
        report = f"held-out loss {velocity_loss(model, images, labels, times, noise):.5f}"
    model.train()
    return report


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear over the first 200 steps, 1 until 60 % of the run, then half a cosine to 0."""
    fall = max(0.0, (step / steps - 0.6) / 0.4)
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


def make_optimizers(model: nn.Module, lr: float) -> Optimizers:
    """Muon for the matrices inside the transformer blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def average_gradients(model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = flat.div_(dist.get_world_size()).split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def save_checkpoint(path: Path, step: int, model: nn.Module, ema: nn.Module, optimizers: Optimizers) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for k, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{name}": value for name, value in state.items()}
    partial = path.with_suffix(".partial")
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, partial, {"step": str(step)})
    partial.replace(path)


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizers: Optimizers) -> int:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(file.metadata()["step"])
    for prefix, module in (("model.", model), ("ema.", ema)):
        part = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        module.load_state_dict(part)
    for k, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{k}."):
                _, _, i, key = name.split(".")
                states.setdefault(int(i), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def save_weights(path: Path, ema: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in ema.state_dict().items()}
    save_file(tensors, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def train(args: argparse.Namespace, checkpoint: Path, weights: Path) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    kind = args.kind
    torch.manual_seed(args.seed)
    model: nn.Module = {"classifier": Classifier, "flow16": UNet}.get(kind, DiT)()
    if args.start_from:
        model.load_state_dict({name: value.float() for name, value in load_file(args.start_from).items()})
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, args.lr)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    start = load_checkpoint(checkpoint, model, ema, optimizers) if checkpoint.exists() else 0
    saved, smooth = time.monotonic(), None
    bar = tqdm(
        range(start, args.steps),
        initial=start,
        total=args.steps,
        desc=kind,
        mininterval=5,
        disable=rank > 0,
    )
    for step in bar:
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * world + rank)
        if kind == "classifier":
            loss = classifier_batch_loss(model, args.batch // world, generator)
        else:
            loss = diffusion_batch_loss(kind, model, args.batch // world, generator)
        loss.backward()
        if world > 1:
            average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate_factor(step, args.steps)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, value in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(value, 1 - decay)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if rank == 0 and (time.monotonic() - saved > args.every or step + 1 == args.steps):
            save_checkpoint(checkpoint, step + 1, model, ema, optimizers)
            save_weights(weights, ema)
            bar.write(f"step {step + 1}: training loss {smooth:.5f}, {held_out_report(kind, ema)}")
            saved = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.mnist.train", description=__doc__)
    parser.add_argument("kind", choices=("flow", "vp", "flow16", "classifier"))
    parser.add_argument("--steps", type=int, help="default: 3400, classifier 2500")
    parser.add_argument("--batch", type=int, help="images a step; default: 96, classifier 64")
    parser.add_argument("--lr", type=float, help="peak; default: 4e-3, classifier and flow16 2e-3")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the weight average")
    parser.add_argument("--start-from", type=Path, help="weights to start from instead of random ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--every", type=float, default=120, help="seconds between checkpoints")
    parser.add_argument("--checkpoint", type=Path, help="default: out/mnist-<kind>.safetensors")
    parser.add_argument("--weights", type=Path, help="default: <kind>.safetensors in examples/mnist/weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.steps = args.steps or (2500 if args.kind == "classifier" else 3400)
    args.batch = args.batch or (64 if args.kind == "classifier" else 96)
    args.lr = args.lr or (2e-3 if args.kind in ("classifier", "flow16") else 4e-3)
    checkpoint = args.checkpoint or Path("out") / f"mnist-{args.kind}.safetensors"
    weights = args.weights or WEIGHTS / f"{args.kind}.safetensors"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    train(args, checkpoint, weights)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
