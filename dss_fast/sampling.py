"""sample: run a solver. One loop for every solver, schedule and model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser
from .graph import replay, signature
from .handmade import METHODS, handmade
from .schedule import Schedule, default_schedule, step_weights
from .solver import Solver
from .step import multistep_step


@torch.no_grad()
def sample(
    model: Callable,
    noise: Tensor | Sequence[int],
    solver: Solver | str,
    *,
    schedule: Schedule | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    guided_channels: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[dict], None] | None = None,
    return_trajectory: bool = False,
    history_dtype: torch.dtype | None = None,
    check_finite: bool | None = None,
    backend: str | None = None,
    cuda_graph: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples with N network calls:

        for i in range(N):
            m = model(x, time_i, **cond)                            with guidance m_u + scale * (m - m_u)
            y_i = p_i * x + q_i * m
            x = a_i * x + b_i * sum_{j<=i} c_ij * y_j

    model: called as model(x, t, **cond) -> (B, *S); t is (B,), in the schedule's units.
    noise: (B, *S), any float dtype, standard normal; or a shape, drawn with generator, device and dtype.
    solver: a Solver; a name, ``"sit-xl-2-256/10"``, ``"dpmpp_2m/8"``, ``"ab2/10@karras"``; or a JSON file.
    schedule: the model's; by default that of the solver's family, ``Flow()`` or ``VP()``.
    cond, uncond: keyword arguments of the model, and what replaces them in the unconditional branch.
    guidance_scale: a number, N numbers (one per step), or a tensor (B,) per sample, (N,) per step when
        N differs from B, or (B, N). At 1 everywhere the unconditional branch is not run.
    guided_channels: guide only the first channels, as DiT does with 3 of 4. None: all.
    callback: called after each step with a dict of step, num_steps, u (reached), x, x0 (preview).
    return_trajectory: also return the states x_0..x_N, (N + 1, B, *S).
    history_dtype: storage of the predictions; the state's dtype by default. Sums are in float32.
    check_finite: raise when the model returns NaN or Inf. None: on the CPU only, where it costs no sync.
    backend: of the step, see :func:`dss_fast.step.multistep_step`.
    cuda_graph: capture all N steps, model included, at the first call and replay them at later ones with
        new noise and conditions. Runs eagerly, with a warning that says why, where that cannot be.

    Returns (B, *S) in the noise's dtype. Raises ValueError naming what does not fit, and
    FloatingPointError with the step and the number of samples when the model returns NaN or Inf.
    """
    x = _noise(noise, generator, device, dtype)
    solver = find_solver(solver, schedule)
    schedule = default_schedule(solver.family) if schedule is None else schedule
    check_family(solver, schedule)
    scale = guidance_table(guidance_scale, len(x), solver.num_steps)
    guided = uncond is not None and not _is_one(scale)
    uncond = uncond if guided else None
    elements = leading_elements(guided_channels, x.shape)
    weights, times = device_weights(solver, schedule, scale, x)

    if cuda_graph:
        if callback is not None or return_trajectory or check_finite:
            raise ValueError(
                "cuda_graph=True replays all steps at once; callback, return_trajectory and check_finite=True "
                "need it off"
            )
        return _replay(model, x, weights, times, cond, uncond, elements, history_dtype, backend)

    denoise = Denoiser(model, cond, uncond, check_finite=check_finite)
    trajectory = [x] if return_trajectory else None
    run = steps(denoise, x, weights, times, elements, history_dtype, backend, reuse=not return_trajectory)
    for i, x, history in run:  # noqa: B007
        if trajectory is not None:
            trajectory.append(x)
        if callback is not None:
            callback(_report(i, solver, schedule, x, history))
    return (x, torch.stack(trajectory)) if return_trajectory else x


