"""Textbook solvers as tables. Each method is a few lines in its own terms; one function brings all of them home.

A linear multistep method writes the next state with predictions of its own choice (x0, epsilon or
velocity) and an exponential factor of its own. With the grid fixed every state is a linear combination of
the initial noise and the stored predictions y_j, so the row c with

    x_{i+1} = a_i * x_i + b_i * sum_j c_ij * y_j

is found by writing states as vectors over (x_init, y_0, ..., y_{N-1}) in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .files import shortened
from .schedule import DiscreteVP, Flow, Schedule, check_path, inverse
from .solver import ROW_SUM_TOLERANCE, Solver

SPACINGS = ("uniform", "lambda", "karras")
SOURCE = "hand-made"
RESTING = 1e-10  # noise that falls by a smaller part rests: float64 leaves its coefficients six digits
MOST_STEPS = 5_000
SHORT = 1e-7  # of Heun's step, its second half: where it is called again is the same place to float32
LAST_U = 1e-3  # where log-SNR is infinite at an end, spacings stop this far before it, as a table of 1000 steps does


def handmade(
    method: str,
    num_steps: int | None = None,
    schedule: Schedule | None = None,
    *,
    spacing: str = "uniform",
    timesteps: Tensor | None = None,
    lower_order_final: bool = True,
) -> Solver:
    """The table of a hand-made method on a grid.

    method: ``euler`` (DDIM for VP); ``ab2`` ``ab3`` ``ab4`` Adams-Bashforth with variable-step rows and
        ``ab2_uniform`` ... with the textbook's; ``dpmpp_2m`` ``dpmpp_3m`` (DPM-Solver++, arXiv 2211.01095); ``unip2``
        ``unip3`` (UniPC's predictor with B(h) = e^h - 1, arXiv 2302.04867); ``unipc`` ``unipc3`` (with its corrector,
        order 2 and 3); ``deis`` ``deis3`` (log-rho, order 2 and 3, arXiv 2204.13902); ``heun`` (EDM's, arXiv
        2206.00364), of two calls a step and one in the last: n steps are a table of N = 2 n - 1.
    schedule: the noise schedule the rows belong to; ``Flow()`` by default.
    spacing: ``uniform`` in u, ``lambda`` uniform in log-SNR, ``karras`` (rho = 7, arXiv 2206.00364), or
        ``shift3`` for sigma moved as SD3 does with shift 3, any number.
    timesteps: (N + 1,) u from 0 to 1, instead of num_steps and spacing; of heun (n + 1,), where its steps begin.
    lower_order_final: take the last steps at order 2, 1 as diffusers does: UniP and UniPC always, DPM-Solver++
        and DEIS below 15 steps, Adams-Bashforth never.

    Raises ValueError naming what exists when a name is unknown.
    """
    schedule = Flow() if schedule is None else schedule
    if method not in METHODS:
        raise ValueError(f"no hand-made solver is called {method!r}; there are {', '.join(METHODS)}")
    check_path(schedule, torch.linspace(0, 1, 33, dtype=torch.float64))
    if timesteps is None:
        if num_steps is None:
            raise ValueError("give num_steps, or the timesteps themselves")
        if num_steps > MOST_STEPS:
            raise ValueError(f"num_steps={num_steps!r}: at most {MOST_STEPS:,}, whose table takes 200 MB")
        if calls_within(method, num_steps) != num_steps:
            raise ValueError(
                f"num_steps={num_steps!r}: {method} takes an odd number of calls, two a step and one in the last; take "
                f"{num_steps - 1} or {num_steps + 1}"
            )
        points = (num_steps + 1) // 2 if method == "heun" else num_steps
        timesteps = _rising(grid(points, schedule, spacing), spacing, schedule)
    u = torch.as_tensor(timesteps, dtype=torch.float64)
    u = _paired(u) if method == "heun" else u
    n = len(u) - 1
    label = f"{method}/{n}" + (f"@{spacing}" if spacing != "uniform" else "")
    alpha, sigma = schedule.alpha_sigma(u)
    check_path(schedule, u)
    before, after = sigma[:-1] * alpha[1:], sigma[1:] * alpha[:-1]
    steps = ((before - after).abs() > RESTING * before).nonzero()[:, 0]
    # Where the noise stays what it is (beyond VP's t_end, at entries of a table that are equal) a step moves nothing,
    # whatever its row, and its prediction is that of the next step.
    rows = torch.eye(n, dtype=torch.float64)
    falling = torch.cat([u[steps], u[-1:]])
    again = torch.tensor([method == "heun" and i % 2 == 1 for i in range(n)])[steps]
    again[-1:] = False  # the last step in which the noise falls is Euler's, also where calls follow that change nothing
    rows[steps[:, None], steps] = _rows(method, schedule, falling, again, lower_order_final)
    sound = (rows.sum(1) - 1).abs() <= ROW_SUM_TOLERANCE * rows.abs().amax(1).clamp(1)
    sound &= rows.isfinite().all(1)
    if not bool(sound.all()):
        i = int((~sound).nonzero()[0])
        raise ValueError(
            f"{label} has no coefficients that floats can hold for step {i}, from u = {float(u[i]):.6g} to "
            f"{float(u[i + 1]):.6g} of {shortened(repr(schedule))}: take a method of lower order, other timesteps, or "
            "a schedule whose noise falls more evenly"
        )
    return Solver(tuple(u.tolist()), tuple(map(tuple, torch.tril(rows).tolist())), schedule, name=label, source=SOURCE)


def calls_within(method: str, num_steps: int) -> int:
    """The most calls, and num_steps at most, that a table of a method takes: any number but of Heun's, which is odd."""
    return num_steps - 1 if method == "heun" and num_steps % 2 == 0 else num_steps


