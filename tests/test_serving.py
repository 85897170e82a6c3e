"""Requests that share a batch get what they would have got alone."""

import pytest
import torch

from dss_fast import Flow, handmade, sample
from dss_fast.serving import Batch

SHAPE = (3, 5)


def model(x, t):
    return torch.sin(x * 1.5 + t[:, None, None]) - 0.3 * x


@pytest.mark.parametrize("guided", [False, True])
def test_requests_of_different_solvers_equal_sample(guided):
    """Admitted at different ticks, of 5, 8 and 10 steps, more requests than places."""
    torch.manual_seed(0)
    waiting = [(torch.randn(SHAPE), name) for name in ("sit-xl-2-256/5", "ab2/8", "sit-xl-2-256/10", "ab3/5", "ab2/10")]
    scale = 1.5 if guided else 1.0

    def pair(x, t):
        return torch.cat([model(0.5 * x, t), model(x, t)])

    def alone(x, t, half):
        return model(x * half.reshape(-1, 1, 1), t)

    expected = []
    for noise, name in waiting:
        extra = {"uncond": {"half": torch.tensor(0.5)}, "guidance_scale": scale} if guided else {}
        expected.append(sample(alone, noise[None], name, cond={"half": torch.ones(1)}, **extra)[0])

    batch, requests, results = Batch(3, SHAPE, max_steps=10), {}, {}
    queue, tick = list(enumerate(waiting)), 0
    while queue or batch.running:
        if queue and batch.free and tick % 2 == 0:
            number, (noise, name) = queue.pop(0)
            requests[batch.admit(noise, name, guidance_scale=scale)] = number
        output = (pair if guided else model)(batch.x, batch.times())
        for place in batch.step(output):
            results[requests.pop(place)] = batch.retire(place)
        tick += 1
    assert sorted(results) == list(range(5))
    for number, result in results.items():
        torch.testing.assert_close(result, expected[number], rtol=1e-6, atol=1e-6)


def test_company_does_not_change_a_bit():
    """The same request alone in the batch and among others; the model sees rows independently."""
    torch.manual_seed(1)
    noise, others = torch.randn(SHAPE), torch.randn(3, *SHAPE)
    results = []
    for company in (False, True):
        batch = Batch(4, SHAPE, max_steps=10)
        batch.admit(noise, "ab2/8")
        for other in others if company else ():
            batch.admit(other, "sit-xl-2-256/5")
        while batch.running:
            finished = batch.step(model(batch.x, batch.times()))
            results += [batch.retire(place) for place in finished if place == 0]
    assert torch.equal(*results)


def test_a_free_place_may_hold_anything():
    batch = Batch(2, SHAPE, max_steps=5)
    place = batch.admit(torch.ones(SHAPE), "sit-xl-2-256/5")
    other = 1 - place
    batch.x[other] = float("nan")
    while batch.running:
        batch.step(model(batch.x, batch.times()))
    assert batch.retire(place).isfinite().all() and batch.x[other].isnan().all()


def test_a_model_with_parameters_needs_no_context():
    batch, net = Batch(1, SHAPE, max_steps=5), torch.nn.Linear(5, 5)
    place = batch.admit(torch.ones(SHAPE), "ab2/5")
    while batch.running:
        batch.step(net(batch.x))
    assert not batch.retire(place).requires_grad


def test_errors():
    batch = Batch(2, SHAPE, max_steps=5)
    batch.admit(torch.zeros(SHAPE), "ab2/5")  # the first one says what model this is
    with pytest.raises(ValueError, match="for vp models, the schedule is flow"):
        batch.admit(torch.zeros(SHAPE), "dit-xl-2-256/5")
    with pytest.raises(ValueError, match="another noise schedule: alpha at u = 0.25"):
        batch.admit(torch.zeros(SHAPE), handmade("ab2", 4, Flow(shift=3.0)))
    batch = Batch(1, SHAPE, max_steps=5)
    with pytest.raises(ValueError, match="takes 10 steps.*5"):
        batch.admit(torch.zeros(SHAPE), "ab2/10")
    with pytest.raises(ValueError, match=r"noise has shape \(3,\)"):
        batch.admit(torch.zeros(3), "ab2/5")
    with pytest.raises(ValueError, match="place 0 holds no request"):
        batch.retire(0)
    batch.admit(torch.zeros(SHAPE), "ab2/5")
    with pytest.raises(RuntimeError, match="all 1 places"):
        batch.admit(torch.zeros(SHAPE), "ab2/5")
