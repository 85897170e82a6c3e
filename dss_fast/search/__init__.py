"""search: the best table for a model, its number of steps and its guidance."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import inspect
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..problem import Problem, join_processes
from ..sampling import find_solver
from ..schedule import Flow, Schedule
from ..solver import Solver
from .run import RunFolder, SearchResult, check_writable, drive

__all__ = ["METHODS", "SearchResult", "search"]

METHODS = ("gauss_newton", "lion")


def search(
    model: Callable,
    shape: Sequence[int],
    num_steps: int | Sequence[int],
    *,
    schedule: Schedule | None = None,
    cond: Callable | Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: float | tuple[float, float] = 1.0,
    guided_channels: int | None = None,
    method: str | None = None,
    initial: str | Solver = "euler",
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int | torch.Generator = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    cache: str | os.PathLike | None = None,
    key: str | None = None,
    name: str | None = None,
    progress: bool = True,
    report: bool = True,
    decode: Callable | None = None,
    features: Any = None,
    classify: Any = None,
    labels: Any = None,
    **settings,
) -> SearchResult:
    """Searches timesteps and coefficients that take the model from noise to where a fine solver takes it:

        min over tables  E |x_N - teacher(1)|^2,   x_{i+1} = a_i x_i + b_i sum_{j<=i} c_ij y_j

    model, schedule, uncond, guided_channels: as in ``sample``; the schedule is ``Flow()`` by default.
    shape: of one sample, without the batch. num_steps: N, or several in one search.
    cond: ``draw(n, generator) -> dict`` of the model's keyword arguments for n samples (generator: a CPU
        ``torch.Generator``), or a dict for all samples.
    guidance_scale: a number, or a pair (low, high) from which each sample draws its own.
    method: ``"gauss_newton"``, or ``"lion"``, the paper's recipe (arXiv 2505.21114).
    initial: the solver to start from, a Solver or a name that fits every N (``"ab2"``).
    samples, batch_size: by default the method's.
    seed: settles all noise and conditions; a Generator gives one number. Global generators stay as they are.
    device: where noise is put; by default the model's. dtype: of the states.
    budget: the most model evaluations to spend (forward 1, backward 2; guidance counts once; the teacher,
        checks and rejected steps count).
    out: a run folder: config, log, checkpoints, solvers, a report. resume: continue the search in it, to
        the bit-identical table. cache: a folder for teacher trajectories; ``out/teacher`` by default.
    key: names the model in the cache instead of a hash of its parameters. name: of the solvers.
    report: write report.md with pictures into ``out``. decode: latents -> images in [0, 1], for its pictures.
    features, classify, labels: ``compare`` takes them; here so that one dict describes a model to both.
    settings: the method's own; see ``search.lion``, ``search.gauss_newton``.

    Under torchrun the samples are shared by the processes; rank 0 reports. Ctrl-C ends the search with the
    best solver so far. Raises ValueError for what does not fit, OSError for a folder that cannot be
    written, both before any work; FloatingPointError for NaN or Inf, with ``error.result`` the best so far.
    """
    steps = _steps(num_steps)
    given = {"samples": samples, "batch_size": batch_size, "initial": initial}
    settings.update({k: v for k, v in given.items() if v is not None})
    run, settings = _method(method, settings)
    joined = join_processes()
    schedule = Flow() if schedule is None else schedule
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (1,), generator=seed, device=seed.device))
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if device is None:
        device = parameter.device if parameter is not None else "cpu"
    _check(shape, samples, batch_size, budget, dtype)
    for n in steps:
        if not isinstance(initial, Solver):
            find_solver(initial, schedule, n)
    problem = Problem(
        model,
        tuple(shape),
        schedule,
        draw=cond,
        uncond=uncond,
        guidance_scale=guidance_scale,
        guided_channels=guided_channels,
        device=device,
        dtype=dtype,
        seed=seed,
        budget=budget,
    )
    config = {
        "method": run.__name__,
        "num_steps": steps,
        "shape": problem.shape,
        "schedule": schedule.spec(),
        "guidance_scale": problem.guidance_scale,
        "guided_channels": guided_channels,
        "dtype": str(dtype),
        "seed": seed,
        "settings": {k: _plain(v) for k, v in settings.items()},
        "budget": budget,
        "processes": problem.world,
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    own_cache = Path(out) / "teacher" if out is not None and cache is None else None
    if out is not None:
        check_writable(Path(out))  # before the fingerprint's model calls
    with _frozen(model):
        config["model"] = key or problem.fingerprint()
        folder, checkpoint = _open(out, config, resume, problem)
        found = inspect.signature(run).parameters
        extra = {"cache": own_cache or cache, "key": config["model"]}
        settings.update({k: v for k, v in extra.items() if k in found})
        named = {"name": name} if name else {}
        result = drive(
            run,
            problem,
            steps,
            settings,
            folder=folder,
            checkpoint=checkpoint,
            provenance={**config, **named},
            progress=progress,
        )
        done_before = checkpoint is not None and checkpoint["finished"] and (Path(out) / "report.md").exists()
        if folder and report and not result.interrupted and not done_before:
            from .report import write_report

            write_report(result, problem, config, decode=decode)
        if own_cache and not result.interrupted and problem.rank == 0:
            shutil.rmtree(own_cache, ignore_errors=True)  # served resuming only
    if joined:
        torch.distributed.destroy_process_group()
    return result


def _open(out, config: dict, resume: bool, problem: Problem) -> tuple[RunFolder | None, dict | None]:
    """Rank 0's run folder, and the checkpoint every rank goes on from."""
    folder = checkpoint = error = None
    if out is not None and problem.rank == 0:
        try:
            folder = RunFolder(out, config, resume)
            checkpoint = folder.checkpoint
        except Exception as failed:
            error = failed
    if problem.world > 1:
        shared = [error, checkpoint]
        torch.distributed.broadcast_object_list(shared, src=0)
        error, checkpoint = shared
    if error is not None:
        raise error
    return folder, checkpoint


