"""Batch: requests at different steps of different solvers advance together, one launch of the step a tick."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import check_untouched, copied, output_of, tensors_in, versions
from .names import find_solver
from .schedule import Schedule
from .solver import Solver
from .step import multistep_step
from .table import GUIDANCE, Guidance, StepTable, guidance_table

__all__ = ["Batch"]


class Batch:
    """A fixed number of places, each with its own state, history, conditions, solver and step.

        batch = Batch(8, (4, 32, 32), max_steps=10, cond={"y": torch.zeros(8, dtype=torch.long)})
        place = batch.admit(noise, "sit-xl-2-256/10", cond={"y": 207})
        while batch.running:
            for place in batch.tick(model):
                image = batch.retire(place)

    A tick calls model(x, t, **cond) -> (places, *S), or the guided pair, unconditional rows first, once for all places
    and takes one step of each. Of the unconditional rows those of ``batch.guided`` are enough, in that order. When the
    model raises, nothing has happened and the tick can be tried again. Which places finish is known on the host from
    the solvers' lengths: nothing waits for the device, but for ``check_finite``. When the model has written into states
    or conditions, the running requests are lost: they end with that tick, and :meth:`retire` says so. A request gets
    the bits it would get alone, if the model gives every row the bits it would get alone. One whose state is NaN or Inf
    ends with that step, and :meth:`retire` raises what became of it.

    Shapes and addresses never change, so a compiled model, or a whole tick without its count, stays as it is:

        advance = torch.compile(lambda: batch.advance(model(batch.x, batch.times(), **batch.cond)))   # or a captured
        advance()                                                                                     # CUDA graph
        finished = batch.count()

    admit, tick and retire may be called from several threads; ``advance`` and ``count`` from one, with no ``admit``
    between the call of the model and them.

    places: how many requests run at once; the model always sees all of them.
    shape: of one sample. max_steps: the longest solver that may be admitted.
    cond: the model's keyword arguments, tensors with a row for each place, which :meth:`admit` fills.
    schedule: the model's, which all solvers must fit. None: that of the first solver admitted.
    history_dtype: storage of the predictions, by default that of the states.
    forecasts: make room for solvers that call the unconditional branch at some steps only, N more slots a place.
    check_finite: look for NaN and Inf after each step, which reads a number a place back from the device, and compare
        what the first tick gave to the model with what it was. None: on the CPU only.

    Raises ValueError for what does not fit.
    """

    def __init__(
        self,
        places: int,
        shape: Sequence[int],
        max_steps: int,
        *,
        cond: Mapping[str, Tensor] | None = None,
        schedule: Schedule | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        history_dtype: torch.dtype | None = None,
        forecasts: bool = False,
        check_finite: bool | None = None,
    ) -> None:
        real = torch.float64 if dtype is torch.float64 else torch.float32
        with torch.inference_mode(False):  # what is made in that mode cannot be written outside it
            self.x = torch.zeros(places, *shape, device=device, dtype=dtype)
            idle = StepTable.idle(places, max_steps, dtype=real, device=device, forecasts=forecasts)
            self.weights, self._times = idle.weights, idle.times
            self.history = torch.zeros(places, idle.slots, *shape, device=device, dtype=history_dtype or dtype)
            self.index = torch.full((places,), max_steps, device=device)  # at max_steps and beyond a place is idle
            self.cond = {k: v.detach().to(self.x.device, copy=True) for k, v in (cond or {}).items()}
            self._steps = torch.zeros(places, dtype=torch.long, device=device)  # of each place's solver
        for key, value in self.cond.items():
            if value.ndim < 1 or len(value) != places:
                raise ValueError(
                    f"cond[{key!r}] has shape {tuple(value.shape)}; give a row for each of {places} places"
                )
        self.max_steps, self.schedule, self.forecasts = max_steps, schedule, forecasts
        self.check_finite = self.x.device.type == "cpu" if check_finite is None else check_finite
        self._left: list[int | None] = [None] * places  # steps to go; 0 is finished, None is free
        self._both: dict[int, tuple[bool, ...]] = {}  # running guided places -> which of their steps call both branches
        self._needs_pair = self._some_alone = False  # whether any does now, any does not: what a compiler can check
        self._failed: dict[int, str] = {}  # place -> what became of its request
        self._compared = False  # whether a tick has been compared with what it was given
        self._lock = threading.Lock()

    @property
    def running(self) -> list[int]:
        """Places that still have steps to go."""
        return [place for place, left in enumerate(self._left) if left]

    @property
    def guided(self) -> list[int]:
        """Running places whose next step calls the unconditional branch too, rising."""
        left = {place: self._left[place] or 0 for place in self._both}
        return sorted(place for place, both in self._both.items() if left[place] and both[-left[place]])

    @property
    def free(self) -> list[int]:
        """Places that hold no request."""
        return [place for place, left in enumerate(self._left) if left is None]

    @torch.no_grad()
    def admit(
        self,
        noise: Tensor,
        solver: Solver | str | os.PathLike[str],
        *,
        cond: Mapping[str, Any] | None = None,
        guidance_scale: Guidance = 1.0,
    ) -> int:
        """Starts a request: noise of one sample's shape, a Solver or its name, and its row of every condition.

        guidance_scale: a number, or one per step. Any but 1 needs a model that returns the guided pair, at the steps
            that are guided.

        Returns its place. Raises ValueError for a solver longer than max_steps, one of another family or path than the
        batch's schedule, noise of another shape, conditions other than the batch's or that its dtypes cannot hold;
        RuntimeError when full.
        """
        found = find_solver(solver, self.schedule)
        steps, cond = found.num_steps, cond or {}
        if steps > self.max_steps:
            raise ValueError(f"the solver takes {steps} steps, this batch at most {self.max_steps}; raise max_steps")
        if not isinstance(noise, Tensor):
            raise ValueError(f"noise is {type(noise).__name__}; give a tensor of shape {tuple(self.x.shape[1:])}")
        if not isinstance(cond, Mapping):
            raise ValueError(f"cond={str(cond)[:60]!r}: give a dict of the model's keyword arguments")
        if noise.shape != self.x.shape[1:]:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; one sample here is {tuple(self.x.shape[1:])}")
        if not noise.is_floating_point():
            raise ValueError(f"noise has dtype {noise.dtype}; it must be a floating point tensor")
        if cond.keys() != self.cond.keys():
            raise ValueError(f"cond={sorted(cond)}: this batch has rows of {sorted(self.cond)}; give one of each")
        rows = {key: _row(key, value, self.cond[key]) for key, value in cond.items()}
        scale = guidance_table(guidance_scale, 1, steps)
        known = torch.as_tensor(scale)
        if not bool(known.isfinite().all()):
            raise ValueError(f"guidance_scale={guidance_scale!r}: must be finite")
        with self._lock:
            alone = StepTable.of(found, self.schedule, guidance=scale, dtype=self.weights.dtype, device=self.x.device)
            if alone.forecasts and not self.forecasts:
                raise ValueError(
                    f"{found.label} calls the unconditional branch at some steps only and forecasts it at the others, "
                    "which takes more slots than this batch has: make it with forecasts=True"
                )
            table = alone.padded(self.max_steps, self.forecasts)
            if None not in self._left:
                raise RuntimeError(f"all {len(self._left)} places are taken; retire a finished one first")
            self.schedule = found.schedule if self.schedule is None else self.schedule
            place = self._left.index(None)
            self.weights[place], self._times[place] = table.weights[0], table.times
            self.x[place] = noise
            self.history[place, self.max_steps] = noise
            for key, row in rows.items():
                self.cond[key][place] = row
            self._steps[place], self.index[place], self._left[place] = steps, 0, steps
            if bool((known != 1).any()):
                self._both[place] = alone.both or (True,) * steps
            self._settle()
        return place

    def times(self) -> Tensor:
        """(places,) what the network is told about time; places without a request repeat an old time."""
        return self._times.gather(1, self.index.clamp(max=self.max_steps - 1)[:, None])[:, 0]

    @torch.no_grad()
    def tick(self, model: Callable[..., Tensor]) -> list[int]:
        """Calls the model and takes one step of every running place. Returns the places that have just finished.

        Raises what the model raises, with nothing changed, and ValueError when it writes into states or conditions, or
        returns no pair for a request with a guidance scale.
        """
        with self._lock:
            given = {"x": self.x, **tensors_in(self.cond)}
            before, copies = versions(given), {}
            if self.check_finite and not self._compared:
                copies = copied(given)
            try:
                output = model(self.x, self.times(), **self.cond)
            except Exception as error:
                self._lose_where_written(given, before, copies, error)
                raise
            self._lose_where_written(given, before, copies)
            finished = self.step(output)
            self._compared = True
            return finished

    def _lose_where_written(
        self,
        given: Mapping[str, Any],
        before: Mapping[str, int],
        copies: Mapping[str, Any],
        cause: Exception | None = None,
    ) -> None:
        """Ends all running requests where a model has written into what they are read from, and raises ValueError."""
        try:
            check_untouched(given, before, copies)
        except ValueError as error:
            for place in self.running:
                self._failed[place] = f"{error}; of what it held nothing is left to go on from"
                self._left[place] = 0
                self.index[place] = self.max_steps
            self._both.clear()
            self._settle()
            raise error from cause

    def step(self, output: Any) -> list[int]:
        """Takes one step of every running place in one launch. output: (places, *S), or the guided pair; of a tuple
        the first counts, of an object its ``sample``.

        Returns the places that have just finished. Raises ValueError as :meth:`tick` does.
        """
        self.advance(output)
        return self.count()

    @torch.no_grad()
    def advance(self, output: Any) -> None:
        """The part of a step that is on the device: nothing of it depends on the host."""
        output = output_of(output)
        places, sample = len(self.x), tuple(self.x.shape[1:])
        fits = isinstance(output, Tensor) and output.is_floating_point() and tuple(output.shape[1:]) == sample
        if not fits or not places <= len(output) <= 2 * places:
            got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the model returned {got}; it must return floats of shape {(places, *sample)}, or for the guided pair "
                f"{(2 * places, *sample)}, unconditional rows first"
            )
        if self._needs_pair and len(output) == places:
            raise ValueError(
                f"the model returned {len(output)} rows, and requests with a guidance scale are running: it must "
                f"return the guided pair, {2 * places} rows, unconditional ones first; or admit without a scale"
            )
        if len(output) != places and (self._some_alone or len(output) != 2 * places):
            # A row that is not guided now gets its conditional output, to the bit.
            uncond, cond = output[:-places], output[-places:]
            if len(uncond) < places:
                guided = self.guided
                if len(uncond) != len(guided):
                    raise ValueError(
                        f"the model returned {len(output)} rows; give {places}, before them the unconditional rows of "
                        f"all places or of the {len(guided)} that are guided now, {guided}"
                    )
                uncond = cond.index_copy(0, torch.tensor(guided, device=cond.device), uncond)
            at = self.index.clamp(max=self.max_steps - 1)[:, None, None].expand(-1, 1, self.weights.shape[2])
            alone = self.weights.gather(1, at)[:, 0, GUIDANCE] == 1
            uncond = torch.where(alone.reshape(-1, *[1] * (cond.ndim - 1)), cond, uncond)
            output = torch.cat([uncond, cond])
        multistep_step(self.x, output, self.history, self.weights, self.index, out=self.x)
        later = self.index + 1
        self.index.copy_(torch.where(later < self._steps, later, self.max_steps))

    def count(self) -> list[int]:
        """The part of a step that is on the host: the places that have just finished."""
        before, self._left = self._left, [left - 1 if left else left for left in self._left]
        if self.check_finite:
            sound = self.x.isfinite().flatten(1).all(1).tolist()
            for place in [place for place, left in enumerate(before) if left and not sound[place]]:
                steps = int(self._steps[place])
                self._failed[place] = (
                    f"its state held NaN or Inf after step {steps - (before[place] or 0)} of {steps} (of its noise, or "
                    "of the model); the others go on"
                )
                self._left[place] = 0
                self.index[place] = self.max_steps
        finished = [place for place, left in enumerate(before) if left and not self._left[place]]
        for place in finished:
            self._both.pop(place, None)
        self._settle()
        return finished

    def _settle(self) -> None:
        """Takes note of who is guided at the next step."""
        guided = len(self.guided)
        self._needs_pair, self._some_alone = guided > 0, 0 < guided < len(self.running)

    # What changes at every tick would make torch.compile compile again. This is the mark that torch.compiler.disable
    # sets, without loading the compiler.
    count._torchdynamo_disable = True  # type: ignore[attr-defined]

    def retire(self, place: int) -> Tensor:
        """The sample of a finished place, which becomes free; of a running one, the state it has reached.

        Raises FloatingPointError for a request that has failed, and frees its place all the same.
        """
        with self._lock:
            if not 0 <= place < len(self._left) or self._left[place] is None:
                raise ValueError(f"place {place} holds no request; running are {self.running}")
            self._left[place] = None
            self.index[place] = self.max_steps
            self._both.pop(place, None)
            self._settle()
            if place in self._failed:
                raise FloatingPointError(f"the request at place {place} has failed: {self._failed.pop(place)}")
            return self.x[place].clone()


def _row(key: str, value: Any, own: Tensor) -> Tensor:
    """A request's row of a condition, as the batch stores it. Raises ValueError where it would not be the same.

    Python's numbers have no dtype: as everywhere, a float is rounded to the batch's.
    """
    plain = not isinstance(value, Tensor | np.ndarray)
    try:
        given = torch.as_tensor(np.asarray(value) if plain else value).detach()
    except TypeError as error:
        raise ValueError(f"cond[{key!r}]={str(value)[:60]!r}: give a tensor or numbers ({error})") from None
    if given.shape != own.shape[1:]:
        raise ValueError(f"cond[{key!r}] has shape {tuple(given.shape)}, not {tuple(own.shape[1:])}")
    row = given.to(own)
    rounded = plain and given.is_floating_point() and own.is_floating_point()
    if rounded and bool((given.isfinite() & (given.abs() > torch.finfo(own.dtype).max)).any()):
        raise ValueError(
            f"cond[{key!r}]={str(value)[:60]} is more than this batch's rows of {own.dtype} hold, "
            f"{torch.finfo(own.dtype).max:g}: make the batch with rows of another dtype"
        )
    if given.dtype != own.dtype and not rounded:
        back = row.to(given.device, given.dtype)
        if not bool(((back == given) | ((back != back) & (given != given))).all()):  # NaN stays NaN
            raise ValueError(
                f"cond[{key!r}] is {str(given.tolist())[:60]} of {given.dtype}, and this batch's rows are {own.dtype}, "
                f"which cannot hold it: give it as {own.dtype}, or make the batch with rows of {given.dtype}"
            )
    return row
