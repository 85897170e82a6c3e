"""The dense teacher: order of the trajectory and of its interpolation, the paper's teachers, what is kept."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, Grid, Target, handmade, sample, search
from dss_fast.denoiser import Denoiser
from dss_fast.draws import Draws
from dss_fast.searching import teacher as teaching
from dss_fast.searching.budget import Ledger
from dss_fast.searching.lion import paper_trajectory
from dss_fast.searching.residual import residual
from dss_fast.searching.room import Room
from dss_fast.searching.teacher import Teacher
from dss_fast.trajectory import DenseGrid, Trajectory, dense_grid, evaluations, integrate

F64 = torch.float64
SPREAD, CENTER = 0.3, torch.tensor([0.7, -0.4], dtype=F64)
SCHEDULES = {
    "flow": Flow(),
    "flow shifted": Flow(shift=3.0, convention="diffusers"),
    "vp": VP(),
    "vp v": VP(prediction_type="v_prediction"),
}


def exact(schedule, u, x, start=0.0):
    """Where the sampling ODE of a normal distribution N(CENTER, SPREAD^2) carries x from ``start`` to u."""

    def moments(at):
        alpha, sigma = schedule.alpha_sigma(torch.as_tensor(at, dtype=F64))
        return alpha * CENTER, (alpha**2 * SPREAD**2 + sigma**2).sqrt()

    (m0, s0), (m1, s1) = moments(start), moments(u)
    return m1 + (x - m0) * (s1 / s0)


def predict_normal(schedule):
    """(x, u) -> y for that distribution: its velocity or its x0."""

    def predict(x, u):
        alpha, sigma = schedule.alpha_sigma(u)
        whitened = (x - alpha * CENTER) / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = CENTER + alpha * SPREAD**2 * whitened
        return x0 - sigma * whitened if schedule.family == "flow" else x0

    return predict


def noise(rows=8):
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def slope(errors, sizes):
    return math.log(errors[0] / errors[-1]) / math.log(sizes[-1] / sizes[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_trajectory_has_order_four(name):
    schedule, sizes = SCHEDULES[name], (80, 160, 320)
    errors = []
    for m in sizes:
        made = integrate(predict_normal(schedule), noise(), DenseGrid(schedule, m))
        errors.append(float((made.last - exact(schedule, 1.0, noise())).abs().max()))
    assert slope(errors, sizes) > 3.7, errors


@pytest.mark.parametrize("schedule", [Flow(), VP(), DiscreteVP.linear(final="sigma_min")], ids=repr)
def test_64_evaluations_beat_a_thousand_steps_of_first_order(schedule):
    predict, truth = predict_normal(schedule), exact(schedule, 1.0, noise())
    made = integrate(predict, noise(), dense_grid(schedule, 64))
    coarse = paper_trajectory(predict, noise(), schedule, 1000)[:, -1]
    assert float((made.last - truth).abs().max()) < 0.1 * float((coarse - truth).abs().max())


@pytest.mark.parametrize("name", SCHEDULES)
def test_interpolation_has_order_four(name):
    schedule, sizes = SCHEDULES[name], (40, 80, 160)
    u = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=F64)
    errors = []
    for m in sizes:
        grid = DenseGrid(schedule, m)
        states = torch.stack([exact(schedule, float(at), noise()) for at in grid.points], 1)
        y = torch.stack([predict_normal(schedule)(states[:, k], at) for k, at in enumerate(grid.points)], 1)
        slopes = grid.slope[:, :1] * states + grid.slope[:, 1:] * y
        made = Trajectory(grid, states, slopes, states[:, -1])
        truth = torch.stack([exact(schedule, float(at), noise()) for at in u], 1)
        errors.append(float((made.at(u) - truth).abs().max()))
    assert slope(errors, sizes) > 3.6, errors


@pytest.mark.parametrize("schedule", [Flow(), VP()], ids=repr)
def test_interpolation_is_differentiable_in_u(schedule):
    made = integrate(predict_normal(schedule), noise(2), dense_grid(schedule, 24))
    u = torch.tensor([0.0312, 0.417, 0.903], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(made.at, u)
    jacobian = torch.autograd.functional.jacobian(made.at, u)
    velocity = made.velocity(u)
    assert torch.allclose(torch.einsum("bnsn->bns", jacobian), velocity, rtol=1e-9, atol=1e-12)
    points = made.grid.points
    assert torch.allclose(made.at(points), made.states, rtol=1e-9, atol=1e-12)


def test_the_end_beyond_the_networks_last_time():
    grid = dense_grid(VP(), 32)
    assert grid.end == pytest.approx(0.998, abs=1e-12)
    made = integrate(predict_normal(VP()), noise(), grid)
    assert torch.equal(made.at(torch.tensor([0.999, 1.0], dtype=F64))[:, 1], made.last)
    schedule = DiscreteVP.linear()
    made = integrate(predict_normal(schedule), noise(), dense_grid(schedule, 64))
    final = made.at(torch.ones(1, dtype=F64))[:, 0]
    assert torch.equal(final, made.last)
    y = predict_normal(schedule)(made.states[:, -1], made.grid.points[-1])
    assert torch.allclose(final, y, atol=1e-12)  # sigma = 0: the last x0
    assert evaluations(made.grid) == 64


@dataclass(frozen=True)
class Trigonometric:
    """A schedule of a user's, whose time runs to clean data."""

    prediction_type: str = "x0"
    kind: ClassVar = "trigonometric"
    family: ClassVar = "vp"
    convention: ClassVar = "paper"

    def time(self, u):
        return 1 - u.double()

    def alpha_sigma(self, u):
        angle = math.pi / 2 * self.time(u)
        return angle.cos(), angle.sin()

    prediction, transition, clock, x0, to_dict = VP.prediction, VP.transition, VP.clock, VP.x0, VP.to_dict


