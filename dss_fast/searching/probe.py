"""Probe: what a model must show before a search spends anything on it, and what tells it from another."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..denoiser import NO_GRAPH, state_of, versions
from ..draws import Draws
from ..files import tensor_bytes
from ..target import Target
from ..unroll.kept import FirstCall, TooMuch
from .budget import Cost, gigabytes
from .gauss_newton import NO_NUMBER
from .processes import from_first
from .recompute import recomputing
from .room import PART, REMEDIES

SAMPLES = 2
CALLS = 8  # :func:`probe` takes so many evaluations, a way there and twice back among them
KEYLESS = 4  # :func:`identity` of a target without a key takes so many
CLOCK_SHARE, EACH = 0.1, 3  # of a time to spend, and evaluations a sample, with the way back
OUTPUTS = "outputs"  # what identity says of those
DRAWN, ROWS = 8, 16  # so many times so many conditions are part of it
# Differences, in parts of the state, by which a gradient is checked, and the part of it that may be missing. In float32
# on networks shipped it is 1.000 to 1.001 at the first; the others are for networks that compute in 8 or 16 bits.
DIFFERENCES, PARTIAL = (0.005, 0.05, 0.25), 0.2
SAME_GRADIENT = 0.01  # by which that of a network that computes its activations again may differ


class NoGraph(ValueError):
    """The model's output has no graph."""


def probe(draws: Draws, differentiated: bool, may: float = math.inf, most: float = math.inf, batch: int = 1) -> Cost:
    """What a model evaluation costs, by one sample at u = 0 and at u = 1/2, and back from there. Of several targets,
    the mean of the seconds and the largest graph.

    differentiated: whether the search goes back through the model. may, most: bytes that the graphs of ``batch``
    samples may take, and of one. Where they take more, the network's own gradient checkpointing is measured instead,
    which the search then switches on, if the gradient stays the same.

    Raises ValueError for a model that returns nothing but zeros, and of one to go back through when its output has no
    graph (NoGraph), when that cannot be gone through twice, when a part of the gradient is missing, and when the graph
    of one sample takes more than may be used.
    """
    if draws.others:
        costs = [probe(one, differentiated, may, most, batch) for one in draws.each]
        seconds, saved = sum(cost.seconds for cost in costs) / len(costs), max(cost.saved for cost in costs)
        return Cost(seconds, saved, any(cost.recomputed for cost in costs), sum(cost.calls for cost in costs))
    if not differentiated:
        return replace(_looked(draws, False)[0], calls=CALLS)
    calls, found = 0, None
    for recomputed, limit in ((False, may / batch), (True, most), (False, most)):
        with recomputing([draws.target] if recomputed else []) as switched:
            if found is None and switched == recomputed:
                calls += CALLS
                try:
                    found = _looked(draws, True, limit)
                    cost, gradient = replace(found[0], recomputed=recomputed), found[1]
                except (TooMuch, torch.OutOfMemoryError):
                    continue
                except ValueError as error:
                    if not recomputed:
                        raise
                    warnings.warn(f"the network's gradient checkpointing stays off: {error}", stacklevel=3)
    if found is None:
        raise ValueError(f"the graph of one sample takes more than the {gigabytes(most)} that may be used: {REMEDIES}")
    if cost.recomputed:
        calls += CALLS
        with suppress(TooMuch, torch.OutOfMemoryError):
            plain, whole = _looked(draws, True, min(most, PART))
            same = float((gradient - whole).norm()) <= SAME_GRADIENT * float(whole.norm())
            if not same:
                warnings.warn("the network's gradient checkpointing stays off: it changes its gradient", stacklevel=3)
            cost = cost if same and cost.saved < plain.saved else plain
    return replace(cost, calls=calls)


