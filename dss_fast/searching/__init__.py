"""search: the best table for a model, its number of steps and its guidance."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..denoiser import modules_of
from ..draws import Draws, targets_of
from ..files import check_writable
from ..names import find_solver
from ..solver import Solver
from ..target import Model, Target
from .ledger import Ledger
from .lion import Lion
from .plan import Plan, evaluations_in, plan, planned
from .probe import CALLS, PLAUSIBLE_CALLS, Cost, doubt, probe
from .processes import join_processes
from .runs import RunFolder, SearchResult, drive
from .settings import described
from .two_stage import GaussNewton

__all__ = ["METHODS", "Lion", "Plan", "SearchResult", "GaussNewton", "plan", "search"]

LOOK = 0.02  # at most this part of the budget goes into whether the schedule is plausible

FAILED = "dss_fast/failed"

METHODS: dict[str, type[GaussNewton] | type[Lion]] = {"gauss_newton": GaussNewton, "lion": Lion}


def search(
    target: Target | Model | Sequence[Target],
    num_steps: int | Sequence[int],
    *,
    method: str | GaussNewton | Lion = "gauss_newton",
    initial: str | Solver | None = None,
    budget: int | str | None = None,
    seed: int | torch.Generator = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    cache: str | os.PathLike[str] | None = None,
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
    out: a run folder: config, log, checkpoints, solvers, a report. resume: continue the search in it, to
        the bit-identical table. cache: a folder for teacher trajectories; ``out/teacher`` by default.
    progress: print the plan and show a bar. report: write report.html, and report.md with its
        pictures, into ``out``.

    Under torchrun the samples are shared by the processes; rank 0 reports. Ctrl-C ends the search with the
    best solver so far. Raises ValueError for what does not fit, OSError for a folder that cannot be
    written, both before any work; FloatingPointError for NaN or Inf, with ``error.result`` the best so far.
    """
    steps = _steps(num_steps)
    settings = _method(method)
    if isinstance(budget, str):
        evaluations_in(budget, Cost(1.0, 0))  # what is no time is refused before any work
    elif budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ValueError(f"budget={budget!r}: give a whole number from 1, or a time such as '20min'")
    joined = join_processes()
    targets = targets_of(target, **description)
    if any(one.shape is None for one in targets):
        raise ValueError("the shape of one sample is not known: give it, as in search(Target(model, (4, 32, 32)), 10)")
    if len(targets) > 1 and not isinstance(settings, GaussNewton):
        raise ValueError(f"method={settings.name!r} takes one target, not {len(targets)}; use 'gauss_newton'")
    by_features = isinstance(settings, GaussNewton) and settings.select == "features"
    if by_features and len({one.features is None for one in targets}) > 1:
        raise ValueError("select='features': some of the targets have features and some have none; give all of them")
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r}: give a whole number or a torch.Generator")
    draws = Draws.of(targets, seed)
    ledger = Ledger(settings.budget(steps) if budget is None else None if isinstance(budget, str) else budget)
    config = _config(draws, settings, steps, initial, budget)
    if out is not None:
        check_writable(out)  # before any call of the model
    folder = None
    try:
        folder, checkpoint = _open(out, config, resume, draws)
        if isinstance(budget, str) and checkpoint is not None:
            ledger.budget = checkpoint["budget"]  # what the time came to when it began
        finished = checkpoint is not None and _is_finished(checkpoint, ledger.budget)
        own_cache = Path(out) / "teacher" if out is not None and cache is None else None
        with _frozen([one.model for one in targets]):
            if finished:  # the model is not called, unless the report is missing
                assert checkpoint is not None
                result = SearchResult.of(checkpoint, folder)
            else:
                if checkpoint is None:
                    looks = CALLS * len(targets)
                    if not ledger.affords(looks):
                        raise ValueError(f"budget={budget!r}: the look at the model alone takes {looks}")
                    cost = probe(draws, differentiated=not (isinstance(settings, GaussNewton) and settings.rounds == 0))
                    ledger.spend_once("probe", looks)
                    if isinstance(budget, str):
                        ledger.budget = _from_first(draws, lambda: evaluations_in(str(budget), cost))
                    if progress and draws.rank == 0:
                        print(planned(draws, settings, steps, ledger.budget, cost))
                    if ledger.affords(PLAUSIBLE_CALLS * len(targets) / LOOK):
                        ledger.spend_once("plausible", sum(doubt(one) for one in draws.each))
                unnamed = sum(one.key is None for one in targets)
                if unnamed:
                    models = [about["model"] for about in (config, *config.get("others", ()))]
                    draws, config["outputs"] = draws.fingerprinted(models)
                    ledger.spend_once("fingerprint", 4 * unnamed)
                if out is not None:
                    _from_first(draws, lambda: folder.begin(config) if folder else None)
                kept = None if cache is None else Path(cache)
                state = checkpoint and checkpoint["state"]
                events = settings.run(draws, ledger, steps, initial=initial, cache=own_cache or kept, state=state)
                asked = draws.target.request if len(targets) == 1 else None
                request = {"request": dict(asked)} if asked else {}
                provenance = {**config, "name": "+".join(one.name for one in targets), **request}
                result = drive(
                    events,
                    ledger,
                    folder=folder,
                    checkpoint=checkpoint,
                    provenance=provenance,
                    progress=progress,
                    draws=draws,
                )
            if folder is not None and report and not result.interrupted:
                _report(result, draws, config, not finished, progress)
        if own_cache is not None and not result.interrupted and draws.rank == 0:
            shutil.rmtree(own_cache, ignore_errors=True)  # trajectories there only serve resuming
    except Exception as error:
        if draws.world > 1:
            _name_the_first(error, draws.rank)
        raise
    finally:
        if folder is not None:
            folder.close()
        if joined:  # after an error too: leaving the group frees those who wait for this process
            torch.distributed.destroy_process_group()
    return result


