"""The multistep step in plain PyTorch: the definition of correct, for any device.

Every function here has the name and the signature of a registered op in `dss_fast.step`, where the equation and
the shapes are written down. Nothing here is tuned; the sums run in a fixed order so that a batch and its rows
taken one by one give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..table import GUIDANCE, HISTORY, A, P, Q
from . import shapes

__all__ = [
    "check",
    "check_update",
    "multistep_update",
    "multistep_update_backward",
    "multistep_pull",
    "multistep_step_",
]


def fits(steps: int, slots: int) -> bool:
    """Whether N steps may have so many slots: the predictions, the initial noise behind them, and behind it what
    guidance added to each prediction."""
    return slots in (steps, steps + 1, 2 * steps + 1)


def taken(step: int, steps: int, slots: int) -> int:
    """How many tensors a step's list of slots holds: the predictions before it, the noise, its own e_i and those
    before."""
    return step + (slots > steps) + (step + 1) * (slots > steps + 1)


def check(x: Tensor, output: Tensor, history: Tensor, weights: Tensor, index: Tensor) -> None:
    """Raise ValueError where shapes or dtypes break the contract of `dss_fast.step.multistep_step`."""
    batch, sample = x.shape[0], x.shape[1:]
    _check_output(x, output)
    if history.dim() != x.dim() + 1 or history.shape[0] != batch or history.shape[2:] != sample:
        raise ValueError(
            f"history has shape {tuple(history.shape)}; x {tuple(x.shape)} needs (batch {batch}, slots, {sample})"
        )
    slots = history.shape[1]
    _check_weights(weights, x)
    if weights.shape[2] != HISTORY + slots:
        raise ValueError(
            f"weights {tuple(weights.shape)} do not fit a history of {slots} slots: N steps take (R, N, {HISTORY} + "
            "slots) with N slots, N + 1 when the last one holds the initial noise, or 2 N + 1"
        )
    _check_index(index, batch)


def check_update(x: Tensor, output: Tensor, history: Sequence[Tensor], weights: Tensor, step: int) -> None:
    """Raise ValueError where the arguments break the contract of `dss_fast.step.multistep_update`."""
    _check_output(x, output)
    _check_weights(weights, x)
    steps, slots = weights.shape[1], weights.shape[2] - HISTORY
    if not 0 <= step < steps:
        raise ValueError(f"step is {step}; weights {tuple(weights.shape)} are for the steps 0 to {steps - 1}")
    wanted = taken(step, steps, slots)
    if len(history) != wanted:
        noise = ", the initial noise behind them," if slots > steps else ""
        noise += f" the {step + 1} parts of guidance behind it," if slots > steps + 1 else ""
        raise ValueError(
            f"history holds {len(history)} tensors; step {step} with weights {tuple(weights.shape)} takes the {step} "
            f"predictions before it{noise} {wanted} in all"
        )
    for j, y in enumerate(history):
        if y.shape != x.shape or y.dtype is not history[0].dtype:
            raise ValueError(
                f"history[{j}] is {y.dtype} {tuple(y.shape)}; needed is {history[0].dtype} {tuple(x.shape)} like x "
                "and like the rest of the history"
            )


def check_pull(adjoints: Tensor, weights: Tensor, index: Tensor) -> None:
    """Raise ValueError where shapes or dtypes break the contract of `dss_fast.step.multistep_pull`."""
    if adjoints.dim() < 2:
        raise ValueError(f"adjoints have shape {tuple(adjoints.shape)}; needed is (batch, steps, *sample)")
    batch, steps = adjoints.shape[:2]
    _check_weights(weights, adjoints)
    _check_index(index, batch)
    if weights.shape[1] != steps:
        raise ValueError(f"weights {tuple(weights.shape)} are for {weights.shape[1]} steps and adjoints hold {steps}")


def _check_output(x: Tensor, output: Tensor) -> None:
    batch, sample = x.shape[0], x.shape[1:]
    if output.shape[0] not in (batch, 2 * batch) or output.shape[1:] != sample:
        raise ValueError(
            f"output has shape {tuple(output.shape)}; x {tuple(x.shape)} allows {(batch, *sample)} or, guided, "
            f"{(2 * batch, *sample)} with the unconditional rows first"
        )


def _check_weights(weights: Tensor, x: Tensor) -> None:
    """N rows of HISTORY + N or N + 1 columns for x's rows; float64 for a float64 state and float32 for any other."""
    batch = x.shape[0]
    sound = weights.dim() == 3 and weights.shape[0] in (1, batch)
    if not sound or not fits(weights.shape[1], weights.shape[2] - HISTORY):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; N steps take (1 or {batch}, N, {HISTORY} + N), or one column "
            "more for the initial noise, or N more behind it for what guidance added"
        )
    wanted = torch.float64 if x.dtype is torch.float64 else torch.float32
    if weights.dtype is not wanted:
        raise ValueError(f"weights are {weights.dtype}; a {x.dtype} state needs {wanted}, use weights.to(...)")