def _paired(u: Tensor) -> Tensor:
    """Where Heun's n steps (n + 1,) call: once at u = 0, and at each point twice, just before it and there."""
    early = u[1:-1] - SHORT * u[:-1].diff()
    return torch.cat([u[:1], torch.stack([early, u[1:-1]], 1).flatten(), u[-1:]])


def _rows(method: str, schedule: Schedule, u: Tensor, again: Tensor, lower_order_final: bool) -> Tensor:
    """(N, N) coefficients on points (N + 1,) between which the noise falls; NaN where there are none. again: (N,) which
    steps do the one before once more, as the second half of Heun's."""
    rule, order = METHODS[method]
    n = len(u) - 1
    line = _Line(schedule, u, again)
    rows = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        usable = min(order, i + 1)
        if lower_order_final and (rule in (_unip, _unipc) or (rule in (_dpmpp, _deis) and n < 15)):
            usable = min(usable, n - i)
        try:
            state = rule(line, i, usable)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # two predictions at one place
            state = torch.full_like(line.states[i], math.nan)
        rows[i] = (state - line.a[i] * line.states[i])[1:] / line.b[i]
        line.states.append(state)
    return rows


def grid(num_steps: int, schedule: Schedule, spacing: str = "uniform") -> Tensor:
    """N + 1 points u from 0 to 1, float64. See :func:`handmade` for the spacings.

    The last call is on the table of a discrete schedule: below its first entry the network's time stands still while
    the noise goes on falling, and each call there is wrong by more.
    """
    u = _spaced(num_steps, schedule, spacing)
    last = schedule.last if isinstance(schedule, DiscreteVP) else 1.0
    if num_steps > 1 and float(u[-2]) > last + 1e-9:
        u = torch.cat([u[:-1] * (last / u[-2]), u[-1:]])
    return u


