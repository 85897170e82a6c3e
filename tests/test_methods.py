"""Hand-made tables against independent truths: diffusers' schedulers, and measured order on closed-form problems."""

import dataclasses
import itertools
import math

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, handmade, sample
from dss_fast.methods import METHODS
from dss_fast.schedule import FLOOR, Grid
from dss_fast.table import StepTable

pytestmark = pytest.mark.fast
ADAMS = {"euler": 1, "ab2": 2, "ab3": 3, "ab4": 4}

MIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3


def field(x, t):
    """A smooth network with a time of its own, any units."""
    return 0.8 * torch.tanh(x @ MIX + t[:, None] / 500) + 0.2 * x


def run_diffusers(scheduler, num_steps, x):
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "sigmas"):  # in float64, so that methods are compared and not their rounding
        alpha2 = scheduler.alphas_cumprod.double()[[*scheduler.timesteps.tolist(), 0]]
        last = scheduler.sigmas[-1] > 0
        scheduler.sigmas = ((1 - alpha2) / alpha2).sqrt()
        scheduler.sigmas[-1] *= last
    for t in scheduler.timesteps:
        output = field(x, torch.full((len(x),), float(t), dtype=x.dtype))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def run_table(method, schedule, timesteps, x):
    solver = handmade(method, schedule=schedule, timesteps=timesteps)
    return sample(field, x, solver, schedule=schedule)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "method, name, options",
    [
        ("euler", "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
        ("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero"}),
        ("unip2", "UniPCMultistepScheduler", {"solver_order": 2, "disable_corrector": list(range(99))}),
        ("unip3", "UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": list(range(99))}),
        ("unipc", "UniPCMultistepScheduler", {"solver_order": 2}),
        ("unipc3", "UniPCMultistepScheduler", {"solver_order": 3}),
        ("deis", "DEISMultistepScheduler", {"solver_order": 2}),
        ("deis3", "DEISMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_equals_diffusers_on_its_own_grid(method, name, options, prediction_type, num_steps):
    diffusers = pytest.importorskip("diffusers", reason="a test dependency, in requirements.txt")
    scheduler = getattr(diffusers, name)(prediction_type=prediction_type, **options)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = run_diffusers(scheduler, num_steps, x)
    table = tuple(scheduler.alphas_cumprod.double().tolist())
    kind = "x0" if prediction_type == "sample" else prediction_type
    n = scheduler.timesteps.double()
    if method.startswith("deis"):  # its last sigma is the table's first entry, not zero
        schedule, u = DiscreteVP(table, prediction_type=kind, final="sigma_min"), 1 - n / 999
    else:
        schedule, u = DiscreteVP(table, prediction_type=kind), 1 - (n + 1) / 1000
    assert u[0] == 0
    ours = run_table(method, schedule, torch.cat([u, torch.ones(1, dtype=u.dtype)]), x)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_flow_match_euler(shift):
    diffusers = pytest.importorskip("diffusers", reason="a test dependency, in requirements.txt")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    theirs = x
    for t in scheduler.timesteps:
        output = field(theirs, t.double().expand(len(x)))
        theirs = scheduler.step(output, t, theirs, return_dict=False)[0]
    schedule = Flow(shift=shift, convention="diffusers")
    assert relative(sample(field, x, "euler/8", schedule=schedule), theirs) < 1e-5


def edm(denoised, levels, z):
    """Algorithm 1 of EDM without churn, z = x0 + sigma eps, as its authors wrote it: Euler's step to sigma = 0."""
    for now, later in itertools.pairwise(levels):
        slope = (z - denoised(z, now)) / now
        there = z + (later - now) * slope
        if later > 0:
            there = z + (later - now) * (slope + (there - denoised(there, later)) / later) / 2
        z = there
    return z


def test_heun_is_a_table_of_two_calls_a_step():
    """On EDM's own variables; six steps are eleven calls, the second of a pair a ten millionth of the step away."""
    levels, asked = [14.0, 6.0, 2.5, 0.8, 0.2, 0.05, 0.0], []

    def denoised(z, sigma):
        asked.append(round(sigma, 4))
        return torch.tanh(z @ MIX / (1 + sigma))

    x = 14 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs, wanted = edm(denoised, levels, x), list(asked)
    asked.clear()
    grid = Grid.ve(levels)
    solver = handmade("heun", schedule=grid, timesteps=grid.timesteps)
    ours = sample(lambda z, t: denoised(z, float(t[0])), x, solver, schedule=grid)
    assert asked == wanted and (solver.num_steps, solver.name) == (11, "heun/11")
    assert relative(ours, theirs) < 5e-6
    assert solver.noise_coeffs is solver.network_timesteps is None and not solver.free_rows
    assert handmade("heun", 1).coeffs == handmade("euler", 1).coeffs


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_heun_of_a_flow(dtype, bound):
    """Five steps of x' = v(x, t) by hand, the last of them Euler's."""

    def velocity(x, t):
        return torch.tanh(2 * x @ MIX.to(x) + t)

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = x
    for k in range(5):
        slope = velocity(theirs, k / 5)
        there = theirs + slope / 5
        theirs = theirs + (slope + velocity(there, (k + 1) / 5)) / 10 if k < 4 else there
    ours = sample(lambda x, t: velocity(x, t[:, None]), x.to(dtype), "heun/9")
    assert relative(ours.double(), theirs) < bound


def test_heun_equals_flow_match_heun():
    diffusers = pytest.importorskip("diffusers", reason="a test dependency, in requirements.txt")
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(field(theirs, t.double().expand(len(x))), t, theirs, return_dict=False)[0]
    sigmas = [1.0, *scheduler.sigmas.double()[1::2].tolist()]
    grid = Grid.flow(sigmas, [1000 * s for s in sigmas[:-1]])
    assert relative(sample(field, x, handmade("heun", schedule=grid, timesteps=grid.timesteps)), theirs) < 1e-6


def power_law(schedule, k=0.5):
    """A network whose trajectories are known, and the map from u = 0 to u = 1.

    Flow: velocity k x, x = e^(k u). VP: x0 = k x / alpha, so that x / sigma = (alpha / sigma)^k.
    """
    if schedule.family == "flow":
        return lambda x, t: k * x, lambda x: x * math.exp(k)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    growth = sigma[1] / sigma[0] * (alpha[1] / sigma[1] * sigma[0] / alpha[0]) ** k

    def network(x, t):
        _, sigma = schedule.alpha_sigma(schedule.t_start - t[:, None] / 1000)
        return (1 - k) * x / sigma  # epsilon

    return network, lambda x: growth * x


def graded(n, start=24):
    """n equal steps, the first one split by halving so that the low-order starting steps cost nothing."""
    s = [torch.zeros(1), 2.0 ** torch.arange(-start, 0) / n, torch.arange(1, n + 1) / n]
    return torch.cat(s).double()


# t from 1.1 to 0.1: no clamp, no square root of zero
SMOOTH_VP = VP(beta_min=0.5, beta_max=8.0, t_start=1.1, t_end=0.05)


@pytest.mark.parametrize(
    "method, order, schedule",
    [
        *[(m, o, s) for m, o in ADAMS.items() for s in (Flow(), SMOOTH_VP)],
        *[(m, 2, SMOOTH_VP) for m in ("dpmpp_2m", "unip2", "deis", "heun")],
        ("heun", 2, Flow()),
        # The corrector adds one; 2.85 and 3.78 here, 2.92 and 3.88 with twice the steps.
        *[(m, o, SMOOTH_VP) for m, o in (("unipc", 3), ("unipc3", 4))],
        # dpmpp_3m, as published and as everybody runs it, puts a divided difference, half of the second
        # derivative, where its expansion has the second derivative: it converges with order 2.
        ("dpmpp_3m", 2, SMOOTH_VP),
        *[(m, 3, SMOOTH_VP) for m in ("unip3", "deis3")],
    ],
)
def test_order_of_convergence(method, order, schedule):
    network, flow_map = power_law(schedule)
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for n in (60, 120):
        solver = handmade(method, schedule=schedule, timesteps=graded(n), lower_order_final=False)
        errors.append(float((sample(network, x, solver, schedule=schedule) - flow_map(x)).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < (0.25 if method.startswith("unipc") else 0.15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3.0), VP(), DiscreteVP.cosine()], ids=str)
@pytest.mark.parametrize("spacing", ["uniform", "lambda", "karras", "shift3"])
def test_every_method_runs_on_every_grid(method, schedule, spacing):
    """Constant data is reached exactly by any consistent solver, whatever its grid."""
    target = torch.tensor([[1.5], [-0.5]], dtype=torch.float64)
    solver = handmade(method, 7, schedule, spacing=spacing)
    exact = type(schedule)(**{**vars_of(schedule), "prediction_type": "x0"})
    x = sample(lambda x, t: target, torch.ones(2, 1, dtype=torch.float64), solver, schedule=exact)
    alpha, sigma = exact.alpha_sigma(torch.tensor(1.0))
    alpha0, sigma0 = exact.alpha_sigma(torch.tensor(0.0))
    expected = alpha * target + sigma * (1 - alpha0 * target) / sigma0
    assert torch.allclose(x, expected, atol=1e-7)


def vars_of(schedule):
    return {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule)}


