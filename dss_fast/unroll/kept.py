"""Kept: what a rollout holds between its forward and its backward, the graphs of as many calls as a budget allows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..denoiser import modules_of

AUTO_BYTES, AUTO_SHARE = 1 << 29, 0.5  # what "auto" allows: bytes, and on a GPU a share of its free memory


@dataclass(frozen=True)
class Kept:
    """The graphs of the last ``graphs`` of ``steps`` calls; the others run again.

    activation_bytes: what one graph saves for its backward, measured at the first call; None when nothing was measured.
    budget_bytes: None without a budget.
    """

    steps: int
    graphs: int = 0
    activation_bytes: int | None = None
    budget_bytes: int | None = None


class TooMuch(Exception):
    """A graph takes more bytes than it may."""


class FirstCall:
    """Counts what the graph of the model's first call saves for its backward, and says how many such graphs fit.

    Every storage counts once. Those of x, the parameters and the model's own modules do not: they live on anyway.

    most: bytes at which the call is given up, as TooMuch.
    """

    def __init__(
        self,
        steps: int,
        budget: int,
        model: Callable[..., Any],
        tensors: Sequence[Tensor],
        most: float = math.inf,
    ):
        self.steps, self.budget, self.most, self.total = steps, budget, most, 0
        held = [t for module in modules_of(model) for t in (*module.parameters(), *module.buffers())]
        self.aside = {t.untyped_storage().data_ptr() for t in (*tensors, *held) if t.layout == torch.strided}
        self.saved: set[int] = set()
        self.bytes: int | None = None

    def watching(self, x: Tensor) -> AbstractContextManager[Any]:
        """A context for the first call, and an empty one for the others."""
        if self.bytes is not None:
            return nullcontext()

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            if tensor.device == x.device and tensor.layout == torch.strided:
                self._count(tensor)
            return tensor.detach(), tensor._version  # undetached it would keep its own graph alive

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

    def settle(self, output: Tensor) -> None:
        """Takes note of what the first call returned, which its graph holds too."""
        if self.bytes is None:
            self._count(output)
            self.bytes = self.total

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self.aside and pointer not in self.saved:
            self.saved.add(pointer)
            self.total += storage.nbytes()
            if self.total > self.most:
                raise TooMuch

    def graphs(self) -> int:
        """How many such graphs fit."""
        assert self.bytes is not None
        return min(self.steps, self.budget // max(self.bytes, 1))

    @property
    def kept(self) -> Kept:
        """What the rollout keeps."""
        return Kept(self.steps, self.graphs(), self.bytes, self.budget)


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """Autograd's own check of saved tensors, which hooks switch off."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError("a tensor that the model saved for its backward was modified by an inplace operation")
    return tensor


def budget_bytes(budget: int | float | str | None, device: torch.device) -> int | None:
    """A memory budget in bytes; None keeps nothing. Raises ValueError saying what a budget may be."""
    if budget == "auto":
        budget = AUTO_SHARE if device.type == "cuda" else AUTO_BYTES
    if budget is None or isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return budget
    if isinstance(budget, float) and 0 < budget <= 1:
        return int(budget * free_bytes(device))
    raise ValueError(
        f"memory_budget={budget!r}: give None, 'auto', a number of bytes (int), "
        "or a fraction of the free device memory (float above 0, at most 1)"
    )


def free_bytes(device: torch.device) -> int:
    """What is free on a device now, PyTorch's own idle blocks included."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
