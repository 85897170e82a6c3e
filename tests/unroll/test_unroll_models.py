"""The unrolled rollout and what models do: draw numbers, cast, compile, checkpoint, run in threads, leak."""

import gc
import itertools
import sys
import threading

import pytest
import torch
from test_unroll import Net, close, leaves, plain, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

from dss_fast import extension
from dss_fast.unroll import Kept, Rollout, _engine, unroll

pytestmark = pytest.mark.fast
needs_extension = pytest.mark.skipif(extension.compiled is None, reason="the reference keeps no graphs")


def compare(model, tensors, backend, tolerance=1e-10, parameters=(), seed=5, **options):
    """Runs both ways from the same seed and compares states and every gradient."""
    ours, theirs = leaves(*tensors), leaves(*tensors)
    torch.manual_seed(seed)
    expected = plain(model, *theirs)
    torch.manual_seed(seed)
    states = unroll(model, *ours, parameters=parameters, backend=backend, **options)
    assert close(states, expected, tolerance)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [*theirs, *parameters], cotangent, allow_unused=True)
    found = torch.autograd.grad(states, [*ours, *parameters], cotangent, allow_unused=True)
    for f, w in zip(found, wanted, strict=True):
        assert (f is None) == (w is None) and (w is None or close(f, w, tolerance))


@pytest.mark.parametrize("pattern", list(itertools.product([False, True], repeat=4)))
def test_every_requires_grad_pattern(pattern, backend):
    model, *tensors = problem(pair=True, noise=True)
    inputs = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, pattern[:3], strict=True)]
    parameters = [model.shift] if pattern[3] else []
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.shift and pattern[3])
    states = unroll(model, *inputs, parameters=parameters, backend=backend)
    assert states.requires_grad == any(pattern)
    wanted = [t for t in [*inputs, *parameters] if t.requires_grad]
    if wanted:
        found = torch.autograd.grad(states.square().sum(), wanted)
        expected = torch.autograd.grad(plain(model, *inputs).square().sum(), wanted)
        assert all(close(f, e) for f, e in zip(found, expected, strict=True))


def test_single_precision_and_float64_tables(backend):
    model, x, weights, times = problem(family="vp", pair=True)
    model, x = model.float(), x.float()
    table = weights.clone().requires_grad_()
    states = unroll(model, x, table, times, backend=backend)
    expected = plain(model, x, weights.float(), times.float())
    assert states.dtype == torch.float32 and close(states, expected, 1e-5)
    states.sum().backward()
    assert table.grad.dtype == torch.float64


def test_bfloat16_state(backend):
    model, x, weights, times = problem()
    half = Net().bfloat16()
    half.load_state_dict(model.state_dict())
    rollout = Rollout(lambda x, t: half(x, t.bfloat16()), x.bfloat16(), weights, times, backend=backend)
    found = rollout.pull(torch.ones(1, *x.shape))
    exact = Rollout(model, x, weights, times, backend=backend).pull(torch.ones(1, *x.shape))
    assert rollout.states.dtype == found.x.dtype == torch.bfloat16 and found.weights.dtype == torch.float64
    assert torch.nn.functional.cosine_similarity(found.x.double().flatten(), exact.x.flatten(), 0) > 0.99
    assert torch.nn.functional.cosine_similarity(found.weights.flatten(), exact.weights.flatten(), 0) > 0.99


def test_random_numbers_are_replayed_and_the_generator_left_alone(backend):
    model, *tensors = problem(dropout=0.5)
    torch.manual_seed(1)
    states = unroll(model, *leaves(*tensors), backend=backend)
    after = torch.get_rng_state()
    torch.rand(3)
    now = torch.get_rng_state()
    states.sum().backward()
    assert torch.equal(now, torch.get_rng_state())
    torch.manual_seed(1)
    plain(model, *tensors)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("budget", [None, 10**9])
def test_autocast_is_replayed(budget, backend):
    model, *tensors = problem(dtype=torch.float32)
    parameters = list(model.parameters())
    ours, theirs = leaves(*tensors), leaves(*tensors)
    options = dict(parameters=parameters, backend=backend, memory_budget=budget)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(model, *theirs)
        states = unroll(model, *ours, **options)
        inside = torch.autograd.grad(states.sum(), [*ours, *parameters], retain_graph=True, allow_unused=True)
        assert torch.is_autocast_cache_enabled()
    assert not torch.equal(expected, plain(model, *tensors)) and close(states, expected, 1e-2)
    outside = torch.autograd.grad(states.sum(), [*ours, *parameters], allow_unused=True)
    wanted = torch.autograd.grad(expected.sum(), [*theirs, *parameters], allow_unused=True)
    for i, o, w in zip(inside, outside, wanted, strict=True):
        assert (w is None and i is None) or (torch.equal(i, o) and close(i, w, 2e-2))