def test_rows_on_a_uniform_grid_are_the_textbooks():
    for order in (2, 3, 4):
        a, b = handmade(f"ab{order}", 10), handmade(f"ab{order}_uniform", 10)
        assert torch.allclose(torch.tensor(a.coeffs), torch.tensor(b.coeffs), atol=1e-12)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: handmade("rk4", 5), ("rk4", "euler", "dpmpp_2m")),
        (lambda: handmade("heun", 10), ("num_steps=10", "odd", "9 or 11")),
        (lambda: handmade("ab2", 5, spacing="cubic"), ("cubic", "uniform", "karras")),
        (lambda: handmade("ab2", 5, spacing="shift-1"), ("shift-1", "shift3")),
        (lambda: handmade("ab2", 0), ("num_steps=0",)),
        (lambda: handmade("ab2"), ("num_steps",)),
    ],
)
def test_errors_name_what_exists(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words)


ALPHAS = DiscreteVP.scaled_linear(100).alphas_cumprod
# Noise that rests somewhere: beyond t_end, at entries at the floor, at data that are clean before the end.
RESTING = {
    "t_end=.5": VP(t_end=0.5), "t_end=.9": VP(t_end=0.9), "t_end=0": VP(t_end=0.0), "t_start=.01": VP(t_start=0.01),
    "t_start=.5": VP(t_start=0.5), "two at the floor": DiscreteVP((*ALPHAS[:-2], FLOOR, FLOOR)),
    "two at zero": DiscreteVP((*ALPHAS[:-2], 1e-9, 0.0), prediction_type="v_prediction"),
    "nine at the floor": DiscreteVP((*ALPHAS[:-9], *[FLOOR] * 9), final="sigma_min"),
    "clean at the first": DiscreteVP((1.0, *ALPHAS[1:])), "shift=.001": Flow(shift=0.001),
    "shift=1e-6": Flow(shift=1e-6), "shift=1e6": Flow(shift=1e6), "two entries": DiscreteVP((0.9, 0.1)),
    "t_start=2": VP(t_start=2.0),
}  # fmt: skip


