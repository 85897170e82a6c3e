"""search: the best table for a model, its number of steps and its guidance."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..denoiser import frozen
from ..files import check_writable
from ..solver import Solver
from ..target import Model, Target
from .budget import Ledger, default_budget, evaluations_in
from .descent import descend
from .job import Job, prepare
from .lion import imitate
from .plan import Plan, plan, planned
from .probe import CALLS, KEYLESS, PLAUSIBLE_CALLS, doubt, identity, probe
from .processes import agreed, from_first, joined
from .result import Event, SearchResult
from .runs import RunFolder, follow, opened
from .settings import METHODS, GaussNewton, Lion, Method

__all__ = ["METHODS", "Event", "GaussNewton", "Lion", "Method", "Plan", "SearchResult", "plan", "search"]

LOOK = 0.02  # at most this part of the budget goes into whether the schedule is plausible
RUN: dict[str, Callable[[Job, Ledger, dict[str, Any] | None], Iterator[Event]]] = {
    GaussNewton.name: descend,
    Lion.name: imitate,
}


def search(
    target: Target | Model | Sequence[Target],
    num_steps: int | Sequence[int],
    *,
    method: str | Method = "gauss_newton",
    initial: str | Solver | None = None,
    budget: int | str | None = None,
    seed: int | torch.Generator = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    report: bool = True,
    **description: Any,
) -> SearchResult:
    """Searches timesteps and coefficients that take the model from noise to where a fine solver takes it:

        min over tables  E |x_N - teacher(1)|^2,   x_{i+1} = a_i x_i + b_i sum_{j<=i} c_ij y_j

    target: a Target with a shape; its schedule is ``Flow()`` by default, its device and dtype are those of the search,
        and its ``name`` the solvers'. Or the model alone, with the Target's fields as ``description``. Or several
        Targets of one schedule: a table for all of them, in which each counts by its error relative to what the table
        that the search starts from leaves there.
    num_steps: N, or several in one search.
    method: ``"gauss_newton"``, or ``"lion"``, the paper's recipe (arXiv 2505.21114); or a :class:`GaussNewton` or
        :class:`Lion` with settings of its own.
    initial: the table to start from, coefficients included: a Solver, or a name that fits every N (``"ab2"``).
        None: the best hand-made one; Euler for ``"lion"``.
    budget: the most model evaluations to spend (forward 1, backward 2; guidance counts once; the teacher,
        checks and rejected steps count), or a time, ``"20min"``, which one forward and one backward of the model turn
        into evaluations. None: the method's. :func:`plan` says what one takes.
    seed: settles all noise and conditions; a Generator gives one number. Global generators stay as they are.
    out: a run folder: config, log, checkpoint, solvers, a report. resume: continue the search in it, to
        the bit-identical table.
    progress: print the plan and show a bar. report: write report.html, and report.md with its
        pictures, into ``out``; its evaluations are not part of the budget.

    Under torchrun the samples are shared by the processes; rank 0 reports. Ctrl-C ends the search with the
    best solver so far. Raises ValueError for what does not fit, OSError for a folder that cannot be
    written, both before any work; FloatingPointError for NaN or Inf, with ``error.result`` the best so far.
    """
    if out is not None:
        check_writable(out)  # before any call of the model
    with joined(), torch.inference_mode(False), torch.enable_grad():
        asked: dict[str, Any] = {"method": method, "initial": initial, "budget": budget, "seed": seed}
        job = prepare(target, num_steps, **asked, **description)
        with opened(out, job, resume) as (folder, checkpoint), frozen([one.model for one in job.draws.targets]):
            result, config = run(job, folder, checkpoint, progress)
            if report and folder is not None and not result.interrupted:
                finish(job, result, config)
    return result


def run(
    job: Job, folder: RunFolder | None, checkpoint: dict[str, Any] | None, progress: bool
) -> tuple[SearchResult, dict[str, Any]]:
    """Looks at the model, then searches, or goes on from a checkpoint; what was found, and all that was asked."""
    timed = isinstance(job.budget, str)
    ledger = Ledger(job.budget if isinstance(job.budget, int) else None)
    if job.budget is None:
        ledger.budget = default_budget(job.settings, job.steps)
    if checkpoint is None:
        config = _looked_at(job, ledger, progress)
    else:
        ledger.budget = checkpoint["budget"] if timed else ledger.budget  # what the time came to when it began
        config = _identified(job)
    from_first(job.draws, lambda: folder.check(config) if folder else None)
    if checkpoint is not None and _is_finished(checkpoint, ledger.budget):
        history, out = (folder.history, folder.path) if folder else ([], None)
        found = SearchResult(
            checkpoint["solvers"], history, checkpoint["evaluations"], False, out, checkpoint["starts"]
        )
        if folder:
            folder.mend_solvers(found.solvers)
        return found, config
    events = RUN[job.settings.name](job, ledger, checkpoint and checkpoint["state"])
    return follow(events, job, ledger, config, folder=folder, checkpoint=checkpoint, progress=progress), config


def finish(job: Job, result: SearchResult, config: Mapping[str, Any]) -> None:
    """Writes the report. Nothing that it raises loses what was found."""
    ...


def _looked_at(job: Job, ledger: Ledger, progress: bool) -> dict[str, Any]:
    """What the search is for, after the model has shown that it can be searched; prints the plan.

    Raises ValueError where it cannot, or where the processes have different models.
    """
    draws, looks = job.draws, CALLS * len(job.draws.targets)
    if not ledger.affords(looks):
        raise ValueError(f"budget={job.budget!r}: the look at the model alone takes {looks}")
    cost = probe(draws, job.differentiated)
    ledger.spend_once("probe", looks)
    config = _identified(job)
    if isinstance(job.budget, str):
        limit = job.budget
        ledger.budget = from_first(draws, lambda: evaluations_in(limit, cost))
    if progress and draws.rank == 0:
        print(planned(job, ledger.budget, cost))
    if ledger.affords(PLAUSIBLE_CALLS * len(draws.targets) / LOOK):
        ledger.spend_once("plausible", sum(doubt(one) for one in draws.each))
    ledger.spend_once("identity", KEYLESS * sum(target.key is None for target in draws.targets))
    return config


def _identified(job: Job) -> dict[str, Any]:
    """All that is asked, with the identity of each target. Raises ValueError where processes have different ones."""
    config = {**job.to_dict(), "targets": [identity(one) for one in job.draws.each]}
    return agreed(job.draws, config)


def _is_finished(checkpoint: Mapping[str, Any], budget: int | None) -> bool:
    """Whether nothing is left to do: the method said so, or a budget that was not raised since stopped it."""
    if not checkpoint["finished"]:
        return False
    before = checkpoint["budget"]
    return checkpoint["complete"] or before is None or (budget is not None and budget <= before)
