"""The unrolled rollout's memory, measured where torch's allocator hands it out."""

import pytest
import torch
from test_unroll import leaves, plain, problem
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dss_fast import extension
from dss_fast.unroll import Rollout, unroll

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(extension.compiled is None, reason="the reference keeps every state"),
]
WIDE = 512


class Meter:
    """Bytes that torch's allocator has handed out since the start: ``now``, and ``peak``, the most of them at once."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *_):
        self.profile.__exit__(None, None, None)
        self.now = self.peak = 0
        for event in self.profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                self.now += event.nbytes()
                self.peak = max(self.peak, self.now)


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    layers = [nn.Linear(48, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, 48)]
    net = nn.Sequential(*layers).requires_grad_(False)
    return lambda x, t: net(x.flatten(1) + t[:, None]).reshape(x.shape)


def inputs(steps):
    _, *tensors = problem(steps=steps, rows=32, dtype=torch.float32)
    return tensors


def peak(run):
    with Meter() as meter:
        run()
    return meter.peak


def ours(model, tensors, budget=None):
    def run():
        unroll(model, *leaves(*tensors), memory_budget=budget, backend="cpp").sum().backward()

    return run


def one_call(model, tensors):
    x, t = tensors[0].clone().requires_grad_(), tensors[2][0].expand(32).clone().requires_grad_()
    return peak(lambda: torch.autograd.grad(model(x, t), [x, t], x.detach()))


def test_peak_is_one_model_call_whatever_the_steps(wide):
    found = {}
    for steps in (4, 32):
        tensors = inputs(steps)
        held = 4 * steps * tensors[0].nbytes  # states, history, adjoints and the loss's gradient
        found[steps] = peak(ours(wide, tensors)) - held
        assert found[steps] < 1.15 * one_call(wide, tensors)
        theirs = leaves(*tensors)
        assert peak(lambda theirs=theirs: plain(wide, *theirs).sum().backward()) > steps * 32 * WIDE * 4 * 2
    assert found[32] < 1.1 * found[4]


def test_budget_holds(wide):
    tensors = inputs(8)
    size = Rollout(wide, *tensors, memory_budget=1, backend="cpp").kept.activation_bytes
    nothing = peak(ours(wide, tensors))
    for kept in (2, 4, 8):
        extra = peak(ours(wide, tensors, kept * size + size // 2)) - nothing
        assert (kept - 1.5) * size < extra < kept * size


def test_nothing_stays_allocated(wide):
    """After a backward, and after an exception on the way, only the gradients are left."""
    for budget in (None, 10**9):
        for fails_at in (None, 1, 5):
            tensors, calls = inputs(4), iter(range(100))

            def model(x, t, calls=calls, fails_at=fails_at):
                if next(calls) == fails_at:
                    raise KeyError("no")
                return wide(x, t)

            with Meter() as meter:
                try:
                    x, weights, times = leaves(*tensors)
                    states = unroll(model, x, weights, times, memory_budget=budget, backend="cpp")
                    states.sum().backward()
                except KeyError:
                    pass
                states = x = weights = times = None
            assert meter.now == 0
