"""search: the best table for a model, its number of steps and its guidance."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from ..denoiser import frozen
from ..files import check_writable
from ..modes import on_host
from ..report import SearchRecord, write_report
from ..solver import Solver
from ..target import Model, Target
from .budget import Ledger, clocked, default_budget, evaluations_in, seconds_in
from .descent import descend
from .description import doubt, look_evaluations
from .folder import RunFolder, opened
from .job import Job, prepare
from .lion import imitate
from .plan import Plan, looked, plan, planned, with_room
from .probe import CALLS, KEYLESS, OUTPUTS, Weights, clock, identity
from .processes import agreed, from_first, is_first, joined
from .recompute import recomputing
from .result import Event, SearchResult
from .runs import is_finished, restored, run
from .settings import METHODS, GaussNewton, Lion, Method

__all__ = ["METHODS", "Event", "GaussNewton", "Lion", "Method", "Plan", "SearchResult", "fit", "plan", "search"]

CLOCKED = 64  # samples of the largest batch that a time is measured on
DOUBT_SHARE = 0.02  # at most this part of the budget goes into whether the target is described rightly
METHOD: dict[str, Callable[[Job, Ledger, dict[str, Any] | None], Iterator[Event]]] = {
    GaussNewton.name: descend,
    Lion.name: imitate,
}


def search(
    target: Target | Model | Sequence[Target],
    num_steps: int | Sequence[int] | None = None,
    *,
    calls: int | None = None,
    method: str | Method = "gauss_newton",
    initial: str | Solver | None = None,
    budget: int | str | None = None,
    seed: int | torch.Generator = 0,
    group: Any = None,
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
    calls: the most calls of the model that a sample may take with guidance, instead of two a step: the unconditional
        branch then runs at some steps, which the search finds, and at the others the difference of the two is forecast.
        Without num_steps the search chooses N too, of two: half the calls, with both branches at all steps, or two
        thirds of them, with both at as many steps as the calls leave (of 11: 5, or 7 with 4). For up to 40 steps.
    method: ``"gauss_newton"``, or ``"lion"``, the paper's recipe (arXiv 2505.21114); or a :class:`GaussNewton` or
        :class:`Lion` with settings of its own.
    initial: the table to start from, coefficients included: a Solver, or a name that fits every N (``"ab2"``).
        None: the best of the library's, the published and the hand-made ones; Euler for ``"lion"``.
    budget: the most model evaluations to spend (forward 1, backward 2; guidance counts once; the teacher,
        checks and rejected steps count), or a time, ``"20min"``, which the speed of a few batches turns into
        evaluations, and that of the search itself as it goes. None: the method's. :func:`plan` says what one takes.
    seed: settles all noise and conditions; a Generator gives one number. Global generators stay as they are.
    group: a torch.distributed process group whose processes share the samples, as the data-parallel one of a device
        mesh. None: torchrun's, where none is initialised. In one that is, each process takes all samples, as tensor or
        context parallelism asks for; every process of it calls ``search`` alike, and its first one reports.
    out: a run folder: config, log, checkpoint, solvers, a report. resume: continue the search in it, to
        the bit-identical table.
    progress: print the plan and show a bar. report: write report.html, and report.md with its
        pictures, into ``out``; its evaluations are not part of the budget.

    Whether the target is described rightly is looked at before: 82 evaluations forward, 46 where 82 are more than a
    fiftieth of the budget, which then are not part of it; up to eight times as many for samples of fewer than 64
    numbers, and more where the look leaves a doubt. Where it is not, the search warns, names the description that fits,
    and the report answers nothing.

    Batches that take more than the memory there is (``GaussNewton(memory=...)``) run in parts, down to one sample,
    with the network's own gradient checkpointing on where it has one (diffusers, ``Target(checkpointing=...)``), and
    find the same table up to rounding. Where memory runs out nevertheless, parts of half the size go on.

    Under torchrun the samples are shared by the processes; rank 0 reports. Ctrl-C ends the search with the
    best solver so far. Raises ValueError for what does not fit, OSError for a folder that cannot be
    written, both before any work; FloatingPointError for NaN or Inf, with ``error.result`` the best so far.
    """
    if out is not None:
        check_writable(out)  # before any call of the model
    began = time.monotonic()
    asked: dict[str, Any] = {"calls": calls, "method": method, "initial": initial, "budget": budget, "seed": seed}
    with on_host(), joined() as own, torch.inference_mode(False), torch.enable_grad():
        job = prepare(target, num_steps, group=own if group is None else group, **asked, **description)
        config = job.config()
        models = [one.model for one in job.draws.targets]
        with opened(out, config, resume) as (folder, checkpoint), frozen(models), ExitStack() as until_the_end:
            job, ledger = begin(job, config, folder, checkpoint, progress, until_the_end)
            over = checkpoint is not None and is_finished(checkpoint, ledger)
            if checkpoint is not None and over:
                result = restored(checkpoint, folder)
            else:
                events = METHOD[job.settings.name](job, ledger, checkpoint and checkpoint["state"])
                if isinstance(budget, str) and checkpoint is None:
                    events = clocked(events, ledger, budget, began)
                result = run(events, ledger, config, folder=folder, checkpoint=checkpoint, progress=progress)
            if report and folder is not None and not result.interrupted and not (over and folder.has_report()):
                finish(job, result, config, progress)
    return result


