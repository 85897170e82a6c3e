"""Solvers for SiT and DiT on ImageNet: search one, sample 50,000 images, write what ADM's evaluator reads.

    python -m examples.imagenet256 search --model sit --checkpoint SiT-XL-2-256x256.pt --steps 10 --out sit-10.json
    torchrun --nproc_per_node=8 -m examples.imagenet256 sample --model sit --checkpoint SiT-XL-2-256x256.pt \\
        --vae sd-vae-ft-ema --solver sit-10.json --out out/sit-10
    python evaluator.py VIRTUAL_imagenet256_labeled.npz out/sit-10.npz        # openai/guided-diffusion

The checkpoints are those of facebookresearch/DiT and willisma/SiT, published or of their train.py; the size of the
network and of its images is read from the weights. The autoencoder is stabilityai/sd-vae-ft-ema, a
folder for diffusers. Interrupted sampling goes on where it was. Guidance as in the paper: 1.375 for SiT on all
channels, 1.5 for DiT on the first three of four.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dss_fast import VP, Flow, Solver, Target, find_solver, sample, search
from dss_fast.searching.processes import take_local_device

from .imagenet import images
from .imagenet.model import Transformer, load

CLASSES = 1000
SHAPE = (4, 32, 32)
LATENT_SCALE = 0.18215
GUIDANCE = {"sit": (1.375, None), "dit": (1.5, 3)}


def target(kind: str, network: Transformer, guidance_scale: float = 1.0, guided_channels: int | None = None) -> Target:
    """The target of a network: SiT is a flow in the paper's own convention, DiT the paper's VP model.

    The paper searches without guidance and samples with it.
    """
    classes = _classes(network)
    size = int(network.pos_embed.shape[1] ** 0.5) * network.patch

    def draw(n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"y": torch.randint(classes, (n,), generator=generator)}

    return Target(
        network,
        (network.channels, size, size),
        Flow() if kind == "sit" else VP(),
        cond=draw,
        uncond={"y": torch.tensor([classes])},
        guidance_scale=guidance_scale,
        guided_channels=guided_channels,
        name=f"{kind}-{len(network.blocks)}-{network.patch}-{8 * size}-searched",
    )


def _classes(network: Transformer) -> int:
    """Without the null class, the last row of the table."""
    return network.y_embedder.embedding_table.num_embeddings - 1


def sit(checkpoint: str = "SiT-XL-2-256x256.pt") -> Target:
    """For the command line."""
    return target("sit", load(checkpoint))


def dit(checkpoint: str = "DiT-XL-2-256x256.pt") -> Target:
    """For the command line."""
    return target("dit", load(checkpoint))


def decoder(path: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """latents (B, 4, h, w) -> (B, 8h, 8w, 3) uint8, through a KL autoencoder in diffusers' layout."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(path, torch_dtype=dtype).to(device).eval()

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        pictures = vae.decode((latents / LATENT_SCALE).to(dtype)).sample
        return to_bytes(pictures)

    return decode


def to_bytes(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, as ADM and DiT do it."""
    return (127.5 * pictures.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@torch.no_grad()
def make_images(
    first: int,
    count: int,
    *,
    target: Target,
    solver: Solver | str,
    decode: Callable[[Tensor], Tensor],
    batch: int,
    seed: int,
) -> Tensor:
    """Images first .. first + count - 1, (count, H, W, 3) uint8."""
    parts, classes = [], _classes(target.model)
    for start in range(first, first + count, batch):
        rows = min(batch, first + count - start)
        noise, y = images.draw(start, rows, target.shape, classes, seed)
        latents = sample(target, noise, solver, cond={"y": y})
        parts.append(decode(latents).cpu())
    return torch.cat(parts)


def run_sampling(
    target: Target,
    solver: Solver | str,
    decode: Callable[[Tensor], Tensor],
    out: Path,
    *,
    total: int,
    chunk: int,
    batch: int,
    seed: int,
) -> Path | None:
    """All images over all processes of torchrun; the first process then writes ``out.npz``."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    make = partial(make_images, target=target, solver=solver, decode=decode, batch=batch, seed=seed)
    report = (lambda i, n: print(f"chunk {i + 1} of {n}", flush=True)) if rank == 0 else None
    images.write_chunks(out, total, chunk, make, rank, world, report)
    if world > 1:
        torch.distributed.barrier()
    return images.merge(out, total, chunk, out.parent / f"{out.name}.npz") if rank == 0 else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("search", "sample"))
    parser.add_argument("--model", choices=("sit", "dit"), required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", type=Path, required=True, help="search: a JSON file; sample: a folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--solver", help="sample: a name or a JSON file; the published one of --steps by default")
    parser.add_argument("--vae", help="sample: the folder of sd-vae-ft-ema")
    parser.add_argument("--guidance", type=float, help="default: the paper's when sampling, 1 when searching")
    parser.add_argument("--total", type=int, default=50_000)
    parser.add_argument("--chunk", type=int, default=500, help="images a file")
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args(arguments)

    take_local_device()  # before the network is loaded there
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group()
    dtype = getattr(torch, options.dtype) if device.type == "cuda" else torch.float32
    network = load(options.checkpoint).to(device, dtype)

    if options.command == "search":
        model = target(options.model, network, options.guidance or 1.0, GUIDANCE[options.model][1])
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        result = search(model, options.steps, seed=options.seed, group=group)
        if int(os.environ.get("RANK", 0)) == 0:
            result.solver.save(options.out)
            print(f"wrote {options.out}")
        return
    if not options.vae:
        parser.error("sample needs --vae, a folder of sd-vae-ft-ema")
    scale, channels = GUIDANCE[options.model]
    model = target(options.model, network, options.guidance or scale, channels)
    published = {"sit": "sit-xl-2-256", "dit": "dit-xl-2-256"}[options.model]
    solver = find_solver(options.solver or published, model.schedule, options.steps)
    sizes = {"total": options.total, "chunk": options.chunk, "batch": options.batch, "seed": options.seed}
    done = run_sampling(model, solver, decoder(options.vae, device, dtype), options.out, **sizes)
    if done:
        print(f"wrote {done}")


if __name__ == "__main__":
    main()