@pytest.mark.parametrize("budget", [None, 10**9])
@pytest.mark.parametrize("cotangents", [1, 3])
def test_compiled_model(cotangents, budget, backend):
    model, x, weights, times = problem(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    rollout = Rollout(compiled, x, weights, times, backend=backend, memory_budget=budget)
    found = rollout.pull(torch.ones(cotangents, *x.shape))
    expected = Rollout(model, x, weights, times, backend=backend).pull(torch.ones(cotangents, *x.shape))
    for f, e in zip(found[:3], expected[:3], strict=True):
        assert close(f, e, 1e-5)


def test_kept_graphs_may_save_the_state_itself(backend):
    _, *tensors = problem()
    rows = (-1, 1, 1, 1)
    compare(lambda x, t: x * x * t.reshape(rows), tensors, backend, memory_budget=10**9)


@needs_extension
@pytest.mark.parametrize("budget", [None, 10**9])
def test_tensors_that_a_model_saves_and_then_writes_are_noticed(budget):
    """Measuring the first graph must not switch autograd's check off; torch.utils.checkpoint has none."""
    _, x, weights, times = problem(steps=1)
    rollout = Rollout(lambda x, t: x.exp().add_(1), x, weights, times, backend="cpp", memory_budget=budget)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rollout.pull(rollout.states[None])


class Checkpointed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0
        self.register_full_backward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def forward(self, x, t):
        return checkpoint(self.model, x, t, use_reentrant=False)


@pytest.mark.parametrize("budget", [None, 10**9])
def test_nested_checkpointing_and_hooks(budget, backend):
    model, *tensors = problem(dropout=0.3)
    wrapped = Checkpointed(model)
    compare(wrapped, tensors, backend, memory_budget=budget, parameters=list(model.parameters()))
    assert wrapped.calls == 8


def test_conditions_with_a_history_of_their_own(backend):
    """A condition computed by an outer graph: the rollout stops at it, autograd goes on from there."""
    net, *tensors = problem()
    table = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)

    def run(function):
        cond = table[torch.tensor([1, 3, 1])].tanh()

        def model(x, t):
            return net(x + cond.reshape(x.shape), t)

        return torch.autograd.grad(function(model, cond)[:, -1].square().sum(), table)[0]

    ours = run(lambda model, cond: unroll(model, *tensors, parameters=[cond], backend=backend))
    assert close(ours, run(lambda model, cond: plain(model, *tensors)))


