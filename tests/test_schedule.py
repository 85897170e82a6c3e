"""Schedules: their formulas, ends, prediction types and gradients."""

import dataclasses
import math

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, Target, compare, handmade, sample, search
from dss_fast.schedule import PREDICTION_TYPES, Grid
from dss_fast.table import StepTable
from dss_fast.tensors import SolverTensors

pytestmark = pytest.mark.fast
U = torch.linspace(0, 1, 11, dtype=torch.float64)
ALL = [
    Flow(),
    Flow(shift=3.0),
    Flow(convention="diffusers"),
    VP(),
    DiscreteVP.linear(),
    DiscreteVP.scaled_linear(),
    DiscreteVP.cosine(),
]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_monotone_from_noise_to_data(schedule):
    alpha, sigma = schedule.alpha_sigma(U)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert (alpha.diff() > 0).all() and (sigma.diff() < 0).all()
    assert sigma[0] > 0.99 and alpha[-1] > 0.99
    if schedule.family == "vp":
        assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(U))
    else:
        assert torch.allclose(alpha + sigma, torch.ones_like(U))
    again = dataclasses.replace(schedule)
    assert again is not schedule and again == schedule and hash(again) == hash(schedule)


@pytest.mark.parametrize("schedule", [s for s in ALL if s.family == "vp"] + [Flow(), Flow(shift=2.0)], ids=str)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_type_gives_the_same_history(schedule, kind):
    if schedule.family == "flow" and kind == "epsilon":
        with pytest.raises(ValueError, match="epsilon.*flow"):
            Flow(prediction_type="epsilon")
        return
    u = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(u)
    x0, epsilon = torch.randn(2, 7, dtype=torch.float64)
    x = alpha * x0 + sigma * epsilon
    output = {
        "epsilon": epsilon,
        "x0": x0,
        "velocity": x0 - epsilon,
        "v_prediction": alpha * epsilon - sigma * x0,
    }[kind]
    schedule = dataclasses.replace(schedule, prediction_type=kind)
    p, q = schedule.prediction(u)
    assert torch.allclose(p * x + q * output, x0 - epsilon if schedule.family == "flow" else x0)


def test_diffusers_convention_points_the_other_way():
    p, q = Flow(convention="diffusers").prediction(U[:-1])
    assert (p == 0).all() and (q == -1).all()
    assert torch.allclose(Flow(convention="diffusers").time(U), 1000 * (1 - U))
    assert torch.allclose(Flow().time(U), U)


def test_shift_formulas():
    s = 1 - U
    assert torch.allclose(Flow(shift=3.0).alpha_sigma(U)[1], 3 * s / (1 + 2 * s))
    flux = Flow.dynamic(4096)
    assert math.isclose(flux.shift, math.exp(1.15)) and math.isclose(Flow.dynamic(256).shift, math.exp(0.5))
    e = math.exp(1.15)
    assert torch.allclose(flux.alpha_sigma(U[:-1])[1], e / (e + (1 / s[:-1] - 1)))
    assert math.isclose(Flow.dynamic(4096, kind="linear").shift, 1.15)


def test_continuous_vp_is_the_papers():
    t = torch.tensor([0.999, 0.5, 1e-3], dtype=torch.float64)
    schedule = VP()
    alpha, sigma = schedule.alpha_sigma(0.999 - t)
    assert torch.allclose(alpha, torch.exp(-0.5 * (0.1 * t + 19.9 * t * t / 2)))
    assert abs(float(sigma[-1]) - 0.0105) < 1e-4  # what the last sample of the published tables keeps
    assert torch.allclose(schedule.time(0.999 - t), 1000 * t)
    assert schedule.time(torch.tensor(1.0)) == 1.0


