"""Probe: what a model must show before a search spends anything on it, and what tells it from another."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy

from ..bench import SCALES
from ..denoiser import NO_GRAPH, state_of, versions
from ..draws import Draws
from ..files import tensor_bytes
from ..schedule import PREDICTION_TYPES, VP, Flow, Schedule
from ..target import Target
from ..trajectory import dense_grid, integrate
from .budget import Cost

SAMPLES = 2
CALLS = 4 * SAMPLES  # :func:`probe` takes so many evaluations, its backward among them
KEYLESS = 4  # :func:`identity` of a target without a key takes so many
OUTPUTS = "outputs"  # what identity says of those
DRAWN, ROWS = 8, 16  # so many times so many conditions are part of it
FINE, COARSE = 24, 16  # the two trajectories that must agree take so many calls
PLAUSIBLE_CALLS = SAMPLES * (FINE + COARSE + 1)
# The two end states may differ by this part. On the MNIST models they do by 0.01; wrong units of time give 0.67, a
# wrong prediction type 1.1.
AGREEMENT = 0.1
# At pure noise the output's slope in the noise may miss the one it should have, 1 for epsilon, -1 or 1 for a velocity,
# 0 for x0, by this much.
SLOPE = 0.5


def probe(draws: Draws, differentiated: bool) -> Cost:
    """Two samples through the model at u = 0 and u = 1/2, and back from the second; what an evaluation costs. Of
    several targets, the mean of the seconds and the largest graph.

    differentiated: whether the search goes back through the model. Raises ValueError when it then returns an output
    without a graph, and when it returns nothing but zeros.
    """
    if draws.others:
        costs = [probe(one, differentiated) for one in draws.each]
        return Cost(sum(cost.seconds for cost in costs) / len(costs), max(cost.saved for cost in costs))
    batch = replace(draws.alone, seed=0).batch("probe", 0, SAMPLES)
    if torch.equal(batch.noise[:1], batch.noise[1:]):
        raise ValueError(
            f"noise({SAMPLES}, generator) of the target {draws.target.name!r} returned the same for both: all "
            "samples would begin at one point"
        )
    denoise, zero = batch.denoiser(), True
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for u in (0.0, 0.5):
        now = batch.schedule.time(torch.tensor([u], dtype=torch.float64))
        now = now.to(batch.noise.device, torch.promote_types(batch.noise.dtype, torch.float32))
        start = time.perf_counter()
        with torch.set_grad_enabled(differentiated), saved_tensors_hooks(pack, lambda tensor: tensor):
            x = batch.noise.detach().requires_grad_(differentiated).clone()
            output = denoise(x, now.repeat(len(x)))
        if differentiated and not output.requires_grad:
            raise ValueError(NO_GRAPH)
        zero = zero and not bool(output.any())
    if zero:
        raise ValueError("the model returns zero everywhere: it is not trained, or its weights were not loaded")
    if differentiated:
        _backward(output)
    float(output.detach().sum())  # the clock must wait for the device
    seconds = (time.perf_counter() - start) / (SAMPLES * (3 if differentiated else 1))
    return Cost(seconds, sum(kept.values()) // (2 * SAMPLES))


class Weights:
    """The tensors of a target's modules, of which some may change as the model is called: counters, running means."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._before = state_of(target.model)
        self._versions = versions(self._before)

    def moved(self) -> list[str]:
        """The names of those that were written into, replaced, added or removed since this was made."""
        now = state_of(self._target.model)
        count = versions(now)
        names = now.keys() | self._before.keys()
        same = {k for k in names if now.get(k) is self._before.get(k) and count.get(k) == self._versions.get(k)}
        return sorted(names - same)


def weights(target: Target, moved: Sequence[str]) -> str:
    """A hash of the tensors of a target's modules, but for those ``moved``; no call of the model."""
    held = {name: tensor for name, tensor in sorted(state_of(target.model).items()) if name not in moved}
    return _hash(held)


