"""Noise schedules: alpha, sigma and the network's time on the unit interval, and the scalars of a step.

A sample is ``x = alpha * x0 + sigma * epsilon``. Every schedule lives on u in [0, 1], u = 0 noise and
u = 1 data, and is a frozen value: two equal schedules compare equal, print themselves and can be
written to JSON. All scalars are float64 tensors and differentiable in u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "velocity", "v_prediction", "x0")


@dataclass(frozen=True)
class Flow:
    """Rectified flow: alpha = 1 - sigma, and sigma = s * (1 - u) / (1 + (s - 1) * (1 - u)) with s = ``shift``.

    The history of a flow holds velocities x0 - epsilon.

    shift: the resolution shift of SD3 and FLUX; 1 leaves the time alone. See :meth:`dynamic`.
    convention: what the network speaks. ``"paper"`` (SiT, FlowDCN): time 1 - sigma, velocity
        x0 - epsilon. ``"diffusers"`` (SD3, FLUX, Wan): time ``time_scale * sigma``, velocity
        epsilon - x0.
    prediction_type: one of ``PREDICTION_TYPES``.
    time_scale: multiplies the network's time in the diffusers convention (1000; FLUX divides it back).
    """

    shift: float = 1.0
    convention: str = "paper"
    prediction_type: str = "velocity"
    time_scale: float = 1000.0
    family = "flow"

    def __post_init__(self):
        _check_prediction_type(self.prediction_type)
        if self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' on a flow: at u = 0 (alpha = 0) epsilon tells nothing about the data; "
                "use 'velocity', 'v_prediction' or 'x0'"
            )
        if self.convention not in ("paper", "diffusers"):
            raise ValueError(f"convention={self.convention!r}: choose 'paper' or 'diffusers'")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift={self.shift!r}: must be a finite number above 0 (1 means no shift)")

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
        **options,
    ) -> Flow:
        """Shift by image size: mu is linear in the token count, s = e^mu (FLUX) or s = mu (``"linear"``)."""
        slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
        mu = base_shift + slope * (image_seq_len - base_seq_len)
        if kind not in ("exponential", "linear"):
            raise ValueError(f"kind={kind!r}: choose 'exponential' or 'linear'")
        return cls(shift=math.exp(mu) if kind == "exponential" else mu, **options)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at u, float64, u's shape."""
        noise = 1 - u.double()
        sigma = self.shift * noise / (1 + (self.shift - 1) * noise)
        return 1 - sigma, sigma

    def time(self, u: Tensor) -> Tensor:
        """The time the network is called with at u, float64, u's shape."""
        alpha, sigma = self.alpha_sigma(u)
        return alpha if self.convention == "paper" else self.time_scale * sigma

    def spec(self) -> dict:
        """The schedule as JSON data."""
        return {
            "kind": "flow",
            "shift": self.shift,
            "convention": self.convention,
            "prediction_type": self.prediction_type,
        }


@dataclass(frozen=True)
class VP:
    """Continuous variance preserving: alpha = exp(-1/2 int_0^t beta), beta(t) = beta_min + (beta_max - beta_min) t.

    t = max(t_start - u, t_end); the network's time is 1000 t. The history of a VP model holds x0
    predictions. Defaults are those of the published DiT and PixArt tables (arXiv 2505.21114).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    prediction_type: str = "epsilon"
    t_start: float = 0.999
    t_end: float = 1e-3
    time_scale: float = 1000.0
    family = "vp"

    def __post_init__(self):
        _check_prediction_type(self.prediction_type)
        if not 0 <= self.beta_min < self.beta_max < math.inf:
            raise ValueError(f"beta_min={self.beta_min!r}, beta_max={self.beta_max!r}: need 0 <= beta_min < beta_max")

    def _t(self, u: Tensor) -> Tensor:
        return (self.t_start - u.double()).clamp_min(self.t_end)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at u, float64, u's shape."""
        t = self._t(u)
        log_alpha = -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time(self, u: Tensor) -> Tensor:
        """The time the network is called with at u, float64, u's shape."""
        return self.time_scale * self._t(u)

    def spec(self) -> dict:
        """The schedule as JSON data."""
        return {
            "kind": "vp",
            "beta_min": self.beta_min,
            "beta_max": self.beta_max,
            "prediction_type": self.prediction_type,
        }