@pytest.mark.parametrize("schedule", RESTING.values(), ids=RESTING)
@pytest.mark.parametrize("spacing", ["uniform", "lambda", "karras", "shift3", "shift0.1"])
def test_every_method_has_numbers_where_the_noise_rests(schedule, spacing):
    """Made by Solver, which takes finite numbers and rows that sum to one only."""
    for method in METHODS:
        for n in (1 if method == "heun" else 2, 7):
            table = StepTable.of(handmade(method, n, schedule, spacing=spacing))
            assert table.weights.isfinite().all() and table.times.isfinite().all(), (method, n)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rests", ["first", "middle", "last"])
def test_steps_without_noise_change_nothing(method, rests):
    """Points that repeat a noise level add calls, and no bit to the result beyond rounding."""

    class Stairs(Grid):
        """A grid some of whose levels stand twice."""

        def __post_init__(self):
            pass

    def net(x, t):
        return 0.3 * torch.tanh(x @ MIX)

    levels = [14.0, 6.0, 2.5, 0.8, 0.2, 0.05]
    twice = {"first": [0, 0, 0, 1, 2, 3, 4, 5], "middle": [0, 1, 2, 2, 3, 3, 4, 5], "last": [0, 1, 2, 3, 4, 5, 5, 5]}
    stairs = tuple(levels[k] for k in twice[rests])
    falling = Grid.ve(levels)
    resting = Stairs((1.0,) * len(stairs), stairs, stairs, prediction_type="x0")
    x = 14 * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = sample(net, x, handmade(method, schedule=falling, timesteps=falling.timesteps))
    found = sample(net, x, handmade(method, schedule=resting, timesteps=resting.timesteps))
    bound = 1e-6 if method == "heun" else 1e-9  # its calls are a ten millionth of a step early, on two grids of u
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