def steps(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weights: Tensor,
    times: Tensor,
    guided: int | None = None,
    history_dtype: torch.dtype | None = None,
    backend: str | None = None,
    reuse: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The sampling loop: yields (i, x_{i+1}, history) after each step.

    denoise: (x, t) -> output. weights, times: from :func:`device_weights`. guided: leading elements of
    a sample that are guided, None all. reuse: let a step overwrite the state of the one before.
    """
    num_steps, slots = weights.shape[1], weights.shape[2] - 4
    history = x.new_empty((len(x), slots, *x.shape[1:]), dtype=history_dtype or x.dtype)
    if slots > num_steps:
        history[:, -1] = x
    index = torch.arange(num_steps, device=x.device)
    for i in range(num_steps):
        with naming_step(i, num_steps):
            output = denoise(x, times[i].expand(len(x)))
        out = x if reuse and i else None  # never the caller's noise
        x, history = multistep_step(
            x, output, history, weights, index[i : i + 1], guided=guided, out=out, backend=backend
        )
        yield i, x, history


def _replay(model, x, weights, times, cond, uncond, elements, history_dtype, backend) -> Tensor:
    """The loop as one CUDA graph; conditions that are tensors may change between replays, the rest may not."""
    cond = dict(cond or {})
    given = {f"cond.{k}": v.to(x.device) for k, v in cond.items() if isinstance(v, Tensor)}
    null = {f"uncond.{k}": v.to(x.device) for k, v in (uncond or {}).items() if isinstance(v, Tensor)}

    def loop(x: Tensor, weights: Tensor, times: Tensor, **tensors: Tensor) -> Tensor:
        now = {k: tensors.get(f"cond.{k}", v) for k, v in cond.items()}
        then = None if uncond is None else {k: tensors.get(f"uncond.{k}", v) for k, v in uncond.items()}
        denoise = Denoiser(model, now, then, check_finite=False)
        *_, (_, last, _) = steps(denoise, x, weights, times, elements, history_dtype, backend)
        return last

    fixed = (signature(cond), None if uncond is None else signature(uncond))
    key = (id(model), fixed, elements, history_dtype, backend)
    return replay(key, loop, {"x": x, "weights": weights, "times": times, **given, **null})


def find_solver(solver: Solver | str, schedule: Schedule | None = None, num_steps: int | None = None) -> Solver:
    """A solver from a Solver, ``"published/N"``, ``"method/N"``, ``"method/N@spacing"`` or the path of a JSON file.

    num_steps stands in for a missing ``/N``. Raises ValueError listing what exists.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str | Path):
        raise ValueError(f"solver={solver!r}: give a Solver, a name or the path of a JSON file")
    if str(solver).endswith(".json"):
        return Solver.load(solver)
    name, _, spacing = str(solver).partition("@")
    name, _, steps = name.partition("/")
    steps = steps or (str(num_steps) if num_steps else "")
    if name in METHODS:
        if not steps.isdigit():
            raise ValueError(f"solver={solver!r}: how many steps? Write for example '{name}/10'")
        return handmade(name, int(steps), schedule, spacing=spacing or "uniform")
    try:
        return Solver.named(f"{name}/{steps}" if steps else name)
    except ValueError as error:
        raise ValueError(
            f"{error}; hand-made: {', '.join(f'{m}/N' for m in METHODS)}; or a path ending in .json"
        ) from None


def check_family(solver: Solver, schedule: Schedule) -> None:
    """Raises ValueError when the solver's rows do not belong to the schedule's kind of prediction."""
    if solver.family != schedule.family:
        raise ValueError(
            f"solver {solver.name or '(unnamed)'} is for {solver.family} models, the schedule is {schedule.family}; "
            f"choose a {schedule.family} solver or the right schedule"
        )


def device_weights(solver: Solver, schedule: Schedule, scale: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """weights (R, N, 4 + K) and times (N,) on a state's device, float32, or float64 for a float64 state."""
    weights, times = step_weights(schedule, **solver.tensors())
    real = torch.float64 if like.dtype == torch.float64 else torch.float32
    weights = weights.to(real).to(like.device, non_blocking=True)
    times = times.to(real).to(like.device, non_blocking=True)
    if scale.ndim or not _is_one(scale):
        # Filled in on the device: a scale that lives there need not come back to the host.
        rows = len(scale) if scale.ndim == 2 else 1
        weights = weights.repeat(rows, 1, 1)
        weights[:, :, 3] = scale.to(like.device, real, non_blocking=True)
    return weights, times


def guidance_table(scale: float | Sequence[float] | Tensor, rows: int, num_steps: int) -> Tensor:
    """The guidance scale as a float64 tensor (), (N,), (B, 1) or (B, N). Raises ValueError on any other shape."""
    table = torch.as_tensor(scale, dtype=torch.float64)
    per_sample = isinstance(scale, Tensor) and table.shape == (rows,)
    if table.shape == (num_steps,) and not (per_sample and rows != num_steps):
        return table
    if per_sample:
        return table[:, None]
    if table.ndim == 0 or table.shape in ((rows, 1), (rows, num_steps)):
        return table
    raise ValueError(
        f"guidance_scale has shape {tuple(table.shape)}; give a number, {num_steps} numbers (one per step), "
        f"a tensor ({rows},) per sample, or ({rows}, {num_steps})"
    )


def leading_elements(channels: int | None, shape: Sequence[int]) -> int | None:
    """How many elements of a flattened sample the first ``channels`` channels are; None means all."""
    if channels is None:
        return None
    if len(shape) < 2 or not 0 < channels <= shape[1]:
        raise ValueError(f"guided_channels={channels!r}: samples of shape {tuple(shape[1:])} have 1 to {shape[1]}")
    return channels * int(torch.tensor(shape[2:]).prod()) if len(shape) > 2 else channels


@contextmanager
def naming_step(step: int, num_steps: int) -> Iterator[None]:
    """Adds the step to whatever the model raises, and leaves the exception as it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step} of {num_steps}")
        raise


def _noise(noise, generator, device, dtype) -> Tensor:
    if isinstance(noise, Tensor):
        if not noise.is_floating_point():
            raise ValueError(f"noise has dtype {noise.dtype}; it must be a floating point tensor")
        if noise.ndim < 1:
            raise ValueError("noise has no batch dimension; give (B, *S)")
        return noise.to(device=device, dtype=dtype).contiguous()
    shape = tuple(noise)
    if device is None and generator is not None:
        device = generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _is_one(scale: Tensor) -> bool:
    return scale.device.type == "cpu" and bool((scale == 1).all())


def _report(i: int, solver: Solver, schedule: Schedule, x: Tensor, history: Tensor) -> dict:
    y, u = history[:, i].to(x.dtype), solver.timesteps[i + 1]
    if schedule.family == "flow":
        _, sigma = schedule.alpha_sigma(torch.tensor(u))
        x0 = x + float(sigma) * y
    else:
        x0 = y
    return {"step": i, "num_steps": solver.num_steps, "u": u, "x": x, "x0": x0}
