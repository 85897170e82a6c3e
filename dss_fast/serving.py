"""Batch: requests at different steps of different solvers advance together, one launch of the step a tick."""

import torch

from .sampling import device_weights, find_solver
from .schedule import default_schedule
from .step import multistep_step

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
    history_dtype: storage of the predictions, by default that of the states.
    guided: how many leading elements of a flattened sample use the guidance; None for all.
    """

    def __init__(self, places, shape, max_steps, *, device=None, dtype=torch.float32, history_dtype=None, guided=None,
                 backend=None):  # fmt: skip
        real = torch.float64 if dtype is torch.float64 else torch.float32
        slots = max_steps + 1  # the last one holds the initial noise
        self.x = torch.zeros(places, *shape, device=device, dtype=dtype)
        self.history = torch.zeros(places, slots, *shape, device=device, dtype=history_dtype or dtype)
        self.weights = torch.zeros(places, max_steps, 4 + slots, device=device, dtype=real)
        self.index = torch.full((places,), max_steps, device=device)  # max_steps and beyond: idle
        self.max_steps, self.guided, self.backend = max_steps, guided, backend
        self._times = torch.zeros(places, max_steps, device=device, dtype=real)
        self._left = [None] * places  # steps to go: None free, 0 finished

    @property
    def running(self):
        """Places that still have steps to go."""
        return [place for place, left in enumerate(self._left) if left]

    @property
    def free(self):
        return [place for place, left in enumerate(self._left) if left is None]

    def admit(self, noise, solver, *, schedule=None, guidance_scale=1.0):
        """Start a request: noise of one sample's shape, a Solver or its name. Returns its place.

        Raises ValueError for a solver longer than max_steps or noise of another shape, RuntimeError when full.
        """
        solver = find_solver(solver, schedule)
        schedule = default_schedule(solver.family) if schedule is None else schedule
        steps = solver.num_steps
        if steps > self.max_steps:
            raise ValueError(f"the solver takes {steps} steps, this batch at most {self.max_steps}; raise max_steps")
        if noise.shape != self.x.shape[1:]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; one sample here is {tuple(self.x.shape[1:])}")
        if not self.free:
            raise RuntimeError(f"all {len(self._left)} places are taken; retire a finished one first")
        place = self.free[0]
        scale = torch.as_tensor(guidance_scale, dtype=torch.float64)
        weights, times = device_weights(solver, schedule, scale, self.x)
        row = self.weights[place].zero_()
        row[:steps, : 4 + steps] = weights[0, :, : 4 + steps]
        if weights.shape[2] > 4 + steps:
            row[:steps, -1] = weights[0, :, -1]
        self._times[place, :steps] = times
        self._times[place, steps:] = times[-1]
        self.x[place] = noise
        self.history[place, -1] = noise
        self.index[place] = 0
        self._left[place] = steps
        return place

    def times(self):
        """(places,) what the network is told about time; places without a request repeat an old time."""
        return self._times.gather(1, self.index.clamp(max=self.max_steps - 1)[:, None])[:, 0]

    @torch.no_grad()
    def step(self, output):
        """Advance every running place by one step in one launch. output: (places, *S), or the guided pair.

        Returns the places that have just finished.
        """
        multistep_step(
            self.x, output, self.history, self.weights, self.index,
            guided=self.guided, out=self.x, backend=self.backend,
        )  # fmt: skip
        self.index += 1
        finished = []
        for place, left in enumerate(self._left):
            if left:
                self._left[place] = left - 1
                if left == 1:
                    self.index[place] = self.max_steps
                    finished.append(place)
        return finished

    def retire(self, place):
        """The sample of a finished place, which becomes free; of a running one, the state it has reached."""
        if self._left[place] is None:
            raise ValueError(f"place {place} holds no request; running are {self.running}")
        self._left[place] = None
        self.index[place] = self.max_steps
        return self.x[place].clone()
