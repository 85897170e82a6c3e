"""sample: run a solver. One loop for every solver, schedule and model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .denoiser import COMPUTED, Denoiser, naming_step, not_finite
from .graph import replay, signature
from .modes import on_host
from .names import find_solver
from .schedule import Schedule
from .solver import Solver
from .step import multistep_step
from .table import Guidance, StepTable, guidance_table
from .target import Model, Target


@torch.no_grad()
def sample(
    target: Target | Model,
    noise: Tensor | Sequence[int] | int,
    solver: Solver | str | os.PathLike[str],
    *,
    schedule: Schedule | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: Guidance | None = None,
    guided_channels: int | None = None,
    strict: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    return_trajectory: bool = False,
    history_dtype: torch.dtype | None = None,
    check_finite: bool | None = None,
    backend: str | None = None,
    cuda_graph: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples with N network calls, and as many of the unconditional branch as steps are guided:

        for i in range(N):
            m = model(x, time_i, **cond)                            with guidance m_u + scale * (m - m_u)
            y_i = p_i * x + q_i * m
            x = a_i * x + b_i * sum_{j<=i} c_ij * y_j

    target: a Target, or the model alone, called as model(x, t, **cond) -> (B, *S); t is (B,), in the schedule's units.
    noise: (B, *S), of 16 bits or more, standard normal or the target's source; a shape; or, for a Target with one, the
        number of samples. What is drawn here comes from generator, in dtype.
    solver: a Solver; a name, ``"sit-xl-2-256/10"``, ``"dpmpp_2m/8"``, ``"ab2/10@karras"``; or a JSON file.
    schedule: the model's. None: the target's, or else the solver's own.
    cond, uncond: keyword arguments of the model, and what replaces them in the unconditional branch; the target's by
        default, whose ``draw`` is then asked for them.
    guidance_scale: a number, N numbers (one per step), or a tensor (B,) per sample, (N,) per step when
        N differs from B, or (B, N). The unconditional branch is not run at steps where it is 1 for all samples, nor at
        those that the solver leaves out (``Solver.guided_steps``).
    guided_channels, device: as in :class:`Target`.
    strict: refuse a solver made for another path than the schedule's, see :meth:`Solver.on`.
    callback: called after each step with a dict of step, num_steps, u (reached), x, x0 (preview), which it may keep.
    return_trajectory: also return the states x_0..x_N, (N + 1, B, *S).
    history_dtype: storage of the predictions; the state's dtype by default. Sums are in float32.
    check_finite: raise when the noise, what the model returns or the sample holds NaN or Inf. None: on the CPU only,
        where it costs no sync, and only where values can be read, which they cannot under torch.export or vmap.
    backend: of the step, see :func:`dss_fast.step.multistep_step`.
    cuda_graph: capture all N steps, model included, at the first call and replay them at later ones with
        new noise and conditions, from any thread and stream. Runs eagerly, with a warning that says why, where that
        cannot be. A device keeps 8 captures, and a ninth ends them. A replay sees parameters that were changed in
        place and nothing else that changed in the model: not parameters moved or replaced, and no number or flag of
        its modules, such as the scale of a LoRA. After such a change call :func:`dss_fast.graph.forget`.

    Returns (B, *S) in the noise's dtype. Raises ValueError naming what does not fit, and
    FloatingPointError with the step and the number of samples when the model returns NaN or Inf.
    """
    target = Target.of(
        target, schedule=schedule, cond=cond, uncond=uncond, guided_channels=guided_channels, device=device
    )
    x, now = _start(target, noise, generator, dtype)
    found = find_solver(solver, target.schedule)
    scale = _scale(target, guidance_scale, len(x), found.num_steps)
    table = StepTable.of(found, target.schedule, guidance=scale, dtype=x.dtype, device=x.device, strict=strict)
    null = None if isinstance(scale, int | float) and scale == 1 else target.uncond

    if cuda_graph:
        if callback is not None or return_trajectory or check_finite:
            raise ValueError(
                "cuda_graph=True replays all steps at once; callback, return_trajectory and check_finite=True "
                "need it off"
            )
        return _replay(target, x, table, now, null, history_dtype, backend)

    denoise = Denoiser(target.model, now, null, guided_channels=target.guided_channels, check_finite=check_finite)
    looks = denoise.looks(x)
    if looks and (bad := not_finite(x)):
        raise FloatingPointError(f"the noise holds NaN or Inf in {bad} of {len(x)} samples")
    trajectory = [x] if return_trajectory else None
    run = steps(denoise, x, table, history_dtype, backend, reuse=not return_trajectory and callback is None)
    for i, state, history in run:
        if trajectory is not None:
            trajectory.append(state)
        if callback is not None:
            callback(_report(i, found, target.schedule or found.schedule, state, history))
    if looks and (bad := not_finite(state)):
        raise FloatingPointError(
            f"{bad} of {len(x)} samples ended in NaN or Inf, and every output of the model was finite: "
            f"{found.label} is too much for {x.dtype}"
        )
    return state if trajectory is None else (state, torch.stack(trajectory))


