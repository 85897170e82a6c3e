"""Serving and the unroll where the samples live: on a GPU where there is one, and on the CPU."""

import pytest
import torch
from torch import nn

from dss_fast import Flow, Target, sample
from dss_fast.names import find_solver
from dss_fast.serving import Batch
from dss_fast.step import multistep_step
from dss_fast.table import StepTable
from dss_fast.unroll import Rollout

pytestmark = pytest.mark.fast
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(17, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, x, t):
        return self.inner(torch.cat([x, t[:, None].to(x)], 1))


def test_requests_in_one_batch_on_the_device(device):
    """Requests of three solvers, at different steps, equal what each gets alone."""
    net = Net().to(device)
    waiting = [(torch.randn(16, device=device), name) for name in ("sit-xl-2-256/5", "ab2/8", "sit-xl-2-256/10")]
    batch = Batch(2, (16,), max_steps=10, device=device)
    queue, requests, results = list(enumerate(waiting)), {}, {}
    while queue or batch.running:
        while queue and batch.free:
            number, (noise, name) = queue.pop(0)
            requests[batch.admit(noise, name)] = number
        for place in batch.step(net(batch.x, batch.times())):
            results[requests.pop(place)] = batch.retire(place)
    for number, (noise, name) in enumerate(waiting):
        assert results[number].device.type == device.type
        torch.testing.assert_close(results[number], sample(net, noise[None], name)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("sit-xl-2-256/5", "ab2/8"), ("dit-xl-2-256/6", "dpmpp_2m/9")])
def test_a_request_gets_the_bits_that_it_gets_alone(device, names):
    """From a model that takes rows one by one: for VP tables too, whose prediction has two products."""

    def model(x, t):
        return torch.sin(x + t[:, None])

    noises, schedule = torch.randn(2, 1027, device=device), find_solver(names[0]).schedule
    batch = Batch(2, (1027,), max_steps=9, schedule=schedule, device=device)
    places, found = [batch.admit(noise, name) for noise, name in zip(noises, names, strict=True)], {}
    while batch.running:
        for place in batch.step(model(batch.x, batch.times())):
            found[place] = batch.retire(place)
    for place, noise, name in zip(places, noises, names, strict=True):
        assert torch.equal(found[place], sample(Target(model, schedule=schedule), noise[None], name)[0])


@pytest.mark.parametrize("budget", [0, 1 << 30, 0.5])
def test_gradients_of_a_rollout_on_the_device(device, backend, budget):
    """Those of plain autograd, with no graph kept and with all of them."""
    net = Net().to(device).requires_grad_(False)
    table = StepTable.of(find_solver("sit-xl-2-256/5"), Flow(), device=device)
    inputs = [t.clone().requires_grad_() for t in (torch.randn(3, 16, device=device), table.weights, table.times)]
    x, weights, times = inputs
    cotangents = torch.randn(2, 3, 16, device=device)
    history, index, state = x.new_zeros(3, 5, 16), torch.arange(5, device=device), x
    for i in range(5):
        state, history = multistep_step(state, net(state, times[i].expand(3)), history, weights, index[i : i + 1])
    expected = [torch.autograd.grad(state, inputs, c, retain_graph=True) for c in cotangents]
    rollout = Rollout(net, x, weights, times, memory_budget=budget, backend=backend)
    torch.testing.assert_close(rollout.states[:, -1].to(device), state.detach(), rtol=1e-5, atol=1e-5)
    found = rollout.pull(cotangents)
    for c, (of_x, of_weights, of_times) in enumerate(expected):
        torch.testing.assert_close(found.x[c], of_x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.weights[c].sum(0, keepdim=True), of_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.times[c].sum(0), of_times, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weight_gradients_do_not_follow_the_users_tf32():
    """The sums over elements settle the search's step; a model without products gives the same bits either way."""
    table = StepTable.of(find_solver("sit-xl-2-256/5"), Flow(), device="cuda")
    x, cotangents = torch.randn(8, 4096, device="cuda"), torch.randn(1, 8, 4096, device="cuda")
    found, before = [], torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            rollout = Rollout(lambda x, t: torch.sin(x) * t[:, None], x, table.weights, table.times)
            found.append(rollout.pull(cotangents).weights)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(*found)
