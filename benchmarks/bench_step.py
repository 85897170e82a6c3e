"""The step against everything a user could run instead, in the same run, the ways taking turns.

    pytest benchmarks/bench_step.py --benchmark -s [-k "forward and not 21x90x160"] [--threads 2]

`forward` and `gradient` take the last of N steps (all N outputs weighted; forward alone, or forward and backward),
`pull` what a rollout's N adjoints send back to its first step, `loop` all N steps with the outputs at hand, per step.
`host` is a loop on 256 elements: what Python costs. Rows go to results/step.csv.
"""

import csv
import random
import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks.machine import DEVICE, conditions
from benchmarks.step_ways import GRADIENT, LAST_STEP, LOOP, PULL, Setting, copy

RESULTS = Path(__file__).parent / "results" / "step.csv"
LATENT, BATCH, FLUX, FLUX4, VIDEO = (
    (1, 4, 32, 32), (16, 4, 32, 32), (1, 16, 128, 128), (4, 16, 128, 128), (1, 16, 21, 90, 160)
)  # fmt: skip
SHAPES = [LATENT, BATCH, FLUX, FLUX4, VIDEO]
F32, MIXED = (torch.float32, torch.float32), (torch.float32, torch.bfloat16)
SECONDS = 1.2 if DEVICE.type == "cpu" else 0.6  # a cell's budget, compilation apart
LIMIT = 40  # rounds


def size(shape):
    return "x".join(map(str, shape))


def once(call, repeats):
    """Seconds a call. The first is not timed: it brings back into the cache what the other ways have evicted."""
    call()
    if DEVICE.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def take_turns(calls, seconds=SECONDS):
    """Seconds a call, for each way: lists of one value a round. Short calls are repeated within a round."""
    repeats = {}
    for name, call in calls.items():
        call(), call()
        repeats[name] = max(1, min(200, int(2e-3 / max(once(call, 1), 1e-7))))
    round_seconds = sum(once(call, repeats[name]) * (repeats[name] + 1) for name, call in calls.items())
    rounds = max(5, min(LIMIT, int(seconds / round_seconds)))
    times = {name: [] for name in calls}
    turns = list(calls)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(turns)  # whoever follows the copy finds the cache full of it
        for name in turns:
            times[name].append(once(calls[name], repeats[name]))
    return times


def report(group, setting, times, bytes_moved, per=1, skip=("copy",)):
    """Append one row a way and print the cell. Fraction: the copy's median over the way's."""
    rows = []
    copied = statistics.median(times["copy"]) if "copy" in times else None
    for way, seconds in times.items():
        low, middle, high = (q * 1e6 / per for q in quantiles(seconds))
        rows.append({
            "group": group, "way": way, "shape": size(setting.shape), "elements": setting.x.numel(),
            "steps": setting.steps, "pair": int(setting.pair), "state": str(setting.x.dtype)[6:],
            "network": str(setting.history.dtype)[6:], "median_us": f"{middle:.3f}", "p20_us": f"{low:.3f}",
            "p80_us": f"{high:.3f}", "rounds": len(seconds), "bytes": bytes_moved,
            "gb_per_s": f"{bytes_moved / (middle * per) / 1e3:.2f}",
            "copy_fraction": f"{copied / statistics.median(seconds):.3f}" if copied else "",
            "times_released": ratio(times, way), **conditions(),
        })  # fmt: skip
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)
    types = f"{rows[0]['state']}/{rows[0]['network']}"
    guided = " guided" if setting.pair else ""
    print(f"\n{group} {rows[0]['shape']} N={setting.steps} {types}{guided}, {bytes_moved:,} B")
    for row in rows:
        print(
            f"  {row['way']:26} {float(row['median_us']):11.1f} us (p20 {float(row['p20_us']):9.1f})  "
            f"{row['gb_per_s']:>7} GB/s  of copy {row['copy_fraction'] or '-':>6}  "
            f"released/it {row['times_released'] or '-':>7}"
        )
    return {row["way"]: float(row["median_us"]) for row in rows}


