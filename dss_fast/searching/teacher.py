"""Teacher: the fine trajectories of a set of samples, which a search imitates, batch by batch, made once.

Their end points are kept, and their inner states as far as the host has room; the others are made again when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..draws import Draws
from ..target import Samples
from ..trajectory import Trajectory, dense_grid, evaluations, integrate
from .budget import Ledger
from .room import Room

DEVICE = 1 << 27  # bytes of samples and end points that stay on the device; the rest is drawn and sent again
LOOSE = 0.25  # the models shipped have up to 0.08 at 16 calls; v = -10 x, which diverges there, has 5 at 24


class Teacher:
    """draws: the model and its samples. ledger: what is spent. stream, count, batch_size: batches 0.. of that stream,
    count samples in all. calls: of the model per sample, 16 to 64. room: how many samples run at a time, and how many
    inner states are kept. inner: whether those are asked for at all.

    ``teacher[k]`` is a batch and its trajectory, of which only the end points are sure to be there; :meth:`part` has
    the inner states of some of its samples. A resumed search makes its trajectories again, and they are counted as
    evaluations once.
    """

    def __init__(
        self,
        draws: Draws,
        ledger: Ledger,
        stream: str,
        count: int,
        batch_size: int,
        calls: int,
        room: Room | None = None,
        inner: bool = True,
    ) -> None:
        self.draws, self.ledger, self.stream = draws, ledger, stream
        self.room, self.inner = room or Room(), inner
        self.grid = dense_grid(draws.schedule, calls)
        self.sizes = [min(batch_size, count - k) for k in range(0, count, batch_size)]
        if len(self.sizes) > 1 and self.sizes[-1] < draws.world:
            self.sizes.pop()
        self._left = DEVICE
        self._batches: dict[int, Samples] = {}
        self._made: dict[int, Trajectory] = {}
        self._whole: set[int] = set()  # batches whose inner states are kept

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
        if self.inner and self.room.keeps(self._bytes(k)):
            self._whole.add(k)
        parts: list[Trajectory] = []
        for part in self.room.over(slice(0, len(batch))):
            with part as rows:
                some = batch.rows(rows)
                whole = integrate(some.predictor(check_finite=None), some.noise, self.grid)
                whole = whole if k in self._whole else whole.ends()
                parts.append(replace(whole, states=whole.states.cpu(), slopes=whole.slopes.cpu()))
        made = Trajectory.joined(parts)
        if not bool(made.last.isfinite().all()):  # on a GPU no single call was checked
            raise FloatingPointError(f"the model returned NaN or Inf on the teacher's way, batch {k}")
        if made.loose > LOOSE:
            raise ValueError(
                f"the teacher's trajectories of {evaluations(self.grid)} calls do not converge: predictor and "
                f"corrector are {made.loose:.3g} of the samples' scale apart, where {LOOSE} is the most. Either the "
                "model is too stiff for so few, then give teacher_evaluations=96 or more, or "
                f"what is said of it, its noise or its schedule, {self.draws.schedule!r}, is not so"
            )
        size = sum(t.nbytes for t in (batch.noise, made.last, *batch.cond.values()) if isinstance(t, Tensor))
        if size <= self._left:
            self._left -= size
            self._batches[k], self._made[k] = batch, made
        else:
            self._made[k] = replace(made, last=made.last.cpu())
        self.ledger.spend_once(f"teacher {self.stream} {self.sizes[k]} {k}", self.sizes[k] * evaluations(self.grid))
        return batch, made

    @torch.no_grad()
    def part(self, k: int, rows: slice) -> tuple[Samples, Trajectory]:
        """Some samples of batch k, with the inner states of their trajectories; see :meth:`again` for what it takes."""
        batch, made = self[k]
        part = batch.rows(rows)
        if k in self._whole or not self.inner:
            return part, made.rows(rows)
        return part, integrate(part.predictor(check_finite=None), part.noise, self.grid)

    def again(self, batches: slice) -> int:
        """Model evaluations to make the inner states of some batches once more, those that are not kept."""
        lost = [k for k in range(len(self))[batches] if self.inner and k in self._made and k not in self._whole]
        return sum(self.sizes[k] for k in lost) * evaluations(self.grid)

    def grow(self, more: int) -> None:
        """So many samples more, in batches as large as the first one."""
        self.sizes += [self.sizes[0]] * (more // self.sizes[0])

    def cost(self) -> int:
        """Model evaluations of all trajectories, made or not."""
        return sum(self.sizes) * evaluations(self.grid)

    def _bytes(self, k: int) -> int:
        """Of a batch's inner states, the same on every process."""
        target = self.draws.targets[k % len(self.draws.targets)]
        rows = -(-self.sizes[k] // self.draws.world)
        return 2 * (self.grid.intervals + 1) * rows * math.prod(target.shape or ()) * target.dtype.itemsize