CLEAN = (1.0, *DiscreteVP.linear().alphas_cumprod)
NOISELESS = [
    Trigonometric(),
    VP(t_end=0.0),
    VP(t_start=1.0, t_end=0.0),
    DiscreteVP(CLEAN, final="sigma_min"),
    DiscreteVP(CLEAN, final="zero"),
    Grid.ve([*((2.2 - 0.06 * k) ** 7 for k in range(32)), 0.0]),
]


@pytest.mark.parametrize("schedule", NOISELESS, ids=repr)
def test_sigma_0_at_the_end(schedule):
    """There VP's clock, alpha / sigma, is infinite."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 1.0], dtype=F64))
    assert float(sigma[1]) == 0 and math.copysign(1, float(sigma[1])) > 0
    x, u = noise() * sigma[0], torch.linspace(0.9, 1, 401, dtype=F64)
    made = integrate(predict_normal(schedule), x, dense_grid(schedule, 64))
    truth = torch.stack([exact(schedule, float(at), x) for at in u], 1)
    assert float((made.at(u) - truth).abs().max()) < 5e-4  # of data whose deviation is 0.3
    assert torch.equal(made.at(u[-1:])[:, 0], made.last) and evaluations(made.grid) == 64
    assert made.slopes.isfinite().all() and made.velocity(u).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_search_to_sigma_0(dtype):
    schedule = Trigonometric()

    def model(x, t):
        return predict_normal(schedule)(x.double(), 1 - t[:, None]).to(x.dtype)

    target = Target(model, (2,), schedule, dtype=dtype)
    solver = search(target, 4, budget=3_000, progress=False).solver
    x = noise(256).to(dtype)
    error = {name: float((sample(target, x, table) - exact(schedule, 1.0, x)).square().mean())
             for name, table in {"mine": solver, "theirs": handmade("dpmpp_2m", 4, schedule)}.items()}  # fmt: skip
    assert error["mine"] < 0.5 * error["theirs"]


def test_the_papers_teachers_are_euler_and_ddim():
    flow = paper_trajectory(predict_normal(Flow()), noise(), Flow(), 100)
    model = lambda x, t: predict_normal(Flow())(x, t[:1])  # noqa: E731
    _, states = sample(model, noise(), handmade("euler", 100), return_trajectory=True)
    assert torch.allclose(flow, states.transpose(0, 1), rtol=1e-12)
    calls = []
    predict = lambda x, u: (calls.append(float(u)), predict_normal(VP())(x, u))[1]  # noqa: E731
    vp = paper_trajectory(predict, noise(), VP(), 100)
    assert vp.shape[1] == 100 and len(calls) == 99
    assert calls[-1] == pytest.approx(0.999 * 98 / 99)
    alpha, sigma = VP().alpha_sigma(torch.tensor([calls[0], calls[1]], dtype=F64))
    y = predict_normal(VP())(noise(), torch.tensor(0.0, dtype=F64))
    step = sigma[1] / sigma[0] * noise() + sigma[1] * (alpha[1] / sigma[1] - alpha[0] / sigma[0]) * y
    assert torch.allclose(vp[:, 1], step, rtol=1e-12)


class Counting:
    """A normal distribution's velocity, counting its rows."""

    def __init__(self, center=0.5):
        self.center, self.rows = center, 0

    def __call__(self, x, t, shift=None):
        self.rows += len(x)
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        center = self.center if shift is None else shift.reshape(-1, 1)
        return (center * t - x) * (1 - 0.91 * t) / (0.09 * t**2 + (1 - t) ** 2) + center