@dataclass(frozen=True)
class DiscreteVP:
    """Variance preserving from a table of ``alphas_cumprod`` (= alpha^2), as DDPM checkpoints carry it.

    log alpha is interpolated linearly in the table's index n; the network's time is n. With
    ``final="zero"`` u = 1 is clean data (n = -1, sigma = 0) and n = T (1 - u) - 1; with
    ``final="sigma_min"`` it is the table's first entry and n = (T - 1)(1 - u).
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    prediction_type: str = "epsilon"
    final: str = "zero"
    name: str = "custom"
    family = "vp"

    def __post_init__(self):
        _check_prediction_type(self.prediction_type)
        if self.final not in ("zero", "sigma_min"):
            raise ValueError(f"final={self.final!r}: choose 'zero' or 'sigma_min'")
        table = tuple(float(a) for a in self.alphas_cumprod)
        if len(table) < 2 or not all(0 <= b < a <= 1 for a, b in zip(table, table[1:], strict=False)):
            raise ValueError(
                f"alphas_cumprod: need at least 2 values in [0, 1] falling strictly, got {len(table)} values "
                f"from {table[:1]} to {table[-1:]}"
            )
        # A zero terminal SNR has no log; 2^-24 is what diffusers puts in its place.
        object.__setattr__(self, "alphas_cumprod", tuple(max(a, 2.0**-24) for a in table))
        log_alpha = 0.5 * torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64).log()
        object.__setattr__(self, "_log_alpha", log_alpha)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], **options) -> DiscreteVP:
        """The schedule of a table of betas: alphas_cumprod = cumprod(1 - beta)."""
        betas = torch.as_tensor(betas, dtype=torch.float64)
        return cls(tuple(torch.cumprod(1 - betas, 0).tolist()), **options)

    @classmethod
    def linear(cls, num: int = 1000, start: float = 1e-4, end: float = 0.02, **options) -> DiscreteVP:
        """betas linear (DDPM, DiT)."""
        betas = torch.linspace(start, end, num, dtype=torch.float64)
        return cls.from_betas(betas, **{"name": "linear", **options})

    @classmethod
    def scaled_linear(cls, num: int = 1000, start: float = 0.00085, end: float = 0.012, **options) -> DiscreteVP:
        """square roots of betas linear (Stable Diffusion)."""
        betas = torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
        return cls.from_betas(betas, **{"name": "scaled_linear", **options})

    @classmethod
    def cosine(cls, num: int = 1000, max_beta: float = 0.999, **options) -> DiscreteVP:
        """alphas_cumprod a squared cosine (Nichol and Dhariwal 2021), betas capped at ``max_beta``."""
        t = torch.arange(num + 1, dtype=torch.float64) / num
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp_max(max_beta), **{"name": "cosine", **options})

    def _n(self, u: Tensor) -> Tensor:
        num = len(self.alphas_cumprod)
        u = u.double()
        return num * (1 - u) - 1 if self.final == "zero" else (num - 1) * (1 - u)

    def alpha_sigma(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at u, float64, u's shape."""
        n = self._n(u)
        table = self._log_alpha.to(n.device)
        lower = n.detach().floor().clamp(-1, len(table) - 3).long()
        fraction = n - lower
        log_alpha = table[lower + 1] * (1 - fraction) + table[lower + 2] * fraction
        # fraction is -1e-16 rather than 0 at some grid points, and sigma must not become NaN there
        log_alpha = log_alpha.clamp_max(0)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time(self, u: Tensor) -> Tensor:
        """The time the network is called with at u, float64, u's shape."""
        return self._n(u).clamp_min(0)

    def spec(self) -> dict:
        """The schedule as JSON data; the table itself is named by its kind, length and ends."""
        table = self.alphas_cumprod
        return {
            "kind": "discrete_vp",
            "name": self.name,
            "num": len(table),
            "ends": [table[0], table[-1]],
            "final": self.final,
            "prediction_type": self.prediction_type,
        }


