"""The multistep step in plain PyTorch: the definition of correct, for any device.

Every function here has the name and the signature of a registered op in `dss_fast.step`, where the equation and
the shapes are written down. Nothing here is tuned; the sums run in a fixed order so that a batch and its rows
taken one by one give the same bits.
"""

import torch

__all__ = [
    "check",
    "multistep_pull",
    "multistep_step",
    "multistep_step_",
    "multistep_step_backward",
]

SCALARS = 4  # a, p, q, guidance stand before the history's weights in a row


def check(x, output, history, weights, index):
    """Raise ValueError where shapes or dtypes break the contract of `dss_fast.step.multistep_step`."""
    batch, sample = x.shape[0], x.shape[1:]
    if output.shape[0] not in (batch, 2 * batch) or output.shape[1:] != sample:
        raise ValueError(
            f"output has shape {tuple(output.shape)}; x {tuple(x.shape)} allows {(batch, *sample)} or, guided, "
            f"{(2 * batch, *sample)} with the unconditional rows first"
        )
    if history.dim() != x.dim() + 1 or history.shape[0] != batch or history.shape[2:] != sample:
        raise ValueError(
            f"history has shape {tuple(history.shape)}; x {tuple(x.shape)} needs (batch {batch}, slots, {sample})"
        )
    slots = history.shape[1]
    if weights.dim() != 3 or weights.shape[0] not in (1, batch):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; needed is (1 or {batch}, num_steps, {SCALARS + slots})"
        )
    if weights.shape[2] != SCALARS + slots or slots - weights.shape[1] not in (0, 1):
        raise ValueError(
            f"weights {tuple(weights.shape)} do not fit a history of {slots} slots: N steps take (R, N, {SCALARS} + "
            "slots) with N slots, or N + 1 when the last one holds the initial noise"
        )
    check_dtypes(x, weights, index, batch)


def check_dtypes(x, weights, index, batch):
    wanted = torch.float64 if x.dtype is torch.float64 else torch.float32
    if weights.dtype is not wanted:
        raise ValueError(f"weights are {weights.dtype}; a {x.dtype} state needs {wanted}, use weights.to(...)")
    if index.dtype is not torch.int64 or index.dim() != 1 or index.shape[0] not in (1, batch):
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; needed is torch.int64 of shape (1,) or ({batch},)"
        )


class _Row:
    """The scalars of every row at its own step, and masks over the history's slots."""

    def __init__(self, batch, slots, weights, index):
        steps = weights.shape[1]
        self.index = index.expand(batch)
        self.active = (self.index >= 0) & (self.index < steps)
        at = self.index.clamp(0, steps - 1)
        row = weights.expand(batch, -1, -1).gather(1, at[:, None, None].expand(batch, 1, weights.shape[2]))[:, 0]
        self.a, self.p, self.q, self.g = row[:, :SCALARS, None].unbind(1)  # each (B, 1)
        self.w = row[:, SCALARS:]  # (B, K)
        slot = torch.arange(slots, device=index.device)
        self.now = (slot == self.index[:, None]) & self.active[:, None]
        past = (slot < self.index[:, None]) | (slot == steps)
        self.past = past & self.active[:, None]
        self.w_now = torch.where(self.now, self.w, 0).sum(1, keepdim=True)


def _combine(output, batch, g, dtype):
    """The guided output and m_cond - m_uncond, (B, D) each; None where there is no pair."""
    flat = output.reshape(output.shape[0], -1).to(dtype)
    if output.shape[0] == batch:
        return flat, None
    uncond, cond = flat.split(batch)
    return uncond + g * (cond - uncond), cond - uncond


def _forward(x, output, history, weights, index):
    """x_next and the history's slot of every active row, y."""
    check(x, output, history, weights, index)
    batch, slots, dtype = x.shape[0], history.shape[1], weights.dtype
    row = _Row(batch, slots, weights, index)
    state, past = x.reshape(batch, -1).to(dtype), history.reshape(batch, slots, -1)
    m, _ = _combine(output, batch, row.g, dtype)
    y = row.p * state + row.q * m
    total = row.a * state + row.w_now * y
    read = row.past & (row.w != 0)  # an unread slot may hold anything, so mask it: zero times NaN is NaN
    for j in range(slots):
        total = total + torch.where(read[:, j, None], row.w[:, j, None] * past[:, j].to(dtype), 0)
    x_next = torch.where(row.active[:, None], total.to(x.dtype), x.reshape(batch, -1))
    return x_next.reshape(x.shape), y.to(history.dtype).reshape(x.shape)


def multistep_step(x, output, history, weights, index):
    if x.numel() == 0:
        check(x, output, history, weights, index)
        return torch.empty_like(x), torch.empty_like(history)
    x_next, y = _forward(x, output, history, weights, index)
    slot = torch.arange(history.shape[1], device=index.device)
    here = ((slot == index[:, None]) & (slot < weights.shape[1])).reshape(len(index), -1, *(1,) * (x.dim() - 1))
    return x_next, torch.where(here, y[:, None], history)


