"""Teacher: the fine trajectories of a set of samples, which a search imitates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..draws import Draws
from ..target import Samples
from ..trajectory import EVALUATIONS, LATEST, LOG_SHARE, SOFTENING, Trajectory, dense_grid, evaluations, integrate
from .ledger import Ledger
from .store import Store


class Teacher:
    """The dense trajectories of a set of samples, batch by batch, made once and kept.

    draws: the model and its samples. ledger: what is spent. stream, count, batch_size: batches 0.. of that stream,
        count samples in all. budget: model calls per sample, 48 to 64. cache: a folder that outlives the process; None
        keeps them in memory up to ``memory`` bytes and in a temporary folder beyond.

    ``for batch, trajectory in teacher: ...`` streams them; ``teacher[k]`` is one pair, whose samples and end points
    stay on the device up to a quarter of ``memory`` and are drawn and read again beyond. Trajectories are
    counted as model evaluations when first asked for, found in the cache or not, so that the count does
    not depend on what ran before.
    """

    def __init__(
        self,
        draws: Draws,
        ledger: Ledger,
        stream: str,
        count: int,
        batch_size: int,
        *,
        budget: int = EVALUATIONS,
        cache: str | Path | None = None,
        memory: int = 2 << 30,
    ) -> None:
        if count < 0 or batch_size < 1:
            raise ValueError(f"count={count!r}, batch_size={batch_size!r}: need none or more, and at least 1")
        self.draws, self.ledger, self.stream = draws, ledger, stream
        self.grid = dense_grid(draws.schedule, budget)
        self.sizes = [min(batch_size, count - k) for k in range(0, count, batch_size)]
        if len(self.sizes) > 1 and self.sizes[-1] < draws.world:
            self.sizes.pop()
        settings = {
            "kind": "dense",
            "stream": stream,
            "count": count,
            "batch_size": batch_size,
            "budget": budget,
            "grid": ["ab3 am4", LOG_SHARE, SOFTENING, LATEST],
        }
        self.store = Store(draws, settings, cache=cache, memory=memory)
        self._kept: dict[int, tuple[Samples, Trajectory]] = {}
        self._room = memory // 4

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Samples, Trajectory]]:
        return (self[k] for k in range(len(self)))

    @torch.no_grad()
    def __getitem__(self, k: int) -> tuple[Samples, Trajectory]:
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of {len(self)}")
        pair = self._kept.get(k)
        if pair is None:
            batch = self.draws.batch(self.stream, k, self.sizes[k])
            tensors = self.store.find(k, batch)
            if tensors is None:
                made = integrate(batch.predictor(check_finite=None), batch.noise, self.grid)
                if not bool(made.last.isfinite().all()):  # on a GPU no single call was checked
                    raise FloatingPointError(f"the model returned NaN or Inf on the teacher's way, batch {k}")
                tensors = self.store.keep(k, batch, {"states": made.states, "slopes": made.slopes, "last": made.last})
            last = tensors["last"].to(batch.noise.device)
            pair = batch, Trajectory(self.grid, tensors["states"], tensors["slopes"], last)
            size = sum(t.nbytes for t in (batch.noise, last, *batch.cond.values()) if isinstance(t, Tensor))
            if size <= self._room:
                self._room -= size
                self._kept[k] = pair
        self.ledger.spend_once(f"teacher {self.stream} {self.sizes[k]} {k}", self.sizes[k] * evaluations(self.grid))
        return pair

    def cost(self) -> int:
        """Model evaluations of all trajectories, made or not."""
        return sum(self.sizes) * evaluations(self.grid)
