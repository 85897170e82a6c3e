"""Description: whether what is said of a model is true. The model is a denoiser, and its own samples tell.

At x = alpha x0 + sigma epsilon a description reads the model's estimates x0^ and epsilon^ out of what it returns. They
are posterior means, with which their own errors do not correlate:

    E <epsilon^, epsilon - epsilon^> = 0,   E <x0^, x0 - x0^> = 0      at every level of noise

so the model's own end states, noised afresh, tell whether sign, time, prediction type, path and source are what they
are said to be. A search looks at this before it spends anything.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..draws import Draws
from ..files import shortened
from ..schedule import PREDICTION_TYPES, VP, DiscreteVP, Flow, Schedule
from ..target import Samples, Target
from ..trajectory import dense_grid, integrate
from .processes import from_first

# log(alpha |x0| / sigma |noise|) where end states are noised: from a tenth of an outline to the last grain.
LEVELS = (-2.5, -1.5, -0.75, 0.0, 0.75, 1.5, 2.5)
WHOLE, QUICK = (20, 3), (16, 1)  # calls of the trajectory, and noises at each level
SAMPLES, NUMBERS, MOST = 2, 128, 16  # so many samples, or, of a few dimensions, as many as have so many numbers
# The root mean square of both correlations over the levels. On 23 right descriptions of exact models, of those of the
# zoo and of the MNIST nets it is at most 0.034 (quick: 0.056), on 27 wrong ones 0.083 and more.
TRUE = 0.06
LINEAR = 0.97  # correlation of end states with their noise; 0.5 to 0.95 on exact models of digits and of a ring
WORST = 3.0  # a level's part is cut here
# Root mean square of both errors, in parts of noise and samples, between noise and its own end states: 0.08 on an exact
# optimal transport of eight clusters. Fields read in wrong units can be as straight, so other descriptions come first.
STRAIGHT = 0.15
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)
CLIPPED = -5.1  # lambda where cosine tables are cut off (arXiv 2211.01095)
SOURCES = (2.0, 4.0, 8.0, 16.0, 32.0, 80.0, 0.5)
FAMILIES: tuple[tuple[str, Schedule], ...] = (
    ("Flow()", Flow()),
    ("Flow(convention='diffusers')", Flow(convention="diffusers")),
    ("Flow(convention='diffusers', time_scale=1.0)", Flow(convention="diffusers", time_scale=1.0)),
    ("VP()", VP()),
    ("VP(prediction_type='v_prediction')", VP(prediction_type="v_prediction")),
    ("DiscreteVP.cosine()", DiscreteVP.cosine()),
)


def doubt(draws: Draws, whole: bool = True) -> tuple[int, str]:
    """Warns, at the line that called the package, when a model is no denoiser of its own samples by its description.

    Names the description near it by which it is one, where there is one: that takes up to 350 evaluations of a sample
    more, and only where the search would be worth nothing. whole: at once the look that :func:`look_evaluations`
    counts, and not one of half as many before it.

    Returns the evaluations of a whole look, and what was said, "" where nothing was.
    """
    target = replace(draws.target, guidance_scale=1.0)  # a guided model is no denoiser, its branch is one
    mine = replace(draws.alone, seed=0, target=target)
    for look in (WHOLE,) if whole else (QUICK, WHOLE):
        off = _miss(mine, look)
        miss = from_first(lambda off=off: off)  # type: ignore[misc]
        if miss <= TRUE:
            return look_evaluations(target), ""
    named = fallen = ""
    for words, other in _others(target):
        fits, linear = _fits(replace(mine, target=other))
        if fits and not linear:
            named = words
            break
        fallen = fallen or (words if fits else "")
    straight = not named and _straight(mine)
    if from_first(lambda: straight):
        return look_evaluations(target), ""
    cause = f"with {named or fallen} all would be in order" if named or fallen else "no description near it does better"
    text = (
        "the model and its description do not seem to belong together: its estimates of clean samples and noise, from "
        f"its own samples with noise added, are off by {100 * miss:.0f} % ({100 * TRUE:.0f} % at most is usual). The "
        f"schedule is {shortened(repr(draws.schedule))}; {cause}"
    )
    warnings.warn(text, stacklevel=_callers_level())
    return look_evaluations(target), text


def look_evaluations(target: Target) -> int:
    """The evaluations of a whole look at a target: 82 from 64 dimensions on."""
    return samples_of(target) * (WHOLE[0] + WHOLE[1] * len(LEVELS))


def samples_of(target: Target) -> int:
    """How many samples a look takes: more where each has a few numbers only."""
    assert target.shape is not None
    return min(max(SAMPLES, math.ceil(NUMBERS / math.prod(target.shape))), MOST)


def _fits(draws: Draws) -> tuple[bool, bool]:
    """Whether a model is one of another description, and whether its end states are its noise in another scale: what
    returns next to nothing, far from its own times, is a denoiser of Gaussian noise, and no news.

    A network may refuse times that are not its own. The first process's answer counts.
    """
    fits = linear = False
    with suppress(Exception):
        fits = _miss(draws, QUICK) <= TRUE
        linear = fits and _linear(draws)
    return from_first(lambda: (fits, linear))


def _miss(draws: Draws, look: tuple[int, int]) -> float:
    """The root mean square of both correlations; Inf where the model diverges."""
    with suppress(FloatingPointError):
        batch, ends = _ends(draws, look[0])
        parts = []
        for number, (u, alpha, sigma) in enumerate(_levels(draws.schedule, ends, batch.noise)):
            found = torch.zeros(4, dtype=torch.float64)
            for k in range(look[1]):
                noise = draws.batch("description", number * look[1] + k, len(ends)).noise.double()
                x0, epsilon = _estimates(batch, alpha * ends.double() + sigma * noise, u, alpha, sigma)
                pairs = ((epsilon, noise - epsilon), (noise, noise), (x0, ends - x0), (ends, ends))
                found += torch.stack([(a.double() * b).sum().cpu() for a, b in pairs])
            parts += [min(abs(float(found[i] / found[i + 1])), WORST) for i in (0, 2)]
        value = math.sqrt(sum(part * part for part in parts) / len(parts)) if len(parts) > len(LEVELS) else math.inf
        return value if math.isfinite(value) else math.inf
    return math.inf


def _straight(draws: Draws) -> bool:
    """Whether the model's trajectories are straight, as those of couplings by optimal transport and of rectified flows
    are: noise and end state then depend on each other, and only their own pairs are what the model was trained on."""
    with suppress(FloatingPointError):
        batch, ends = _ends(draws, WHOLE[0])
        errors = []
        for u, alpha, sigma in _levels(draws.schedule, ends, batch.noise):
            x0, epsilon = _estimates(batch, alpha * ends.double() + sigma * batch.noise.double(), u, alpha, sigma)
            for estimate, truth in ((x0, ends.double()), (epsilon, batch.noise.double())):
                errors.append(float((estimate - truth).square().mean() / truth.square().mean()))
        return bool(errors) and math.sqrt(sum(errors) / len(errors)) <= STRAIGHT
    return False


def _linear(draws: Draws) -> bool:
    """Whether end states are the noise in another scale."""
    batch, ends = _ends(draws, QUICK[0])
    x, z = ends.double().flatten(), batch.noise.double().flatten()
    return float(x @ z / (x.norm() * z.norm())) > LINEAR


def _ends(draws: Draws, calls: int) -> tuple[Samples, Tensor]:
    """Noise and where the model takes it. Raises FloatingPointError where it diverges."""
    batch = draws.batch("probe", 0, samples_of(draws.target))
    with torch.no_grad():
        ends = integrate(batch.predictor(True), batch.noise, dense_grid(draws.schedule, calls)).last
    if not bool(ends.isfinite().all()) or not bool(ends.any()):
        raise FloatingPointError("no end states")
    return batch, ends


def _levels(schedule: Schedule, ends: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, float, float]]:
    """u, alpha and sigma at those of ``LEVELS`` that the schedule has."""
    scale, source = (float(x.double().square().mean().sqrt()) for x in (ends, noise))
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    alpha, sigma = schedule.alpha_sigma(u)
    level = (alpha * scale).log() - (sigma * source).log()
    for wanted in LEVELS:
        i = int((level - wanted).abs().argmin())
        if abs(float(level[i]) - wanted) < 0.5:
            yield u[i], float(alpha[i]), float(sigma[i])


def _estimates(batch: Samples, x: Tensor, u: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """x0^ and epsilon^ at x (B, *S) float64, by the model in the batch's own dtype."""
    with torch.no_grad():
        y = batch.predictor(True)(x.to(batch.noise.dtype), u).double()
    r, s = (float(v) for v in batch.schedule.x0(u.reshape(1)))
    x0 = r * x + s * y
    return x0, (x - alpha * x0) / sigma