def multistep_step_(x, output, history, weights, index, out):
    if x.numel() == 0:
        return check(x, output, history, weights, index)
    x_next, y = _forward(x, output, history, weights, index)
    batch, steps = x.shape[0], weights.shape[1]
    step = index.expand(batch)
    shape = (batch,) + (1,) * x.dim()
    at = step.clamp(0, steps - 1).reshape(shape).expand(batch, 1, *x.shape[1:])
    active = ((step >= 0) & (step < steps)).reshape(shape)
    history.scatter_(1, at, torch.where(active, y[:, None], history.gather(1, at)))
    out.copy_(x_next)


def multistep_step_backward(grad_x_next, grad_history_next, x, output, history, weights, index, needs):
    batch, slots, dtype = x.shape[0], history.shape[1], weights.dtype
    if x.numel() == 0:
        return _wanted(
            needs,
            torch.empty_like(x),
            torch.empty_like(output),
            torch.empty_like(history),
            weights.new_zeros(batch, SCALARS + slots),
        )
    row = _Row(batch, slots, weights, index)
    state, past = x.reshape(batch, -1).to(dtype), history.reshape(batch, slots, -1)
    m, difference = _combine(output, batch, row.g, dtype)
    y = row.p * state + row.q * m
    active = row.active[:, None]
    incoming = grad_x_next.reshape(batch, -1).to(dtype)
    g = torch.where(active, incoming, 0)
    grad_now = row.w_now * g
    if grad_history_next is not None:
        later = grad_history_next.reshape(batch, slots, -1).to(dtype)
        grad_now = grad_now + torch.where(row.now[:, :, None], later, 0).sum(1)

    grad_x = torch.where(active, row.a * g + row.p * grad_now, incoming)
    grad_output = row.q * grad_now
    guide = torch.zeros_like(row.a)
    if difference is not None:
        guide = row.q * (difference * grad_now).sum(1, keepdim=True)
        grad_output = torch.cat(((1 - row.g) * grad_output, row.g * grad_output))
    grad_history = torch.where(row.past[:, :, None], row.w[:, :, None] * g[:, None], 0)
    if grad_history_next is not None:
        grad_history = grad_history + torch.where(row.now[:, :, None], 0, later)

    products = torch.where(row.past[:, :, None], past.to(dtype) * g[:, None], 0).sum(2)
    products = products + torch.where(row.now, (y * g).sum(1, keepdim=True), 0)
    scalars = torch.cat(
        [(state * g).sum(1, keepdim=True), (state * grad_now).sum(1, keepdim=True),
         (m * grad_now).sum(1, keepdim=True), guide], 1
    )  # fmt: skip
    return _wanted(
        needs,
        grad_x.to(x.dtype).reshape(x.shape),
        torch.where(active.repeat(output.shape[0] // batch, 1), grad_output, 0).to(output.dtype).reshape(output.shape),
        grad_history.to(history.dtype).reshape(history.shape),
        torch.where(active, torch.cat([scalars, products], 1), 0),
    )


def _wanted(needs, *gradients):
    return tuple(g if need else g.new_empty(0) for need, g in zip(needs, gradients, strict=True))


def multistep_pull(adjoints, weights, index, pair=False):
    batch, steps, dtype = adjoints.shape[0], adjoints.shape[1], weights.dtype
    check_dtypes(adjoints, weights, index, batch)
    if weights.dim() != 3 or weights.shape[0] not in (1, batch) or weights.shape[1] != steps:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; adjoints {tuple(adjoints.shape)} need "
            f"(1 or {batch}, {steps}, {SCALARS} + slots)"
        )
    rows = 2 * batch if pair else batch
    if adjoints.numel() == 0:
        return adjoints.new_empty(adjoints[:, 0].shape), adjoints.new_empty(rows, *adjoints.shape[2:])
    flat = adjoints.reshape(batch, steps, -1)
    row = _Row(batch, weights.shape[2] - SCALARS, weights, index)
    column = (SCALARS + row.index.clamp(0, steps - 1))[:, None, None].expand(batch, steps, 1)
    w = weights.expand(batch, -1, -1).gather(2, column)[:, :, 0]  # (B, N): w_ij of every later step i
    pulled = torch.zeros_like(flat[:, 0], dtype=dtype)
    own = torch.zeros_like(pulled)
    for i in range(steps):
        read = (row.active & (row.index <= i) & (w[:, i] != 0))[:, None]
        pulled = pulled + torch.where(read, w[:, i, None] * flat[:, i].to(dtype), 0)
        own = torch.where((row.active & (row.index == i))[:, None], flat[:, i].to(dtype), own)
    active = row.active[:, None]
    grad_x = torch.where(active, row.a * own + row.p * pulled, 0)
    grad_output = torch.where(active, row.q * pulled, 0)
    if pair:
        grad_output = torch.cat(((1 - row.g) * grad_output, row.g * grad_output))
    shape = adjoints.shape[2:]
    return grad_x.to(adjoints.dtype).reshape(batch, *shape), grad_output.to(adjoints.dtype).reshape(rows, *shape)