def _name_the_first(error: Exception, rank: int) -> None:
    """Leaves word of an error for the other processes, which see a closed connection only, or adds what they left."""
    with suppress(RuntimeError):  # the process that keeps the store may be the one that is gone
        store = torch.distributed.distributed_c10d._get_default_store()
        if store.check([FAILED]):
            error.add_note(f"the first to fail was {store.get(FAILED).decode()}")
        else:
            store.set(FAILED, f"process {rank}: {type(error).__name__}: {error}")


def _report(result: SearchResult, draws: Draws, config: dict[str, Any], again: bool, progress: bool = False) -> None:
    """Writes the report; Ctrl-C leaves it out, and so does an error, which is told. again: also where there is one."""
    from ..report import FILES, SearchRecord, write_report

    assert result.out is not None
    times = [event["time"] for event in result.history if "time" in event]
    curves = {key: {n: result.curve(key, n) for n in result.solvers} for key in ("loss", "held_out")}
    record = SearchRecord(
        result.solvers,
        result.evaluations,
        _call(config, "[target, *others]" if draws.others else "target"),
        config,
        starts=_starts(result, config, draws),
        budget=config["budget"] if isinstance(config["budget"], int) else None,
        seconds=times[-1] - times[0] if times else None,
        **curves,
        others=[other.name for other in draws.others],
    )
    try:
        if again or not all((result.out / name).exists() for name in FILES):
            write_report(result.out, draws.target, record, progress=progress)
    except KeyboardInterrupt:
        print(f"interrupted: the search is finished and saved in {result.out}, without its report")
    except Exception as error:  # the report calls the user's own code; what it raises must not cost the result
        what = f"{type(error).__name__}: {error}"
        warnings.warn(f"the search is finished and saved in {result.out}, without its report: {what}", stacklevel=3)


def _starts(result: SearchResult, config: dict[str, Any], draws: Draws) -> list[Solver]:
    """The tables that a search started from, by their names."""
    first = {e["num_steps"]: e["start"] for e in result.history if isinstance(e.get("start"), str)}
    found = []
    for n in result.solvers:
        given = first.get(n) or config["initial"] or ("euler" if config["method"] == "lion" else None)
        if given is not None:
            found.append(Solver.from_dict(given) if isinstance(given, dict) else find_solver(given, draws.schedule, n))
    return found