def test_second_backward(backend):
    model, *tensors = problem()
    inputs = leaves(*tensors)
    states = unroll(model, *inputs, backend=backend)
    first = torch.autograd.grad(states.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(states.sum(), inputs)
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(states.sum(), inputs)
    for budget in (None, 10**9):
        rollout = Rollout(model, *tensors, backend=backend, memory_budget=budget)
        one = rollout.pull(rollout.states[None], retain_graph=True)
        two = rollout.pull(rollout.states[None])
        assert torch.equal(one.weights, two.weights)
        with pytest.raises(RuntimeError, match="second time.*retain_graph=True"):
            rollout.pull(rollout.states[None])


def test_double_backward_is_refused(backend):
    model, *tensors = problem()
    inputs = leaves(*tensors)
    states = unroll(model, *inputs, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivatives.*create_graph"):
        torch.autograd.grad(states.sum(), inputs, create_graph=True)


def test_states_written_in_place_are_noticed(backend):
    model, *tensors = problem()
    rollout = Rollout(model, *tensors, backend=backend)
    rollout.states.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        rollout.pull(rollout.states[None])


def test_threads(backend):
    """Rollouts side by side, forwards and pulls interleaved, give what they give alone."""
    model, x, weights, times = problem(pair=True, family="vp")
    inputs = [x + k for k in range(4)]
    alone = [Rollout(model, v, weights, times, backend=backend).pull(v[None]) for v in inputs]
    together, barrier = [None] * 4, threading.Barrier(4)

    def work(k):
        barrier.wait()
        for _ in range(3):
            together[k] = Rollout(model, inputs[k], weights, times, backend=backend).pull(inputs[k][None])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, t in zip(alone, together, strict=True):
        assert torch.equal(a.weights, t.weights) and torch.equal(a.x, t.x)


def test_other_threads_run_between_two_calls_of_the_model(backend):
    """The interpreter takes the lock from nobody here, so another thread runs only while the engine has given it up:
    the C++ engine from one call to the next, the reference inside each of PyTorch's operators."""
    count, marks, stop = [0], [], threading.Event()

    def counting():
        while not stop.wait(0.0002):
            count[0] += 1

    def call(step, x, t):
        marks.append(count[0])
        try:
            return torch.tanh(x)
        finally:  # torch.utils.checkpoint leaves a call that it runs again as soon as it has what it needs
            marks.append(count[0])

    def ran():
        """Whether the other thread got anything done between the two calls, and forgets them."""
        _, end, start, _ = marks
        marks.clear()
        return start > end

    x, weights, times = torch.randn(2, 300_000), torch.ones(1, 2, 6), torch.ones(2, 2)
    engine = _engine(backend)  # without the checks around the model, which are Python and operators too
    interval, thread = sys.getswitchinterval(), threading.Thread(target=counting)
    sys.setswitchinterval(1e3)
    thread.start()
    try:
        before = count[0]
        for _ in range(1_000_000):
            pass
        assert count[0] == before  # a loop of Python keeps the lock
        forward = backward = False
        for _ in range(100):  # one try may pass while the machine is at something else
            rollout = engine(call, x, weights, times, None, [], [True] * 3)
            forward |= ran()
            rollout.pull(x[None], False)
            backward |= ran()
            if forward and backward:
                break
        assert forward and backward
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()


@needs_extension
def test_kept_graphs_fit_the_budget():
    model, *tensors = problem(steps=6, rows=64)
    size = Rollout(model, *tensors, memory_budget=1).kept.activation_bytes
    assert size > 64 * 32 * 8
    for graphs in (0, 1, 3, 6):
        budget = graphs * size + size // 2
        assert Rollout(model, *tensors, memory_budget=budget).kept == Kept(6, graphs, size, budget)
    assert Rollout(model, *tensors).kept.graphs == 0
    assert Rollout(model, *tensors, memory_budget=0.5).kept.graphs == 6
    assert Rollout(model, *tensors, memory_budget="auto").kept == Kept(6, 6, size, 512 << 20)
    assert Rollout(model, *tensors, memory_budget=0.5, backend="reference").kept.graphs == 0


@needs_extension
def test_frozen_weights_do_not_count_as_activations():
    """The weights a frozen layer saves for its backward live on without the graph."""
    wide = nn.Sequential(nn.Linear(48, 4096), nn.Tanh(), nn.Linear(4096, 48)).double().requires_grad_(False)
    _, *tensors = problem()
    rollout = Rollout(lambda x, t: wide(x.flatten(1)).reshape(x.shape), *tensors, memory_budget=1)
    assert rollout.kept.activation_bytes < 2 * 3 * 4096 * 8


def test_budget_saves_calls(backend):
    net, *tensors = problem()
    calls = itertools.count()

    def model(x, t):
        next(calls)
        return net(x, t)

    size = Rollout(model, *tensors, memory_budget=1, backend=backend).kept.activation_bytes or 4000
    kept = (2, 4) if backend == "cpp" else (0, 0)
    for budget, expected in ((None, 8), (2 * size, 8 - kept[0]), (10**9, 8 - kept[1])):
        calls = itertools.count()
        rollout = Rollout(model, *tensors, memory_budget=budget, backend=backend)
        rollout.pull(rollout.states[None])
        assert next(calls) == expected
    calls = itertools.count()
    Rollout(model, *tensors, wrt=["weights"], backend=backend).pull(tensors[0][None])
    assert next(calls) == 7


def test_no_leak(backend):
    """Live tensors after 200 rollouts, backward or not, are those of before."""
    model, *tensors = problem(steps=2, rows=1)
    parameters = list(model.parameters())

    def once(i):
        budget = (None, 1, 4000, 10**9)[i % 4]
        states = unroll(model, *leaves(*tensors), parameters=parameters, memory_budget=budget, backend=backend)
        if i % 3:
            states.sum().backward()

    def alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    for i in range(4):
        once(i)
    before = alive()
    for i in range(200):
        once(i)
    assert alive() <= before
