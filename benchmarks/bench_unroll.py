"""Time and peak memory of a differentiated rollout: plain autograd, torch.utils.checkpoint around each call, ours.

    pytest benchmarks/bench_unroll.py --benchmark [--full]

All run the same frozen network and the same step and take the gradients of the state, the weights and the times. Time
is wall time on a GPU and, so that other work on the machine counts less, processor time of one thread on a CPU; the
ways take turns. Peak memory is what torch's allocator hands out above the start of the run, counted on a run of its
own. With --rows they go to results/unroll.csv.
"""

import platform
import time
from functools import cache

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import DEVICE
from benchmarks.turns import in_turns
from dss_fast.step import multistep_update
from dss_fast.unroll import Rollout
from examples.mnist.model import Block, DiT

N = 10
clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LatentDiT(nn.Module):
    """DiT-S/2 in size (width 384, 12 blocks, 6 heads, patch 2), on latents (B, 4, side, side); random weights."""

    def __init__(self, width=384, depth=12, heads=6, patch=2, channels=4, side=16):
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.randn((side // patch) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4) for _ in range(depth))
        self.final = nn.Linear(width, patch * patch * channels)

    def forward(self, x, t):
        h = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        angles = t[:, None] * torch.exp2(torch.linspace(0, 6, 32, device=x.device))
        condition = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            h = block(h, condition)
        h = self.final(nn.functional.layer_norm(h, h.shape[-1:]))
        side, channels = x.shape[-1] // self.patch, x.shape[1]
        return (
            h.reshape(len(x), side, side, channels, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        )


def mnist_dit():
    dit = DiT()
    rows = 16 if DEVICE.type == "cpu" else 512
    labels = torch.arange(rows, device=DEVICE) % 10
    return dit, lambda x, t: dit(x, t, labels), (rows, 1, 28, 28)


def dit_s_2():
    dit = LatentDiT()
    return dit, dit, (1 if DEVICE.type == "cpu" else 64, 4, 16, 16)


MODELS = {"mnist-dit": mnist_dit, "dit-s-2": dit_s_2}


class Case:
    """One network, one rollout, every way to differentiate it."""

    def __init__(self, name, steps=N):
        torch.manual_seed(0)
        net, self.model, shape = MODELS[name]()
        for p in net.to(DEVICE).requires_grad_(False).parameters():
            if p.abs().max() == 0:  # adaLN-zero starts as the identity
                nn.init.normal_(p, std=0.02)
        self.name, self.steps = name, steps
        weights = torch.cat([torch.tensor([1.0, 0, 1, 1]).expand(steps, 4), torch.eye(steps) / steps], 1)
        weights[:, 4:] += 0.1 / steps * torch.randn(steps, steps).tril()
        self.inputs = [
            v.to(DEVICE).requires_grad_() for v in (torch.randn(shape), weights[None], torch.linspace(0.02, 0.9, steps))
        ]
        self.cotangents = torch.randn(3, *shape, device=DEVICE)

    @property
    def held_bytes(self):
        """States, history and the adjoints of one cotangent."""
        return 3 * self.steps * self.inputs[0].nbytes

    def loop(self, call, cotangents):
        x, weights, times = self.inputs
        start, history = x, []
        for i in range(self.steps):
            output = call(x, times[i].expand(len(x)))
            x, y = multistep_update(x, output, history, weights, i)
            history.append(y)
        inputs = [start, weights, times]
        return [
            torch.autograd.grad(x, inputs, c, retain_graph=k < cotangents - 1)
            for k, c in enumerate(self.cotangents[:cotangents])
        ]

    def plain(self, cotangents=1):
        return self.loop(self.model, cotangents)

    def checkpointed(self, cotangents=1):
        return self.loop(lambda x, t: checkpoint(self.model, x, t, use_reentrant=False), cotangents)

    def ours(self, cotangents=1, budget=None):
        rollout = Rollout(self.model, *self.inputs, memory_budget=budget)
        found = rollout.pull(self.cotangents[:cotangents])
        self.kept = rollout.kept
        return [(found.x[c], found.weights[c].sum(0, keepdim=True), found.times[c].sum(0)) for c in range(cotangents)]

    def one_call(self):
        """Forward and backward of one model call: the yardstick of the peak."""
        x, _, times = self.inputs
        t = times[0].expand(len(x)).detach().requires_grad_()
        return torch.autograd.grad(self.model(x, t), [x, t], self.cotangents[0])


def peak(way):
    """Bytes allocated at the highest point of a run, above its start."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way()
    now = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def _synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(way):
    _synchronize()
    start = clock()
    way()
    _synchronize()
    return clock() - start


def measure(calls, rounds=3):
    for call in calls.values():
        call()
    return in_turns(calls, lambda way: seconds_of(calls[way]), rounds)


@cache
def case_of(name, steps=N):
    return Case(name, steps)


@cache
def graph_bytes(name):
    """Of one call: what a kept graph holds."""
    case = case_of(name)
    case.ours(budget=1)
    return case.kept.activation_bytes


def kept(name, graphs, cotangents=1):
    """Ours with the graphs of so many calls kept."""
    budget = None if graphs == 0 else int((graphs + 0.5) * graph_bytes(name))
    return lambda: case_of(name).ours(cotangents, budget)


WAYS = {
    "plain": lambda name, cotangents: lambda: case_of(name).plain(cotangents),
    "checkpoint": lambda name, cotangents: lambda: case_of(name).checkpointed(cotangents),
    "ours": lambda name, cotangents: kept(name, 0, cotangents),
    f"ours, k={N // 2}": lambda name, cotangents: kept(name, N // 2, cotangents),
    f"ours, k={N}": lambda name, cotangents: kept(name, N, cotangents),
}
ALL_MODELS = [pytest.param(name, marks=pytest.mark.full) if name != "mnist-dit" else name for name in MODELS]
ROW = {
    "dtype": "float32",
    "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} cpu, 1 thread",
}


def told(turns, case, way, run, direction):
    """A way of a case: its time in turns with the others, and its peak."""
    shape = "x".join(map(str, case.inputs[0].shape))
    info = {"op": f"unroll {case.name}", "backend": way, "direction": direction, "shape": shape, "order": case.steps}
    info |= ROW | {"peak_mb": f"{peak(run(way)) / 1e6:.1f}"}
    ratios = {"plain": "times_plain", "checkpoint": "times_checkpoint"}
    turns(f"unroll {case.name} N={case.steps} {direction}", run, measure=measure, info=info, ratios=ratios,
          rows="unroll.csv", unit="ms")  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cotangents", [1, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_rollout(turns, name, cotangents, way):
    if cotangents > 1 and "k=" in way:
        pytest.skip("graphs are kept for one cotangent")
    told(
        turns,
        case_of(name),
        way,
        lambda w: WAYS[w](name, cotangents),
        f"{cotangents} cotangent{'s' * (cotangents > 1)}",
    )


@pytest.mark.full
@pytest.mark.parametrize("way", ["ours"])
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("name", MODELS)
def test_growth_with_steps(turns, name, steps, way):
    case = case_of(name, steps)
    told(turns, case, way, lambda w: case.ours, "growth")


@pytest.mark.parametrize("name", ALL_MODELS)
def test_gradients_agree_and_the_peak_is_that_of_one_call(name):
    case = case_of(name)
    for mine, theirs in zip(case.ours(3), case.plain(3), strict=True):
        for ours, plain in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
    assert peak(case.ours) - case.held_bytes <= 1.15 * peak(case.one_call)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_stays_flat_with_steps(name):
    peaks = [peak(case_of(name, steps).ours) - case_of(name, steps).held_bytes for steps in (5, 50)]
    assert peaks[1] <= 1.1 * peaks[0]