def _call(config: dict[str, Any], given_to: str) -> str:
    """The lines of Python that search again and compare. given_to: the call's first argument."""
    kind = METHODS[config["method"]]
    defaults = {f.name: f.default for f in fields(kind)}
    given = {key: value for key, value in config["settings"].items() if value != defaults[key]}
    named, arguments = "", [f"{given_to}, {config['num_steps']!r}"]
    if given or kind is Lion:
        named = f"{kind.__name__}, "
        arguments.append(f"method={kind.__name__}({', '.join(f'{key}={value!r}' for key, value in given.items())})")
    if config["initial"] is not None:
        arguments.append(f"initial={config['initial']!r}" if isinstance(config["initial"], str) else "initial=solver")
    arguments += [f"{key}={config[key]!r}" for key in ("budget", "seed")]
    lines = [f"from dss_fast import {named}compare, search", ""]
    lines += [f'result = search({", ".join(arguments)}, out="another-folder")', ""]
    return "\n".join([*lines, "print(compare(target, list(result.solvers.values())))"])


def _config(
    draws: Draws,
    settings: GaussNewton | Lion,
    steps: tuple[int, ...],
    initial: str | Solver | None,
    budget: int | str | None,
) -> dict[str, Any]:
    """What a run folder says of a search, and a resumed one must say too."""
    about = [
        {
            "shape": one.target.shape,
            "guidance_scale": one.target.guidance_scale,
            "guided_channels": one.target.guided_channels,
            "model": one.target.key or one.parameters_hash(),
        }
        for one in draws.each
    ]
    return {
        "method": settings.name,
        "settings": described(settings),
        "num_steps": steps,
        "initial": initial.to_dict() if isinstance(initial, Solver) else initial,
        "schedule": draws.schedule.to_dict(),
        **about[0],
        **({"others": about[1:]} if draws.others else {}),
        "dtype": str(draws.target.dtype),
        "seed": draws.seed,
        "budget": budget,
        "processes": draws.world,
        "versions": {"dss_fast": _version(), "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _open(
    out: str | os.PathLike[str] | None, config: dict[str, Any], resume: bool, draws: Draws
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """Rank 0's run folder, and the checkpoint every rank goes on from."""
    opened: list[RunFolder] = []

    def checkpoint() -> dict[str, Any] | None:
        assert out is not None
        opened.append(RunFolder(out, config, resume))
        return opened[0].checkpoint

    found = None if out is None else _from_first(draws, checkpoint)
    return (opened[0] if opened else None), found


def _from_first(draws: Draws, work: Callable[[], Any]) -> Any:
    """What some work of the first process returns, or raises, on every process: none is left waiting."""
    found = error = None
    if draws.rank == 0:
        try:
            found = work()
        except Exception as failed:
            error = failed
    if draws.world > 1:
        shared: list[Any] = [error, found]
        torch.distributed.broadcast_object_list(shared, src=0)
        error, found = shared
    if error is not None:
        raise error
    return found


def _is_finished(checkpoint: dict[str, Any], budget: int | None) -> bool:
    """Whether nothing is left to do: the method said so, or a budget that was not raised since stopped it."""
    if not checkpoint["finished"]:
        return False
    before = checkpoint["budget"]
    return checkpoint["complete"] or before is None or (budget is not None and budget <= before)


def _method(method: str | GaussNewton | Lion) -> GaussNewton | Lion:
    """The settings of a method. Raises ValueError listing the methods."""
    if isinstance(method, GaussNewton | Lion):
        return method
    if method not in METHODS:
        raise ValueError(
            f"method={method!r}: choose {' or '.join(map(repr, METHODS))}, or give GaussNewton or Lion settings"
        )
    return METHODS[method]()


def _steps(num_steps: int | Sequence[int]) -> tuple[int, ...]:
    steps = (num_steps,) if isinstance(num_steps, int) else tuple(num_steps)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in steps)
    if not steps or not whole or len(set(steps)) != len(steps):
        raise ValueError(f"num_steps={num_steps!r}: give a whole number from 1, or several different ones")
    return steps


@contextmanager
def _frozen(models: Sequence[Model]) -> Iterator[None]:
    """The models' modules in eval mode, their parameters out of autograd, for the search; then as they were."""
    modules = [part for model in models for module in modules_of(model) for part in module.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    before = [p.requires_grad for p in parameters], [m.training for m in modules]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in modules:
            module.training = False
        yield
    finally:
        for parameter, wanted in zip(parameters, before[0], strict=True):
            parameter.requires_grad_(wanted)
        for module, mode in zip(modules, before[1], strict=True):
            module.training = mode


def _version() -> str:
    from .. import __version__

    return __version__