def _others(target: Target) -> Iterator[tuple[str, Target]]:
    """Descriptions near a target's, in words: what is mistaken for what.

    A network of a table of alphas may look its times up, and is told none beyond: on a GPU that ends the process.
    """
    schedule = target.schedule or Flow()
    most = float(schedule.time(ENDS).max()) if isinstance(schedule, DiscreteVP) else math.inf
    for words, other in _changed(schedule):
        if float(other.time(ENDS).max()) <= most:
            yield f"schedule={words}", replace(target, schedule=other)
    first, last = schedule.time(ENDS).tolist()
    total, call = f"{first + last:.6g}", "model=lambda x, t, **cond:"
    for words, wrapped in (
        (f"the other sign, {call} -model(x, t, **cond),", _wrapped(target, sign=-1.0)),
        (f"its time multiplied, {call} model(x, 1000 * t, **cond),", _wrapped(target, scale=1000.0)),
        (f"its time divided, {call} model(x, t / 1000, **cond),", _wrapped(target, scale=1e-3)),
        (
            f"its time reversed, {call} model(x, {total} - t, **cond),",
            _wrapped(target, scale=-1.0, offset=first + last),
        ),
    ):
        if "1000 * t" not in words or most == math.inf:
            yield words, wrapped
    for words, other in FAMILIES:
        if other != schedule and float(other.time(ENDS).max()) <= most:
            yield f"schedule={words}", replace(target, schedule=other)
    for scale in SOURCES:
        words = f"a source of {scale:g} times the deviation, noise=lambda n, generator: {scale:g} * "
        own = "standard normal noise" if target.noise is None else "the noise it has"
        yield f"{words}({own}),", replace(target, noise=_scaled(target, scale))