def ratio(times, way):
    """How many times faster than the released code: the median of the ratios within a round."""
    if "released eager" not in times:
        return ""
    pairs = zip(times["released eager"], times[way], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def quantiles(seconds):
    ordered = sorted(seconds)
    return tuple(ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))


FORWARD = [(shape, steps, F32, False) for shape in SHAPES for steps in (5, 10, 15)]
FORWARD += [(shape, 10, MIXED, False) for shape in SHAPES] + [(BATCH, 10, F32, True), (VIDEO, 10, MIXED, True)]


def name(cell):
    shape, steps, types, pair = cell
    return f"{size(shape)}-{steps}-{'mixed' if types is MIXED else 'fp32'}{'-guided' if pair else ''}"


@pytest.mark.parametrize("cell", FORWARD, ids=name)
def test_forward(cell):
    shape, steps, types, pair = cell
    s = Setting(shape, steps, types, pair, DEVICE)
    torch._dynamo.reset()
    with torch.no_grad():
        ways = {k: build(s) for k, build in LAST_STEP.items() if steps == 10 or "compiled" not in k}
        times = take_turns({**ways, "copy": copy(s.bytes(), DEVICE)})
    report("forward", s, times, s.bytes())


@pytest.mark.parametrize("cell", [(shape, 10, F32, False) for shape in SHAPES], ids=name)
def test_loop(cell):
    shape, steps, types, pair = cell
    s = Setting(shape, steps, types, pair, DEVICE)
    with torch.no_grad():
        ways = {k: build(s) for k, build in LOOP.items()}
        times = take_turns({**ways, "copy": copy(s.loop_bytes(), DEVICE)})
        less_setup(ways, times)
        report("loop", s, times, s.loop_bytes(), per=steps)


def less_setup(ways, times):
    for way, run in ways.items():
        if hasattr(run, "without"):
            setup = statistics.median(once(run.without, 5) for _ in range(5))
            times[way] = [max(t - setup, 1e-9) for t in times[way]]


@pytest.mark.parametrize("cell", [(shape, 10, F32, False) for shape in (LATENT, BATCH, FLUX, VIDEO)], ids=name)
def test_gradient(cell):
    shape, steps, types, pair = cell
    s = Setting(shape, steps, types, pair, DEVICE)
    torch._dynamo.reset()
    ways = {k: build(s) for k, build in GRADIENT.items()}
    times = take_turns({**ways, "copy": copy(s.bytes(backward=True), DEVICE)})
    report("gradient", s, times, s.bytes(backward=True))


@pytest.mark.parametrize("cell", [(shape, 10, F32, False) for shape in SHAPES], ids=name)
def test_pull(cell):
    shape, steps, types, pair = cell
    s = Setting(shape, steps, types, pair, DEVICE)
    torch._dynamo.reset()
    with torch.no_grad():
        ways = {k: build(s) for k, build in PULL.items()}
        times = take_turns({**ways, "copy": copy(s.pull_bytes(), DEVICE)})
    report("pull", s, times, s.pull_bytes())


def test_host():
    """Tensors of 256 elements; on a GPU the time to enqueue, not to run."""
    s = Setting((1, 4, 8, 8), 10, F32, device=DEVICE)
    with torch.no_grad():
        ways = {k: build(s) for k, build in LOOP.items()}
        times = {way: [] for way in ways}
        for _ in range(30):
            for way, run in ways.items():
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(10):
                    run()
                times[way].append((time.perf_counter() - begin) / 10)
        less_setup(ways, times)
        micros = report("host", s, times, s.loop_bytes(), per=10)
    assert micros["ours"] < micros.get("diffusers UniPC", float("inf")) / 3


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_graph():
    """The whole 10-step loop, the outputs at hand, as one graph."""
    s = Setting(LATENT, 10, F32, device=DEVICE)
    with torch.no_grad():
        run = LOOP["ours"](s)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        report("graph", s, take_turns({"ours": graph.replay}), s.loop_bytes(), per=10)
