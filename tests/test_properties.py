"""What holds for every schedule and solver: through JSON and back nothing changes, to the bit."""

import json

import pytest
import torch

pytest.importorskip("hypothesis", reason="a test dependency, in requirements-test.txt")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dss_fast import VP, DiscreteVP, Flow, Grid, Solver, sample
from dss_fast.schedule import from_dict
from dss_fast.table import StepTable

pytestmark = pytest.mark.fast
F64 = torch.float64
RELAXED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def number(low, high):
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


types = st.sampled_from(["velocity", "x0", "v_prediction"])
flows = st.one_of(
    st.builds(Flow, shift=number(0.05, 20), prediction_type=types),
    st.builds(
        Flow,
        shift=number(0.05, 20),
        convention=st.just("diffusers"),
        prediction_type=types,
        time_scale=number(0.1, 5000),
    ),
)
kinds = st.sampled_from(["epsilon", "x0", "velocity", "v_prediction"])
vps = st.builds(
    VP,
    beta_min=number(0, 1),
    beta_max=number(1.5, 40),
    prediction_type=kinds,
    t_start=number(0.9, 1),
    t_end=number(1e-6, 0.05),
    time_scale=number(0.1, 5000),
)


@st.composite
def discrete(draw):
    ratios = draw(st.lists(number(0.5, 0.999), min_size=2, max_size=12))
    table, value = [], 0.9999
    for ratio in ratios:
        table.append(value)
        value *= ratio
    return DiscreteVP(
        tuple(table), draw(kinds), draw(st.sampled_from(["zero", "sigma_min"])), draw(st.text(max_size=5))
    )


@st.composite
def grids(draw):
    drops = draw(st.lists(number(0.01, 1), min_size=2, max_size=8))
    total = sum(drops)
    sigmas, left = [], 1.0
    for drop in drops:
        sigmas.append(left)
        left -= drop / total
    sigmas.append(0.0)
    options = {"prediction_type": draw(st.sampled_from(["velocity", "x0"]))}
    return Grid.flow(sigmas, [1000 * s for s in sigmas[:-1]], **options)


schedules = st.one_of(flows, vps, discrete(), grids())


@RELAXED
@given(schedules)
def test_a_schedule_goes_through_json_unchanged(schedule):
    again = from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule) and again.to_dict() == schedule.to_dict()
    u = torch.linspace(0, 1, 23, dtype=F64)
    for mine, theirs in zip(schedule.alpha_sigma(u), again.alpha_sigma(u), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(schedule.time(u), again.time(u))


@st.composite
def solvers(draw):
    n = draw(st.integers(1, 5))
    deltas = draw(st.lists(number(0.05, 1), min_size=n, max_size=n))
    lower = [draw(st.lists(number(-3, 3), min_size=i, max_size=i)) for i in range(n)]
    extra = {}
    if draw(st.booleans()):
        extra["noise_coeffs"] = tuple(draw(st.lists(number(-1, 1), min_size=n, max_size=n)))
    if draw(st.booleans()):
        extra["network_timesteps"] = tuple(draw(st.lists(number(0.01, 0.95), min_size=n, max_size=n)))
    return Solver.from_timedeltas(deltas, lower, draw(schedules), name=draw(st.text(max_size=8)), **extra)


@RELAXED
@given(solver=solvers())
def test_a_solver_saved_and_loaded_samples_to_the_same_bits(solver, tmp_path_factory):
    path = tmp_path_factory.mktemp("solvers") / "solver.json"
    solver.save(path)
    again = Solver.load(path)
    assert again == solver and hash(again) == hash(solver)
    assert (again.name, again.source) == (solver.name, solver.source)
    x = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
    model = lambda x, t: 0.1 * x + 1e-4 * t[:, None]  # noqa: E731
    assert torch.equal(sample(model, x, solver), sample(model, x, again))
    assert torch.equal(StepTable.of(solver).weights, StepTable.of(again).weights)
