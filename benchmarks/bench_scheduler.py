"""What a step costs the host: DSSScheduler.step against the stock schedulers of diffusers, taking turns in one run.

    pytest benchmarks/bench_scheduler.py --benchmark -s

A latent of 4 x 32 x 32, where the arithmetic is next to nothing and what is left is Python and launches. Each round
runs 10 steps of every scheduler, in turn, so that a busy machine slows all alike; medians over the rounds go to
results/scheduler.csv. On CUDA the host's time is taken without waiting for the device.
"""

import csv
import datetime
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "scheduler.csv"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE, STEPS, ROUNDS = (1, 4, 32, 32), 10, 60


def schedulers(family):
    if family == "flow":
        config = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        euler, table = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config), "sit-xl-2-256"
    else:
        config, flow = diffusers.DDIMScheduler(clip_sample=False).config, {}
        euler, table = diffusers.DDIMScheduler.from_config(config), "dit-xl-2-256"
    return {
        "dss_fast": DSSScheduler.from_config(config, solver=table),
        "stock euler or ddim": euler,
        "stock dpmpp_2m": diffusers.DPMSolverMultistepScheduler(**flow),
        "stock unipc": diffusers.UniPCMultistepScheduler(**flow),
    }


def host_seconds(scheduler, x, output):
    """Per step, over one run; set_timesteps and waiting for the device are not counted."""
    scheduler.set_timesteps(STEPS, device=DEVICE)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times = list(scheduler.timesteps)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in times:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return (time.perf_counter() - start) / STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["flow", "vp"])
@torch.no_grad()
def test_host_time_per_step(family, dtype):
    x, output = (torch.randn(SHAPE, device=DEVICE, dtype=dtype) for _ in range(2))
    ways = schedulers(family)
    seconds = {name: [] for name in ways}
    for round_ in range(ROUNDS + 5):
        for name, scheduler in ways.items():
            taken = host_seconds(scheduler, x, output)
            if round_ >= 5:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        rows = csv.writer(file)
        if new:
            rows.writerow(
                ["date", "device", "threads", "torch", "diffusers", "python", "family", "dtype"]
                + ["scheduler", "microseconds_per_step", "share_of_unipc"]
            )
        for name, median in medians.items():
            share = median / medians["stock unipc"]
            print(f"\n{family} {str(dtype)[6:]:9} {name:20} {median * 1e6:8.1f} us  {share:.3f} of UniPC", end="")
            rows.writerow(
                [datetime.date.today().isoformat(), DEVICE, torch.get_num_threads(), torch.__version__]
                + [diffusers.__version__, platform.python_version(), family, str(dtype)[6:], name]
                + [f"{median * 1e6:.2f}", f"{share:.4f}"]
            )
    assert medians["dss_fast"] <= medians["stock unipc"] / 3