def _looked(draws: Draws, differentiated: bool, most: float = math.inf) -> tuple[Cost, Tensor]:
    """The cost of an evaluation, and a gradient. Raises TooMuch when a graph saves more than ``most`` bytes, and
    ValueError as :func:`probe` says."""
    batch = replace(draws.alone, seed=0).batch("probe", 0, SAMPLES)
    if torch.equal(batch.noise[:1], batch.noise[1:]):
        raise ValueError(
            f"noise({SAMPLES}, generator) of the target {draws.target.name!r} returned the same for both: all "
            "samples would begin at one point"
        )
    if differentiated:
        _loaded()
    x, denoise = batch.noise[:1], batch.rows(slice(0, 1)).denoiser()
    times = batch.schedule.time(torch.tensor([0.0, 0.5], dtype=torch.float64))
    times = times.to(x.device, torch.promote_types(x.dtype, torch.float32))

    def graph(t: Tensor) -> tuple[list[Tensor], Tensor, int]:
        leaves = [x.clone().requires_grad_(), t.clone().requires_grad_()]
        watched = FirstCall(1, 0, draws.target.model, leaves, most)
        with torch.enable_grad(), watched.watching(x):
            output = denoise(leaves[0].clone(), leaves[1].clone())
        if not output.requires_grad:
            raise NoGraph(NO_GRAPH)
        watched.settle(output)
        return leaves, output, watched.total

    with torch.no_grad():
        first = graph(times[:1])[1].detach() if differentiated else denoise(x, times[:1].clone())
        start = time.perf_counter()
        leaves, output, saved = graph(times[1:]) if differentiated else ([], denoise(x, times[1:].clone()), 0)
        zero = not bool(first.any()) and not bool(output.any())  # which waits for the device
        seconds = time.perf_counter() - start
        if zero:
            raise ValueError("the model returns zero everywhere: it is not trained, or its weights were not loaded")
        if not differentiated:
            return Cost(seconds, 0), output
        # The direction that the first step goes, and noise beside it.
        v = first[-1:] / first[-1:].norm().clamp_min(1e-30) + batch.noise[1:] / batch.noise[1:].norm()
        v, shares = v * x.norm() / v.norm().clamp_min(1e-30), []
        for h in DIFFERENCES:
            ahead, behind = (denoise(x + sign * h * v, times[1:].clone()).double() for sign in (1, -1))
            w = (ahead - behind) / (2 * h)
            start = time.perf_counter()
            try:
                gradient = _pulled(output, leaves, w)
            except RuntimeError as error:
                # A graph that was compiled before the search may give its buffers to the first way back.
                if "donated" not in str(error):
                    raise
                torch.compiler.reset()
                leaves, output, saved = graph(times[1:])
                gradient = _pulled(output, leaves, w)
            if not bool(gradient.isfinite().all()):
                raise FloatingPointError(NO_NUMBER)
            wanted = float(w.square().sum())
            shares.append(float((gradient * v).sum()) / wanted if wanted else 1.0)
            if len(shares) == 1:
                seconds += (time.perf_counter() - start) / 2
            if abs(shares[-1] - 1) <= PARTIAL:
                return Cost(seconds / 3, saved), gradient
    raise ValueError(
        f"a part of the model's gradient is missing: along one direction it is {', '.join(f'{s:.2f}' for s in shares)} "
        f"of what differences of {', '.join(map(str, DIFFERENCES))} give. Something in its forward has no autograd, an "
        "attention kernel, a quantised layer, .detach() or torch.no_grad(): choose another backend for it, or "
        "GaussNewton(gradients=False), which takes none"
    )


def clock(draws: Draws, cost: Cost, differentiated: bool, seconds: float, most: int) -> Cost:
    """The cost with the seconds of an evaluation as the search pays them, in batches: those of one sample alone are up
    to ten times as many on a small network.

    Batches grow to ``most`` samples while all of this takes no more than ``CLOCK_SHARE`` of the seconds to spend.
    """
    best, calls, rows, began = cost.seconds, cost.calls, 1, time.perf_counter()
    alone = replace(draws.alone, seed=0)
    room = CLOCK_SHARE * seconds

    def fits() -> bool:
        graph = cost.saved * rows if differentiated else 0
        return graph <= PART and time.perf_counter() - began + rows * EACH * best < room

    while rows <= most and from_first(fits):  # processes that share a model call it alike
        batch = alone.batch("probe", 0, rows)
        start = time.perf_counter()
        with torch.enable_grad() if differentiated else torch.no_grad():
            x = batch.noise.clone().requires_grad_(differentiated)
            t = batch.schedule.time(torch.tensor([0.5], dtype=torch.float64))
            t = t.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(rows)
            output = batch.denoiser()(x.clone(), t.clone())
            if differentiated:
                # A rollout goes forward, forward again and back by two cotangents, and that counts as 1 + 2.
                _pulled(output, [x], torch.ones_like(output))
        float(output.detach().flatten()[0])  # which waits for the device
        each = (time.perf_counter() - start) / rows
        best, calls = min(best, each / (3 if differentiated else 1)), calls + rows * (3 if differentiated else 1)
        rows *= 2 if rows > 1 else 4
    return replace(cost, seconds=best, calls=calls)


def _loaded() -> None:
    """Takes a gradient along a given direction, of nothing: the first of a process loads symbolic shapes, 0.3 s that
    would be counted as the model's."""
    with torch.enable_grad():
        leaf = torch.zeros(1, requires_grad=True)
        torch.autograd.grad(leaf * leaf, leaf, torch.ones(1))


def _pulled(output: Tensor, leaves: list[Tensor], cotangent: Tensor) -> Tensor:
    """The gradient in x, float64, gone back through twice, as a rollout goes for its two cotangents."""
    found: list[Tensor | None] = []
    for _ in range(2):
        try:
            found.append(
                torch.autograd.grad(output, leaves, cotangent.to(output), retain_graph=True, allow_unused=True)[0]
            )
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "donated" in str(error):
                raise
            raise ValueError(
                "the search goes back through each call of the model, more than once, and that fails with "
                f"{type(error).__name__}: {error}. Where the model computes its activations again (gradient "
                "checkpointing), switch that off, or use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            ) from error
    return torch.zeros_like(leaves[0]).double() if found[1] is None else found[1].double()


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
