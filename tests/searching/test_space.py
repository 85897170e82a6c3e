"""theta and the table behind it: there and back, the derivative, what a step may do."""

import pytest
import torch

from dss_fast import VP, Flow
from dss_fast.methods import handmade
from dss_fast.searching.space import MAX_LOG_INCREMENT, MAX_TIME, SPACES, Space

F64 = torch.float64
SCHEDULES = {"flow": Flow(), "vp": VP()}


def space_of(kind, family, n=4):
    solver = handmade("ab2" if family == "flow" else "dpmpp_2m", n, SCHEDULES[family], spacing="shift2")
    return Space(kind, SCHEDULES[family], n), solver


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("kind", SPACES)
def test_a_hand_made_table_is_in_every_space(kind, family):
    space, solver = space_of(kind, family)
    theta = space.theta(solver)
    assert len(theta) == sum(space.sizes())
    back = space.solver(theta)
    for name, value in vars(solver.tensors()).items():
        if value is not None:
            torch.testing.assert_close(getattr(back.tensors(), name), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("kind", SPACES)
def test_the_jacobian_is_the_difference_quotient(kind, family):
    space, solver = space_of(kind, family)
    theta = space.theta(solver)
    if space.sizes()[-1]:
        theta[-space.sizes()[-1] :] += 0.03  # off the clamp at 0

    def flat(theta):
        table = space.table(theta)
        return torch.cat([table.weights.flatten(), table.times, space.targets(theta)])

    jacobian, h = space.jacobian(theta), 1e-6
    for k in range(len(theta)):
        step = torch.zeros_like(theta)
        step[k] = h
        quotient = (flat(theta + step) - flat(theta - step)) / (2 * h)
        torch.testing.assert_close(jacobian[:, k], quotient, rtol=1e-5, atol=1e-5 * float(quotient.abs().max()))


def test_plain_rows_sum_to_one_wherever_theta_goes():
    space, solver = space_of("plain", "flow", 6)
    theta = space.theta(solver) + torch.randn(sum(space.sizes()), dtype=F64)
    solver = space.solver(theta)
    torch.testing.assert_close(solver.tensors().coeffs.sum(1), torch.ones(6, dtype=F64))
    assert solver.noise_coeffs is None and solver.network_timesteps is None


@pytest.mark.parametrize("family", ["flow", "vp"])
def test_a_long_step_is_shortened_and_times_stay_inside(family):
    space, solver = space_of("noise+times", family)
    theta = space.theta(solver)
    moved = (space.move(theta, torch.full_like(theta, 10.0)) - theta).split(space.sizes())
    assert float(moved[0].abs().max()) <= MAX_LOG_INCREMENT and float(moved[-1].abs().max()) <= MAX_TIME + 1e-12
    down = theta.clone()
    for _ in range(30):
        down = space.move(down, torch.full_like(theta, -1.0))
    assert min(space.solver(down).network_timesteps) == 0


def test_an_unknown_space_is_named():
    with pytest.raises(ValueError, match="space='full': choose plain, noise, noise\\+start"):
        Space("full", Flow(), 1)