def test_discrete_vp_is_its_table():
    schedule = DiscreteVP.linear()
    n = torch.arange(999, -1, -1, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(1 - (n + 1) / 1000)
    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64).flip(0)
    assert torch.allclose(alpha**2, table, rtol=1e-10)
    assert torch.allclose(schedule.time(1 - (n + 1) / 1000), n)
    end = torch.tensor([1.0])
    assert schedule.alpha_sigma(end) == (1, 0)
    ends = DiscreteVP.linear(final="sigma_min").alpha_sigma(end)[0] ** 2
    assert math.isclose(float(ends), schedule.alphas_cumprod[0], rel_tol=1e-12)
    assert DiscreteVP((0.9, 0.5, 0.0)).alphas_cumprod[-1] == 2.0**-24


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_weights_are_differentiable_and_finite(schedule):
    u = torch.tensor([0, 0.2, 0.55, 1.0], dtype=torch.float64, requires_grad=True)
    c = torch.tril(torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    noise = torch.randn(3, dtype=torch.float64, requires_grad=True)
    table = StepTable.build(schedule, SolverTensors(u, c, noise))
    weights, times = table.weights, table.times
    assert weights.shape == (1, 3, 8) and times.shape == (3,)
    for gradient in torch.autograd.grad(weights.square().sum() + times.sum(), (u, c, noise)):
        assert gradient.isfinite().all()
    # off the knots of a discrete table, where log alpha has a kink
    inner = torch.tensor([0.2003, 0.5507], dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    rows = c.detach().requires_grad_()

    def flat(i, c):
        table = StepTable.build(schedule, SolverTensors(torch.cat([ends[:1], i, ends[1:]]), c))
        return table.weights, table.times

    assert torch.autograd.gradcheck(flat, (inner, rows))


def test_guidance_shapes():
    u, c = torch.linspace(0, 1, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for scale, rows in (
        (2.0, 1),
        (torch.tensor([1.0, 2.0]), 1),
        (torch.ones(4, 1), 4),
        (torch.ones(4, 2), 4),
    ):
        weights = StepTable.build(Flow(), SolverTensors(u, c), scale).weights
        assert weights.shape == (rows, 2, 6)
        assert torch.equal(weights[0, :, 3], torch.as_tensor(scale).double().expand(rows, 2)[0])


def test_transition_of_vp_is_ddim():
    a, b = VP().transition(U)
    alpha, sigma = VP().alpha_sigma(U)
    x0, epsilon = 0.3, -1.1
    x = alpha * x0 + sigma * epsilon
    assert torch.allclose(a * x[:-1] + b * x0, x[1:])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Flow(shift=0), ("shift", "0")),
        (lambda: Flow(convention="comfy"), ("comfy", "diffusers")),
        (lambda: VP(prediction_type="noise"), ("noise", "epsilon")),
        (lambda: VP(beta_min=3, beta_max=2), ("beta_min", "beta_max")),
        (lambda: DiscreteVP((0.5, 0.9)), ("alphas_cumprod", "falling")),
        (lambda: DiscreteVP.linear(final="one"), ("final", "one", "sigma_min")),
        (lambda: Flow.dynamic(4096, kind="cubic"), ("cubic", "exponential")),
        (lambda: Flow(shift=1e-17), ("shift=1e-17", "1e-06", "1e+06")),
        (lambda: Flow(shift=1e9), ("shift=1000000000.0", "1e-06", "1e+06")),
        (lambda: Flow(shift=math.nan), ("shift=nan", "finite", "above 0")),
        (lambda: Flow(time_scale=1e308), ("time_scale=1e+308", "1e+30")),
        (lambda: Flow(time_scale=1.0), ("time_scale=1.0", "convention='diffusers'", "1000 * t")),
        (lambda: VP(time_scale=math.inf), ("time_scale=inf", "1e+30")),
        (lambda: VP(t_start=50.0), ("t_start=50.0", "alpha", "1e-12", "0.999")),
        (lambda: VP(beta_max=2000.0), ("beta_max=2000.0", "alpha", "1e-12")),
        (lambda: VP(beta_min=0.0, beta_max=1e-320), ("beta_max=1e-320", "sigma", "1e-12")),
        (lambda: Grid.ve((math.inf, 5.0, 0.1)), ("sigmas[0]", "finite", "inf")),
        (lambda: Grid.ve((1e300, 1.0)), ("sigmas[0]", "1e+30", "1e+300")),
        (lambda: Grid((1.0, 1.0), (2.0, 1.0), (math.nan,)), ("times[0]", "finite", "nan")),
        (lambda: DiscreteVP((0.9, math.nan)), ("alphas_cumprod[1]", "finite", "nan")),
    ],
)
def test_errors_name_what_is_allowed(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("make", [DiscreteVP.scaled_linear, DiscreteVP.linear])
@pytest.mark.parametrize("given, word", [((10, -0.1), "start=-0.1"), ((1,), "num=1"), ((10, 0.1, 1.5), "end=1.5"),
                                         ((10, "a"), "start='a'"), ((2.5,), "num=2.5")])  # fmt: skip
def test_betas_out_of_range_are_named(make, given, word):
    with pytest.raises(ValueError, match=word):
        make(*given)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_schedule_without_numbers_is_refused_wherever_it_is_used(where):
    class Broken(Flow):
        def alpha_sigma(self, u):
            alpha, sigma = super().alpha_sigma(u)
            return torch.where(u == where, torch.nan, alpha), sigma

    words = f"alpha is nan at u = {where:g} .*must be finite"
    for use in (
        lambda: handmade("ab2", 4, Broken()),
        lambda: sample(lambda x, t: -x, torch.randn(2, 3), "ab2/4", schedule=Broken()),
        lambda: search(Target(lambda x, t: -x, (3,), Broken()), 3, progress=False),
        lambda: compare(Target(lambda x, t: -x, (3,), Broken()), ["ab2/4"], progress=False),
    ):
        with pytest.raises(ValueError, match=words):
            use()


def test_a_flow_prints_a_scale_of_time_where_it_has_one():
    assert repr(Flow()) == "Flow(shift=1.0, convention='paper', prediction_type='velocity')"
    for flow in (Flow(shift=2.0), Flow(convention="diffusers", time_scale=1.0)):
        assert eval(repr(flow)) == flow
