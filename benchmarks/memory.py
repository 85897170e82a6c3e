"""What a search of the models people have takes, counted on meta tensors: no weights, no GPU, a minute.

    python -m benchmarks.memory [--write docs/memory.md] [NAME ...]

For each network at its real size, one sample, bfloat16, attention without its matrix kept (flash attention): bytes that
one call saves for its backward, plain and with the network's own gradient checkpointing, floating point operations, and
the search's own plan for cards of 80 and 24 GB. Needs diffusers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dss_fast import Flow, Target
from dss_fast.searching import room
from dss_fast.searching.budget import Cost
from dss_fast.searching.job import prepare
from dss_fast.searching.plan import Memory, Sizes, limits, memory_of, with_room

META, HALF = torch.device("meta"), torch.bfloat16
SPEED = 400e12  # operations a second: 40 % of what an H100 is sold with, as large products reach
STEPS, BUDGETS = 10, (3_000, 30_000)
# Of a card: bytes, bytes of a weight, and what a search may use of what the weights leave, as it does by itself.
CARDS = {"80 GB, bf16": (80e9, 2), "24 GB, float8": (24e9, 1)}


@dataclass(frozen=True)
class Case:
    """A network, the shape of its latents, and one call of it with so many tokens of text; branches: calls a step."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Tensor]
    branches: int = 1


def new(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def at() -> Tensor:
    """The time of a call, which a search goes back to as well."""
    return new(1).requires_grad_(torch.is_grad_enabled())


def flux(net: nn.Module, x: Tensor) -> Tensor:
    ids = dict(img_ids=new(x.shape[1], 3), txt_ids=new(512, 3))
    text = dict(encoder_hidden_states=new(1, 512, 4096), pooled_projections=new(1, 768))
    return net(x, timestep=at(), guidance=new(1), **ids, **text, return_dict=False)[0]


def flux2(net: nn.Module, x: Tensor) -> Tensor:
    ids = dict(img_ids=new(1, x.shape[1], 4), txt_ids=new(1, 512, 4))
    text = new(1, 512, 15360)
    return net(x, encoder_hidden_states=text, timestep=at(), guidance=new(1), **ids, return_dict=False)[0]


def sd3(net: nn.Module, x: Tensor) -> Tensor:
    text = dict(encoder_hidden_states=new(1, 333, 4096), pooled_projections=new(1, 2048))
    return net(x, timestep=at(), **text, return_dict=False)[0]


def qwen(net: nn.Module, x: Tensor) -> Tensor:
    side = math.isqrt(x.shape[1])
    text = dict(encoder_hidden_states=new(1, 256, 3584), encoder_hidden_states_mask=None)
    return net(x, timestep=at(), img_shapes=[[(1, side, side)]], **text, return_dict=False)[0]


def wan(net: nn.Module, x: Tensor) -> Tensor:
    return net(x, at(), new(1, 512, 4096), return_dict=False)[0]


def ltx(net: nn.Module, x: Tensor) -> Tensor:
    text = (new(1, 128, 4096), at(), new(1, 128))
    return net(x, *text, num_frames=21, height=16, width=22, return_dict=False)[0]


def zimage(net: nn.Module, x: Tensor) -> Tensor:
    return net([x[0]], at(), [new(256, 2560)], return_dict=False)[0][0]


def cases() -> dict[str, Case]:
    """By name, at the size each is used at."""
    import diffusers as d

    guided = dict(guidance_embeds=True)
    large = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)
    return {
        "FLUX.1 dev, 1024 x 1024": Case(lambda: d.FluxTransformer2DModel(**guided), (4096, 64), flux),
        "FLUX.2 dev, 1024 x 1024": Case(d.Flux2Transformer2DModel, (4096, 128), flux2),
        "SD3.5 large, 1024 x 1024": Case(
            lambda: d.SD3Transformer2DModel(**large, qk_norm="rms_norm"), (16, 128, 128), sd3, 2
        ),
        "Qwen-Image, 1328 x 1328": Case(d.QwenImageTransformer2DModel, (6889, 64), qwen, 2),
        "Z-Image, 1024 x 1024": Case(d.ZImageTransformer2DModel, (16, 1, 128, 128), zimage, 2),
        "Wan 2.2 A14B, 480p, 81 frames": Case(d.WanTransformer3DModel, (16, 21, 60, 104), wan, 2),
        "Wan 2.2 A14B, 720p, 81 frames": Case(d.WanTransformer3DModel, (16, 21, 90, 160), wan, 2),
        "LTX-Video 2B, 704 x 512, 161 frames": Case(d.LTXVideoTransformer3DModel, (7392, 128), ltx, 2),
    }


