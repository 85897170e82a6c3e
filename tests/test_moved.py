"""A table moved to data k times as large gives k times the samples, and follows the shift of its model."""

import pytest
import torch
from torch import nn

from dss_fast import VP, DiscreteVP, Flow, Solver, find_solver, sample
from dss_fast.names import Name, published
from dss_fast.searching.space import Space
from dss_fast.searching.starts import candidates
from dss_fast.x0form import X0Form
from examples.mixture import Mixture

F64 = torch.float64
KS = (0.3, 2.0, 4.0)


def mixture():
    generator = torch.Generator().manual_seed(0)
    return Mixture(torch.randn(5, 6, generator=generator, dtype=F64), 0.3)


class Larger(nn.Module):
    """The velocity of a flow whose data are k times those of a model."""

    def __init__(self, model, k):
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x, t):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        gain = 1 - t + self.k * t
        old, z = self.k * t / gain, x / gain
        clean = z + (1 - old) * self.model(z, old.flatten())
        return (self.k * clean - x) / (1 - t)


class LargerNoise(nn.Module):
    """The epsilon of a VP model of centred data with standard deviation ``spread``, multiplied by k."""

    def __init__(self, schedule, spread, k=1.0):
        super().__init__()
        self.schedule, self.spread = schedule, spread * k

    def forward(self, x, t):
        u = (self.schedule.t_start - t / self.schedule.time_scale).reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = self.schedule.alpha_sigma(u)
        return sigma * x / (alpha**2 * self.spread**2 + sigma**2)


def away(solver, kind="noise+start"):
    """A table of a space with all of its numbers somewhere."""
    space = Space(kind, solver.schedule, solver.num_steps)
    theta = space.theta(solver)
    theta = theta + 0.05 * torch.randn(len(theta), generator=torch.Generator().manual_seed(1), dtype=F64)
    *parts, times = theta.split(space.sizes())
    return space.solver(torch.cat([*parts, times.abs()]))


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize(
    "name", ["euler/1", "euler/3", "ab2/8", "unip3/6@karras", "sit-xl-2-256/8", "flowdcn-b-2-256/5"]
)
def test_a_plain_table_is_moved_exactly_and_stays_plain(name, k):
    solver, model, noise = find_solver(name, Flow()), mixture(), torch.randn(4, 6, dtype=F64)
    moved = solver.moved(k)
    assert not moved.free_rows and moved.noise_coeffs is None and moved.network_timesteps is None
    assert apart(sample(Larger(model, k), noise, moved), k * sample(model, noise, solver)) < 1e-12


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("kind, tolerance", [("noise", 1e-12), ("noise+start", 1e-3), ("noise+times", 1e-3)])
def test_a_searched_table_is_moved(kind, tolerance, k):
    """Exact, but for a first call that is told a time of its own: its state is noise, whatever it is told."""
    solver, model, noise = away(find_solver("ab2/5", Flow()), kind), mixture(), torch.randn(4, 6, dtype=F64)
    assert apart(sample(Larger(model, k), noise, solver.moved(k)), k * sample(model, noise, solver)) < tolerance
    unmoved = sample(Larger(model, k), noise, solver)
    assert apart(unmoved, k * sample(model, noise, solver)) > 20 * tolerance


@pytest.mark.parametrize("k", KS)
def test_a_searched_table_stays_in_its_space(k):
    solver = away(find_solver("ab2/5", Flow()))
    space = Space("noise+start", Flow(), 5)
    moved = solver.moved(k)
    back = space.solver(space.theta(moved))
    for key, value in vars(moved.tensors()).items():
        torch.testing.assert_close(getattr(back.tensors(), key), value, rtol=1e-9, atol=1e-9)
    returned = moved.moved(1 / k)
    for key, value in vars(solver.tensors()).items():
        torch.testing.assert_close(getattr(returned.tensors(), key), value, rtol=1e-9, atol=1e-9)
    assert returned.provenance["moved"] == pytest.approx(1)


