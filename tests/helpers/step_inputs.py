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


def draw_list(**options):
    """x, output, list, weights, step of the same step in list form: the slots that it reads, in its order."""
    x, output, history, weights, index = draw(**options)
    return x, output, listed(history, weights, int(index[0])), weights, int(index[0])


def listed(history, weights, i):
    slots = [*history[:, :i].unbind(1), *history[:, weights.shape[1] :].unbind(1)]
    return [slot.contiguous() for slot in slots]


def in_float64(x, output, history, weights, index):
    many = [y.double() for y in history] if isinstance(history, list) else history.double()
    return x.double(), output.double(), many, weights.double(), index


def stacked(ops, x, output, history, weights, index):
    """x_next and the history after the step in place, on copies."""
    history, x_next = history.clone(), torch.empty_like(x)
    ops.multistep_step_(x, output, history, weights, index, x_next)
    return x_next, history


def eager(x, output, history, weights, i):
    """The step as a user writes it: every operation in the state's dtype, one row of weights, a list."""
    dtype, steps = x.dtype, weights.shape[1]
    shape = (-1,) + (1,) * (x.dim() - 1)
    a, p, q, g, *w = (column.reshape(shape) for column in weights[:, i].to(dtype).unbind(1))
    m = output.to(dtype)
    if len(m) == 2 * len(x):
        uncond, cond = m.chunk(2)
        m = uncond + g * (cond - uncond)
    y = p * x + q * m
    total = a * x + w[i] * y
    for j, slot in enumerate(history):
        total = total + w[j if j < i else steps] * slot.to(dtype)
    return total, y.to(history[0].dtype if history else dtype)