def _check_index(index: Tensor, batch: int) -> None:
    if index.dtype is not torch.int64 or index.dim() != 1 or index.shape[0] not in (1, batch):
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; needed is torch.int64 of shape (1,) or ({batch},)"
        )


class _Row:
    """The scalars of every row at its own step, and masks over the history's slots."""

    def __init__(self, batch: int, slots: int, weights: Tensor, index: Tensor):
        steps = weights.shape[1]
        self.index = index.expand(batch)
        self.active, at = (self.index >= 0) & (self.index < steps), self.index.clamp(0, steps - 1)
        row = weights.expand(batch, -1, -1).gather(1, at[:, None, None].expand(batch, 1, weights.shape[2]))[:, 0]
        self.a, self.p, self.q, self.g = row[:, :HISTORY, None].unbind(1)  # each (B, 1)
        self.w = row[:, HISTORY:]  # (B, K)
        slot = torch.arange(slots, device=index.device)
        self.now = (slot == self.index[:, None]) & self.active[:, None]
        added = slot - steps - 1  # which step's e_j a slot holds, where it is not negative
        earlier = torch.where(added < 0, slot, added) < self.index[:, None]
        self.past = (earlier | (slot == steps)) & self.active[:, None]
        self.w_now = torch.where(self.now, self.w, 0).sum(1, keepdim=True)
        self.own = (added == self.index[:, None]) & self.active[:, None]
        self.r_now = torch.where(self.own, self.w, 0).sum(1, keepdim=True)


