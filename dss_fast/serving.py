"""Batch: requests at different steps of different solvers advance together, one launch of the step a tick."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .names import find_solver
from .schedule import Schedule
from .solver import Solver
from .step import multistep_step
from .table import StepTable

__all__ = ["Batch"]


class Batch:
    """A fixed number of places, each with its own state, history, solver and step.

        batch = Batch(8, (4, 32, 32), max_steps=10)
        place = batch.admit(noise, "sit-xl-2-256/10")
        while batch.running:
            output = model(batch.x, batch.times())
            for place in batch.step(output):
                image = batch.retire(place)

    Shapes never change, so model and step can be captured once as a CUDA graph. Which places finish is known on the
    host from the solvers' lengths: nothing waits for the device. A request gets the bits it would have got alone,
    as far as the model gives every row the bits it would have got alone.

    places: how many requests run at once; the model always sees all of them.
    shape: of one sample. max_steps: the longest solver that may be admitted.
    schedule: the model's, which all solvers must fit. None: that of the first solver admitted.
    history_dtype: storage of the predictions, by default that of the states.
    """

    def __init__(
        self,
        places: int,
        shape: Sequence[int],
        max_steps: int,
        *,
        schedule: Schedule | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        history_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        real = torch.float64 if dtype is torch.float64 else torch.float32
        self.x = torch.zeros(places, *shape, device=device, dtype=dtype)
        idle = StepTable.idle(places, max_steps, dtype=real, device=device)
        self.weights, self._times = idle.weights, idle.times
        self.history = torch.zeros(places, idle.slots, *shape, device=device, dtype=history_dtype or dtype)
        self.index = torch.full((places,), max_steps, device=device)  # max_steps and beyond: idle
        self.max_steps, self.schedule, self.backend = max_steps, schedule, backend
        self._left: list[int | None] = [None] * places  # steps to go: None free, 0 finished

    @property
    def running(self) -> list[int]:
        """Places that still have steps to go."""
        return [place for place, left in enumerate(self._left) if left]

    @property
    def free(self) -> list[int]:
        """Places that hold no request."""
        return [place for place, left in enumerate(self._left) if left is None]

    def admit(self, noise: Tensor, solver: Solver | str | os.PathLike[str], *, guidance_scale: float = 1.0) -> int:
        """Start a request: noise of one sample's shape, a Solver or its name. Returns its place.

        Raises ValueError for a solver longer than max_steps, one of another family or path than the batch's schedule,
        and noise of another shape; RuntimeError when full.
        """
        found = find_solver(solver, self.schedule)
        steps = found.num_steps
        if steps > self.max_steps:
            raise ValueError(f"the solver takes {steps} steps, this batch at most {self.max_steps}; raise max_steps")
        if noise.shape != self.x.shape[1:]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; one sample here is {tuple(self.x.shape[1:])}")
        table = StepTable.of(
            found, self.schedule, guidance=guidance_scale, dtype=self.weights.dtype, device=self.x.device
        ).padded(self.max_steps)
        if not self.free:
            raise RuntimeError(f"all {len(self._left)} places are taken; retire a finished one first")
        self.schedule = found.schedule if self.schedule is None else self.schedule
        place = self.free[0]
        self.weights[place], self._times[place] = table.weights[0], table.times
        self.x[place] = noise
        self.history[place, -1] = noise
        self.index[place] = 0
        self._left[place] = steps
        return place

    def times(self) -> Tensor:
        """(places,) what the network is told about time; places without a request repeat an old time."""
        return self._times.gather(1, self.index.clamp(max=self.max_steps - 1)[:, None])[:, 0]

    @torch.no_grad()
    def step(self, output: Tensor) -> list[int]:
        """Advance every running place by one step in one launch. output: (places, *S), or the guided pair.

        Returns the places that have just finished.
        """
        multistep_step(self.x, output, self.history, self.weights, self.index, out=self.x, backend=self.backend)
        self.index += 1
        finished = []
        for place, left in enumerate(self._left):
            if left:
                self._left[place] = left - 1
                if left == 1:
                    self.index[place] = self.max_steps
                    finished.append(place)
        return finished

    def retire(self, place: int) -> Tensor:
        """The sample of a finished place, which becomes free; of a running one, the state it has reached."""
        if self._left[place] is None:
            raise ValueError(f"place {place} holds no request; running are {self.running}")
        self._left[place] = None
        self.index[place] = self.max_steps
        return self.x[place].clone()