def _method(method: str | None, settings: dict) -> tuple[Callable, dict]:
    """The generator of a method. Raises ValueError listing the methods, or the settings it has."""
    if method is None:
        there = importlib.util.find_spec(f"{__name__}.gauss_newton") is not None
        method = "gauss_newton" if there else "lion"
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose {' or '.join(map(repr, METHODS))}")
    run = getattr(importlib.import_module(f"{__name__}.{method}"), method)
    accepted = set(inspect.signature(run).parameters) - {"problem", "steps", "state", "cache", "key"}
    if "initial" not in accepted and settings["initial"] == "euler":
        del settings["initial"]
    for name in settings:
        if name not in accepted:
            raise ValueError(f"method {method!r} has no setting {name!r}; it has: {', '.join(sorted(accepted))}")
    return run, settings


def _steps(num_steps: int | Sequence[int]) -> tuple[int, ...]:
    steps = (num_steps,) if isinstance(num_steps, int) else tuple(num_steps)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in steps)
    if not steps or not whole or len(set(steps)) != len(steps):
        raise ValueError(f"num_steps={num_steps!r}: give a whole number from 1, or several different ones")
    return steps


def _check(shape, samples, batch_size, budget, dtype) -> None:
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape={tuple(shape)!r}: give the sizes of one sample, as in (3, 32, 32)")
    for label, value in (("samples", samples), ("batch_size", batch_size), ("budget", budget)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{label}={value!r}: give a whole number from 1")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: must be floating point")


class _frozen:
    """Takes a module's parameters out of autograd for the search, and puts them back as they were."""

    def __init__(self, model: Callable):
        self.parameters = list(model.parameters()) if isinstance(model, nn.Module) else []

    def __enter__(self):
        self.before = [p.requires_grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *_):
        for parameter, wanted in zip(self.parameters, self.before, strict=True):
            parameter.requires_grad_(wanted)


def _plain(value: Any) -> Any:
    if isinstance(value, Solver):
        return value.to_dict()
    return value if isinstance(value, str | int | float | bool | list | tuple | dict | None) else repr(type(value))


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"dss_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
