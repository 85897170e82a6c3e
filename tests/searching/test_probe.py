"""What a model's gradient must be before a search spends anything: whole, and there as often as it is asked for."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dss_fast import Target, plan, sample, search


class Recompute(torch.autograd.Function):
    """Activations computed again by hand, as code bases did before torch had it."""

    @staticmethod
    def forward(ctx, body, x, t, *weights):
        ctx.body, ctx.inputs, ctx.weights = body, (x, t), weights
        with torch.no_grad():
            return body(x, t)

    @staticmethod
    def backward(ctx, grad):
        again = [v.detach().requires_grad_() for v in ctx.inputs]
        with torch.enable_grad():
            out = ctx.body(*again)
        grads = torch.autograd.grad(out, (*again, *ctx.weights), grad, allow_unused=True)
        del ctx.inputs  # a second way back fails
        return None, *grads


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.way, self.rows = nn.Linear(6, 16), nn.Linear(16, 6), way, 0

    def body(self, x, t):
        return self.b(torch.tanh(self.a(x) + t[:, None]))

    def forward(self, x, t):
        self.rows += len(x)
        if self.way == "again":
            return checkpoint(self.body, x, t, use_reentrant=False)
        if self.way == "reentrant":
            return checkpoint(self.body, x, t, use_reentrant=True)
        if self.way == "none":
            return self.body(x, t)
        return Recompute.apply(self.body, x, t, *(self.parameters() if self.way == "own, with weights" else ()))


@pytest.mark.parametrize("way", ["none", "again", "reentrant", "own", "own, with weights"])
def test_a_network_that_computes_again_is_searched_or_refused_before_any_work(way, tmp_path):
    net = Net(way).eval()
    sample(net, torch.randn(2, 6), "ab2/4")
    net.rows, options = 0, dict(budget=1_000, out=tmp_path / "run", report=False, progress=False)
    if way in ("none", "again"):
        assert search(Target(net, (6,), key="net"), 4, **options).solver.num_steps == 4
        return
    with pytest.raises(ValueError, match=r"more than once, and that fails with .*switch that off.*use_reentrant=False"):
        search(Target(net, (6,), key="net"), 4, **options)
    assert net.rows <= 8 and not (tmp_path / "run" / "config.json").exists()
    assert all(p.requires_grad for p in net.parameters())


class Attention(nn.Module):
    """Two blocks around residual paths. lost: whether the kernels of the first have no backward."""

    def __init__(self, lost, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.lost = lost
        self.to(dtype)

    def forward(self, x, t):
        dtype = self.out[0].weight.dtype
        x = x.to(dtype)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(2 * x).chunk(3, -1)
            mixed = torch.softmax(q @ k.mT, -1) @ v
            x = x + 2 * out(2 * (mixed.detach() if self.lost else mixed))
        return x * (1 - t.to(dtype)[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_part_of_the_gradient_that_is_missing_is_noticed(dtype):
    """A graph is there, by the residual paths."""
    state = torch.promote_types(dtype, torch.float32)
    assert plan(Target(Attention(False, dtype), (4, 8), dtype=state), 3).cost.saved
    for steps, method in ((3, "gauss_newton"), ([3, 4], "lion")):
        with pytest.raises(
            ValueError, match=r"a part of the model's gradient is missing.*no autograd.*attention kernel"
        ):
            search(Target(Attention(True, dtype), (4, 8), dtype=state), steps, method=method, progress=False)


def test_networks_on_which_differences_say_little_are_not_refused():
    kinked = lambda x, t: (x.abs() + x.relu()) * (1 - t[:, None])  # noqa: E731
    rounded = lambda x, t: (x + ((8 * x).round() / 8 - x).detach()) * (1 - t[:, None])  # noqa: E731  # straight through
    steep = lambda x, t: torch.tanh(40 * x) * (1 - t[:, None])  # noqa: E731
    constant = lambda x, t: (0 * x + 1) * (1 + t[:, None])  # noqa: E731
    for model in (kinked, rounded, steep, constant):
        assert plan(Target(model, (64,)), 3).cost.saved >= 0