def _spaced(num_steps: int, schedule: Schedule, spacing: str) -> Tensor:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: need at least 1")
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    shift = check_spacing(spacing)
    if spacing == "uniform":
        return u
    if shift is not None:
        points = 1 - shift * (1 - u) / (1 + (shift - 1) * (1 - u))
        points[0], points[-1] = 0, 1  # rounding may leave the first just below
        return points
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    finite = _log_snr(schedule, ends).isfinite()
    ends = torch.where(finite, ends, torch.tensor([LAST_U, 1 - LAST_U], dtype=torch.float64))
    if not bool(_log_snr(schedule, ends[1:]).isfinite()):  # the data are clean before that already
        ends[1] = inverse(lambda u: (schedule.alpha_sigma(u)[1] == 0).double(), torch.tensor(0.5)) - LAST_U
    low, high = _log_snr(schedule, ends)
    if spacing == "lambda":
        targets = low + (high - low) * u
    else:
        rho = 7.0
        first, last = (-low / rho).exp(), (-high / rho).exp()
        targets = -rho * (first + (last - first) * u).log()
    points = inverse(lambda u: _log_snr(schedule, u), targets)
    points[0], points[-1] = 0, 1
    return points


def _rising(timesteps: Tensor, spacing: str, schedule: Schedule) -> Tensor:
    """Timesteps that rise. Raises ValueError where float64 has no numbers between them."""
    if not bool((timesteps.diff() > 0).all()):
        raise ValueError(
            f"spacing={spacing!r} puts two of {len(timesteps)} timesteps at one place of {shortened(repr(schedule))}: "
            "take 'uniform', or give the timesteps"
        )
    return timesteps


def check_spacing(spacing: str) -> float | None:
    """The number in ``shift<number>``, None for the other spacings. Raises ValueError naming what exists."""
    if not spacing.startswith("shift"):
        if spacing not in SPACINGS:
            raise ValueError(f"spacing={spacing!r}: choose {', '.join(SPACINGS)} or shift<number>")
        return None
    try:
        shift = float(spacing[5:])
    except ValueError:
        shift = 0.0
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"spacing={spacing!r}: 'shift' needs a number above 0, as in 'shift3'")
    return shift


def _log_snr(schedule: Schedule, u: Tensor) -> Tensor:
    alpha, sigma = schedule.alpha_sigma(u)
    return alpha.log() - sigma.log()


class _Line:
    """A sampling run written over the basis (x_init, y_0, ..., y_{N-1}): states and predictions as vectors."""

    def __init__(self, schedule: Schedule, u: Tensor, again: Tensor):
        self.again, self.flow = again, schedule.family == "flow"
        self.alpha, self.sigma = schedule.alpha_sigma(u)
        self.log_snr = self.alpha.log() - self.sigma.log()
        _, self.clock = schedule.clock(u)
        self.a, self.b = schedule.transition(u)
        self.of_state, self.of_y = schedule.x0(u)
        self.basis = torch.eye(len(u), dtype=torch.float64)
        self.states = [self.basis[0]]
        self.corrected = [self.basis[0]]  # UniPC's states
        self.orders: list[int] = []  # that UniPC stepped with

    def y(self, j: int) -> Tensor:
        """The prediction of call j: a velocity for flows, x0 for VP."""
        return self.basis[j + 1]

    def x0(self, j: int) -> Tensor:
        """The clean sample that y_j implies at x_j."""
        return self.of_state[j] * self.states[j] + self.of_y[j] * self.y(j)

    def epsilon(self, j: int) -> Tensor:
        """The noise that y_j implies at x_j: (x_j - alpha_j x0_j) / sigma_j."""
        return (self.states[j] - self.alpha[j] * self.x0(j)) / self.sigma[j]

    def ddim(self, i: int) -> Tensor:
        """The state after step i when x0 and epsilon stay what they are: alpha_{i+1} x0_i + sigma_{i+1} epsilon_i."""
        return self.alpha[i + 1] * self.x0(i) + self.sigma[i + 1] * self.epsilon(i)

    def advance(self, i: int, row: list[float] | Tensor, first: int) -> Tensor:
        """The state after step i when the history's y_first.. are mixed by a row that sums to one."""
        mixed = torch.stack([float(c) * self.y(first + k) for k, c in enumerate(row)]).sum(0)
        return self.a[i] * self.states[i] + self.b[i] * mixed


_TEXTBOOK = {1: ((1,), 1), 2: ((-1, 3), 2), 3: ((5, -16, 23), 12), 4: ((-9, 37, -59, 55), 24)}


