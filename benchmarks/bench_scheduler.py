"""What a step costs the host: DSSScheduler.step against the stock schedulers of diffusers, taking turns.

    pytest benchmarks/bench_scheduler.py --benchmark

A latent of 4 x 32 x 32, where the arithmetic is next to nothing and what is left is Python and launches. A round is 10
steps of each scheduler. On CUDA the host's time is taken without waiting for the device. With --rows they go to
results/scheduler.csv.
"""

import time

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from benchmarks.machine import DEVICE  # noqa: E402
from benchmarks.turns import in_turns  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402

SHAPE, STEPS, ROUNDS = (1, 4, 32, 32), 10, 40
WAYS = ["dss_fast", "stock euler or ddim", "stock dpmpp_2m", "stock unipc"]


def scheduler(family, way):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    options, table = flow, "sit-xl-2-256"
    if family == "vp":
        stock, options, table = diffusers.DDIMScheduler(clip_sample=False), {}, "dit-xl-2-256"
    return {
        "dss_fast": lambda: DSSScheduler.from_config(stock.config, solver=table),
        "stock euler or ddim": lambda: stock,
        "stock dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**options),
        "stock unipc": lambda: diffusers.UniPCMultistepScheduler(**options),
    }[way]()


def host_seconds(scheduler, x, output):
    """Per step, over one run; set_timesteps and waiting for the device are not counted."""
    scheduler.set_timesteps(STEPS, device=DEVICE)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times = list(scheduler.timesteps)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for t in times:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return (time.perf_counter() - start) / STEPS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("family", ["flow", "vp"])
@torch.no_grad()
def test_host_time_per_step(turns, family, dtype, way):
    x, output = (torch.randn(SHAPE, device=DEVICE, dtype=dtype) for _ in range(2))

    def measure(calls):
        for call in calls.values():
            call()
        return in_turns(calls, lambda way: calls[way](), ROUNDS)

    def build(way):
        one = scheduler(family, way)
        return lambda: host_seconds(one, x, output)

    about = {"family": family, "dtype": str(dtype)[6:], "scheduler": way, "diffusers": diffusers.__version__}
    turns(
        f"scheduler {family} {about['dtype']}", build,
        measure=measure, info=about, ratios={"stock unipc": "times_unipc"}, rows="scheduler.csv",
    )  # fmt: skip