class Flash(torch.autograd.Function):
    """Attention that keeps what flash attention does: its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def flash() -> Iterator[list[float]]:
    """Attention as Flash for a while; the operations of its products are appended."""
    real, counted = nn.functional.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        counted.append(4.0 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1])
        found: Tensor = Flash.apply(query, key, value)
        return found

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield counted
    finally:
        nn.functional.scaled_dot_product_attention = real


@dataclass(frozen=True)
class Counted:
    """Of one sample's call: weights, operations, bytes saved plain and with checkpointing, the largest block's."""

    weights: int
    operations: float
    plain: int
    again: int
    block: int


def saved(net: nn.Module, call: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that a call's graph saves, each storage once, parameters aside; and those of the largest block."""
    aside = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    held: dict[int, tuple[Tensor, int]] = {}
    total, start, blocks = 0, 0, [0]

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if key not in aside and key not in held:
            held[key] = tensor, size  # kept, so that its address is not another's
            total += size
        return tensor

    def enter(*_: Any) -> None:
        nonlocal start
        start = total

    hooks = []
    for module in net.modules():
        if isinstance(module, nn.ModuleList):
            hooks += [block.register_forward_pre_hook(enter) for block in module]
            hooks += [block.register_forward_hook(lambda *_: blocks.append(total - start)) for block in module]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for hook in hooks:
        hook.remove()
    return total, max(blocks)


def count(case: Case) -> Counted:
    """A case on the meta device."""
    with META:
        net = case.build().to(HALF).eval().requires_grad_(False)

    def call() -> Tensor:
        return case.call(net, new(1, *case.shape).requires_grad_(torch.is_grad_enabled()))

    weights = sum(p.numel() for p in net.parameters())
    with flash() as attention, META:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            call()
        operations = flops.get_total_flops() + sum(attention)
        plain, block = saved(net, call)
        net.enable_gradient_checkpointing()
        again, _ = saved(net, call)
    return Counted(weights, operations * case.branches, plain * case.branches, again * case.branches, block)


def planned(case: Case, found: Counted, card: str, budget: int) -> tuple[Memory, int | None, int] | str:
    """The plan on a card: its memory, how many samples run at a time, how many there are; or what is too large."""
    size, width = CARDS[card]
    free = size - found.weights * width
    if free <= 0:
        return "the weights"
    room.free_bytes = lambda device: int(free)  # of the card, instead of this machine
    job = prepare(Target(lambda x, t: x, case.shape, Flow(), device=META), STEPS, budget=budget)
    job = replace(job, room=replace(job.room, host=room.HOST))
    may, _, batch = limits(job, budget)
    recomputed = found.plain * batch > may
    # With checkpointing a block's activations are there again while it is gone back through.
    saves = found.again + found.block * case.branches if recomputed else found.plain
    try:
        job = with_room(job, budget, Cost(0.0, saves, recomputed))
    except ValueError:
        return "one sample"
    sizes, rows = Sizes.of(job, budget), min(job.room.rows or batch, batch)
    return memory_of(job, sizes, rows, sizes.calls, Cost(0.0, saves, recomputed)), rows, sizes.samples


def table(names: list[str]) -> str:
    """Markdown: what is counted, then what is planned."""
    lines = [
        "| network | weights | operations a call | saved, plain | saved, checkpointing | its largest block |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    plans = [
        "| network | card | budget | samples | at a time | device, weights included | host | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in cases().items():
        if names and not any(word.lower() in name.lower() for word in names):
            continue
        found = count(case)
        sizes = " | ".join(f"{size / 1e9:.1f} GB" for size in (found.plain, found.again, found.block))
        lines.append(f"| {name} | {found.weights / 1e9:.1f} B | {found.operations / 1e12:.0f} T | {sizes} |")
        for card, (_, width) in CARDS.items():
            for budget in BUDGETS:
                plan = planned(case, found, card, budget)
                if isinstance(plan, str):
                    plans.append(f"| {name} | {card} | {budget:,} | - | - | {plan}: too large | - | - |")
                    continue
                memory, rows, samples = plan
                device = (found.weights * width + memory.graphs + memory.states) / 1e9
                host = (memory.teacher + memory.algebra) / 1e9
                hours = budget * found.operations / SPEED / 3600
                plans.append(
                    f"| {name} | {card} | {budget:,} | {samples} | {rows} | {device:.1f} GB | {host:.1f} GB | "
                    f"{hours:.2g} h |"
                )
    return "\n".join([*lines, "", *plans])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all by default")
    parser.add_argument("--write", type=Path, help="a page, whose part after <!-- memory --> is replaced")
    options = parser.parse_args()
    found = table(options.names)
    if options.write is None:
        print(found)
        return
    mark = "<!-- memory -->"
    page = options.write.read_text(encoding="utf-8")
    options.write.write_text(page[: page.index(mark)] + f"{mark}\n\n{found}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