def _combine(output: Tensor, batch: int, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The guided output and m_cond - m_uncond, (B, D) each; None where there is no pair."""
    flat = output.reshape(output.shape[0], -1).to(dtype)
    if output.shape[0] == batch:
        return flat, None
    uncond, cond = flat.split(batch)
    return uncond + g * (cond - uncond), cond - uncond


def multistep_step_(
    x: Tensor, output: Tensor, history: Tensor, weights: Tensor, index: Tensor, out: Tensor
) -> None:  # fmt: skip
    """Writes y_i into slot i of the history and x_{i+1} into ``out``, see `dss_fast.step.multistep_step`."""
    check(x, output, history, weights, index)
    if x.numel() == 0:
        return
    batch, slots, steps, dtype = x.shape[0], history.shape[1], weights.shape[1], weights.dtype
    row = _Row(batch, slots, weights, index)
    state, past = x.reshape(batch, -1).to(dtype), history.reshape(batch, slots, -1)
    m, difference = _combine(output, batch, row.g, dtype)
    y = row.p * state + row.q * m
    total = row.a * state + row.w_now * y
    written = [(y, 0)]
    if slots > steps + 1:
        added = torch.zeros_like(y) if difference is None else row.q * (row.g - 1) * difference
        total = total + torch.where(row.r_now != 0, row.r_now * added, 0)
        written.append((added, steps + 1))
    read = row.past & (row.w != 0)  # an unread slot may hold anything, and zero times NaN is NaN: it is masked
    for j in range(slots):
        total = total + torch.where(read[:, j, None], row.w[:, j, None] * past[:, j].to(dtype), 0)
    x_next = torch.where(row.active[:, None], total.to(x.dtype), x.reshape(batch, -1))

    shape = (batch,) + (1,) * x.dim()
    for value, first in written:
        at = (first + row.index.clamp(0, steps - 1)).reshape(shape).expand(batch, 1, *x.shape[1:])
        stored = value.to(history.dtype).reshape(batch, 1, *x.shape[1:])
        history.scatter_(1, at, torch.where(row.active.reshape(shape), stored, history.gather(1, at)))
    out.copy_(x_next.reshape(x.shape))


class _ListRow:
    """The scalars of one step, (R, 1) each, and of each tensor of a list its column and its weights (R, 1)."""

    def __init__(self, history: Sequence[Tensor], weights: Tensor, step: int):
        row, steps = weights[:, step], weights.shape[1]
        # Behind all predictions stand the initial noise and what guidance added.
        self.columns = [HISTORY + (j if j < step else steps + j - step) for j in range(len(history))]
        self.a, self.p, self.q, self.g = row[:, :HISTORY, None].unbind(1)
        self.now = row[:, HISTORY + step, None]
        self.w = [row[:, column, None] for column in self.columns]


def multistep_update(
    x: Tensor, output: Tensor, history: Sequence[Tensor], weights: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """(x_{i+1}, y_i), both new, see `dss_fast.step.multistep_update`."""
    check_update(x, output, history, weights, step)
    kept = history[0].dtype if history else x.dtype
    if x.numel() == 0:
        return shapes.multistep_update(x, output, history, weights, step)
    batch, dtype = x.shape[0], weights.dtype
    row = _ListRow(history, weights, step)
    state = x.reshape(batch, -1).to(dtype)
    m, _ = _combine(output, batch, row.g, dtype)
    y = row.p * state + row.q * m
    total = row.a * state + row.now * y
    for w, slot in zip(row.w, history, strict=True):
        total = total + torch.where(w != 0, w * slot.reshape(batch, -1).to(dtype), 0)
    return total.to(x.dtype).reshape(x.shape), y.to(kept).reshape(x.shape)


def multistep_update_backward(
    grad_x_next: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor,
    output: Tensor,
    history: Sequence[Tensor],
    weights: Tensor,
    step: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The gradients of x, of the output, of each past tensor and of each sample's row of weights (B, 4 + K).

    The formulas stand in `dss_fast.step`. grad_x_next, grad_y: None for zero.
    needs: which of the four are wanted; the others come back empty.
    """
    batch, dtype = x.shape[0], weights.dtype
    needs_x, needs_output, needs_history, needs_row = needs
    if x.numel() == 0:
        grads = shapes.multistep_update_backward(grad_x_next, grad_y, x, output, history, weights, step, needs)
        grads[3].zero_()
        return grads
    row = _ListRow(history, weights, step)
    state, past = x.reshape(batch, -1).to(dtype), [y.reshape(batch, -1).to(dtype) for y in history]
    m, difference = _combine(output, batch, row.g, dtype)
    g = torch.zeros_like(state) if grad_x_next is None else grad_x_next.reshape(batch, -1).to(dtype)
    grad_now = row.now * g
    if grad_y is not None:
        grad_now = grad_now + grad_y.reshape(batch, -1).to(dtype)

    grad_x = row.a * g + row.p * grad_now
    grad_output = row.q * grad_now
    guide = row.q.new_zeros(batch, 1)
    if difference is not None:
        guide = row.q * (difference * grad_now).sum(1, keepdim=True)
        grad_output = torch.cat(((1 - row.g) * grad_output, row.g * grad_output))
    grad_history = [(w * g).to(y.dtype).reshape(y.shape) for w, y in zip(row.w, history, strict=True)]

    grad_row = weights.new_zeros(batch, weights.shape[2])
    y = row.p * state + row.q * m
    for column, value in ((A, state * g), (P, state * grad_now), (Q, m * grad_now)):
        grad_row[:, column] = value.sum(1)
    grad_row[:, GUIDANCE] = guide[:, 0]
    grad_row[:, HISTORY + step] = (y * g).sum(1)
    for column, slot in zip(row.columns, past, strict=True):
        grad_row[:, column] = (slot * g).sum(1)
    return (
        grad_x.to(x.dtype).reshape(x.shape) if needs_x else x.new_empty(0),
        grad_output.to(output.dtype).reshape(output.shape) if needs_output else output.new_empty(0),
        grad_history if needs_history else [],
        grad_row if needs_row else weights.new_empty(0),
    )


def multistep_pull(adjoints: Tensor, weights: Tensor, index: Tensor, pair: bool = False) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_output) of step j = index, see `dss_fast.step.multistep_pull`."""
    check_pull(adjoints, weights, index)
    batch, steps, dtype = adjoints.shape[0], adjoints.shape[1], weights.dtype
    rows = 2 * batch if pair else batch
    if adjoints.numel() == 0:
        return shapes.multistep_pull(adjoints, weights, index, pair)
    flat = adjoints.reshape(batch, steps, -1)
    row = _Row(batch, weights.shape[2] - HISTORY, weights, index)

    def sum_of(first: int) -> Tensor:
        """sum_{i>=j} of g_{i+1} under the weights of column first + j."""
        column = (first + row.index.clamp(0, steps - 1))[:, None, None].expand(batch, steps, 1)
        w = weights.expand(batch, -1, -1).gather(2, column)[:, :, 0]  # (B, N), of every later step i
        total = torch.zeros_like(flat[:, 0], dtype=dtype)
        for i in range(steps):
            read = (row.active & (row.index <= i) & (w[:, i] != 0))[:, None]
            total = total + torch.where(read, w[:, i, None] * flat[:, i].to(dtype), 0)
        return total

    pulled = sum_of(HISTORY)
    own = torch.zeros_like(pulled)
    for i in range(steps):
        own = torch.where((row.active & (row.index == i))[:, None], flat[:, i].to(dtype), own)
    active = row.active[:, None]
    grad_x = torch.where(active, row.a * own + row.p * pulled, 0)
    grad_output = torch.where(active, row.q * pulled, 0)
    if pair:
        uncond, cond = (1 - row.g) * grad_output, row.g * grad_output
        if weights.shape[2] - HISTORY > steps + 1:
            added = torch.where(active, row.q * (row.g - 1) * sum_of(HISTORY + steps + 1), 0)
            uncond, cond = uncond - added, cond + added
        grad_output = torch.cat((uncond, cond))
    shape = adjoints.shape[2:]
    return grad_x.to(adjoints.dtype).reshape(batch, *shape), grad_output.to(adjoints.dtype).reshape(rows, *shape)