def drawn(model=None, seed=0, **options):
    return Draws.of(Target(model or Counting(), (3,), Flow(), **options), seed)


def stream(teacher):
    return [trajectory.at(torch.tensor([0.3, 1.0])) for _, trajectory in teacher]


def test_teacher_counts_streams_and_keeps():
    draws, ledger = drawn(), Ledger()
    teacher = Teacher(draws, ledger, "train", 10, 4, 24)
    assert teacher.sizes == [4, 4, 2] and teacher.cost() == 240 and ledger.evaluations == 0
    first = stream(teacher)
    assert draws.target.model.rows == ledger.evaluations == 240 == 10 * evaluations(teacher.grid)
    again = stream(teacher)
    assert draws.target.model.rows == ledger.evaluations == 240
    assert all(map(torch.equal, first, again))


def test_inner_states_beyond_the_hosts_room_are_made_again_for_the_samples_at_hand():
    """Two of three batches fit; of the third the end points stay, and each look between them is counted."""
    whole = Teacher(drawn(), Ledger(), "train", 10, 4, 24)
    draws, ledger, u = drawn(), Ledger(), torch.tensor([0.3, 1.0])
    size = [sum(t.nbytes for t in (made.states, made.slopes)) for _, made in whole]
    teacher = Teacher(draws, ledger, "train", 10, 4, 24, Room(rows=3, host=size[0] + size[1]))
    assert teacher.again(slice(0, 3)) == 0 and [len(batch) for batch, _ in teacher] == [4, 4, 2]
    assert teacher.room.host == 0 and ledger.evaluations == 240 and teacher.again(slice(0, 3)) == 2 * 24
    for k, (_, made) in enumerate(whole):
        for rows in (slice(0, 1), slice(1, len(made.last))):
            part, trajectory = teacher.part(k, rows)
            assert torch.equal(part.noise, made.states[rows, 0])
            torch.testing.assert_close(trajectory.at(u), made.at(u)[rows], rtol=0, atol=1e-6)
            assert torch.equal(teacher[k][1].last, made.last)
    assert draws.target.model.rows == 240 + 2 * 24
    kept = sum(made.states.nbytes + made.slopes.nbytes for _, made in teacher)
    assert kept == size[0] + size[1] + 2 * 3 * 4  # and the first state of the two samples of the last batch


def test_a_search_that_asks_for_ends_alone_keeps_nothing_between_them():
    teacher = Teacher(drawn(), Ledger(), "held_out", 8, 4, 24, room := Room(), inner=False)
    assert all(made.states.shape == (4, 1, 3) and not made.slopes.numel() for _, made in teacher)
    assert room == Room()


