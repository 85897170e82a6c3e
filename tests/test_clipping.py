"""Clipping x0 is the model's: what a solver then does is what schedulers that clip do."""

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, GaussNewton, Target, sample, search
from dss_fast.clipping import Clipped

pytestmark = pytest.mark.fast
COSINE = DiscreteVP.cosine(1000)
SCHEDULES = (COSINE, VP(), Flow(), Flow(shift=3.0, convention="diffusers"), DiscreteVP.linear(20, prediction_type="x0"))


class Off(torch.nn.Module):
    """An epsilon model of data of .8 or -.8 that is off by .01 and knows states of up to 4, as trained ones do."""

    def __init__(self):
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(0.8))

    def forward(self, x, t):
        n = t.double().reshape(-1, 1) / 1000
        alpha = torch.cos((n + 0.008 + 0.001) / 1.008 * torch.pi / 2).clamp_min(5e-5)
        x, sigma = x.clamp(-4, 4), (1 - alpha**2).sqrt()
        x0 = self.size * torch.tanh(alpha * self.size * x / sigma**2)
        return ((x - alpha * x0) / sigma + 0.01 * torch.sin(7 * x)).to(x)


def test_a_cosine_table_to_its_end_gives_data_when_x0_is_clipped():
    noise = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    net = Off().requires_grad_(False)
    wild = sample(Target(net, (4,), COSINE), noise, "euler/20")
    tame = sample(Target(Clipped(net, COSINE), (4,), COSINE), noise, "euler/20")
    assert wild.square().mean().sqrt() > 10 and 0.7 < tame.square().mean().sqrt() < 0.9
    u = torch.linspace(0, 1, 21, dtype=torch.float64)
    alpha, sigma = COSINE.alpha_sigma(u)
    x = noise.double()
    for i in range(20):  # DDIM of x0 that is clipped, as schedulers write it
        epsilon = net(x, COSINE.time(u[i]).expand(256))
        x0 = ((x - sigma[i] * epsilon) / alpha[i]).clamp(-1, 1)
        x = alpha[i + 1] * x0 + sigma[i + 1] * (x - alpha[i] * x0) / sigma[i]
    torch.testing.assert_close(tame.double(), x, rtol=0, atol=2e-2)
    assert (tame - x).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind + s.prediction_type)
def test_outputs_whose_x0_is_in_range_stay_and_the_rest_give_the_bound(schedule):
    x, u = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.05, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    own, t = torch.randn(5, 3, dtype=torch.float64), schedule.time(u)
    found = Clipped(lambda x, t: own, schedule, 1.5)(x, t)
    (p, q), (r, s) = ([v[:, None] for v in pair] for pair in (schedule.prediction(u), schedule.x0(u)))
    wanted, got = (r * x + s * (p * x + q * m) for m in (own, found))
    assert torch.equal(found[wanted.abs() <= 1.5], own[wanted.abs() <= 1.5]) and bool((wanted.abs() > 1.5).any())
    torch.testing.assert_close(got, wanted.clamp(-1.5, 1.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids=lambda s: s.kind + s.prediction_type)
def test_gradients_in_state_and_time_are_those_of_differences(schedule):
    model = Clipped(lambda x, t: torch.sin(3 * x) + 0.001 * t[:, None], schedule, 0.7)
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    t = schedule.time(torch.tensor([0.11, 0.32, 0.53, 0.74], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(model, (x, t), eps=1e-6, atol=1e-4, rtol=1e-3)


def test_a_search_steps_the_clipped_model():
    net = Off()
    method = GaussNewton(samples=6, held_out_samples=0, teacher_evaluations=16, rounds=1)
    target = Target(Clipped(net, COSINE), (4,), COSINE)
    result = search(target, 3, initial="euler", method=method, budget=2_000, progress=False)
    assert result.solver.schedule == COSINE and net.size.requires_grad
    with pytest.raises(ValueError, match="bound=0"):
        Clipped(net, COSINE, 0)
    wrapped = Clipped(lambda x, t: net(x, t), COSINE)
    assert next(wrapped.parameters()) is net.size
