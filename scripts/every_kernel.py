"""Launches kernels for others to look at: compute-sanitizer, a profiler of hardware counters, a compile cache.

python scripts/every_kernel.py                      # every kernel once, small and with odd sizes
python scripts/every_kernel.py --share 0 5          # a fifth of them, in which each dtype, size and flag is
python scripts/every_kernel.py --forward bf16 mixed # the last of ten steps on 1 x 16 x 21 x 90 x 160, once for each
DEVICE=cpu TRITON_INTERPRET=1 python scripts/every_kernel.py --share 0 40    # interpreted
DEVICE=cpu STUB=out/stub python scripts/every_kernel.py --share 0 40         # compiled, launched on no device
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch

STUB = os.environ.get("STUB")  # a folder: kernels go through Triton's launcher to the tests' libcuda, built there
if STUB:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from helpers import cuda_stub

    Path(STUB).mkdir(parents=True, exist_ok=True)
    driver = cuda_stub.activate(STUB)

from dss_fast.step import triton as step_triton  # noqa: E402

DEVICE = os.environ.get("DEVICE", "cuda")
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
SIZES = (4096, 1000, 1)  # aligned, ragged, less than a thread's share


def variants():
    return list(itertools.product(SIZES, DTYPES, (False, True), (False, True)))


def run(size, types, pair, noise, batch=3, steps=10):
    """All four operations."""
    state, network = DTYPES[types]
    x = torch.randn(batch, size, device=DEVICE).to(state)
    output = torch.randn(batch * (1 + pair), size, device=DEVICE).to(network)
    history = torch.randn(batch, steps + noise, size, device=DEVICE).to(network)
    weights = torch.randn(batch, steps, 4 + steps + noise, device=DEVICE)
    index = torch.tensor([0, 9, 10], device=DEVICE)
    inputs = x, output, history, weights, index
    step_triton.multistep_step_(*inputs, torch.empty_like(x))
    for step in (0, 1, 5, 9):  # a list of each padded length
        many = [history[:, j].contiguous() for j in (*range(step), *range(steps, steps + noise))]
        _, y = step_triton.multistep_update(x, output, many, weights, step)
        step_triton.multistep_update_backward(x, y if noise else None, x, output, many, weights, step, (True,) * 4)
    step_triton.multistep_pull(history[:, :steps].contiguous(), weights, index, pair)
    step_triton.multistep_pull(history[:, :steps].contiguous(), weights[:1].contiguous(), index[:1], pair)


def forward(types, shape=(1, 16, 21, 90, 160), steps=10):
    state, network = DTYPES[types]
    x = torch.randn(shape, device=DEVICE).to(state)
    history = torch.randn(shape[0], steps, *shape[1:], device=DEVICE).to(network)
    weights = torch.randn(1, steps, 4 + steps, device=DEVICE)
    index = torch.tensor([steps - 1], device=DEVICE)
    step_triton.multistep_step_(x, history[:, 0].contiguous(), history, weights, index, torch.empty_like(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, nargs=2, metavar=("K", "N"), default=(0, 1))
    parser.add_argument("--forward", nargs="+", choices=DTYPES, metavar="TYPES")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    for types in options.forward or ():
        forward(types, **({"shape": (1, 4, 8, 8)} if options.tiny else {}))
    if not options.forward:
        k, n = options.share
        for variant in variants()[k::n]:
            run(*variant)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{driver.stub_launches()} launches on no device" if STUB else "all kernels ran")


if __name__ == "__main__":
    main()
