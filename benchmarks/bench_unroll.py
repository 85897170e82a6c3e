"""Time and peak memory of a differentiated rollout: plain autograd, torch.utils.checkpoint around each call, ours.

    pytest benchmarks/bench_unroll.py --benchmark -s        # about 3 minutes

All three run the same frozen network and the same step and take the gradients of the state, the weights and
the times. Time is wall time on a GPU and, so that other work on the machine counts less, processor time of one
thread on a CPU; the ways take turns. Peak memory is what torch's allocator hands out above the start of the
run, counted on a run of its own. Rows go to results/unroll.csv.
"""

import csv
import datetime
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.machine import DEVICE, commit, version
from dss_fast.step import multistep_update
from dss_fast.unroll import Rollout
from examples.mnist.model import Block, DiT

RESULTS = Path(__file__).parent / "results" / "unroll.csv"
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


def timed(ways, rounds):
    """{way: seconds of each round}; the ways take turns, after one round to warm up."""
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            _synchronize()
            start = clock()
            way()
            _synchronize()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


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


def record(case, way, direction, seconds, peak_bytes):
    low, middle, high = (1e3 * q for q in _quantiles(seconds))
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{platform.machine()} cpu, 1 thread"
    row = {
        "op": f"unroll {case.name}",
        "backend": way,
        "direction": direction,
        "dtype": "float32",
        "shape": "x".join(map(str, case.inputs[0].shape)),
        "order": case.steps,
        "median_ms": f"{middle:.1f}",
        "p20_ms": f"{low:.1f}",
        "p80_ms": f"{high:.1f}",
        "peak_mb": f"{peak_bytes / 1e6:.1f}",
        "device": name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    key = ("op", "backend", "direction", "shape", "order", "device")
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    rows = [r for r in rows if any(str(r[k]) != str(row[k]) for k in key)] + [row]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{row['op']:17} N={case.steps:<3} {direction:14} {way:22} {middle:8.1f} ms  {row['peak_mb']:>7} MB")


def _quantiles(seconds):
    if len(seconds) < 2:
        return seconds * 3
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return cuts[1], statistics.median(seconds), cuts[7]


@pytest.mark.parametrize(("name", "rounds"), [("mnist-dit", 5), ("dit-s-2", 3)])
def test_table(name, rounds):
    case = Case(name)
    single = peak(case.one_call)
    for mine, theirs in zip(case.ours(3), case.plain(3), strict=True):
        for ours, plain in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
    case.ours(budget=1)
    size = case.kept.activation_bytes
    half, whole = int((N // 2 + 0.5) * size), 2 * N * size
    ways = {
        "plain": case.plain,
        "checkpoint": case.checkpointed,
        "ours": case.ours,
        f"ours, k={N // 2}": lambda: case.ours(budget=half),
        f"ours, k={N}": lambda: case.ours(budget=whole),
    }
    several = {
        "plain": lambda: case.plain(3),
        "checkpoint": lambda: case.checkpointed(3),
        "ours": lambda: case.ours(3),
    }
    one, three = timed(ways, rounds), timed(several, rounds)
    peaks = {way: peak(run) for way, run in ways.items()}
    print()
    for way in ways:
        record(case, way, "1 cotangent", one[way], peaks[way])
    for way in several:
        record(case, way, "3 cotangents", three[way], peak(several[way]))

    def ratio(times, way, *bases):
        """Of the medians, and of the fastest rounds, which other work on the machine disturbs least."""
        return tuple(
            len(bases) * pick(times[way]) / sum(pick(times[b]) for b in bases) for pick in (statistics.median, min)
        )

    k = f"ours, k={N}"
    figures = {
        "peak less states / one call, at most 1.15": (peaks["ours"] - case.held_bytes) / single,
        "time / plain, at most 1.55": ratio(one, "ours", "plain"),
        "time / checkpoint, at most 1": ratio(one, "ours", "checkpoint"),
        "three cotangents: time / checkpoint, at most 0.75": ratio(three, "ours", "checkpoint"),
        "k = N/2: time / half-way, about 1": ratio(one, f"ours, k={N // 2}", "plain", "ours"),
        "k = N/2: peak / plain's, about 0.5": peaks[f"ours, k={N // 2}"] / peaks["plain"],
        "k = N: time / plain, 0.95 to 1.05": ratio(one, k, "plain"),
        "k = N: peak / plain's, 0.95 to 1.05": peaks[k] / peaks["plain"],
    }
    print(f"{name}: one call {single / 1e6:.1f} MB, states, history and adjoints {case.held_bytes / 1e6:.2f} MB")
    for label, value in figures.items():
        text = "median {:.3f}, fastest {:.3f}".format(*value) if isinstance(value, tuple) else f"{value:.3f}"
        print(f"    {label:52} {text}")
    assert not figures["peak less states / one call, at most 1.15"] > 1.15


@pytest.mark.parametrize("name", MODELS)
def test_growth_with_steps(name):
    """The peak stays flat, the time grows linearly."""
    print()
    peaks, seconds = {}, {}
    for steps in (5, 10, 20, 50):
        case = Case(name, steps)
        rounds = 1 if name == "dit-s-2" else 3
        taken = timed({"ours": case.ours}, rounds)["ours"] if rounds > 1 else []
        if not taken:
            start = clock()
            held = peak(case.ours)
            taken = [clock() - start]
        else:
            held = peak(case.ours)
        peaks[steps], seconds[steps] = held - case.held_bytes, statistics.median(taken)
        record(case, "ours", "growth", taken, held)
    print(f"    peak less states, N = 50 / N = 5: {peaks[50] / peaks[5]:.3f}")
    print(f"    time per step, N = 50 / N = 5: {seconds[50] / 50 / (seconds[5] / 5):.3f}")
    assert not peaks[50] > 1.1 * peaks[5]
