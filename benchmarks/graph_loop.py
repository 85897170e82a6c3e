"""What a whole loop costs: as one CUDA graph, eagerly on the host, and through ``sample``.

    python benchmarks/graph_loop.py ROWS.jsonl [--tiny]

Loops of 10 steps of a 4 x 32 x 32 latent: with the outputs at hand, and with a model of one kernel. Host times are
taken without waiting for the device. On a CPU, where there are no graphs, the eager ones, and what ``sample`` does
around a graph: the tests' stand-in for one, with a replay that does nothing and tensors on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE, conditions
from step_ways import Setting, ours_loop
from torch import Tensor

from dss_fast import graph, sample
from dss_fast.step import multistep_step

SHAPE, STEPS = (1, 4, 32, 32), 10


def one_kernel(x: Tensor, t: Tensor) -> Tensor:
    """A model that costs a launch."""
    return torch.sin(x)


def with_model(s: Setting) -> Callable[[], Any]:
    def run() -> None:
        x = s.x
        for i in range(s.steps):
            multistep_step(x, torch.sin(x), s.history, s.weights, s.index[i : i + 1], out=s.out)
            x = s.out

    return run


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    run()
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found):
        run()
    return found.replay


def device_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of one run on the device, 50 in a row."""
    if DEVICE.type != "cuda":
        return host_seconds(run, rounds)
    start, end, times = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), []
    for _ in range(rounds):
        start.record()
        for _ in range(50):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / 50)
    return statistics.median(times)


def host_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of the host's work for one run, 10 in a row on an idle device."""
    times = []
    for _ in range(rounds):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            run()
        times.append((time.perf_counter() - begin) / 10)
    return statistics.median(times)


def around_nothing(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of Python around a graph whose replay does nothing."""
    import pytest

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from helpers.graph_fakes import FakeDevice, Recorder

    with pytest.MonkeyPatch.context() as patch:
        device = FakeDevice(patch)
        call()
        patch.setattr(Recorder, "run", lambda self: None)
        seconds = host_seconds(call, rounds)
        device.calls.clear()
    return seconds


def measure(rounds: int) -> dict[str, float]:
    """{figure: microseconds}."""
    s = Setting(SHAPE, STEPS, (torch.float32, torch.float32), device=DEVICE)
    loop, model = ours_loop(s), with_model(s)
    loop(), model()
    found = {"eager step, host": host_seconds(loop, rounds) / STEPS}
    calls = {
        "eager": lambda: sample(one_kernel, s.x, "sit-xl-2-256/10", check_finite=False),
        "graph": lambda: sample(one_kernel, s.x, "sit-xl-2-256/10", cuda_graph=True),
    }
    calls["eager"]()
    found["eager sample call, host"] = host_seconds(calls["eager"], rounds)
    if DEVICE.type == "cuda":
        found["graph step, outputs at hand"] = device_seconds(captured(loop), rounds) / STEPS
        found["graph step, one-kernel model"] = device_seconds(captured(model), rounds) / STEPS
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="cuda_graph=True")  # that it could not be captured
            calls["graph"]()
        (device,) = graph._devices.values()
        (kept,) = device.loops.values()
        assert kept.graph is not None
        found["graph sample call, host"] = host_seconds(calls["graph"], rounds)
        found["graph sample call outside the graph, host"] = found["graph sample call, host"] - host_seconds(
            kept.graph.replay, rounds
        )
        found["graph sample call, device"] = device_seconds(calls["graph"], rounds)
        found["graph alone, device"] = device_seconds(kept.graph.replay, rounds)
    else:
        found["sample call around a graph that does nothing, CPU"] = around_nothing(calls["graph"], rounds)
    return {name: 1e6 * seconds for name, seconds in found.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines are appended here")
    parser.add_argument("--tiny", action="store_true", help="few rounds")
    options = parser.parse_args()
    for name, micros in measure(3 if options.tiny else 30).items():
        print(f"{name:45} {micros:9.2f} us", flush=True)
        with options.rows.open("a") as file:
            file.write(json.dumps({"stage": "loop", "figure": name, "us": micros, **conditions()}) + "\n")


if __name__ == "__main__":
    main()