def test_data_that_are_clean_before_the_end_stay_what_they_are():
    schedule = VP(t_end=0.0, prediction_type="x0")
    u = torch.tensor([0.0, 0.5, 0.9985, 0.9992, 0.9996, 1.0], dtype=torch.float64)
    a, b = schedule.transition(u)
    assert a[-2:].tolist() == [0, 0] and b[-2:].tolist() == [1, 1]  # x = alpha x0 + 0 epsilon, whatever x was
    x = torch.randn(5, 6, dtype=torch.float64)
    last = lambda x, t: x if float(t[0]) == 0 else field(x, t)  # noqa: E731  # at clean data x0 is x
    solvers = [
        handmade("unip3", schedule=schedule, timesteps=u),
        handmade("unip3", schedule=schedule, timesteps=u[[0, 1, 2, 5]]),
    ]
    torch.testing.assert_close(*(sample(last, x, solver) for solver in solvers), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: handmade("ab2", 5, Grid.ve([14.0, 5.0, 1e-30, 0.0]), spacing="lambda"),
            "'lambda' puts two of 6.*uniform",
        ),
        (
            lambda: handmade("ab2", 10, Grid.ve([14.0, 5.0, 1e-30, 0.0])),
            "ab2/10 has no coefficients.*step 7.*lower",
        ),
    ],
)
def test_where_there_are_no_numbers_it_says_what_to_do(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("spacing", ["uniform", "lambda", "karras", "shift3"])
@pytest.mark.parametrize("num_steps", [2, 10, 20, 160])
def test_every_call_of_a_short_table_is_on_it(spacing, num_steps):
    """Below index 0 the network's time stands still: of 160 calls eight would be wrong, and more calls be worse."""
    schedule = DiscreteVP.linear(20, 1e-3, 0.3)
    solver = handmade("euler", num_steps, schedule, spacing=spacing)
    n = 20 * (1 - torch.tensor(solver.timesteps[:-1], dtype=torch.float64)) - 1
    assert float(n.min()) > -1e-7 and solver.timesteps[-1] == 1 and list(solver.timesteps) == sorted(solver.timesteps)
    if spacing == "uniform" and num_steps <= 20:
        assert solver.timesteps == tuple(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64).tolist())


def test_more_calls_of_a_short_table_are_no_worse():
    """The exact epsilon of N(0.5, 0.3^2) at the table's own entries, which is all that such a network knows."""
    schedule = DiscreteVP.linear(20, 1e-3, 0.3)

    def model(x, t):
        n = t[:1].double().reshape(1)
        alpha, sigma = schedule.alpha_sigma(1 - (n + 1) / 20)
        return (sigma * (x.double() - 0.5 * alpha) / (0.09 * alpha**2 + sigma**2)).to(x.dtype)

    x = torch.randn(512, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(torch.zeros(1, dtype=torch.float64))
    exact = 0.5 + (x - 0.5 * alpha) * 0.3 / (0.09 * alpha**2 + sigma**2).sqrt()
    errors = {n: float((sample(model, x, handmade("euler", n, schedule)) - exact).square().mean().sqrt())
              for n in (10, 20, 160)}  # fmt: skip
    assert errors[160] <= errors[20] < errors[10]


def test_a_cosine_table_can_start_where_its_data_are_seen():
    """A network whose epsilon is off by a hundredth and bounded: at alpha 5e-5 x0 is off by 200."""
    ends = {}
    for name, schedule in {"all": DiscreteVP.cosine(), "clipped": DiscreteVP.cosine(lambda_min=-5.1)}.items():

        def model(x, t, schedule=schedule):
            alpha, sigma = schedule.alpha_sigma(1 - (t[:1].double() + 1) / len(schedule.alphas_cumprod))
            return 0.01 + (sigma * (x - 0.5 * alpha) / (0.09 * alpha**2 + sigma**2)).clamp(-4, 4)

        x = torch.randn(256, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ends[name] = float(sample(model, x, handmade("euler", 20, schedule)).square().mean().sqrt())
    assert ends["all"] > 3 and 0.4 < ends["clipped"] < 1.0
    assert len(DiscreteVP.cosine(lambda_min=-5.1).alphas_cumprod) == 996
    assert DiscreteVP.linear(lambda_min=-20.0) == DiscreteVP.linear()
