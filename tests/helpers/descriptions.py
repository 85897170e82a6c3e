"""Targets described rightly and wrongly: exact mixtures that speak every convention, and what was mistaken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dss_fast import VP, Flow, Target
from dss_fast.schedule import DiscreteVP, Schedule
from examples.mixture import centres

LINEAR, COSINE = DiscreteVP.linear(), DiscreteVP.cosine()
SHAPE, WIDTH = (1, 8, 8), 0.3


class Mixture:
    """The posterior mean of x0 = mu_k + h xi at x = alpha x0 + sigma epsilon, told in one convention.

    path: the network's time (B,) -> alpha, sigma. told: (x0, epsilon, alpha, sigma) -> output.
    """

    def __init__(self, path: Callable[[Tensor], tuple[Tensor, Tensor]], told: Callable[..., Tensor]):
        self.path, self.told, self.centres = path, told, centres()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.to(x.dtype)[:, None] for v in self.path(t.double()))
        flat, mu = x.flatten(1), self.centres.to(x.dtype)
        variance = (alpha * WIDTH) ** 2 + sigma**2
        scores = flat @ mu.T * (alpha / variance) - mu.square().sum(1) * (alpha**2 / (2 * variance))
        mean = scores.softmax(1) @ mu
        x0 = mean + alpha * WIDTH**2 / variance * (flat - alpha * mean)
        epsilon = (flat - alpha * x0) / sigma.clamp_min(1e-9)
        return self.told(x0, epsilon, alpha, sigma).reshape(x.shape)


class Pairs:
    """The velocity between clusters a_k and b_k of deviations .3 and .1: an optimal transport of one's own source."""

    def __init__(self) -> None:
        angle = torch.arange(8) * math.pi / 4
        self.a = 3 * torch.stack([angle.cos(), angle.sin()], 1)
        self.b = torch.stack([(angle + 0.2).cos(), 0.6 * (angle + 0.2).sin()], 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None]
        apart = x[:, None] - (t * self.b + (1 - t) * self.a)
        variance = (0.1 * t) ** 2 + (0.3 * (1 - t)) ** 2
        weight = (-apart.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        return (weight * (self.b - self.a + (0.01 * t - 0.09 * (1 - t)) / variance * apart)).sum(1)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return self.a[torch.randint(8, (n,), generator=generator)] + 0.3 * torch.randn(n, 2, generator=generator)


@dataclass(frozen=True)
class Trigonometric(Schedule):
    """x = sin(pi u / 2) x0 + cos(pi u / 2) epsilon, of a network that returns dx/du."""

    family = "vp"
    prediction_type = "v_prediction"
    convention = "paper"
    kind = "trigonometric"

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return (u.double() * math.pi / 2).sin(), (u.double() * math.pi / 2).cos()

    def time(self, u: Tensor) -> Tensor:
        return u.double()

    def prediction(self, u: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(u)
        return alpha, sigma * 2 / math.pi


def _flow(t: Tensor) -> tuple[Tensor, Tensor]:
    return t, 1 - t


def _diffusers(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t / 1000, t / 1000


def _discrete(schedule: DiscreteVP) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda n: schedule.alpha_sigma(1 - (n + 1) / len(schedule.alphas_cumprod))


def _vp(t: Tensor) -> tuple[Tensor, Tensor]:
    return VP(t_start=1.0, t_end=1e-5).alpha_sigma(1 - t / 1000)


def _target(path, told, schedule, noise=None) -> Target:
    return Target(Mixture(path, told), SHAPE, schedule, noise=noise)


def _x0(x0, epsilon, alpha, sigma):
    return x0


def _epsilon(x0, epsilon, alpha, sigma):
    return epsilon


def _velocity(x0, epsilon, alpha, sigma):
    return x0 - epsilon


def _v(x0, epsilon, alpha, sigma):
    return alpha * epsilon - sigma * x0


def right() -> dict[str, Target]:
    """Exact models described as they are."""

    def wide(n: int, generator: torch.Generator) -> Tensor:
        return 4 * torch.randn(n, *SHAPE, generator=generator)

    pairs = Pairs()
    return {
        "flow": _target(_flow, _velocity, Flow()),
        "flow of x0": _target(_flow, _x0, Flow(prediction_type="x0")),
        "flow of diffusers": _target(_diffusers, lambda *m: -_velocity(*m), Flow(convention="diffusers", shift=3.0)),
        "vp": _target(_vp, _epsilon, VP()),
        "vp of v": _target(_vp, _v, VP(prediction_type="v_prediction")),
        "linear": _target(_discrete(LINEAR), _epsilon, LINEAR),
        "linear of v": _target(_discrete(LINEAR), _v, replace(LINEAR, prediction_type="v_prediction")),
        "cosine": _target(_discrete(COSINE), _epsilon, COSINE),
        "cosine flow": _target(
            lambda t: Trigonometric().alpha_sigma(t), lambda *m: -math.pi / 2 * _v(*m), Trigonometric()
        ),
        "wide source": _target(lambda t: (t, 4 * (1 - t)), lambda x0, e, a, s: x0 - 4 * e, Flow(), wide),
        "optimal transport": Target(pairs, (2,), noise=pairs.noise),
    }


def wrong() -> dict[str, tuple[Target, str]]:
    """Models described wrongly, and what of the right description must be named."""
    of = right()
    flow, linear, v = of["flow"], of["linear"], of["linear of v"]
    diffusers = replace(of["flow of diffusers"], schedule=Flow())
    return {
        "sign": (replace(flow, model=lambda x, t: -flow.model(x, t)), "other sign"),
        "diffusers as flow": (diffusers, "convention='diffusers'"),
        "flow as diffusers": (replace(flow, schedule=Flow(convention="diffusers")), "convention='paper'"),
        "time times 1000": (replace(flow, model=lambda x, t: flow.model(x, t / 1000)), "1000 * t"),
        "time reversed": (replace(flow, model=lambda x, t: flow.model(x, 1 - t)), "1 - t"),
        "x0 as velocity": (replace(of["flow of x0"], schedule=Flow()), "prediction_type='x0'"),
        "epsilon as v": (replace(linear, schedule=v.schedule), "prediction_type='epsilon'"),
        "v as epsilon": (replace(v, schedule=LINEAR), "prediction_type='v_prediction'"),
        "cosine as linear": (replace(of["cosine"], schedule=LINEAR), "DiscreteVP.cosine(1000"),
        "linear as cosine": (replace(linear, schedule=COSINE), "DiscreteVP.linear(1000"),
        "time over 1000": (replace(of["vp"], model=lambda x, t: of["vp"].model(x, 1000 * t)), "time_scale=1.0"),
        "forgotten source": (replace(of["wide source"], noise=None), "source of 4 times"),
        "flow as vp": (replace(flow, schedule=VP()), "schedule=Flow()"),
        "vp as flow": (replace(of["vp"], schedule=Flow()), "schedule=VP()"),
    }
