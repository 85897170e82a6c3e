"""The unrolled rollout's memory, measured where torch's allocator hands it out."""

import importlib

import pytest
import torch
from test_unroll import leaves, plain, problem
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dss_fast import unroll as module
from dss_fast.unroll import Rollout, unroll

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(isinstance(module._extension(), Exception), reason="the meter is part of the extension")
WIDE = 512


class Meter:
    """Bytes allocated above the start: ``now``, ``peak``."""

    def __enter__(self):
        self.meter = importlib.import_module("dss_fast._C").MemoryMeter("cpu")
        return self.meter

    def __exit__(self, *_):
        self.meter.stop()


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
    size = Rollout(wide, *tensors, memory_budget=1, backend="cpp").plan.activation_bytes
    nothing = peak(ours(wide, tensors))
    for kept in (2, 4, 8):
        extra = peak(ours(wide, tensors, kept * size + size // 2)) - nothing
        assert (kept - 1.5) * size < extra < kept * size


def test_meter_agrees_with_the_profiler(wide):
    tensors = inputs(4)
    run = ours(wide, tensors)
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    assert highest == pytest.approx(peak(run), rel=0.01)


def test_a_running_profiler_is_left_alone(wide):
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        pytest.warns(UserWarning, match="profiler is active"),
    ):
        rollout = Rollout(wide, *inputs(2), memory_budget=10**9, backend="cpp")
    assert rollout.plan.kept == 0 and len(profiler.key_averages())


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
