"""What a search imitates: a model with its schedule, the noise and conditions it gets, and what was spent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .sampling import leading_elements
from .schedule import Schedule, prediction, step_weights


@dataclass(frozen=True)
class Batch:
    """Some samples to search on: this process's rows of a batch that all processes share.

    noise: (B, *S). cond: the model's keyword arguments. scale: (B,) the guidance scale of each sample,
    None when all share the problem's. size: rows over all processes.
    """

    noise: Tensor
    cond: dict[str, Any]
    scale: Tensor | None
    size: int

    def __len__(self) -> int:
        return len(self.noise)


@dataclass
class Problem:
    """The model, how it is called, and the count of what was spent on it.

    model, schedule, uncond, guided_channels: as in ``sample``. shape: of one sample.
    draw: draw(n, generator) -> dict of conditions for n samples, or a dict for all, or None.
    guidance_scale: a number, or a pair (low, high) from which each sample draws its own.
    seed: with a stream's name and a batch's number it settles that batch, whatever ran before and however
        many processes share the work.
    budget: the most model evaluations the search may spend. None: no limit.

    evaluations: model evaluations over all processes so far: forward 1, backward 2, per sample; the
        unconditional branch of guidance is not counted (arXiv 2505.21114 counts so).
    """

    model: Callable
    shape: tuple[int, ...]
    schedule: Schedule
    draw: Callable | Mapping[str, Any] | None = None
    uncond: Mapping[str, Any] | None = None
    guidance_scale: float | tuple[float, float] = 1.0
    guided_channels: int | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    seed: int = 0
    budget: int | None = None
    evaluations: int = 0
    counted: set[str] = field(default_factory=set, repr=False)
    rank: int = field(default=0, init=False)
    world: int = field(default=1, init=False)

    def __post_init__(self):
        self.shape = tuple(self.shape)
        self.device = torch.device(self.device)
        ranged = isinstance(self.guidance_scale, Sequence)
        if ranged:
            low, high = self.guidance_scale = tuple(map(float, self.guidance_scale))
            if not low <= high:
                raise ValueError(f"guidance_scale={self.guidance_scale!r}: give a number, or low and high")
        self.guided = self.uncond is not None and (ranged or self.guidance_scale != 1)
        if not self.guided and (ranged or self.guidance_scale != 1):
            raise ValueError(f"guidance_scale={self.guidance_scale!r} needs uncond, the unconditional arguments")
        self.guided_elements = leading_elements(self.guided_channels, (1, *self.shape))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def batch(self, stream: str, number: int, size: int) -> Batch:
        """Batch ``number`` of a stream (``"train"``, ``"held_out"``), drawn on the CPU, the same anywhere."""
        if size < self.world:
            raise ValueError(f"a batch of {size} samples cannot be shared by {self.world} processes")
        generator = torch.Generator().manual_seed(mix(self.seed, stream, number))
        noise = torch.randn(size, *self.shape, generator=generator, dtype=torch.float64).to(self.dtype)
        cond = self.draw(size, generator) if callable(self.draw) else dict(self.draw or {})
        scale = None
        if isinstance(self.guidance_scale, tuple):
            low, high = self.guidance_scale
            scale = low + (high - low) * torch.rand(size, generator=generator, dtype=torch.float64)
        mine = slice(self.rank, None, self.world)

        def place(value):
            if not isinstance(value, Tensor):
                return value
            return (value[mine] if value.ndim and len(value) == size else value).to(self.device)

        cond = {key: place(value) for key, value in cond.items()}
        return Batch(place(noise), cond, None if scale is None else place(scale), size)

    def denoiser(self, batch: Batch) -> Denoiser:
        """The model with a batch's conditions: (x, t) -> output, checked for NaN and Inf."""
        return Denoiser(self.model, batch.cond, self.uncond if self.guided else None, check_finite=True)

    def weights(self, batch: Batch, timesteps: Tensor, coeffs: Tensor, **extra) -> tuple[Tensor, Tensor]:
        """``step_weights`` with this problem's schedule and the batch's guidance; float64, differentiable."""
        scale = self.guidance_scale if batch.scale is None else batch.scale[:, None]
        return step_weights(self.schedule, timesteps, coeffs, guidance_scale=scale, **extra)

    def predictor(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, u) -> y = p x + q m, what a history stores, guided, in x's dtype. x: (B, *S); u: () float64."""
        denoise = self.denoiser(batch)
        scale = self.guidance_scale if batch.scale is None else batch.scale
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, *[1] * len(self.shape)).to(self.dtype)

        def predict(x: Tensor, u: Tensor) -> Tensor:
            u = u.detach().reshape(1).cpu()
            time = self.schedule.time(u).to(x.device, torch.promote_types(x.dtype, torch.float32))
            output = denoise(x, time.expand(len(x))).to(x.dtype)
            if self.guided:
                uncond, output = output.chunk(2)
                flat, flat_uncond, limit = output.flatten(1), uncond.flatten(1), self.guided_elements
                mixed = flat.clone()
                factor = scale.reshape(-1, 1) if isinstance(scale, Tensor) else scale
                spread = flat[:, :limit] - flat_uncond[:, :limit]
                mixed[:, :limit] = flat_uncond[:, :limit] + factor * spread
                output = mixed.reshape(x.shape)
            p, q = prediction(self.schedule, u)
            return float(q) * output if float(p) == 0 else float(p) * x + float(q) * output

        return predict

    def spend(self, evaluations: int) -> None:
        """Counts model evaluations, given over all processes."""
        self.evaluations += int(evaluations)

    def spend_once(self, what: str, evaluations: int) -> None:
        """Counts work that a resumed search repeats or finds in a cache; ``what`` names it."""
        if what not in self.counted:
            self.counted.add(what)
            self.spend(evaluations)

    def affords(self, evaluations: int) -> bool:
        """Whether the budget allows that many more."""
        return self.budget is None or self.evaluations + evaluations <= self.budget

    def all_reduce(self, *tensors: Tensor) -> None:
        """Sums each tensor over all processes, in place, in float64 and in one message."""
        if self.world > 1:
            together = torch.cat([tensor.reshape(-1).to(self.device, torch.float64) for tensor in tensors])
            torch.distributed.all_reduce(together)
            for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.reshape(tensor.shape))

    def fingerprint(self) -> str:
        """A hash of the model's parameters and buffers and of what it returns for two fixed samples."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(self.model, nn.Module):
            for name, value in sorted(self.model.state_dict().items()):
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(tensor_bytes(value))
        probe = Problem(
            self.model, self.shape, self.schedule, self.draw, self.uncond, self.guidance_scale,
            self.guided_channels, self.device, self.dtype,
        )  # fmt: skip
        probe.rank, probe.world = 0, 1
        batch = probe.batch("probe", 0, 2)
        with torch.no_grad():
            for u in (0.25, 0.75):
                y = probe.predictor(batch)(batch.noise, torch.tensor(u, dtype=torch.float64))
                digest.update(tensor_bytes(y))
        for key, value in {**batch.cond, **(self.uncond or {})}.items():
            digest.update(key.encode())
            plain = isinstance(value, str | int | float | bool | list | tuple | None)
            text = repr(value) if plain else type(value).__name__  # a repr may hold an address
            digest.update(tensor_bytes(value) if isinstance(value, Tensor) else text.encode())
        self.spend_once("fingerprint", 4)
        return digest.hexdigest()


def mix(*parts: int | str) -> int:
    """A 32-bit seed from numbers and names (torch's CPU generator uses no more bits)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def tensor_bytes(tensor: Tensor) -> bytes | memoryview:
    """The raw bytes of a tensor, any dtype and device."""
    flat = tensor.detach().to("cpu", copy=False).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def join_processes() -> bool:
    """Joins the process group torchrun describes in the environment; whether there was one to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        return False
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return True
