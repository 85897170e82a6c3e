"""The step against everything a user could run instead, in the same run, the ways taking turns.

    pytest benchmarks/bench_step.py --benchmark [-k "forward and not video"] [--full]

`forward` and `gradient` take the last of N steps (all N outputs weighted; forward alone, or forward and backward),
`pull` what a rollout's N adjoints send back to its first step, `loop` all N steps with the outputs at hand, per step.
`host` is a loop on 256 elements: what Python costs. With --rows they go to results/step.csv.
"""

import time
from dataclasses import dataclass

import pytest
import torch

from benchmarks.machine import DEVICE
from benchmarks.step_ways import GRADIENT, LAST_STEP, LOOP, PULL, Setting, copy
from benchmarks.turns import in_turns, take_turns

SHAPES = {
    "latent": (1, 4, 32, 32),
    "batch": (16, 4, 32, 32),
    "flux": (1, 16, 128, 128),
    "flux4": (4, 16, 128, 128),
    "video": (1, 16, 21, 90, 160),
}
RATIOS = {"copy": "copy_fraction", "released eager": "times_released"}


@dataclass(frozen=True)
class Cell:
    """One group of a table. network: dtype of the outputs and the history; the state is float32."""

    name: str
    steps: int = 10
    network: torch.dtype = torch.float32
    pair: bool = False

    def __str__(self):
        mixed, guided = "-bf16" * (self.network is torch.bfloat16), "-guided" * self.pair
        return f"{self.name}-{'x'.join(map(str, SHAPES[self.name]))}-N{self.steps}{mixed}{guided}"

    def setting(self):
        return Setting(SHAPES[self.name], self.steps, (torch.float32, self.network), self.pair, DEVICE)


def cells(usual, *more):
    """The usual cells, and those that --full adds."""
    return [*usual, *(pytest.param(cell, marks=pytest.mark.full) for cell in more if cell not in usual)]


def info(s, bytes_moved):
    return {
        "shape": "x".join(map(str, s.shape)), "elements": s.x.numel(), "steps": s.steps, "pair": int(s.pair),
        "state": str(s.x.dtype)[6:], "network": str(s.history.dtype)[6:], "bytes": bytes_moved,
    }  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    """The tensors of the cell at hand; those of the one before are freed."""
    kept = {}

    def of(cell):
        if cell not in kept:
            kept.clear()
            torch._dynamo.reset()
            kept[cell] = cell.setting()
        return kept[cell]

    yield of
    kept.clear()


def step(turns, settings, group, cell, ways, bytes_moved, *, measure=take_turns, per=1):
    """A way of a cell in which ``bytes_moved(setting)`` are moved, beside a copy of as many."""
    s = settings(cell)
    moved = bytes_moved(s)

    def build(way):
        return copy(moved, DEVICE) if way == "copy" else ways[way](s)

    options = dict(measure=measure, per=per, info=info(s, moved), ratios=RATIOS, rows="step.csv")
    turns(f"{group} {cell}", build, **options)


MIXED = torch.bfloat16
FORWARD = [Cell(name, steps) for name in SHAPES for steps in (5, 10, 15)] + [Cell(n, network=MIXED) for n in SHAPES]
FORWARD += [Cell("batch", pair=True), Cell("video", network=MIXED, pair=True)]
TENS = [Cell(name) for name in SHAPES]


@pytest.mark.parametrize("way", [*LAST_STEP, "copy"])
@pytest.mark.parametrize("cell", cells([Cell("latent"), Cell("flux"), Cell("video", network=MIXED)], *FORWARD), ids=str)
def test_forward(turns, settings, cell, way):
    if "compiled" in way and (cell.steps != 10):
        pytest.skip("compiled at N = 10 alone")
    with torch.no_grad():
        step(turns, settings, "forward", cell, LAST_STEP, Setting.bytes)


@pytest.mark.parametrize("way", [*LOOP, "copy"])
@pytest.mark.parametrize("cell", cells([Cell("latent"), Cell("flux")], *TENS), ids=str)
def test_loop(turns, settings, cell, way):
    with torch.no_grad():
        step(turns, settings, "loop", cell, LOOP, Setting.loop_bytes, measure=without_setup, per=cell.steps)


@pytest.mark.parametrize("way", [*GRADIENT, "copy"])
@pytest.mark.parametrize("cell", cells([Cell("flux")], *(c for c in TENS if c.name != "flux4")), ids=str)
def test_gradient(turns, settings, cell, way):
    step(turns, settings, "gradient", cell, GRADIENT, lambda s: s.bytes(backward=True))


@pytest.mark.parametrize("way", [*PULL, "copy"])
@pytest.mark.parametrize("cell", cells([Cell("flux4")], *TENS), ids=str)
def test_pull(turns, settings, cell, way):
    with torch.no_grad():
        step(turns, settings, "pull", cell, PULL, Setting.pull_bytes)


@pytest.mark.parametrize("way", LOOP)
def test_host(turns, way):
    """Tensors of 256 elements; on a GPU the time to enqueue, not to run."""
    s = Setting((1, 4, 8, 8), 10, (torch.float32, torch.float32), device=DEVICE)

    def measure(calls):
        return less_setup(calls, in_turns(calls, lambda way: enqueued(calls[way]), 30))

    options = dict(measure=measure, per=10, info=info(s, s.loop_bytes()), ratios=RATIOS, rows="step.csv")
    with torch.no_grad():
        turns("host 256 elements", lambda way: LOOP[way](s), **options)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("way", ["ours"])
def test_graph(turns, settings, way):
    """The whole 10-step loop, the outputs at hand, as one graph."""
    cell = Cell("latent")

    def captured(s):
        run = LOOP["ours"](s)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    with torch.no_grad():
        step(turns, settings, "graph", cell, {"ours": captured}, Setting.loop_bytes, per=10)


def enqueued(run, repeats=10):
    """Seconds of the host a call."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def without_setup(calls):
    return less_setup(calls, take_turns(calls))


def less_setup(calls, times):
    """Less what setting up takes, in the ways that have it: steps are compared."""
    for way, run in calls.items():
        if hasattr(run, "without"):
            setup = sorted(enqueued(run.without, 5) for _ in range(5))[2]
            times[way] = [max(t - setup, 1e-9) for t in times[way]]
    return times