def steps(
    denoise: Callable[..., Tensor],
    x: Tensor,
    table: StepTable,
    history_dtype: torch.dtype | None = None,
    backend: str | None = None,
    reuse: bool = True,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The sampling loop: yields (i, x_{i+1} (B, *S), history (B, K, *S)) after each step.

    denoise: called as denoise(x (B, *S), t (B,)), returns (B, *S), or the guided pair (2B, *S). Where the table calls
        one branch alone, called with a third argument, False, and returns (B, *S).
    x: (B, *S), which the loop never writes into. table: lives on x's device.
    history_dtype, backend: as in :func:`sample`. reuse: a step may overwrite the state that the step before yielded.

    What ``denoise`` raises comes through with the step as a note.
    """
    num_steps, history = table.num_steps, table.new_history(x, history_dtype)
    index = torch.arange(num_steps, device=x.device)
    for i in range(num_steps):
        with naming_step(i, num_steps):
            alone = () if table.calls_both(i) else (False,)
            output = denoise(x, table.times[i].expand(len(x)), *alone)
        out = x if reuse and i else None  # the first step must leave the caller's noise as it is
        x, history = multistep_step(x, output, history, table.weights, index[i : i + 1], out=out, backend=backend)
        yield i, x, history


def _replay(
    target: Target,
    x: Tensor,
    table: StepTable,
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None,
    history_dtype: torch.dtype | None,
    backend: str | None,
) -> Tensor:
    """The loop as one CUDA graph; conditions that are tensors may change between replays, the rest may not."""
    given = {f"cond.{k}": v.to(x.device) for k, v in cond.items() if isinstance(v, Tensor)}
    null = {f"uncond.{k}": v.to(x.device) for k, v in (uncond or {}).items() if isinstance(v, Tensor)}
    model, channels = target.model, target.guided_channels

    def loop(x: Tensor, weights: Tensor, times: Tensor, **tensors: Tensor) -> Tensor:
        now = {k: tensors.get(f"cond.{k}", v) for k, v in cond.items()}
        then = None if uncond is None else {k: tensors.get(f"uncond.{k}", v) for k, v in uncond.items()}
        denoise = Denoiser(model, now, then, guided_channels=channels, check_finite=False)
        *_, (_, last, _) = steps(denoise, x, StepTable(weights, times, table.both), history_dtype, backend)
        return last

    try:
        fixed = signature(cond), None if uncond is None else signature(uncond)
        key = model, getattr(model, "training", None), fixed, channels, history_dtype, backend, table.both
        hash(key)
    except TypeError as error:
        warnings.warn(f"cuda_graph=True runs eagerly: model and conditions give no key ({error})", stacklevel=4)
        return loop(x, table.weights, table.times, **given, **null)
    return replay(key, loop, {"x": x, **given, **null}, {"weights": table.weights, "times": table.times})


def _start(
    target: Target,
    noise: Tensor | Sequence[int] | int,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Mapping[str, Any]]:
    """The first state (B, *S), where the target lives, and the model's keyword arguments."""
    home = target.home
    if isinstance(noise, Tensor):
        if not noise.is_floating_point():
            raise ValueError(f"noise has dtype {noise.dtype}; it must be a floating point tensor")
        if (dtype or noise.dtype) not in COMPUTED:
            allowed = ", ".join(str(one).removeprefix("torch.") for one in COMPUTED)
            raise ValueError(f"states of {dtype or noise.dtype} cannot be stepped: give dtype=..., one of {allowed}")
        if noise.ndim < 1:
            raise ValueError("noise has no batch dimension; give (B, *S)")
        x = noise.to(device=home, dtype=dtype).contiguous()
    elif isinstance(noise, int) or target.noise is not None:
        count = noise if isinstance(noise, int) else noise[0]
        if count < 1:
            raise ValueError(f"noise={noise!r}: give a number of samples from 1")
        if not isinstance(noise, int) and tuple(noise[1:]) != target.shape:
            raise ValueError(f"noise={tuple(noise)!r}: samples of this target have the shape {target.shape}")
        batch = target.draw(count, _on_cpu(generator))
        return batch.noise if dtype is None else batch.noise.to(dtype), batch.cond
    else:
        place = home or (generator.device if generator is not None else None)
        drawn = generator.device if generator is not None else place
        x = torch.randn(tuple(noise), generator=generator, device=drawn, dtype=dtype).to(place)
    with on_host():  # where its generator is
        return x, target.cond(len(x), _on_cpu(generator)) if callable(target.cond) else target.cond or {}


def _on_cpu(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator: the one given, or one seeded by what is given or by the global one."""
    if generator is not None and generator.device.type == "cpu":
        return generator
    device = "cpu" if generator is None else generator.device
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator, device=device)))


@on_host()
def _scale(target: Target, given: Guidance | None, rows: int, num_steps: int) -> float | tuple[float, ...] | Tensor:
    """The guidance scale as a step table takes it; 1 where every entry is. Raises ValueError without its branch."""
    if given is None and isinstance(target.guidance_scale, tuple):
        raise ValueError(
            f"the target's guidance_scale is a range, {target.guidance_scale}; give the one to sample with"
        )
    scale = guidance_table(target.guidance_scale if given is None else given, rows, num_steps)
    if not (isinstance(scale, Tensor) and scale.is_cuda):  # a scale on a GPU is not waited for
        known = torch.as_tensor(scale)
        if not bool(known.isfinite().all()):
            raise ValueError(f"guidance_scale={scale!r}: must be finite")
        scale = 1.0 if bool((known == 1).all()) else scale
    if target.uncond is None and not (isinstance(scale, int | float) and scale == 1):
        raise ValueError(f"guidance_scale={given!r} needs uncond, the arguments of the unconditional branch")
    return scale


@on_host()
def _report(i: int, solver: Solver, schedule: Schedule, x: Tensor, history: Tensor) -> dict[str, Any]:
    """What a callback is told after step i: x0 = r x + s y, the clean sample that the newest prediction implies."""
    y, u = history[:, i].to(x.dtype), solver.timesteps[i + 1]
    of_x, of_y = schedule.x0(torch.tensor(u, dtype=torch.float64))
    x0 = float(of_x) * x + float(of_y) * y if float(of_x) else float(of_y) * y
    return {"step": i, "num_steps": solver.num_steps, "u": u, "x": x, "x0": x0}
