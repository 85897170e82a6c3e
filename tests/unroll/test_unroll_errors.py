"""What an unrolled rollout refuses, and what of a model's own failures comes through."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
from test_unroll import leaves, problem
from torch import nn

from dss_fast.unroll import Rollout, unroll

pytestmark = pytest.mark.fast


class Breaks(Exception):
    def __init__(self, code):
        super().__init__(f"code {code}")
        self.code = code


@pytest.mark.parametrize("budget", [None, 10**9])
@pytest.mark.parametrize("fails_at", [2, 6])
def test_model_exceptions_come_through_with_the_step(fails_at, budget, backend):
    net, x, weights, times = problem()
    error, held, calls = Breaks(7), [], itertools.count()

    def model(x, t):
        held.append(weakref.ref(x))
        if next(calls) == fails_at:
            raise error
        return net(x, t)

    if fails_at == 6 and budget and backend == "cpp":
        pytest.skip("every graph is kept: nothing runs twice")
    with pytest.raises(Breaks) as caught:
        inputs = leaves(x, weights, times)
        unroll(model, *inputs, backend=backend, memory_budget=budget).sum().backward()
    assert caught.value is error
    step = fails_at if fails_at < 4 else 3 - (fails_at - 4)
    assert f"at step {step} of 4" in error.__notes__[0]
    del inputs, caught
    error.__traceback__ = None
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_exceptions_in_a_custom_backward_come_through(backend):
    error = Breaks(3)

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise error

    _, *tensors = problem()
    rollout = Rollout(lambda x, t: Identity.apply(x), *tensors, backend=backend)
    with pytest.raises(Breaks) as caught:
        rollout.pull(rollout.states[None])
    assert caught.value is error


def norm():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).double()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: lambda x, t: net(x),
        lambda net: functools.partial(lambda n, x, t: n(x), net),
        lambda net: type(
            "Holder",
            (),
            {"__init__": lambda s: setattr(s, "net", net), "__call__": lambda s, x, t: s.net(x)},
        )(),
    ],
    ids=["closure", "partial", "attribute"],
)
def test_models_that_keep_state_are_refused(wrap, backend):
    net = norm()
    _, *tensors = problem()
    with pytest.raises(RuntimeError, match="changed its buffers 0.num_batches_tracked.*model.eval"):
        unroll(wrap(net), *tensors, backend=backend)
    unroll(wrap(net.eval()), *tensors, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(memory_budget=0.0), "memory_budget=0.0.*fraction"),
        (dict(memory_budget=True), "memory_budget=True"),
        (dict(memory_budget=-1), "memory_budget=-1"),
        (dict(backend="triton"), "backend 'triton' cannot run here; can: .'reference'.*None to choose"),
        (dict(weights=torch.ones(2, 4, 8)), r"weights have shape \(2, 4, 8\).*R = 1 or 3"),
        (dict(times=torch.ones(5)), r"times have shape \(5,\)"),
        (
            dict(model=lambda x, t: x[:, :1]),
            r"the model returned torch.float64 \(3, 1, 4, 4\).*give",
        ),
        (dict(model=lambda x, t: None), "the model returned <class 'NoneType'>"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(change, message):
    model, x, weights, times = problem()
    arguments = dict(model=model, x=x, weights=weights, times=times) | change
    with pytest.raises(ValueError, match=message):
        unroll(**arguments)


def test_errors_of_a_rollout():
    model, x, weights, times = problem()
    with pytest.raises(ValueError, match=r"parameters\[0\].*requires grad"):
        Rollout(model, x, weights, times, parameters=[x])
    with pytest.raises(ValueError, match="wrt=.'y'.*choose from x, weights, times"):
        Rollout(model, x, weights, times, wrt=["y"])
    with pytest.raises(ValueError, match="cotangents are torch.float64"):
        Rollout(model, x, weights, times).pull(x)
