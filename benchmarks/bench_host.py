"""What an eager step costs the host, without a GPU: Triton's real launcher in front of a libcuda that does nothing.

    pytest benchmarks/bench_host.py --benchmark

The budget is 13 microseconds for `multistep_step` on a 4 x 32 x 32 latent, the median of 15 rounds of 1,000 calls, in
the thread's own time, which others on the machine hardly lengthen. A GPU's driver adds two or three. The layers below
stand beside it, and Triton's own launch. They are measured in one process of their own, where the kernels of the CPU
are replaced, and in turns.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGET = 13.0

MEASURE = """
import json, os, sys, time, warnings
os.environ["TRITON_INTERPRET"] = "0"
from helpers import cuda_stub
stub = cuda_stub.activate(sys.argv[1])
import torch
from helpers.step_inputs import draw, draw_list
from dss_fast import step
from dss_fast.step import launch, multistep_step, multistep_update
from dss_fast.step import triton as step_triton

warnings.simplefilter("ignore")  # that the CPU's kernels are replaced
library = torch.library.Library("dss_fast", "IMPL")
for name in ("multistep_step_", "multistep_update"):
    library.impl(name, step._late(name, step._on_cuda), "CPU", allow_override=True)
inputs = draw((4, 32, 32), batch=1, steps=10, at=9)
listed = draw_list(sample=(4, 32, 32), batch=1, steps=10, at=9)
out = torch.empty_like(inputs[0])
multistep_step(*inputs, out=out)
kind, pointers = launch.kind_of((*inputs, out), "step")
known = launch.Launch.known[kind]
kernel = step_triton._step_kernel
flags = dict(PAIR=False, ROW_WEIGHTS=False, ROW_INDEX=False, UNROLL=step_triton.trip(10), BLOCK=step_triton.BLOCK)
options = step_triton.options(torch.float32, torch.float32)
calls = {
    "multistep_step(out=)": lambda: multistep_step(*inputs, out=out),
    "multistep_step()": lambda: multistep_step(*inputs),
    "multistep_update()": lambda: multistep_update(*listed),
    "Triton function": lambda: step_triton.multistep_step_(*inputs, out),
    "launch": lambda: known(*pointers),
    "Triton's own launch": lambda: kernel[(4,)](*inputs, out, *known.numbers[:7], **flags, **options),
}
times = {name: [] for name in calls}
with torch.no_grad():
    for _ in range(15):
        for name, call in calls.items():
            call()
            begin = time.thread_time()
            for _ in range(1000):
                call()
            times[name].append((time.thread_time() - begin) * 1e3)
print(json.dumps(times))
"""


WAYS = (
    "multistep_step(out=)", "multistep_step()", "multistep_update()",
    "Triton function", "launch", "Triton's own launch",
)  # fmt: skip


def measure(folder):
    """{way: seconds a call in each round}."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # torch leaves a GPU alone
    command = [sys.executable, "-c", MEASURE, folder]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {way: [us * 1e-6 for us in taken] for way, taken in json.loads(run.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("way", WAYS)
def test_host(turns, tmp_path, way):
    times = turns("host of a step on CUDA, 4x32x32", lambda way: lambda: None, measure=lambda calls: measure(tmp_path))
    if times and way == "multistep_step(out=)" and (taken := 1e6 * statistics.median(times[way])) > BUDGET:
        pytest.fail(f"an eager step takes {taken:.1f} us of the host, over {BUDGET:.0f}")