def _adams_uniform(line: _Line, i: int, order: int) -> Tensor:
    """Adams-Bashforth with the textbook's row, which is exact for equal steps."""
    numerators, divisor = _TEXTBOOK[order]
    return line.advance(i, [c / divisor for c in numerators], i - order + 1)


def _adams(line: _Line, i: int, order: int) -> Tensor:
    """Adams-Bashforth: the polynomial through the newest y, in the clock of the ODE, integrated over the step."""
    if not line.clock[i + 1].isfinite():  # over an infinite interval only a constant x0 has an integral
        order = 1
    nodes = line.clock[i - order + 1 : i + 1]
    start, width = line.clock[i], line.clock[i + 1] - line.clock[i]
    row = _quadrature((nodes - start) / width, [1 / (k + 1) for k in range(order)]) if order > 1 else [1.0]
    return line.advance(i, row, i - order + 1)


def _dpmpp(line: _Line, i: int, order: int) -> Tensor:
    """DPM-Solver++: x0 as a polynomial in log-SNR, by divided differences (arXiv 2211.01095)."""
    h = line.log_snr[i + 1] - line.log_snr[i]
    order, base = min(order, _finite_order(line, i)), line.ddim(i)
    if order == 1 or not h.isfinite():
        return base
    decay = torch.expm1(-h)
    r0 = (line.log_snr[i] - line.log_snr[i - 1]) / h
    slope = (line.x0(i) - line.x0(i - 1)) / r0
    if order == 2:
        return base - 0.5 * line.alpha[i + 1] * decay * slope
    r1 = (line.log_snr[i - 1] - line.log_snr[i - 2]) / h
    older = (line.x0(i - 1) - line.x0(i - 2)) / r1
    first = slope + r0 / (r0 + r1) * (slope - older)
    second = (slope - older) / (r0 + r1)
    return base + line.alpha[i + 1] * ((decay / h + 1) * first - ((decay + h) / h**2 - 0.5) * second)


def _unip(line: _Line, i: int, order: int) -> Tensor:
    """UniPC's predictor on x0, B(h) = e^h - 1 (arXiv 2302.04867)."""
    h = line.log_snr[i + 1] - line.log_snr[i]
    order, base = min(order, _finite_order(line, i)), line.ddim(i)
    if order == 1 or not h.isfinite():
        return base
    ratios = torch.stack([(line.log_snr[i - k] - line.log_snr[i]) / h for k in range(1, order)])
    slopes = [(line.x0(i - k) - line.x0(i)) / ratios[k - 1] for k in range(1, order)]
    return base - line.alpha[i + 1] * torch.expm1(-h) * _weighed(h, ratios, slopes)


def _unipc(line: _Line, i: int, order: int) -> Tensor:
    """UniPC: its predictor, from the newest state as UniC corrects it, without a call, by what the network said there.

    What is stored belongs to the state that the network saw, so the rows go from one of those to the next.
    """
    if i:
        line.corrected.append(_unic(line, i))
    line.orders.append(min(order, _finite_order(line, i)))
    return _unip(line, i, order) + line.sigma[i + 1] / line.sigma[i] * (line.corrected[i] - line.states[i])


def _unic(line: _Line, i: int) -> Tensor:
    """UniPC's corrector: the step to state i once more, of the order that it had, with the prediction made there."""
    before, order, h = i - 1, line.orders[i - 1], line.log_snr[i] - line.log_snr[i - 1]
    decay = torch.expm1(-h)
    earlier = [(line.log_snr[before - k] - line.log_snr[before]) / h for k in range(1, order)]
    ratios = torch.stack([*earlier, torch.ones_like(h)])
    slopes = [(line.x0(before - k) - line.x0(before)) / ratios[k - 1] for k in range(1, order)]
    slopes.append(line.x0(i) - line.x0(before))
    base = line.sigma[i] / line.sigma[before] * line.corrected[before] - line.alpha[i] * decay * line.x0(before)
    return base - line.alpha[i] * decay * _weighed(h, ratios, slopes)


