"""Teacher: the fine trajectories of a set of samples, which a search imitates, batch by batch, made once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..draws import Draws
from ..files import scratch
from ..target import Samples
from ..trajectory import Trajectory, dense_grid, evaluations, integrate
from .budget import Ledger

# Bytes of trajectories that the host keeps in memory, the rest on the disk; a device keeps a quarter, in batches.
MEMORY = 1 << 29
LOOSE = 0.25  # the models shipped have up to 0.08 at 16 calls; v = -10 x, which diverges there, has 5 at 24


class Teacher:
    """draws: the model and its samples. ledger: what is spent. stream, count, batch_size: batches 0.. of that stream,
    count samples in all. calls: of the model per sample, 16 to 64.

    ``for batch, trajectory in teacher: ...`` streams them; ``teacher[k]`` is one pair. States lie on the host; samples
    and end points stay on the device up to a quarter of ``MEMORY``, and are drawn and sent again beyond. A resumed
    search makes its trajectories again, and they are counted as evaluations once.
    """

    def __init__(self, draws: Draws, ledger: Ledger, stream: str, count: int, batch_size: int, calls: int) -> None:
        self.draws, self.ledger, self.stream = draws, ledger, stream
        self.grid = dense_grid(draws.schedule, calls)
        self.sizes = [min(batch_size, count - k) for k in range(0, count, batch_size)]
        if len(self.sizes) > 1 and self.sizes[-1] < draws.world:
            self.sizes.pop()
        self._shelf, self._room = Shelf(MEMORY), MEMORY // 4
        self._batches: dict[int, Samples] = {}
        self._made: dict[int, Trajectory] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Samples, Trajectory]]:
        return (self[k] for k in range(len(self)))

    @torch.no_grad()
    def __getitem__(self, k: int) -> tuple[Samples, Trajectory]:
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of {len(self)}")
        if k in self._batches:
            return self._batches[k], self._made[k]
        batch = self.draws.batch(self.stream, k, self.sizes[k])
        if k in self._made:
            made = self._made[k]
            return batch, replace(made, last=made.last.to(batch.noise.device))
        made = integrate(batch.predictor(check_finite=None), batch.noise, self.grid)
        if not bool(made.last.isfinite().all()):  # on a GPU no single call was checked
            raise FloatingPointError(f"the model returned NaN or Inf on the teacher's way, batch {k}")
        if made.loose > LOOSE:
            raise ValueError(
                f"the teacher's trajectories of {evaluations(self.grid)} calls do not converge: predictor and "
                f"corrector are {made.loose:.3g} of the samples' scale apart, where {LOOSE} is the most. Either the "
                "model is too stiff for so few, then give teacher_evaluations=96 or more, or "
                f"what is said of it, its noise or its schedule, {self.draws.schedule!r}, is not so"
            )
        made = replace(made, states=self._shelf.kept(made.states), slopes=self._shelf.kept(made.slopes))
        size = sum(t.nbytes for t in (batch.noise, made.last, *batch.cond.values()) if isinstance(t, Tensor))
        if size <= self._room:
            self._room -= size
            self._batches[k], self._made[k] = batch, made
        else:
            self._made[k] = replace(made, last=self._shelf.kept(made.last))
        self.ledger.spend_once(f"teacher {self.stream} {self.sizes[k]} {k}", self.sizes[k] * evaluations(self.grid))
        return batch, made

    def cost(self) -> int:
        """Model evaluations of all trajectories, made or not."""
        return sum(self.sizes) * evaluations(self.grid)


class Shelf:
    """Tensors kept on the host while they fit into some bytes, and in files without a name beyond."""

    def __init__(self, room: int) -> None:
        self.room = room

    def kept(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU."""
        self.room -= tensor.nbytes
        return tensor.detach().cpu().contiguous() if self.room >= 0 else scratch(tensor)
