"""Noise schedules: alpha, sigma and the network's time on the unit interval, and the scalars of a step.

A sample is ``x = alpha * x0 + sigma * epsilon``. Every schedule lives on u in [0, 1], u = 0 noise and u = 1 data,
and is a frozen value: two equal schedules compare equal, hash, print and go through JSON without loss. It holds two
things: the *path*, alpha and sigma over u, to which a solver's coefficients belong; and the model's *interface*, what
the network returns and what time it is told. All scalars are float64 tensors and differentiable in u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .files import shortened
from .modes import outside_modes

PREDICTION_TYPES = ("epsilon", "velocity", "v_prediction", "x0")
CONVENTIONS = ("paper", "diffusers")
# By how much alpha and sigma of one path may differ. Float32 tables of alphas_cumprod are within 1e-6 of the exact ones
# and a clamped zero terminal SNR within 2.5e-4; DDPM's linear betas and the paper's continuous VP are 1e-2 apart.
SAME_PATH = 1e-3
LARGEST = 1e30  # steps are in float32, which ends at 3e38
LARGEST_SHIFT = 1e6
LEAST = 1e-12  # VP divides by the alpha and sigma of its start, 6e-3 and 1 in the paper
FLOOR = 2.0**-24  # alphas_cumprod stay above this: zero has no log, and diffusers too puts this number in its place


class Schedule(Protocol):
    """What the package asks of a schedule: the path and the interface, and what follows from them.

    ``Flow``, ``VP``, ``DiscreteVP`` and ``Grid`` are the ones it has. All tensors are float64.
    """

    def __hash__(self) -> int:
        return super().__hash__()

    @property
    def family(self) -> str:
        """``"flow"``, whose histories hold velocities x0 - epsilon, or ``"vp"``, whose histories hold x0."""
        ...

    @property
    def prediction_type(self) -> str:
        """What the network returns, one of ``PREDICTION_TYPES``."""
        ...

    @property
    def convention(self) -> str:
        """The sign of velocities and the unit of time that the network speaks, one of ``CONVENTIONS``."""
        ...

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at u, u's shape."""
        ...

    def time(self, u: Tensor) -> Tensor:
        """The time the network is called with at u, u's shape."""
        ...

    def prediction(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) with y = p * x + q * output: what a history stores, from what the network returns at u."""
        alpha, sigma = self.alpha_sigma(u)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        kind = self.prediction_type
        if self.family == "flow":
            if kind == "velocity":
                return zero, -one if self.convention == "diffusers" else one
            if kind == "x0":
                return -1 / sigma, 1 / sigma
            norm = alpha**2 + sigma**2
            return (alpha - sigma) / norm, -(alpha + sigma) / norm
        if kind == "x0":
            return zero, one
        if kind == "epsilon":
            return 1 / alpha, -sigma / alpha
        if kind == "v_prediction":
            return alpha, -sigma
        return 1 / (alpha + sigma), sigma / (alpha + sigma)

    def transition(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) with x_next = a * x + b * sum_j c_j y_j for the N steps between the N + 1 points u.

        Flow: a = 1, b = sigma - sigma'. VP: a = sigma'/sigma, b = alpha' - sigma' alpha / sigma (DDIM when c is the
        newest y alone).
        """
        alpha, sigma = self.alpha_sigma(u)
        if self.family == "flow":
            return torch.ones_like(sigma[1:]), sigma[:-1] - sigma[1:]
        ratio = sigma[1:] / sigma[:-1].clamp_min(torch.finfo(sigma.dtype).tiny)  # clean data stays clean data
        return ratio, alpha[1:] - ratio * alpha[:-1]

    def clock(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, tau) of the ODE d(x / scale) / dtau = y: (1, -sigma) for flows, (sigma, alpha / sigma) for VP."""
        alpha, sigma = self.alpha_sigma(u)
        return (torch.ones_like(sigma), -sigma) if self.family == "flow" else (sigma, alpha / sigma)

    def x0(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(r, s) with x0 = r * x + s * y at u: x + sigma * y of a flow, y itself for VP."""
        _, sigma = self.alpha_sigma(u)
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        return (one, sigma) if self.family == "flow" else (zero, one)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON data, its kind and every field: ``from_dict`` gives an equal one back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"kind": self.kind, **plain}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: alpha = 1 - sigma, and sigma = s * (1 - u) / (1 + (s - 1) * (1 - u)) with s = ``shift``.

    The history of a flow holds velocities x0 - epsilon.

    shift: the resolution shift of SD3 and FLUX, from 1e-6 to 1e6; 1 leaves the time alone. See :meth:`dynamic`.
    convention: what the network speaks. ``"paper"`` (SiT, FlowDCN): time 1 - sigma, velocity
        x0 - epsilon. ``"diffusers"`` (SD3, FLUX, Wan): time ``time_scale * sigma``, velocity
        epsilon - x0.
    prediction_type: one of ``PREDICTION_TYPES``.
    time_scale: multiplies the network's time in the diffusers convention (1000; FLUX divides it back). The paper's has
        none, and another than the default is refused there.
    """

    shift: float = 1.0
    convention: str = "paper"
    prediction_type: str = "velocity"
    time_scale: float = 1000.0
    kind: ClassVar = "flow"
    family: ClassVar = "flow"

    def __post_init__(self) -> None:
        _check_interface(self)
        _check_positive(self, "shift", "time_scale")
        if self.convention == "paper" and self.time_scale != Flow.time_scale:
            raise ValueError(
                f"time_scale={self.time_scale!r}: in the paper's convention the network's time is 1 - sigma as it is; "
                "multiply it in the model, as in lambda x, t, **cond: model(x, 1000 * t, **cond), or give "
                "convention='diffusers', whose time is time_scale * sigma and whose velocity is epsilon - x0"
            )
        if not 1 / LARGEST_SHIFT <= self.shift <= LARGEST_SHIFT:
            raise ValueError(
                f"shift={self.shift!r}: must be from {1 / LARGEST_SHIFT:g} to {LARGEST_SHIFT:g}; models have 1 to 20"
            )

    def __repr__(self) -> str:
        """The fields that say something: the paper's convention has no scale of time."""
        scale = f", time_scale={self.time_scale!r}" if self.convention == "diffusers" else ""
        start = f"{type(self).__name__}(shift={self.shift!r}, convention={self.convention!r}"
        return f"{start}, prediction_type={self.prediction_type!r}{scale})"

    @classmethod
    def dynamic(
        cls,
        image_seq_len: int,
        *,
        base_seq_len: int = 256,
        max_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        kind: str = "exponential",
        **options: Any,
    ) -> Flow:
        """Shift by image size: mu is linear in the token count, s = e^mu (FLUX) or s = mu (``"linear"``)."""
        slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
        mu = base_shift + slope * (image_seq_len - base_seq_len)
        if kind not in ("exponential", "linear"):
            raise ValueError(f"kind={kind!r}: choose 'exponential' or 'linear'")
        return cls(shift=math.exp(mu) if kind == "exponential" else mu, **options)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        noise, rise = 1 - u.double(), self.shift - 1
        sigma = (1 + rise) * noise / (1 + rise * noise)  # exactly 1 at u = 0, whatever 1 + rise is rounded to
        return 1 - sigma, sigma

    def time(self, u: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(u)
        return alpha if self.convention == "paper" else self.time_scale * sigma


@dataclass(frozen=True)
class VP(Schedule):
    """Continuous variance preserving: alpha = exp(-1/2 int_0^t beta), beta(t) = beta_min + (beta_max - beta_min) t.

    t = max(t_start - u, t_end); the network's time is ``time_scale * t``. The history of a VP model holds x0
    predictions. Defaults are those of the published DiT and PixArt tables (arXiv 2505.21114).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    prediction_type: str = "epsilon"
    t_start: float = 0.999
    t_end: float = 1e-3
    time_scale: float = 1000.0
    kind: ClassVar = "vp"
    family: ClassVar = "vp"
    convention: ClassVar = "paper"

    def __post_init__(self) -> None:
        _check_interface(self)
        _check_positive(self, "time_scale")
        if not 0 <= self.beta_min < self.beta_max < math.inf:
            raise ValueError(f"beta_min={self.beta_min!r}, beta_max={self.beta_max!r}: need 0 <= beta_min < beta_max")
        if not 0 <= self.t_end < self.t_start < math.inf:
            raise ValueError(f"t_start={self.t_start!r}, t_end={self.t_end!r}: need 0 <= t_end < t_start")
        t = self.t_start
        log_alpha = -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t)
        alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
        if min(alpha, sigma) < LEAST:
            raise ValueError(
                f"beta_min={self.beta_min!r}, beta_max={self.beta_max!r}, t_start={t!r}: alpha is {alpha:.3g} and "
                f"sigma {sigma:.3g} at u = 0; both must be at least {LEAST:g}, as with 0.1, 20 and 0.999"
            )

    def _t(self, u: Tensor) -> Tensor:
        return (self.t_start - u.double()).clamp_min(self.t_end)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        t = self._t(u)
        log_alpha = -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time(self, u: Tensor) -> Tensor:
        return self.time_scale * self._t(u)


@dataclass(frozen=True)
class DiscreteVP(Schedule):
    """Variance preserving from a table of ``alphas_cumprod`` (= alpha^2), as DDPM checkpoints carry it.

    log alpha is interpolated linearly in the table's index n; the network's time is n. With
    ``final="zero"`` u = 1 is clean data (n = -1, sigma = 0) and n = T (1 - u) - 1; with
    ``final="sigma_min"`` it is the table's first entry and n = (T - 1)(1 - u).
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    prediction_type: str = "epsilon"
    final: str = "zero"
    name: str = "custom"
    kind: ClassVar = "discrete_vp"
    family: ClassVar = "vp"
    convention: ClassVar = "paper"

    def __post_init__(self) -> None:
        _check_interface(self)
        if self.final not in ("zero", "sigma_min"):
            raise ValueError(f"final={self.final!r}: choose 'zero' or 'sigma_min'")
        table = _floats("alphas_cumprod", self.alphas_cumprod)
        if len(table) < 2 or not all(0 <= b < a <= 1 or a == b == FLOOR for a, b in pairwise(table)):
            raise ValueError(
                f"alphas_cumprod: need at least 2 values in [0, 1] falling strictly, got {len(table)} values "
                f"from {table[:1]} to {table[-1:]}"
            )
        object.__setattr__(self, "alphas_cumprod", tuple(max(a, FLOOR) for a in table))
        table = (1.0, *self.alphas_cumprod)
        log_alpha = outside_modes(lambda: 0.5 * torch.tensor(table, dtype=torch.float64).log())
        object.__setattr__(self, "_log_alpha", log_alpha)
        object.__setattr__(self, "_hash", hash((self.alphas_cumprod, self.prediction_type, self.final, self.name)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]  # computed once, as it takes 15 us

    @classmethod
    def from_betas(
        cls, betas: Tensor | Sequence[float], *, lambda_min: float = -math.inf, **options: Any
    ) -> DiscreteVP:
        """The schedule of a table of betas: alphas_cumprod = cumprod(1 - beta).

        lambda_min: leave out the entries at the noisy end with log(alpha / sigma) below, as ``lambda_min_clipped`` of
        DPM-Solver does. With -5.1 (arXiv 2211.01095) a cosine table of 1,000 starts at n = 995: its last alpha is 5e-5,
        and an error of epsilon there is one of x0 times 20,000; where data have a range, so has
        :class:`dss_fast.clipping.Clipped`.
        """
        betas = torch.tensor(_floats("betas", betas), dtype=torch.float64)  # type: ignore[arg-type]  # of either kind
        table = torch.cumprod(1 - betas, 0)
        kept = 0.5 * (table.log() - (1 - table).log()) >= lambda_min
        if not bool(kept.all()):
            options["name"], table = "custom", table[kept]
        return cls(tuple(table.tolist()), **options)

    @property
    def last(self) -> float:
        """The u of the table's first entry, n = 0, after which the network's time stands still."""
        return 1 - 1 / len(self.alphas_cumprod) if self.final == "zero" else 1.0

    @classmethod
    def linear(cls, num: int = 1000, start: float = 1e-4, end: float = 0.02, **options: Any) -> DiscreteVP:
        """The schedule whose betas rise linearly, DDPM's and DiT's (arXiv 2006.11239)."""
        _check_betas(num, start, end)
        betas = torch.linspace(start, end, num, dtype=torch.float64)
        return cls.from_betas(betas, **{"name": "linear", **options})

    @classmethod
    def scaled_linear(cls, num: int = 1000, start: float = 0.00085, end: float = 0.012, **options: Any) -> DiscreteVP:
        """The schedule whose betas have linearly rising square roots, Stable Diffusion's (arXiv 2112.10752)."""
        _check_betas(num, start, end)
        betas = torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
        return cls.from_betas(betas, **{"name": "scaled_linear", **options})

    @classmethod
    def cosine(cls, num: int = 1000, max_beta: float = 0.999, **options: Any) -> DiscreteVP:
        """The schedule whose alphas_cumprod are a squared cosine, betas capped at ``max_beta`` (arXiv 2102.09672)."""
        _check_betas(num)
        t = torch.arange(num + 1, dtype=torch.float64) / num
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp_max(max_beta), **{"name": "cosine", **options})

    def _n(self, u: Tensor) -> Tensor:
        num = len(self.alphas_cumprod)
        u = u.double()
        return num * (1 - u) - 1 if self.final == "zero" else (num - 1) * (1 - u)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        n = self._n(u)
        table: Tensor = self._log_alpha.to(n.device)  # type: ignore[attr-defined]  # set in __post_init__
        lower = n.detach().floor().clamp(-1, len(table) - 3).long()
        fraction = n - lower
        log_alpha = table[lower + 1] * (1 - fraction) + table[lower + 2] * fraction
        # The fraction is -1e-16 rather than 0 at some grid points, and sigma must not become NaN there.
        log_alpha = log_alpha.clamp_max(0)
        # At clean data a minus sign alone would give sigma = -0, and alpha / sigma = -inf.
        return log_alpha.exp(), (0 - torch.expm1(2 * log_alpha)).sqrt()

    def time(self, u: Tensor) -> Tensor:
        return self._n(u).clamp_min(0)


@dataclass(frozen=True)
class Grid(Schedule):
    """alpha, sigma and the network's time known at N + 1 points only, as a host program's list of sigmas gives them.

    Point i stands at u = i / N; between the points alpha, sigma and time are interpolated linearly. Hand-made
    solvers need no more than the points, so one can be built on any grid of any host.

    alphas, sigmas: (N + 1,) with x = alpha * x0 + sigma * epsilon; sigma / alpha falls strictly.
    times: (N,) or (N + 1,), what the network is called with.
    family, prediction_type, convention: as in the other schedules.

    Raises ValueError when the grid does not fall or the lengths do not fit.
    """

    alphas: tuple[float, ...] = field(repr=False)
    sigmas: tuple[float, ...] = field(repr=False)
    times: tuple[float, ...] = field(repr=False)
    family: str = "vp"
    prediction_type: str = "epsilon"
    convention: str = "paper"
    kind: ClassVar = "grid"

    def __post_init__(self) -> None:
        if self.family not in ("flow", "vp"):
            raise ValueError(f"family={self.family!r}: choose 'flow' or 'vp'")
        _check_interface(self)
        for key in ("alphas", "sigmas", "times"):
            object.__setattr__(self, key, _floats(key, getattr(self, key)))
        n = len(self.sigmas) - 1
        if n < 1 or len(self.alphas) != n + 1 or len(self.times) not in (n, n + 1):
            raise ValueError(
                f"a grid of {len(self.sigmas)} sigmas (at least 2) needs as many alphas and a time per step, got "
                f"{len(self.alphas)} and {len(self.times)}"
            )
        for i, ((a, s), (a_next, s_next)) in enumerate(pairwise(zip(self.alphas, self.sigmas, strict=True))):
            # The ratio sigma / alpha is compared multiplied out, because alpha is 0 where a flow starts.
            if not s * a_next > s_next * a or s_next < 0:
                raise ValueError(
                    f"the noise must fall at every step; at step {i} sigma goes from {s:.6g} to {s_next:.6g}"
                )

    @classmethod
    def flow(cls, sigmas: Sequence[float], times: Sequence[float], **options: Any) -> Grid:
        """The grid of a flow, alpha = 1 - sigma. The network speaks diffusers' convention unless told otherwise."""
        options = {"prediction_type": "velocity", "convention": "diffusers", **options}
        return cls(tuple(1 - float(s) for s in sigmas), tuple(sigmas), tuple(times), family="flow", **options)

    @classmethod
    def ve(cls, sigmas: Sequence[float], **options: Any) -> Grid:
        """The grid of k-diffusion's variance-exploding variables, alpha = 1. The network returns x0."""
        options = {"prediction_type": "x0", **options}
        return cls((1.0,) * len(sigmas), tuple(sigmas), tuple(sigmas), **options)

    @property
    def timesteps(self) -> Tensor:
        """The points' own u, (N + 1,) float64."""
        return torch.linspace(0, 1, len(self.sigmas), dtype=torch.float64)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._at(self.alphas, u), self._at(self.sigmas, u)

    def time(self, u: Tensor) -> Tensor:
        return self._at(self.times, u)

    def _at(self, values: tuple[float, ...], u: Tensor) -> Tensor:
        table = torch.tensor(values, dtype=torch.float64, device=u.device)
        place = u.double() * (len(self.sigmas) - 1)
        nearest = place.detach().round()
        # In float64 u = i / N is not exact, and a point itself must give the host's own number, to the bit.
        place = torch.where((place - nearest).abs() < 1e-9, nearest, place).clamp(0, len(table) - 1)
        lower = place.detach().floor().clamp_max(max(len(table) - 2, 0)).long()
        upper = (lower + 1).clamp_max(len(table) - 1)
        fraction = place - lower
        return torch.where(fraction == 0, table[lower], table[lower] * (1 - fraction) + table[upper] * fraction)


# What ``from_dict`` can build; a schedule of your own joins with its kind, and has ``to_dict`` and these fields.
KINDS: dict[str, Any] = {kind.kind: kind for kind in (Flow, VP, DiscreteVP, Grid)}


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule that ``to_dict`` wrote, equal to the bit. Raises ValueError naming the field at fault."""
    if not isinstance(data, Mapping):
        raise ValueError(f"schedule: must be an object, got {type(data).__name__}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"schedule.kind={kind!r}: choose one of {', '.join(KINDS)}; a kind of your own joins "
            "dss_fast.schedule.KINDS where its module is imported, or give it: Solver.load(path, schedule), and "
            "--schedule module:attribute on the command line"
        )
    known = {f.name for f in fields(KINDS[kind])}
    for key in data:
        if key != "kind" and key not in known:
            raise ValueError(f"schedule.{key}: unknown field of {kind}; known are {', '.join(sorted(known))}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "kind"}
    try:
        found: Schedule = KINDS[kind](**values)
        hash(found)
        return found
    except (TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"schedule: {error}") from None
    except ValueError as error:
        raise ValueError(f"schedule.{error}") from None


def check_schedule(schedule: Any) -> None:
    """Raises ValueError for what is no schedule, or the class of one."""
    if isinstance(schedule, type) or not hasattr(schedule, "alpha_sigma"):
        raise ValueError(f"schedule={schedule!r}: give a schedule, as in Flow() or VP()")


def default_schedule(family: str) -> Schedule:
    """The schedule of the published tables of a family: ``Flow()`` or ``VP()``."""
    return Flow() if family == "flow" else VP()


def path_difference(mine: Schedule, other: Schedule, u: Tensor) -> str | None:
    """Where two schedules' paths part at the points u (n,), in words; None when they are one path.

    Compares alpha and sigma to ``SAME_PATH``; what the networks return and are told does not matter.
    """
    for name, a, b in zip(("alpha", "sigma"), mine.alpha_sigma(u), other.alpha_sigma(u), strict=True):
        apart = ~((a - b).abs() <= SAME_PATH)  # NaN is apart from all
        if bool(apart.any()):
            i = int(apart.nonzero()[0])
            return f"{name} at u = {float(u[i]):.6g} is {float(a[i]):.6g} there and {float(b[i]):.6g} here"
    return None


def check_path(schedule: Schedule, u: Tensor) -> None:
    """Raises ValueError where a schedule has no alpha or sigma; NaN would pass for noise that rests."""
    for name, values in zip(("alpha", "sigma"), schedule.alpha_sigma(u), strict=True):
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"{name} is {float(values[i])} at u = {float(u[i]):.6g} of {shortened(repr(schedule))}: a schedule's "
                "alpha and sigma must be finite from u = 0 to 1"
            )


def inverse(rising: Callable[[Tensor], Tensor], targets: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """u in [low, high] where a rising function of u takes the targets, by bisection: 60 halvings reach float64's last
    bits."""
    below, above = torch.full_like(targets, low), torch.full_like(targets, high)
    for _ in range(60):
        middle = (below + above) / 2
        short = rising(middle) < targets
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    return (below + above) / 2


def _check_interface(schedule: Any) -> None:
    kind = schedule.prediction_type
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={kind!r}: choose one of {', '.join(PREDICTION_TYPES)}")
    if schedule.family == "flow" and kind == "epsilon":
        raise ValueError(
            "prediction_type='epsilon' on a flow: at u = 0 (alpha = 0) epsilon tells nothing about the data; "
            "use 'velocity', 'v_prediction' or 'x0'"
        )
    if schedule.convention not in CONVENTIONS:
        raise ValueError(f"convention={schedule.convention!r}: choose 'paper' or 'diffusers'")


def _check_betas(num: int, *ends: float) -> None:
    if isinstance(num, bool) or not isinstance(num, int) or num < 2:
        raise ValueError(f"num={num!r}: give a whole number of betas from 2")
    for name, beta in zip(("start", "end"), ends, strict=False):
        if not isinstance(beta, int | float) or not 0 < beta < 1:
            raise ValueError(f"{name}={beta!r}: a beta is above 0 and below 1")


def _check_positive(schedule: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(schedule, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            raise ValueError(f"{key}={value!r}: must be a finite number above 0, at most {LARGEST:g}")


def _floats(key: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        found = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: must be a list of numbers, got {str(values)[:80]!r}") from None
    for i, value in enumerate(found):
        if not abs(value) <= LARGEST:
            raise ValueError(f"{key}[{i}]: must be finite and at most {LARGEST:g}, got {value!r}")
    return found
