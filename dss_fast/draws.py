"""Draws: the noise and conditions of a search, settled by its seed, and the processes that share them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .schedule import Flow, Schedule, check_path
from .target import Model, Samples, Target


@dataclass(frozen=True)
class Draws:
    """Batches of a target's samples, the same for any number of processes.

    seed: with a stream's name and a batch's number it settles that batch, whatever ran before.
    rank, world: this process and how many share the work; group: theirs, of torch.distributed.
    others: further targets of the same schedule, for one table over all; their batches take turns.
    """

    target: Target
    seed: int = 0
    rank: int = 0
    world: int = 1
    others: tuple[Target, ...] = ()
    group: Any = None

    @classmethod
    def of(cls, targets: Target | Sequence[Target], seed: int = 0, group: Any = None) -> Draws:
        """For the processes of a group, which share samples; without one each process has all of them, as those of a
        model that is itself spread over processes must. A target without a schedule gets the paper's flow.

        Raises ValueError for targets of several schedules, dtypes or devices, and for a schedule without numbers.
        """
        given = [targets] if isinstance(targets, Target) else list(targets)
        target, *others = [t if t.schedule is not None else replace(t, schedule=Flow()) for t in given]
        for one in (target, *others):
            check_path(one.schedule or Flow(), torch.linspace(0, 1, 33, dtype=torch.float64))
        for other in others:
            for word in ("schedule", "dtype", "home"):
                mine, found = getattr(target, word), getattr(other, word)
                if mine != found:
                    what = "device" if word == "home" else word
                    raise ValueError(
                        f"{what} of {target.name} is {mine!r}, of {other.name} {found!r}; one search needs the same"
                    )
        draws = cls(target, seed, others=tuple(others))
        if group is None:
            return draws
        rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        return replace(draws, rank=rank, world=world, group=group)

    @property
    def targets(self) -> tuple[Target, ...]:
        """All of them."""
        return (self.target, *self.others)

    @property
    def each(self) -> list[Draws]:
        """Of each target by itself."""
        return [replace(self, target=target, others=()) for target in self.targets]

    @property
    def alone(self) -> Draws:
        """The same for one process that takes whole batches."""
        return replace(self, rank=0, world=1, group=None)

    @property
    def schedule(self) -> Schedule:
        """The target's, settled by :meth:`of`."""
        assert self.target.schedule is not None
        return self.target.schedule

    @property
    def device(self) -> torch.device:
        """Where samples live."""
        return self.target.home or torch.device("cpu")

    def batch(self, stream: str, number: int, size: int) -> Samples:
        """Batch ``number`` of a stream (``"train"``, ``"held_out"``): this process's rows of ``size`` samples."""
        if size < self.world:
            raise ValueError(f"a batch of {size} samples cannot be shared by {self.world} processes")
        generator = torch.Generator().manual_seed(mix(self.seed, stream, number))
        target = self.targets[number % len(self.targets)]
        return target.draw(size, generator, self.rank, self.world)

    def mine(self, start: int, size: int) -> slice:
        """Where this process's rows of a batch of ``size`` stand in a vector over samples that has it at ``start``."""
        return slice(start + self.rank, start + size, self.world)

    def all_reduce(self, *tensors: Tensor) -> None:
        """Sums each tensor over all processes, in place, in float64 and in one message."""
        if self.world > 1:
            together = torch.cat([tensor.reshape(-1).to(self.device, torch.float64) for tensor in tensors])
            torch.distributed.all_reduce(together, group=self.group)
            for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.reshape(tensor.shape))

    def gathered(self, sizes: Sequence[int], *parts: Sequence[Tensor]) -> list[Tensor]:
        """Numbers per sample of batches of these sizes, this process's rows of each, as (sum(sizes),) of all processes.

        Float64. Raises FloatingPointError where one is NaN or Inf: a GPU is asked here, once for all batches.
        """
        whole, start = torch.zeros(len(parts), sum(sizes), dtype=torch.float64), 0
        for k, size in enumerate(sizes):
            for row, part in zip(whole, parts, strict=True):
                row[self.mine(start, size)] = part[k].cpu().double()
            start += size
        self.all_reduce(whole)
        if not bool(whole.isfinite().all()):
            raise FloatingPointError("the model returned NaN or Inf along a rollout")
        return list(whole)


def targets_of(target: Target | Model | Sequence[Target], **description: Any) -> list[Target]:
    """The targets of a search. Raises ValueError for a list of anything else, or with fields beside it."""
    if not isinstance(target, list | tuple) or not any(isinstance(one, Target) for one in target):
        return [Target.of(target, **description)]  # type: ignore[arg-type]
    for one in target:
        if not isinstance(one, Target):
            raise ValueError(f"target={type(one).__name__} among several: each must be a Target, which says its shape")
    if description:
        raise ValueError(f"{', '.join(description)}: several targets say this themselves, with replace(target, ...)")
    return list(target)


def mix(*parts: int | str) -> int:
    """A 32-bit seed from numbers and names (torch's CPU generator uses no more bits)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())
