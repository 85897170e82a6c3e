"""Every kernel once, small and with odd sizes: what compute-sanitizer looks at. Needs a GPU."""

import itertools

import torch

from dss_fast.step import triton as step_triton

DTYPES = (torch.float32, torch.bfloat16)


def main(device="cuda"):
    for size, pair, noise, dtype in itertools.product((1, 1000, 4096), (False, True), (False, True), DTYPES):
        batch, steps = 3, 10
        x = torch.randn(batch, size, device=device)
        output = torch.randn(batch * (1 + pair), size, device=device).to(dtype)
        history = torch.randn(batch, steps + noise, size, device=device).to(dtype)
        weights = torch.randn(batch, steps, 4 + steps + noise, device=device)
        index = torch.tensor([0, 9, 10], device=device)
        inputs = x, output, history, weights, index
        step_triton.multistep_step(*inputs)
        step_triton.multistep_step_(*inputs, x)
        step_triton.multistep_step_backward(x, history if noise else None, *inputs, (True,) * 4)
        step_triton.multistep_pull(history[:, :steps].float(), weights, index, pair)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
