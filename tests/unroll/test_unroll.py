"""The unrolled rollout against plain autograd: gradients, memory, what models may do to it."""

import pytest
import torch
from torch import nn

from dss_fast.unroll import Rollout, unroll

pytestmark = pytest.mark.fast
SHAPE = (3, 4, 4)


class Net(nn.Module):
    """A small network of x, t and a condition; with ``pair`` it returns unconditional and conditional rows."""

    def __init__(self, pair=False, dropout=0.0, width=32):
        super().__init__()
        self.pair, self.dropout = pair, nn.Dropout(dropout)
        self.inner = nn.Linear(48 + 1, width)
        self.outer = nn.Linear(width, 48)
        self.shift = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x, t):
        if self.pair:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        h = self.inner(torch.cat([x.flatten(1), torch.sin(3 * t)[:, None]], 1))
        if self.pair:
            h = h + self.shift * torch.arange(2, dtype=h.dtype).repeat_interleave(len(h) // 2)[:, None]
        return self.outer(self.dropout(torch.tanh(h))).reshape(x.shape)


def problem(
    *,
    steps=4,
    rows=3,
    pair=False,
    family="flow",
    noise=False,
    shared=True,
    dropout=0.0,
    dtype=torch.float64,
):
    """model, x, weights, times; flow has p = 0, vp has p != 0, noise adds the slot of the initial state."""
    torch.manual_seed(0)
    model = Net(pair, dropout).to(dtype)
    K = steps + noise
    weights = torch.randn(1 if shared else rows, steps, 4 + K, dtype=dtype) * 0.3
    weights[..., 0] += 1
    weights[..., 1] = 0 if family == "flow" else weights[..., 1] + 1.1
    weights[..., 2] = 1 if family == "flow" else weights[..., 2] - 0.8
    weights[..., 3] += 1.5
    weights[..., 4 : 4 + steps] *= torch.ones(steps, steps, dtype=dtype).tril()
    x = torch.randn(rows, *SHAPE, dtype=dtype)
    times = torch.linspace(0.05, 0.9, steps, dtype=dtype)
    return (
        model,
        x,
        weights,
        times if shared else times + 0.1 * torch.rand(rows, steps, dtype=dtype),
    )


def plain(model, x, weights, times):
    """The same loop under plain autograd."""
    B, N = len(x), weights.shape[1]
    real, w = weights.dtype, weights.expand(B, -1, -1)
    rows = (B,) + (1,) * (x.ndim - 1)
    x0, states, ys = x, [], []
    for i in range(N):
        m = model(x, times.expand(B, N)[:, i])
        if len(m) == 2 * B:
            uncond, cond = m.chunk(2)
            m = uncond + w[:, i, 3].reshape(rows) * (cond - uncond)
        ys.append(w[:, i, 1].reshape(rows) * x + w[:, i, 2].reshape(rows) * m)
        x = w[:, i, 0].reshape(rows) * x
        for j, y in enumerate(ys):
            x = x + w[:, i, 4 + j].reshape(rows) * y
        if weights.shape[2] - 4 > N:
            x = x + w[:, i, 4 + N].reshape(rows) * x0
        x = x.to(x0.dtype) if real != x0.dtype else x
        states.append(x)
    return torch.stack(states, 1)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def close(a, b, tolerance=1e-10):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


CASES = {
    "flow": dict(),
    "vp": dict(family="vp"),
    "noise": dict(noise=True),
    "pair": dict(pair=True),
    "pair vp noise rows": dict(pair=True, family="vp", noise=True, shared=False),
    "one step": dict(steps=1, pair=True),
    "one row": dict(rows=1, family="vp", shared=False),
    "dropout": dict(dropout=0.4, family="vp"),
}


@pytest.mark.parametrize("budget", [None, 6000, 10**9], ids=["none", "some", "all"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_plain_autograd(case, budget, backend):
    model, *tensors = problem(**CASES[case])
    parameters = list(model.parameters())
    ours, theirs = leaves(*tensors), leaves(*tensors)
    torch.manual_seed(5)
    expected = plain(model, *theirs)
    torch.manual_seed(5)
    options = dict(memory_budget=budget, parameters=parameters, backend=backend)
    states = unroll(model, *ours, **options)
    assert close(states, expected)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [*theirs, *parameters], cotangent, allow_unused=True)
    found = torch.autograd.grad(states, [*ours, *parameters], cotangent, allow_unused=True)
    for f, w in zip(found, wanted, strict=True):
        assert (f is None) == (w is None)
        if w is not None:
            assert f.shape == w.shape and close(f, w)


@pytest.mark.parametrize("end_point", [True, False])
@pytest.mark.parametrize("case", ["flow", "pair vp noise rows", "dropout"])
def test_several_cotangents_per_sample(case, end_point, backend):
    model, x, weights, times = problem(**CASES[case])
    B, N = len(x), weights.shape[1]
    parameters = list(model.parameters())
    C = 3
    theirs = leaves(x, weights.expand(B, -1, -1), times.expand(B, N))
    torch.manual_seed(5)
    expected = plain(model, *theirs)
    torch.manual_seed(5)
    rollout = Rollout(model, x, weights, times, parameters=parameters, backend=backend)
    assert close(rollout.states, expected)
    cotangents = torch.randn(C, *(x.shape if end_point else expected.shape), dtype=x.dtype)
    found = rollout.pull(cotangents)
    target = expected[:, -1] if end_point else expected
    for c in range(C):
        wanted = torch.autograd.grad(
            target, [*theirs, *parameters], cotangents[c], retain_graph=True, allow_unused=True
        )
        assert close(found.x[c], wanted[0])
        assert close(found.weights[c], wanted[1])
        assert close(found.times[c], wanted[2])
        for f, w in zip(found.parameters, wanted[3:], strict=True):
            assert f is None if w is None else close(f[c], w)
