"""Inputs of the step's tests, and the step as plain PyTorch in one dtype, the second of the three ways to compare."""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anyone imports the kernels
EPS = {torch.float64: 1e-15, torch.float32: 1.2e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}
NAN = float("nan")


def implementation(name):
    """The module, or the namespace of ops, whose functions are under test, and the device they run on."""
    if name == "reference":
        from dss_fast.step import reference as step_reference

        return step_reference, DEVICE
    if name == "cpp":
        import dss_fast.step  # noqa: F401

        return torch.ops.dss_fast, torch.device("cpu")
    from dss_fast.step import triton as step_triton

    return step_triton, DEVICE


def draw(sample=(3, 7), batch=2, steps=4, at=2, pair=False, noise_slot=False, rows=False, dtypes=None, device="cpu",
         seed=0):  # fmt: skip
    """x, output, history, weights, index of a step; slots that must not be read hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    x_type, output_type, history_type = dtypes or (torch.float32,) * 3
    real = torch.float64 if x_type is torch.float64 else torch.float32
    slots = steps + noise_slot
    at = list(at) if isinstance(at, list | tuple) else [at]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, output = normal(batch, *sample), normal(batch * (1 + pair), *sample)
    history, weights = normal(batch, slots, *sample), normal(batch if rows else 1, steps, 4 + slots)
    for row in range(batch):
        i = at[row % len(at)]
        history[row, max(i, 0) : steps] = NAN
    index = torch.tensor(at)
    tensors = x.to(x_type), output.to(output_type), history.to(history_type), weights.to(real), index
    return tuple(t.to(device) for t in tensors)


def in_float64(x, output, history, weights, index):
    return x.double(), output.double(), history.double(), weights.double(), index


def eager(x, output, history, weights, index):
    """The step as a user writes it: every operation in the state's dtype, one row of weights, one index."""
    i, batch = int(index[0]), len(x)
    a, p, q, g, *w = weights[0, i].to(x.dtype).unbind()
    m = output.to(x.dtype)
    if len(m) == 2 * batch:
        uncond, cond = m.split(batch)
        m = uncond + g * (cond - uncond)
    y = p * x + q * m
    total = a * x + w[i] * y
    for j in range(i):
        total = total + w[j] * history[:, j].to(x.dtype)
    if history.shape[1] > weights.shape[1]:
        total = total + w[-1] * history[:, -1].to(x.dtype)
    return total, torch.cat([history[:, :i], y.to(history.dtype)[:, None], history[:, i + 1 :]], 1)