Schedule = Flow | VP | DiscreteVP


def default_schedule(family: str) -> Schedule:
    """The schedule of the published tables of a family: ``Flow()`` or ``VP()``."""
    return Flow() if family == "flow" else VP()


def prediction(schedule: Schedule, u: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with y = p * x + q * output: what the history stores, from what the network returns.

    y is the velocity x0 - epsilon for a flow and x0 for VP. u: (N,) float64. Each result: (N,) float64.
    """
    alpha, sigma = schedule.alpha_sigma(u)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    kind = schedule.prediction_type
    backwards = getattr(schedule, "convention", "paper") == "diffusers"
    if schedule.family == "flow":
        if kind == "velocity":
            return zero, -one if backwards else one
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


def transition(schedule: Schedule, u: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with x_next = a * x + b * sum_j c_j y_j for the N steps between the N + 1 points u.

    Flow: a = 1, b = sigma - sigma'. VP: a = sigma'/sigma, b = alpha' - sigma' alpha / sigma (DDIM when c
    is the newest y alone). Each result: (N,) float64.
    """
    alpha, sigma = schedule.alpha_sigma(u)
    if schedule.family == "flow":
        return torch.ones_like(sigma[1:]), sigma[:-1] - sigma[1:]
    ratio = sigma[1:] / sigma[:-1]
    return ratio, alpha[1:] - ratio * alpha[:-1]


def step_weights(
    schedule: Schedule,
    timesteps: Tensor,
    coeffs: Tensor,
    *,
    guidance_scale: float | Tensor = 1.0,
    noise_coeffs: Tensor | None = None,
    network_timesteps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Everything the steps of a solver need: the table of scalars and the times to call the network with.

    timesteps: (N + 1,) u from 0 to 1. coeffs: (N, N), lower triangular. guidance_scale: a number, (N,) a
    value per step, (B, 1) one per sample or (B, N) both. noise_coeffs: (N,) weights on the initial
    noise, scaled by b like the rest. network_timesteps: (N,) u to call the network at, if not the solver's own.

    Returns weights (R, N, 4 + K), columns a, p, q, guidance and b_i * c_ij, R = 1 or B and K = N, or N + 1
    with the noise last; and times (N,). Both float64 and differentiable in timesteps (its two ends
    are fixed) and coefficients.
    """
    u = torch.cat([timesteps[:1].detach(), timesteps[1:-1], timesteps[-1:].detach()]).double()
    a, b = transition(schedule, u)
    p, q = prediction(schedule, u[:-1])
    columns = b[:, None] * torch.tril(coeffs.double())
    if noise_coeffs is not None:
        columns = torch.cat([columns, (b * noise_coeffs.double())[:, None]], 1)
    scale = torch.as_tensor(guidance_scale, dtype=torch.float64, device=u.device)
    scale = scale.expand(len(b)) if scale.ndim < 2 else scale.expand(-1, len(b))
    scale = scale.reshape(-1, len(b), 1)
    fixed = torch.stack([a, p, q], 1).expand(len(scale), -1, -1)
    weights = torch.cat([fixed, scale, columns.expand(len(scale), -1, -1)], 2)
    times = schedule.time(u[:-1] if network_timesteps is None else network_timesteps)
    return weights, times


def _check_prediction_type(kind: str) -> None:
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={kind!r}: choose one of {', '.join(PREDICTION_TYPES)}")