def _weighed(h: Tensor, ratios: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """The sum of UniPC's differences, which stand at these parts of the step h, with B(h) = e^h - 1."""
    if len(ratios) == 1:
        return 0.5 * slopes[0]  # the authors' code takes this; the 1x1 system would give phi_2 / B
    decay = torch.expm1(-h)
    phi, factorial, moments = decay / -h - 1, 1, []
    for k in range(1, len(ratios) + 1):
        moments.append(phi * factorial / decay)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = torch.stack([ratios**k for k in range(len(ratios))])
    weights = torch.linalg.solve(powers, torch.stack(moments))
    total: Tensor = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
    return total


def _heun(line: _Line, i: int, order: int) -> Tensor:
    """Heun: Euler's step, and the same step once more by the mean of the slopes at both of its ends (arXiv 2206.00364).

    The second half begins where Euler's step ended and is ``SHORT`` of it, so that timesteps rise and a state belongs
    to each. The slope is the velocity over sigma of a flow, epsilon over sigma / alpha otherwise.
    """
    if not line.again[i]:
        return line.ddim(i)
    if line.flow:
        slope = (line.y(i - 1) + line.y(i)) / 2
        return line.states[i - 1] + (line.clock[i + 1] - line.clock[i - 1]) * slope
    rho, slope = line.sigma / line.alpha, (line.epsilon(i - 1) + line.epsilon(i)) / 2
    return line.alpha[i + 1] * (line.states[i - 1] / line.alpha[i - 1] + (rho[i + 1] - rho[i - 1]) * slope)


def _deis(line: _Line, i: int, order: int) -> Tensor:
    """DEIS: epsilon as a polynomial in log rho, rho = sigma / alpha, integrated over rho (arXiv 2204.13902)."""
    order = min(order, _finite_order(line, i))
    if order == 1:
        return line.ddim(i)
    rho = (line.sigma / line.alpha)[i - order + 1 : i + 2]
    nodes = rho[:-1].log()

    def integral(k: int, r: Tensor) -> Tensor:
        """int_0^r (log s)^k ds."""
        if r == 0:
            return r
        power = r * r.log() ** k
        return power - k * integral(k - 1, r) if k else power

    moments = [integral(k, rho[-1]) - integral(k, rho[-2]) for k in range(order)]
    row = _quadrature(nodes, moments)
    drift: Tensor = sum(c * line.epsilon(i - order + 1 + k) for k, c in enumerate(row))
    return line.alpha[i + 1] * (line.states[i] / line.alpha[i] + drift)


def _finite_order(line: _Line, i: int) -> int:
    """How many of the newest predictions stand at a finite log-SNR (a flow's first does not)."""
    return 1 + sum(1 for j in range(i) if line.log_snr[j].isfinite()) if line.log_snr[i].isfinite() else 1


def _quadrature(nodes: Tensor, moments: Sequence[float | Tensor]) -> Tensor:
    """Weights at the nodes that integrate 1, s, s^2, ... to the given moments."""
    powers = torch.stack([nodes**k for k in range(len(nodes))])
    weights: Tensor = torch.linalg.solve(powers, torch.tensor([float(m) for m in moments], dtype=torch.float64))
    return weights


METHODS: dict[str, tuple[Callable[[_Line, int, int], Tensor], int]] = {
    "euler": (_adams_uniform, 1),
    "ab2": (_adams, 2),
    "ab3": (_adams, 3),
    "ab4": (_adams, 4),
    "ab2_uniform": (_adams_uniform, 2),
    "ab3_uniform": (_adams_uniform, 3),
    "ab4_uniform": (_adams_uniform, 4),
    "dpmpp_2m": (_dpmpp, 2),
    "dpmpp_3m": (_dpmpp, 3),
    "unip2": (_unip, 2),
    "unip3": (_unip, 3),
    "deis": (_deis, 2),
    "deis3": (_deis, 3),
    "unipc": (_unipc, 2),
    "unipc3": (_unipc, 3),
    "heun": (_heun, 2),
}
