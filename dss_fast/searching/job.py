"""Job: a search prepared. What is asked is checked here, before any call of the model."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..draws import Draws, targets_of
from ..names import find_solver
from ..solver import Solver
from ..target import Model, Target
from ..version import __version__
from .budget import Cost, evaluations_in
from .calls import MOST, splits
from .forward import check_known
from .processes import from_first
from .room import Room, host_room
from .settings import GaussNewton, Lion, Method, described, settings_of
from .space import Space


@dataclass(frozen=True)
class Job:
    """What a search is asked for.

    draws: the samples of its targets, which every process draws alike. steps: the Ns. initial: the table to start from
    at each N; None where the search looks for the best one. budget: evaluations, a time, or None for the method's own.
    calls: of the model a sample may take, with guidance; None: two a step. guided: N -> how many steps call both
    branches then. chooses: whether the steps are candidates, of which the best is searched to the end. room: memory for
    it.
    """

    draws: Draws
    settings: Method
    steps: tuple[int, ...]
    initial: dict[int, Solver] | None = None
    budget: int | str | None = None
    calls: int | None = None
    guided: dict[int, int] | None = None
    chooses: bool = False
    room: Room = field(default_factory=Room)

    @property
    def goals(self) -> tuple[int, ...]:
        """The Ns that are searched to the end; of candidates the largest stands for the one to be chosen."""
        return (max(self.steps),) if self.chooses else self.steps

    @property
    def unsettled(self) -> tuple[int, ...]:
        """The Ns of which the search must find the steps that call both branches."""
        guided, given = self.guided or {}, self.initial or {}
        known = {n for n, solver in given.items() if solver.guided_steps is not None}
        return tuple(n for n in self.steps if guided.get(n, n) < n and n not in known)

    def functions(self, target: Target) -> dict[str, Callable[[Tensor], Tensor]]:
        """The functions of samples that a search is for, by what they are."""
        settings, found = self.settings, {}
        if isinstance(settings, GaussNewton):
            if callable(settings.loss):
                found["loss"] = settings.loss
            if settings.select == "features" and target.features is not None:
                found["features"] = target.features
        return found

    @property
    def memory(self) -> int | None:
        """Bytes of the device to use, where they are given."""
        return self.settings.memory

    @property
    def follows(self) -> bool:
        """Whether the search looks at the teacher between its end points."""
        return isinstance(self.settings, GaussNewton) and self.settings.loss == "trajectory"

    @property
    def differentiated(self) -> bool:
        """Whether the search goes back through the model."""
        return not (isinstance(self.settings, GaussNewton) and (self.settings.rounds == 0 or self.by_differences))

    @property
    def by_differences(self) -> bool:
        """Whether the search moves along the few directions of ``forward``, and calls the model alone."""
        return isinstance(self.settings, GaussNewton) and self.settings.gradients is False

    def without_gradient(self) -> Job:
        """The same search by differences. Raises ValueError where the library knows no directions."""
        assert isinstance(self.settings, GaussNewton)
        check_known(self.steps, self.calls)
        return replace(self, settings=replace(self.settings, gradients=False))

    def config(self) -> dict[str, Any]:
        """As JSON data: what a run folder says of a search, and what tables carry as their provenance."""
        request = self.draws.target.request if len(self.draws.targets) == 1 else None
        config = {
            "name": "+".join(target.name for target in self.draws.targets),
            "method": self.settings.name,
            "settings": described(self.settings),
            "num_steps": list(self.steps),
            "initial": None if self.initial is None else {str(n): s.to_dict() for n, s in self.initial.items()},
            "schedule": self.draws.schedule.to_dict(),
            "dtype": str(self.draws.target.dtype),
            "seed": self.draws.seed,
            "budget": self.budget,
            "processes": self.draws.world,
            "versions": {"dss_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **({"request": dict(request)} if request else {}),
            **({"calls": self.calls} if self.calls is not None else {}),
        }
        return cast(dict[str, Any], json.loads(json.dumps(config, allow_nan=False)))

    def call(self) -> str:
        """Lines of Python that search again and compare."""
        kind, several = type(self.settings), len(self.draws.targets) > 1
        given = {f.name: getattr(self.settings, f.name) for f in fields(kind)}
        changed = [f"{f.name}={given[f.name]!r}" for f in fields(kind) if given[f.name] != f.default]
        steps = self.steps[0] if len(self.steps) == 1 else list(self.steps)
        arguments = ["[target, *others]" if several else "target", *([] if self.chooses else [repr(steps)])]
        arguments += [f"calls={self.calls}"] if self.calls is not None else []
        named = ""
        if changed or kind is Lion:
            named = f"{kind.__name__}, "
            arguments.append(f"method={kind.__name__}({', '.join(changed)})")
        if self.initial is not None:
            arguments.append("initial=solver")
        arguments += [f"budget={self.budget!r}", f"seed={self.draws.seed!r}", 'out="another-folder"']
        return (
            f"from dss_fast import {named}compare, search\n\nresult = search({', '.join(arguments)})\n\n"
            "print(compare(target, list(result.solvers.values())))"
        )


def prepare(
    target: Target | Model | Sequence[Target],
    num_steps: int | Sequence[int] | None,
    *,
    calls: int | None = None,
    method: str | Method = "gauss_newton",
    initial: str | Solver | None = None,
    budget: int | str | None = None,
    seed: int | torch.Generator = 0,
    group: Any = None,
    **description: Any,
) -> Job:
    """The arguments of ``search`` as a Job. Raises ValueError naming what does not fit."""
    targets = targets_of(target, **description)
    for one in targets if calls is not None else ():
        if not one.guided:
            raise ValueError(f"calls={calls!r}: {one.name} has no guidance, so its calls are its steps: num_steps")
    guided = None if calls is None else splits(_calls(calls), None if num_steps is None else _steps(num_steps))
    if num_steps is None and guided is None:
        raise ValueError("give num_steps, as in search(target, 10), or calls, as in search(target, calls=11)")
    steps = _steps(num_steps if num_steps is not None else tuple(guided or ()))
    settings = settings_of(method)
    if isinstance(settings, GaussNewton) and settings.gradients is False and settings.rounds:
        check_known(steps, calls)
    if isinstance(budget, str):
        evaluations_in(budget, Cost(1.0, 0))  # what is no duration is refused before any work
    elif budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ValueError(f"budget={budget!r}: give a whole number from 1, or a time such as '20min'")
    if any(one.shape is None for one in targets):
        raise ValueError("the shape of one sample is not known: give it, as in search(Target(model, (4, 32, 32)), 10)")
    if isinstance(settings, GaussNewton):
        if settings.select == "features" and any(one.features is None for one in targets):
            raise ValueError("select='features' needs features, samples -> (B, F), of each target: give all of them")
    elif len(targets) > 1:
        raise ValueError(f"method={settings.name!r} takes one target, not {len(targets)}; use 'gauss_newton'")
    if guided is not None and not isinstance(settings, GaussNewton):
        raise ValueError(f"calls={calls!r}: method={settings.name!r} calls both branches at all steps")
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r}: give a whole number or a torch.Generator")
    draws = Draws.of(targets, seed, group)
    least = draws.world * len(targets)
    if isinstance(settings, GaussNewton) and len(targets) > 1 and (settings.samples or least) < least:
        raise ValueError(
            f"samples={settings.samples}: of each of {len(targets)} targets every process needs one; give {least} or "
            "more"
        )
    given = None
    if initial is not None:
        fewer = guided or {}
        given = {n: _initial(initial, settings.space_of(draws.schedule, n), fewer.get(n)) for n in steps}
    room = Room(host=from_first(host_room))
    job = Job(draws, settings, steps, given, budget, calls, guided, num_steps is None, room)
    if max(job.unsettled, default=0) > MOST:
        raise ValueError(
            f"calls={calls}: which of {max(job.unsettled)} steps call both branches is found for {MOST} steps at most: "
            "give fewer calls, or num_steps without calls, both branches at all of them"
        )
    return job


def _initial(initial: str | Solver, space: Space, guided: int | None) -> Solver:
    """The table to start from. guided: how many steps call both branches, None for all. Raises ValueError naming one
    that a search in this space cannot hold."""
    solver = find_solver(initial, space.schedule, space.num_steps)
    if guided is not None and solver.guided_steps is not None and solver.num_steps == space.num_steps:
        if len(solver.guided_steps) != guided:
            raise ValueError(
                f"initial: {solver.label} calls both branches at {len(solver.guided_steps)} steps, and this search at "
                f"{guided}: start from another table, or search with its calls={solver.guided_calls}"
            )
        space = replace(space, guided_steps=solver.guided_steps)
    if solver.num_steps != space.num_steps:
        raise ValueError(f"initial: {solver.label} has {solver.num_steps} steps; the search is for {space.num_steps}")
    solver = solver.following(space.schedule)
    space.theta(solver)
    return solver


def _calls(calls: int) -> int:
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 2:
        raise ValueError(f"calls={calls!r}: give a whole number from 2, of calls a sample may take")
    return calls


def _steps(num_steps: int | Sequence[int]) -> tuple[int, ...]:
    steps = (num_steps,) if isinstance(num_steps, int) else tuple(num_steps)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in steps)
    if not steps or not whole or len(set(steps)) != len(steps):
        raise ValueError(f"num_steps={num_steps!r}: give a whole number from 1, or several different ones")
    return steps