def fit(
    target: Target | Model | Sequence[Target],
    num_steps: int | Sequence[int],
    *,
    budget: int | str = 500,
    **options: Any,
) -> SearchResult:
    """Chooses a table for the model in a few hundred calls forward, none backward: the best of the library's and the
    published ones, each moved to several sizes of the data (:meth:`Solver.moved`), and of the hand-made ones.

    It is ``search(target, num_steps, method=GaussNewton(rounds=0), budget=budget)``, and so does a search whose budget
    pays for no round; ``options`` are those of :func:`search`. The result says what part of the error of the best
    hand-made table tried is left, on the samples of the choice; ``compare`` says it on fresh ones.
    """
    if "method" in options:
        raise ValueError(f"method={options['method']!r}: fit has its own, GaussNewton(rounds=0); search takes others")
    return search(target, num_steps, method=GaussNewton(rounds=0), budget=budget, **options)


def begin(
    job: Job,
    config: dict[str, Any],
    folder: RunFolder | None,
    checkpoint: dict[str, Any] | None,
    progress: bool,
    until_the_end: ExitStack,
) -> tuple[Job, Ledger]:
    """The job with its room and the ledger of a search, after a look at the model, and at whether it is still the
    one of the checkpoint. Gradient checkpointing that the search needs is on until its end.

    Writes the targets' identities into the config. Raises ValueError where a model cannot be searched, or is another.
    """
    draws, ledger = job.draws, Ledger(job.budget if isinstance(job.budget, int) else None)
    if job.budget is None:
        ledger.budget = default_budget(job.settings, job.goals)
    if checkpoint is not None and isinstance(job.budget, str):
        ledger.budget = checkpoint["budget"]  # what the time came to when it began
    before = [Weights(target) for target in draws.targets]
    if checkpoint is None or not is_finished(checkpoint, ledger):
        looks = CALLS * len(draws.targets)
        if checkpoint is None and not ledger.affords(looks):
            raise ValueError(f"budget={job.budget!r}: the look at the model alone takes {looks}")
        evaluations = job.budget if isinstance(job.budget, int) else None
        job, cost = looked(job, evaluations)
        job = with_room(job, evaluations, cost)
        if cost.recomputed:
            until_the_end.enter_context(recomputing(draws.targets))
    if checkpoint is None:
        time = from_first(lambda: seconds_in(job.budget) if isinstance(job.budget, str) else None)
        if time is not None:
            clocks = [clock(one, cost, job.differentiated, time, CLOCKED) for one in draws.each]
            seconds, spent = sum(one.seconds for one in clocks), sum(one.calls - cost.calls for one in clocks)
            cost = replace(cost, seconds=seconds / len(clocks), calls=cost.calls + spent)
        ledger.spend_once("probe", cost.calls or looks)
        limit, given = job.budget, ledger.budget  # what the first process says counts, also where others say no time
        ledger.budget = from_first(lambda: evaluations_in(limit, cost) if isinstance(limit, str) else given)
        cost_said = planned(job, ledger.budget, cost)  # which refuses what the host cannot hold
        if progress and is_first():
            print(cost_said)
        whole = from_first(
            lambda: ledger.affords(sum(look_evaluations(target) for target in draws.targets) / DOUBT_SHARE)
        )
        found = [doubt(one, whole) for one in draws.each]
        ledger.spend(sum(spent for spent, _ in found) if whole else 0)
        said = from_first(lambda: [text for _, text in found])
        if any(said):
            config["doubt"] = next(filter(None, said))
    elif "doubt" in checkpoint["config"]:
        config["doubt"] = checkpoint["config"]["doubt"]
    # Another process or object may not have called its model yet: what moves is what moved when the search began.
    moved = from_first(lambda: [was.moved() for was in before])
    if checkpoint is not None and len(checkpoint["config"].get("targets", ())) == len(moved):
        moved = [about["moved"] for about in checkpoint["config"]["targets"]]
    each = zip(draws.each, moved, strict=True)
    config["targets"] = [identity(one, names, **job.functions(one.target)) for one, names in each]
    ledger.spend_once("identity", KEYLESS * sum(target.key is None for target in draws.targets))
    config.update(agreed(config))
    for target, about in zip(draws.targets, config["targets"], strict=True):
        if target.key is not None:  # its processes have compared what their models return
            about.pop(OUTPUTS, None)
    # A process that alone doubts its schedule has spent more, and would stop in another round than the others.
    ledger.evaluations = from_first(lambda: ledger.evaluations)
    from_first(lambda: folder.check(config) if folder else None)
    return job, ledger


def finish(job: Job, result: SearchResult, config: Mapping[str, Any], progress: bool = False) -> None:
    """Writes the report. Nothing that it raises loses what was found: it calls the user's own code."""
    assert result.out is not None
    target, *others = job.draws.targets
    record = SearchRecord(
        result.solvers,
        result.evaluations,
        job.call(),
        config,
        starts=list(result.starts.values()),
        budget=job.budget if isinstance(job.budget, int) else None,
        seconds=result.seconds,
        others=[other.name for other in others],
        doubt=config.get("doubt", ""),
        **result.curves(),
    )
    without = f"the search is finished and saved in {result.out}, without its report"
    try:
        write_report(result.out, target, record, progress=progress)
    except KeyboardInterrupt:
        print(f"interrupted: {without}")
    except Exception as error:
        warnings.warn(f"{without}: {type(error).__name__}: {error}", stacklevel=3)