def test_range_of_guidance_and_processes_share_one_draw():
    draw = lambda n, generator: {"shift": torch.rand(n, generator=generator)}  # noqa: E731
    options = dict(cond=draw, uncond={"shift": torch.zeros(1)}, guidance_scale=(1.0, 4.0))
    whole = drawn(**options)
    batch = whole.batch("train", 3, 6)
    assert batch.scale.min() >= 1 and batch.scale.max() <= 4 and len(set(batch.scale.tolist())) == 6
    parts = []
    for rank in (0, 1):
        part = replace(whole, rank=rank, world=2)
        parts.append(part.batch("train", 3, 6))
    for rank, part in enumerate(parts):
        assert torch.equal(part.noise, batch.noise[rank::2]) and part.size == 6
        assert torch.equal(part.scale, batch.scale[rank::2])
        assert torch.equal(part.cond["shift"], batch.cond["shift"][rank::2])
    assert not torch.equal(batch.noise, whole.batch("held_out", 3, 6).noise)
    y = batch.predictor()(batch.noise, torch.tensor(0.5, dtype=F64))
    t = torch.full((6,), 0.5)
    low, high = Counting()(batch.noise, t, torch.zeros(6)), Counting()(batch.noise, t, batch.cond["shift"])
    assert torch.allclose(y, low + batch.scale[:, None].float() * (high - low), atol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="at least 16"):
        dense_grid(Flow(), 10)
    with pytest.raises(ValueError, match="needs uncond"):
        drawn(guidance_scale=2.0)


def test_samples_are_drawn_once_and_the_end_needs_no_states(monkeypatch):
    """What does not fit a quarter of the memory is drawn again, the same; the loss at the end reads ``last`` alone."""
    drawn, draw = [], Draws.batch

    def counted(self, stream, number, size):
        drawn.append(number)
        return draw(self, stream, number, size)

    monkeypatch.setattr(Draws, "batch", counted)
    draws = Draws.of(Target(lambda x, t: -x, (2,), Flow(), dtype=F64), 1)
    size = 8 * 2 * 8  # of a batch's noise, and again of its end points
    monkeypatch.setattr(teaching, "DEVICE", 2 * 2 * size)
    teacher = Teacher(draws, Ledger(), "train", 32, 8, 16)
    first = [pair for _ in range(3) for pair in teacher]
    assert drawn == [0, 1, 2, 3, 2, 3, 2, 3]
    for k, (batch, trajectory) in enumerate(first):
        assert torch.equal(batch.noise, first[k % 4][0].noise) and torch.equal(trajectory.last, first[k % 4][1].last)
    batch, trajectory = teacher[0]
    trajectory.states.fill_(math.nan), trajectory.slopes.fill_(math.nan)
    found = residual("end", 0.1, batch.noise[:, None], trajectory, torch.ones(1))
    assert found.values.isfinite().all() and not trajectory.at(torch.tensor([0.5])).isfinite().all()


def test_states_on_another_device_than_the_end_are_sent_in_parts():
    """As beside a GPU; the meta device stands in for one here, it refuses what would mix the two."""
    grid = dense_grid(Flow(), 16)
    states, slopes = torch.randn(2, 3, grid.intervals + 1, 5)
    trajectory = Trajectory(grid, states, slopes, states[:, -1].to("meta"))
    u = torch.tensor([0.1, 0.5, 1.0], dtype=F64)
    assert trajectory.at(u).device.type == trajectory.velocity(u).device.type == "meta"
    assert trajectory.at(u).shape == (3, 3, 5)


def test_nan_is_noticed_where_no_call_is_looked_at(monkeypatch):
    """On a GPU a call's output is not looked at; the whole way is, once."""
    check = Denoiser._check
    monkeypatch.setattr(Denoiser, "_check", lambda self, *rest: self.check_finite and check(self, *rest))
    broken = Target(lambda x, t: torch.where(t[:, None] > 0.5, math.nan, -x), (2,), Flow(), dtype=F64)
    with pytest.raises(FloatingPointError, match="on the teacher's way, batch 0"):
        Teacher(Draws.of(broken, 1), Ledger(), "train", 8, 8, 16)[0]


@pytest.mark.parametrize("rate, calls, said", [(3, 16, False), (10, 24, True), (10, 96, False), (30, 24, True)])
def test_a_field_too_stiff_for_its_teacher_is_refused(rate, calls, said):
    """Predictor and corrector part long before the states overflow, at no call more."""
    stiff = Draws.of(Target(lambda x, t: -rate * x, (2,), Flow(), dtype=F64), 1)
    teacher = Teacher(stiff, Ledger(), "train", 4, 4, calls)
    if said:
        with pytest.raises(ValueError, match=rf"{calls} calls do not converge.*teacher_evaluations=96"):
            teacher[0]
    else:
        assert float((teacher[0][1].last - math.exp(-rate) * teacher[0][0].noise).abs().max()) < 0.02