def test_the_first_call_of_a_searched_table_says_a_constant_exactly():
    """Rows of the space sum to one in x0 predictions, where those of the velocities do not."""
    solver = away(find_solver("ab2/5", Flow()))
    assert solver.free_rows and solver.network_timesteps[0] > 0
    form = X0Form.of(Flow(), solver.tensors())
    torch.testing.assert_close(form.weights.sum(1), torch.ones(5, dtype=F64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", (0.5, 2.0))
def test_vp_as_far_as_the_path_reaches(k):
    """The last state has the noise of the path's end, and the first noise level cannot grow."""
    schedule, noise = VP(), torch.randn(4, 6, dtype=F64)
    solver = find_solver("dit-xl-2-256/8")
    small, large = LargerNoise(schedule, 0.5), LargerNoise(schedule, 0.5, k)
    moved = solver.moved(k)
    assert moved.timesteps[0] == 0 and moved.timesteps[-1] == 1
    wanted = k * sample(small, noise, solver, schedule=schedule)
    assert apart(sample(large, noise, moved, schedule=schedule), wanted) < 0.03
    assert apart(sample(large, noise, solver, schedule=schedule), wanted) > 0.04
    assert DiscreteVP.linear() != VP() and solver.moved(k, DiscreteVP.linear(final="sigma_min")).num_steps == 8


def test_a_table_follows_the_shift_of_its_model():
    """A model of shift 3 is the one of shift 1 with data three times as large: the u stay, the rows change."""
    solver, model, noise = find_solver("sit-xl-2-256/8"), mixture(), torch.randn(4, 6, dtype=F64)
    followed = solver.following(Flow(shift=3.0))
    assert followed.schedule == Flow(shift=3.0)
    torch.testing.assert_close(followed.tensors().timesteps, solver.tensors().timesteps, rtol=0, atol=1e-12)
    found = sample(Larger(model, 3.0), noise, solver, schedule=Flow(shift=3.0))
    assert apart(found, 3 * sample(model, noise, solver)) < 1e-12
    assert solver.following(Flow()) is solver.following(None) is solver
    with pytest.raises(ValueError, match="for flow models"):
        solver.following(VP())


def test_names_of_moved_tables():
    moved = find_solver("sit-xl-2-256/8@shift3")
    assert moved == find_solver("sit-xl-2-256/8").moved(3.0) and moved.name == "sit-xl-2-256/8@shift3"
    assert moved.provenance["moved"] == 3 and moved.moved(0.5).name == "sit-xl-2-256/8@shift1.5"
    assert Solver.from_dict(moved.to_dict()) == moved
    with pytest.raises(ValueError, match="shift' needs a number above 0"):
        find_solver("sit-xl-2-256/8@shiftx")
    family = {table.num_steps: table for table in published(Name.parse("sit-xl-2-256@shift3"))}
    assert len(family) == 6 and family[8] == moved


@pytest.mark.parametrize("k", [0, -1.0, float("nan"), float("inf"), 1e7, True, "2"])
def test_what_is_no_factor_is_refused(k):
    with pytest.raises(ValueError, match="k="):
        find_solver("ab2/4", Flow()).moved(k)


@pytest.mark.parametrize("schedule", [VP(), DiscreteVP.linear(), DiscreteVP.scaled_linear(), DiscreteVP.cosine()])
@pytest.mark.parametrize("n", [3, 5, 8, 10])
def test_what_a_path_has_no_room_for_is_refused_and_no_candidate(schedule, n):
    """Stable Diffusion's noise begins at 14.6 times the data, where some tables have made a step or two."""
    found = candidates(schedule, n, {})
    assert all(bool((torch.tensor(table.timesteps).diff() > 0).all()) for table in found)
    assert any(table.name.startswith("general") for table in found)
    if n == 8 and schedule == DiscreteVP.scaled_linear():
        with pytest.raises(ValueError, match="beyond those of DiscreteVP"):
            find_solver("sit-xl-2-256/8").moved(1.0, schedule)


class AsVP(nn.Module):
    """The x0 of a flow's model in the coordinates of a VP path."""

    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, x, t):
        u = self.schedule.t_start - t / self.schedule.time_scale
        alpha, sigma = self.schedule.alpha_sigma(u)
        time, columns = alpha / (alpha + sigma), [-1, *[1] * (x.ndim - 1)]
        state = x / (alpha + sigma).reshape(columns)
        return state + (1 - time).reshape(columns) * self.model(state, time)


def test_a_flows_table_on_a_vp_model_of_the_same_data():
    """Between levels that both paths reach the two are one model: only the first state and the last noise differ."""
    schedule, model, noise = VP(prediction_type="x0"), mixture(), torch.randn(64, 6, dtype=F64)
    flow, there = find_solver("ab2/8", Flow()), AsVP(mixture(), schedule)
    wanted = sample(model, noise, flow)
    assert apart(sample(there, noise, flow.moved(1.0, schedule), schedule=schedule), wanted) < 0.03
    assert apart(sample(there, noise, find_solver("ab2/8", schedule), schedule=schedule), wanted) > 0.06
