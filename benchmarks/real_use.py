"""What sampling and searching cost a network of FLUX's size: random weights, 1024 x 1024 pixels, bfloat16.

    python benchmarks/real_use.py ROWS.jsonl [--tiny]

Seconds and peak bytes of ten steps, eager and as one CUDA graph; of one gradient with the network's own checkpointing
and without; and the batch, memory and time that a search plans. The network is diffusers' FluxTransformer2DModel where
diffusers is installed, else examples/flux.py, which is the same. Needs 40 GB of a GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import DEVICE, conditions  # noqa: E402

from dss_fast import Flow, Target, plan, sample  # noqa: E402
from examples.flux import Flux  # noqa: E402

NEEDED = 40e9  # bytes: 24 for the weights, the rest for a gradient
BUDGET = 3000  # model evaluations of the search that is planned
SIZES = {"text": 512, "side": 64, "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
TINY: dict[str, Any] = {
    "text": 3, "side": 4, "in_channels": 8, "joint_attention_dim": 12, "pooled_projection_dim": 6, "num_layers": 1,
    "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def network(options: dict[str, Any]) -> tuple[nn.Module, str]:
    """The transformer with random weights on the device, and whose it is."""
    try:
        from diffusers import FluxTransformer2DModel

        kind, name = FluxTransformer2DModel, "diffusers"
    except ImportError:
        kind, name = Flux, "examples/flux.py"
    with torch.device("meta"):
        net = kind(**options, guidance_embeds=True).to(torch.bfloat16)
    net = net.to_empty(device=DEVICE).eval().requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if p.dim() == 2:
                p.normal_(std=0.02)
            else:
                p.fill_(0 if key.endswith("bias") else 1)
    return net, name


def model_of(net: nn.Module, text: int, side: int) -> Callable[..., Tensor]:
    """model(x, t, prompt, pooled), x (B, side^2, channels) packed latents in float32, t the noise level."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(DEVICE, torch.float32)
    words = torch.zeros(text, 3, device=DEVICE)

    def model(x: Tensor, t: Tensor, prompt: Tensor, pooled: Tensor) -> Tensor:
        return net(
            hidden_states=x.bfloat16(), encoder_hidden_states=prompt, pooled_projections=pooled, timestep=t,
            img_ids=image, txt_ids=words, guidance=torch.full_like(t, 3.5), return_dict=False,
        )[0]  # fmt: skip

    return model


def measured(run: Callable[[], Any]) -> dict[str, float | None]:
    """Seconds of a run, and the peak of what it allocates beside what was there, None on a CPU."""
    if DEVICE.type != "cuda":
        begin = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - begin, "bytes": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    run()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begin, "bytes": torch.cuda.max_memory_allocated() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines are appended here as soon as they are known")
    parser.add_argument("--tiny", action="store_true", help="two blocks, two steps")
    options = parser.parse_args()
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0
    if free < NEEDED and not options.tiny:
        return print(f"skipped: {free / 1e9:.0f} GB of a GPU's memory are free, {NEEDED / 1e9:.0f} are needed")
    sizes = dict(TINY if options.tiny else SIZES)
    text, side, n = sizes.pop("text"), sizes.pop("side"), 2 if options.tiny else 10
    net, name = network(sizes)
    model, shape = model_of(net, text, side), (side**2, sizes["in_channels"])

    def row(figure: str, **found: Any) -> None:
        print(figure, found, flush=True)
        with options.rows.open("a") as file:
            file.write(json.dumps({"stage": "real", "network": name, "figure": figure, **found, **conditions()}) + "\n")

    def prompts(count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        drawn = (torch.randn(count, *size, generator=generator) for size in
                 ((text, sizes["joint_attention_dim"]), (sizes["pooled_projection_dim"],)))  # fmt: skip
        return dict(zip(("prompt", "pooled"), (t.to(DEVICE, torch.bfloat16) for t in drawn), strict=True))

    schedule = Flow.dynamic(side**2, convention="diffusers", time_scale=1.0)
    target = Target(model, shape, schedule=schedule, cond=prompts, device=DEVICE, key="flux", name="flux")
    cond, noise = prompts(1), torch.randn(1, *shape, device=DEVICE)
    for figure, captured in (("sample, eager", False), ("sample, one graph", True)):
        if captured and DEVICE.type != "cuda":
            continue

        def run(captured: bool = captured) -> Tensor:
            return sample(target, noise, f"ab2/{n}", cond=cond, cuda_graph=captured)

        run()  # compiles, captures
        row(figure, num_steps=n, **measured(run))
    from dss_fast.graph import forget

    forget()
    x, t = noise.clone().requires_grad_(), torch.full((1,), 0.5, device=DEVICE)
    for figure, change in (("gradient, checkpointing", "enable"), ("gradient, all kept", "disable")):
        getattr(net, f"{change}_gradient_checkpointing")()

        def back() -> Any:
            return torch.autograd.grad(model(x, t, **cond).float().square().sum(), x)

        try:
            measured(back)
            row(figure, **measured(back))
        except torch.OutOfMemoryError as error:
            print(f"{figure}: {error}".splitlines()[0], flush=True)
    net.enable_gradient_checkpointing()
    free = torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else None
    for steps in (2,) if options.tiny else (5, 10):
        found = plan(target, steps, budget=BUDGET)
        print(found)
        row("plan", num_steps=steps, budget=BUDGET, batch_size=found.batch_size, samples=found.samples,
            minutes=found.minutes, bytes=found.memory.total, free=free)  # fmt: skip


if __name__ == "__main__":
    main()