def _changed(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    known: set[str] = {f.name for f in fields(schedule)} if is_dataclass(schedule) else set()
    changes: list[tuple[str, str | float]] = [("prediction_type", kind) for kind in PREDICTION_TYPES]
    changes += [("convention", "paper"), ("convention", "diffusers"), ("time_scale", 1.0), ("time_scale", 1000.0)]
    tried = [schedule]
    for name, value in changes:
        if name in known:
            with suppress(ValueError):
                other = replace(schedule, **{name: value})  # type: ignore[type-var]  # a dataclass, as just seen
                if other not in tried:
                    tried.append(other)
                    yield repr(other), other
    if isinstance(schedule, DiscreteVP):
        num, kind = len(schedule.alphas_cumprod), schedule.prediction_type
        for make in (DiscreteVP.linear, DiscreteVP.scaled_linear, DiscreteVP.cosine):
            other = replace(make(num), prediction_type=kind, final=schedule.final)
            if other.alphas_cumprod != schedule.alphas_cumprod:
                yield f"DiscreteVP.{other.name}({num}, prediction_type={kind!r})", other
        table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
        kept = schedule.alphas_cumprod[: int((0.5 * (table.log() - (1 - table).log()) >= CLIPPED).sum())]
        if 2 <= len(kept) < num:
            yield f"a start cut off by lambda_min={CLIPPED}", replace(schedule, alphas_cumprod=kept, name="custom")


def _wrapped(target: Target, sign: float = 1.0, scale: float = 1.0, offset: float = 0.0) -> Target:
    model = target.model

    def other(x: Tensor, t: Tensor, **cond: Any) -> Any:
        return sign * model(x, offset + scale * t, **cond)

    return replace(target, model=other, device=target.home)


def _scaled(target: Target, scale: float) -> Callable[[int, torch.Generator], Tensor]:
    plain = target.noise

    def noise(n: int, generator: torch.Generator) -> Tensor:
        assert target.shape is not None
        return scale * (torch.randn(n, *target.shape, generator=generator) if plain is None else plain(n, generator))

    return noise


def _callers_level() -> int:
    """The stacklevel, for a warning of the function that asks, of the nearest line outside the package."""
    package, level, frame = Path(__file__).parents[1], 1, sys._getframe(1)
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(package):
        level, frame = level + 1, frame.f_back
    return level