def identity(draws: Draws, moved: Sequence[str] = (), **functions: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What a target is and what it returns, as JSON data: two are taken for one target where these are equal.

    Hashed are the parameters and buffers of the modules that the model visibly holds, but for those that ``moved``, the
    noise and guidance scales of four fixed samples, the conditions of some hundred, what each of some functions of
    samples returns for the noise and, where the target has no ``key``, what the model predicts for each of them at a
    time of its own: ``KEYLESS`` evaluations. Not seen is what differs elsewhere alone.
    """
    target, batch = draws.target, replace(draws.alone, seed=0).batch("probe", 0, KEYLESS)
    cond: dict[str, Any] = {"uncond": target.uncond}
    for number in range(DRAWN):  # of a table of prompts many rows, of which a search draws others than the first
        generator = torch.Generator().manual_seed(number)
        cond[f"{number}"] = target.cond(ROWS, generator) if callable(target.cond) else target.cond
    found = {
        "shape": list(target.shape or ()),
        "guidance_scale": target.guidance_scale,
        "guided_channels": target.guided_channels,
        "noise": _hash([batch.noise, batch.scale]),
        "conditions": _hash(cond),
        "weights": weights(target, moved),
        "moved": list(moved),
    }
    for name, function in functions.items():
        found[name] = _hash({"returned": _returned(name, function, batch.noise)})
    if target.key is not None:
        found["key"] = target.key
    if target.key is None or draws.world > 1:  # processes compare what their models return, whatever they are called
        times, returned = torch.tensor([0.05, 0.35, 0.65, 0.95], dtype=torch.float64), []
        with torch.no_grad():
            for k, u in enumerate(times):  # each time another sample, whose conditions differ
                one = batch.rows(slice(k, k + 1))
                returned.append(one.predictor()(one.noise, u))
        found[OUTPUTS] = _hash(returned)
    return found


def _returned(name: str, function: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
    """What a function of samples gives for some noise. Raises ValueError where nothing is chosen or learned by it."""
    with torch.enable_grad():
        leaf = noise.detach().clone().requires_grad_()
        found: Any = function(leaf.clone())
    if not isinstance(found, Tensor) or found.ndim < 1 or len(found) != len(noise) or not found.is_floating_point():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"the function {name} returned {got} for {len(noise)} samples; it must return floats, a row each"
        )
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"the function {name} returned NaN or Inf for standard samples, {tuple(noise.shape)} of the noise"
        )
    if name == "loss" and not found.requires_grad:
        raise ValueError("the function loss returned what has no graph: take no_grad, detach and rounding out of it")
    if bool((noise != noise[:1]).any()) and torch.equal(found, found[:1].expand_as(found)):
        raise ValueError(f"the function {name} returned the same for {len(noise)} different samples: it tells nothing")
    return found.detach()


def _hash(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """The bytes of tensors, arrays and numbers, in whatever they are nested. Of other objects, whose repr may hold an
    address, the type."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        value = torch.as_tensor(np.ascontiguousarray(value)) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, Tensor) and is_lazy(value):
        yield type(value).__name__.encode()
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        # Of what is spread over devices, quantised or without storage only the shape is compared.
        if type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.layout == torch.strided and not value.is_meta:
            yield tensor_bytes(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{key}:".encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} of".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, np.ndarray):
        yield from _parts(value.tolist())
    elif isinstance(value, set | frozenset):
        yield from _parts(sorted(map(repr, value)))
    elif isinstance(value, str | bytes | int | float | complex | range | Enum | None):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
        if hasattr(value, "__dict__") and not callable(value):
            yield from _parts(vars(value))


def _backward(output: Tensor) -> None:
    """Back from an output, keeping the graph as the rollouts do.

    A graph that was compiled before the search may give its buffers to the first backward: what is compiled is then
    forgotten, to be compiled again when the model is called next.
    """
    try:
        output.sum().backward(retain_graph=True)
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        torch.compiler.reset()


def doubt(draws: Draws) -> int:
    """Warns when the trajectory that a search would imitate is not plausible, as it is with a wrong schedule.

    Its end states must have the scale of data and agree at two resolutions, and the output at pure noise must change
    with the noise as its prediction type says. The schedule near it with which all hold, and best, is named. Returns
    the evaluations spent, the same on every process.
    """
    schedule = draws.schedule
    scale, apart, slope = _measured(draws, schedule)
    spent = PLAUSIBLE_CALLS
    if _plausible(scale, apart, slope):
        return spent
    found = []
    for other in _neighbours(schedule):
        spent += PLAUSIBLE_CALLS
        with suppress(FloatingPointError, ValueError):
            measured = _measured(draws, other)
            if _plausible(*measured):
                found.append((measured[1], repr(other)))
    cause = f"with {min(found)[1]} all would be in order" if found else "no schedule near it does better"
    warnings.warn(
        f"the model and its schedule do not seem to belong together: fine trajectories end at a root mean square of "
        f"{scale:.3g} ({SCALES[0]} to {SCALES[1]} is usual), differ by {100 * apart:.0f} % between {FINE} and {COARSE} "
        f"evaluations (1 % is usual), and the output at pure noise moves {slope:+.2g} times the noise more than it "
        f"should. The schedule is {schedule!r}; {cause}",
        stacklevel=3,
    )
    return spent


def _plausible(scale: float, apart: float, slope: float) -> bool:
    return SCALES[0] <= scale <= SCALES[1] and apart <= AGREEMENT and abs(slope) <= SLOPE


def _measured(draws: Draws, schedule: Schedule) -> tuple[float, float, float]:
    """Root mean square of a fine trajectory's end states, how far a coarser one's are, and the slope's excess.

    slope = <m_1 - m_2, z_1 - z_2> / |z_1 - z_2|^2 of the outputs m for noises z at u = 0, where x0 says nothing of z.
    """
    alone = replace(draws.alone, seed=0, target=replace(draws.target, schedule=schedule))
    batch = alone.batch("probe", 0, SAMPLES)
    predict, start = batch.predictor(), torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        fine = integrate(predict, batch.noise, dense_grid(schedule, FINE)).last.double()
        coarse = integrate(predict, batch.noise, dense_grid(schedule, COARSE)).last.double()
        (y, other), (z, second) = predict(batch.noise, start[0]).double(), batch.noise.double()
    scale = float(fine.square().mean().sqrt())
    apart = float((fine - coarse).square().mean().sqrt()) / max(scale, 1e-300)
    moved = float(((y - other) * (z - second)).sum() / (z - second).square().sum())
    expected = -1.0 if schedule.family == "flow" else 0.0  # y is x0 - epsilon, or x0
    q = float(schedule.prediction(start)[1])
    return scale, apart, (moved - expected) / q


def _neighbours(schedule: Schedule) -> Iterator[Schedule]:
    """What is mistaken for a schedule: another sign, prediction or unit of time, the other family's."""
    known: set[str] = {f.name for f in fields(schedule)} if is_dataclass(schedule) else set()
    changes: list[tuple[str, str | float]] = [("prediction_type", kind) for kind in PREDICTION_TYPES]
    changes += [("convention", "paper"), ("convention", "diffusers"), ("time_scale", 1.0), ("time_scale", 1000.0)]
    for name, value in changes:
        if name in known and getattr(schedule, name) != value:
            with suppress(ValueError):
                yield replace(schedule, **{name: value})  # type: ignore[type-var]  # a dataclass, as just seen
    yield from (Flow(), Flow(convention="diffusers"), VP())
