"""The multistep step in Triton: kernel and launcher of the step, of its list form, of that one's gradient, of the pull.

Same names and signatures as `dss_fast.step.reference`. A program owns one block of one row; it reads its scalars, and
in the stacked form its step index, from device memory, so a captured graph replays any step. Slots that a step does
not use are masked off, which costs an instruction and no traffic. Under TRITON_INTERPRET=1 the kernels run on CPU
tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from .. import table
from . import shapes
from .launch import Launch, kind_of, launch
from .reference import check, check_pull, check_update

__all__ = ["multistep_pull", "multistep_step_", "multistep_update", "multistep_update_backward"]

# 8 elements a thread make one 128-bit access of a 16-bit tensor and two of a 32-bit one. An H100 needs about 15 KB
# under way on each multiprocessor (3.35 TB/s x 600 ns / 132); one block of 128 threads with 8 slots asks for 16 KB.
BLOCK = 1024
TRIP = 9  # slots loaded together: in float32 they take 72 registers
GROUP = 4  # a list of slots is padded to a multiple of this, so that not every length is compiled
# Registers a thread, by bytes of the state's elements and of a slot's. Left alone, ptxas aims at 64 or fewer and takes
# a trip's loads one after the other; with these, and no more, all of them are under way together (sm_90, sm_80).
REGISTERS = {(4, 4): 128, (2, 4): 128, (4, 2): 96, (2, 2): 80}
LONGEST = 16  # the longest list of slots that fits REGISTERS without spilling

# The columns of a row of weights, as the kernels read them: w_ij stands at W + j.
A, P, Q, G, W = (constexpr(c) for c in (table.A, table.P, table.Q, table.GUIDANCE, table.HISTORY))

_BY_VALUE = ["batch", "blocks", "steps", "slots", "step", "count"]  # a value of 1 or 16 compiles no other kernel
_ANYWHERE = ["index_ptr"]  # index[i : i + 1] is aligned for even i only


def options(state: torch.dtype | None = None, slots: torch.dtype | None = None) -> dict[str, Any]:
    """The compiler's options, by the dtypes of the state and of the slots where many slots are loaded together."""
    chosen: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}  # see _plus
    if state is not None and slots is not None and (state.itemsize, slots.itemsize) in REGISTERS:
        chosen["maxnreg"] = REGISTERS[state.itemsize, slots.itemsize]
    return chosen


def trip(steps: int) -> int:
    """How many slots the step's loop takes at a time: all that the last of N steps reads, in equal trips."""
    past = max(1, steps - 1)
    return -(-past // -(-past // TRIP))


@triton.jit
def _block(size: tensor, blocks: tensor, BLOCK: constexpr) -> tl.tuple:
    """A program's row, its block's first element, the lanes [BLOCK], how many elements are left, and which lanes do."""
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane, left = tl.arange(0, BLOCK), size - start
    return (tl.program_id(0) // blocks).to(tl.int64), start, lane, left, lane < left


@triton.jit
def _here(pointer: tensor, row: tensor, stride: tensor, start: tensor) -> tensor:
    """Address of element `start` of a row, in 64 bits; lanes add their own 32-bit offset."""
    return pointer + row * stride + start


@triton.jit
def _as(value: tensor, pointer: tensor) -> tensor:
    """`value` as what `pointer` stores; sixteen bits are reached by way of float32."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def _plus(total: tensor, weight: tensor, values: tensor) -> tensor:
    """total + weight * values, rounded once. Left to the compiler, p x + q m fuses either product, in one variant of
    a kernel this and in the next that one, and a row has other bits in a batch than alone."""
    return tl.fma(tl.broadcast_to(weight, values.shape), values, total)


@triton.jit
def _plus_slot(total: tensor, past: tensor, weight_ptr: tensor, lane: tensor, left: tensor, wanted: tensor) -> tensor:
    """total + weight * slot; the weight is not read unless wanted, nor the slot under a zero weight."""
    w = tl.load(weight_ptr, mask=wanted, other=0.0)
    slot = tl.load(past + lane, mask=lane < tl.where(w != 0, left, 0), other=0.0)
    return _plus(total, w, slot.to(w.dtype))


@triton.jit(do_not_specialize=_BY_VALUE, do_not_specialize_on_alignment=_ANYWHERE)
def _step_kernel(
    x_ptr: tensor, output_ptr: tensor, history_ptr: tensor, weights_ptr: tensor, index_ptr: tensor, out_ptr: tensor,
    size: tensor, history_row: tensor, history_slot: tensor, batch: tensor,
    blocks: tensor, steps: tensor, slots: tensor,
    PAIR: constexpr, ADDED: constexpr, ROW_WEIGHTS: constexpr, ROW_INDEX: constexpr, UNROLL: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    row, start, lane, left, mask = _block(size, blocks, BLOCK)
    dtype: constexpr = weights_ptr.dtype.element_ty

    step = tl.load(index_ptr + row * ROW_INDEX)
    active = (step >= 0) & (step < steps)
    i = tl.where(active, step, 0)
    read = lane < tl.where(active, left, 0)
    scalars = weights_ptr + (row * ROW_WEIGHTS * steps + i) * (slots + W)
    stored = tl.load(_here(x_ptr, row, size, start) + lane, mask=mask, other=0.0)
    m = tl.load(_here(output_ptr, row, size, start) + lane, mask=read, other=0.0).to(dtype)
    if PAIR:
        cond = tl.load(_here(output_ptr, row + batch, size, start) + lane, mask=read, other=0.0).to(dtype)
        if ADDED:
            added = tl.load(scalars + Q) * (tl.load(scalars + G) - 1) * (cond - m)
        m = _plus(m, tl.load(scalars + G), cond - m)
    elif ADDED:
        added = tl.zeros_like(m)
    x = stored.to(dtype)
    y = _plus(tl.load(scalars + P) * x, tl.load(scalars + Q), m)
    total = _plus(tl.load(scalars + A) * x, tl.load(scalars + W + i), y)

    past = _here(history_ptr, row, history_row, start)
    stride = tl.full((), history_slot, tl.int64)
    used = tl.where(active, i, 0).to(tl.int32)
    for j in range(0, used, UNROLL):
        for k in tl.static_range(UNROLL):
            total = _plus_slot(total, past + (j + k) * stride, scalars + W + j + k, lane, left, j + k < used)
    noise = tl.where(active, slots, 0) > steps  # the slot behind the last step's holds the initial noise
    total = _plus_slot(total, past + steps * stride, scalars + W + steps, lane, left, noise)
    if ADDED:  # behind the noise stand the e_j
        behind, columns = past + (steps + 1) * stride, scalars + W + steps + 1
        own = tl.load(columns + i)
        total = tl.where(own != 0, _plus(total, own, added), total)
        for j in range(0, used, UNROLL):
            for k in tl.static_range(UNROLL):
                total = _plus_slot(total, behind + (j + k) * stride, columns + j + k, lane, left, j + k < used)
        tl.store(behind + i * stride + lane, _as(added, history_ptr), mask=read)

    tl.store(_here(out_ptr, row, size, start) + lane, tl.where(active, _as(total, out_ptr), stored), mask=mask)
    tl.store(past + i * stride + lane, _as(y, history_ptr), mask=read)


def multistep_step_(x: Tensor, output: Tensor, history: Tensor, weights: Tensor, index: Tensor, out: Tensor) -> None:
    """One launch for all rows; strided tensors are copied first. See the reference of the same name."""
    tensors = x, output, history, weights, index, out
    kind, pointers = kind_of(tensors, "step")
    known = Launch.known.get(kind)
    if known is not None:
        return known(*pointers)
    check(x, output, history, weights, index)
    if out.shape != x.shape or out.dtype is not x.dtype:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; needed is {x.dtype} {tuple(x.shape)} like x")
    if x.numel() == 0:
        return None
    whole = [_samples_contiguous(t) if t is history else t.contiguous() for t in tensors]
    if any(a is not b for a, b in zip(whole, tensors, strict=True)):
        multistep_step_(*whole)
        for mine, given in ((whole[2], history), (whole[5], out)):
            if mine is not given:
                given.copy_(mine)
        return None
    batch, steps, slots = x.shape[0], weights.shape[1], history.shape[1]
    size = x.numel() // batch
    blocks = triton.cdiv(size, BLOCK)
    return launch(
        kind, _step_kernel, batch * blocks, tensors,
        (size, history.stride(0), history.stride(1), batch, blocks, steps, slots),
        PAIR=output.shape[0] != batch, ADDED=slots > steps + 1, ROW_WEIGHTS=weights.shape[0] != 1,
        ROW_INDEX=index.shape[0] != 1, UNROLL=trip(steps), BLOCK=BLOCK, **options(x.dtype, history.dtype),
    )  # fmt: skip


def _samples_contiguous(history: Tensor) -> Tensor:
    """A slice of a larger history serves as long as every sample is contiguous."""
    return history if history.is_contiguous() or history[0, 0].is_contiguous() else history.contiguous()


@triton.jit(do_not_specialize=_BY_VALUE)
def _update_kernel(
    x_ptr: tensor, output_ptr: tensor, weights_ptr: tensor, next_ptr: tensor, y_ptr: tensor, history: tl.tuple,
    size: tensor, batch: tensor, blocks: tensor, steps: tensor,
    slots: tensor, step: tensor, count: tensor,
    PAIR: constexpr, ROW_WEIGHTS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row, start, lane, left, mask = _block(size, blocks, BLOCK)
    dtype: constexpr = weights_ptr.dtype.element_ty
    scalars = weights_ptr + (row * ROW_WEIGHTS * steps + step) * (slots + W)
    x = tl.load(_here(x_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
    m = tl.load(_here(output_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
    if PAIR:
        cond = tl.load(_here(output_ptr, row + batch, size, start) + lane, mask=mask, other=0.0).to(dtype)
        m = _plus(m, tl.load(scalars + G), cond - m)
    y = _plus(tl.load(scalars + P) * x, tl.load(scalars + Q), m)
    total = _plus(tl.load(scalars + A) * x, tl.load(scalars + W + step), y)
    for k in tl.static_range(len(history)):
        column = tl.where(k < step, k, steps + k - step)  # behind the predictions stand the noise and the e_j
        total = _plus_slot(total, _here(history[k], row, size, start), scalars + W + column, lane, left, k < count)
    tl.store(_here(next_ptr, row, size, start) + lane, _as(total, next_ptr), mask=mask)
    tl.store(_here(y_ptr, row, size, start) + lane, _as(y, y_ptr), mask=mask)


def multistep_update(
    x: Tensor, output: Tensor, history: Sequence[Tensor], weights: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    x_next, y = shapes.multistep_update(x, output, history, weights, step)
    fixed = x, output, weights, x_next, y
    kind, pointers = kind_of((*fixed, *history), "update", step)
    known = Launch.known.get(kind)
    if known is not None:
        known(*pointers[:5], _padded(pointers[5:]))
        return x_next, y
    check_update(x, output, history, weights, step)
    if x.numel() == 0:
        return x_next, y
    given = x, output, *history, weights
    whole = [t.contiguous() for t in given]
    if any(a is not b for a, b in zip(whole, given, strict=True)):
        return multistep_update(whole[0], whole[1], whole[2:-1], whole[-1], step)
    batch, steps, slots = x.shape[0], weights.shape[1], weights.shape[2] - table.HISTORY
    size = x.numel() // batch
    blocks = triton.cdiv(size, BLOCK)
    chosen = options(x.dtype, y.dtype) if len(history) <= LONGEST else options()
    launch(
        kind, _update_kernel, batch * blocks, (*fixed, _padded(history)),
        (size, batch, blocks, steps, slots, step, len(history)),
        PAIR=output.shape[0] != batch, ROW_WEIGHTS=weights.shape[0] != 1, BLOCK=BLOCK, **chosen,
    )  # fmt: skip
    return x_next, y


def _padded(slots: Sequence[Any]) -> tuple[Any, ...]:
    """A list of slots as the kernels take it, the first one standing for those past its end."""
    return (*slots, *[slots[0]] * (-len(slots) % GROUP)) if slots else ()


@triton.jit(do_not_specialize=_BY_VALUE)
def _update_backward_kernel(
    grad_ptr: tensor, grad_y_ptr: tensor, x_ptr: tensor, output_ptr: tensor, weights_ptr: tensor,
    dx_ptr: tensor, doutput_ptr: tensor, sums_ptr: tensor, history: tl.tuple, dhistory: tl.tuple,
    size: tensor, batch: tensor, blocks: tensor, steps: tensor,
    slots: tensor, step: tensor, count: tensor,
    PAIR: constexpr, ROW_WEIGHTS: constexpr, NEXT: constexpr, OWN: constexpr,
    X: constexpr, OUTPUT: constexpr, HISTORY: constexpr, ROW: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row, start, lane, left, mask = _block(size, blocks, BLOCK)
    dtype: constexpr = weights_ptr.dtype.element_ty
    scalars = weights_ptr + (row * ROW_WEIGHTS * steps + step) * (slots + W)
    p, q, now = tl.load(scalars + P), tl.load(scalars + Q), tl.load(scalars + W + step)

    x = tl.load(_here(x_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
    m = tl.load(_here(output_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
    g = tl.zeros_like(x)
    if NEXT:
        g = tl.load(_here(grad_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
    total = now * g
    if OWN:
        own = tl.load(_here(grad_y_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
        total = _plus(own, now, g)
    grad_m = q * total
    if PAIR:
        cond = tl.load(_here(output_ptr, row + batch, size, start) + lane, mask=mask, other=0.0).to(dtype)
        scale = tl.load(scalars + G)
        difference = cond - m
        m = _plus(m, scale, difference)
        if OUTPUT:
            tl.store(_here(doutput_ptr, row, size, start) + lane, _as((1 - scale) * grad_m, doutput_ptr), mask=mask)
            tl.store(_here(doutput_ptr, row + batch, size, start) + lane, _as(scale * grad_m, doutput_ptr), mask=mask)
    elif OUTPUT:
        tl.store(_here(doutput_ptr, row, size, start) + lane, _as(grad_m, doutput_ptr), mask=mask)
    if X:
        dx = _plus(tl.load(scalars + A) * g, p, total)
        tl.store(_here(dx_ptr, row, size, start) + lane, _as(dx, dx_ptr), mask=mask)

    sums = sums_ptr + tl.program_id(0).to(tl.int64) * (slots + W)
    if ROW:
        tl.store(sums + A, tl.sum(x * g, axis=0))
        tl.store(sums + P, tl.sum(x * total, axis=0))
        tl.store(sums + Q, tl.sum(m * total, axis=0))
        if PAIR:
            tl.store(sums + G, q * tl.sum(difference * total, axis=0))
        tl.store(sums + W + step, tl.sum(_plus(p * x, q, m) * g, axis=0))
    for k in tl.static_range(0, len(history), 2):  # both loads stand before the stores, so that neither waits
        here = _here(history[k], row, size, start) + lane
        there = _here(history[k + 1], row, size, start) + lane
        one, two = tl.where(k < step, k, steps + k - step), tl.where(k + 1 < step, k + 1, steps + k + 1 - step)
        if ROW:
            slot0 = tl.load(here, mask=lane < tl.where(k < count, left, 0), other=0.0).to(dtype)
            slot1 = tl.load(there, mask=lane < tl.where(k + 1 < count, left, 0), other=0.0).to(dtype)
        if HISTORY:
            w0 = tl.load(scalars + W + one, mask=k < count, other=0.0)
            w1 = tl.load(scalars + W + two, mask=k + 1 < count, other=0.0)
            d0, d1 = dhistory[k], dhistory[k + 1]
            at0, at1 = _here(d0, row, size, start) + lane, _here(d1, row, size, start) + lane
            tl.store(at0, _as(w0 * g, d0), mask=lane < tl.where(k < count, left, 0))
            tl.store(at1, _as(w1 * g, d1), mask=lane < tl.where(k + 1 < count, left, 0))
        if ROW:
            tl.store(sums + W + one, tl.sum(slot0 * g, axis=0), mask=k < count)
            tl.store(sums + W + two, tl.sum(slot1 * g, axis=0), mask=k + 1 < count)


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
    dx, doutput, dhistory, row = needs
    batch = x.shape[0]
    blocks = triton.cdiv(x.numel() // batch, BLOCK) if x.numel() else 0
    grads = x.new_empty(x.shape if dx else 0), output.new_empty(output.shape if doutput else 0)
    slots_grads = [y.new_empty(y.shape) for y in history] if dhistory else []
    sums = weights.new_zeros((batch, blocks, weights.shape[-1]) if row else 0)
    fixed = (x if grad_x_next is None else grad_x_next, x if grad_y is None else grad_y, x, output, weights,
             *grads, sums)  # fmt: skip
    given = grad_x_next is not None, grad_y is not None
    kind, pointers = kind_of((*fixed, *history, *slots_grads), "update_backward", step, *needs, *given)
    known = Launch.known.get(kind)
    past = 8 + len(history)
    if known is not None:
        known(*pointers[:8], _padded(pointers[8:past]), _padded(pointers[past:] or pointers[8:past]))
    elif x.numel():
        check_update(x, output, history, weights, step)
        inputs = [*fixed[:5], *history]
        whole = [t.contiguous() for t in inputs]
        if any(a is not b for a, b in zip(whole, inputs, strict=True)):
            next_, own = (t if have else None for t, have in zip(whole[:2], given, strict=True))
            return multistep_update_backward(next_, own, whole[2], whole[3], whole[5:], whole[4], step, needs)
        launch(
            kind, _update_backward_kernel, batch * blocks,
            (*fixed, _padded(history), _padded(slots_grads or history)),
            (x.numel() // batch, batch, blocks, weights.shape[1], weights.shape[2] - table.HISTORY, step, len(history)),
            PAIR=output.shape[0] != batch, ROW_WEIGHTS=weights.shape[0] != 1, NEXT=given[0], OWN=given[1],
            X=dx, OUTPUT=doutput, HISTORY=dhistory, ROW=row, BLOCK=BLOCK, **options(),
        )  # fmt: skip
    return *grads, slots_grads, sums.sum(1) if row else sums


@triton.jit(do_not_specialize=_BY_VALUE, do_not_specialize_on_alignment=_ANYWHERE)
def _pull_kernel(
    adjoints_ptr: tensor, weights_ptr: tensor, index_ptr: tensor, dx_ptr: tensor, doutput_ptr: tensor,
    size: tensor, adjoints_row: tensor, adjoints_slot: tensor, batch: tensor,
    blocks: tensor, steps: tensor, slots: tensor,
    PAIR: constexpr, ADDED: constexpr, ROW_WEIGHTS: constexpr, ROW_INDEX: constexpr, UNROLL: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    row, start, lane, left, mask = _block(size, blocks, BLOCK)
    dtype: constexpr = weights_ptr.dtype.element_ty

    step = tl.load(index_ptr + row * ROW_INDEX)
    active = (step >= 0) & (step < steps)
    j = tl.where(active, step, 0)
    read = lane < tl.where(active, left, 0)
    columns = slots + W
    table = weights_ptr + row * ROW_WEIGHTS * steps * columns
    scalars = table + j * columns
    stride = tl.full((), adjoints_slot, tl.int64)
    adjoints = _here(adjoints_ptr, row, adjoints_row, start)
    own = tl.load(adjoints + j * stride + lane, mask=read, other=0.0).to(dtype)
    pulled = tl.load(scalars + W + j) * own
    first = tl.where(active, j, steps).to(tl.int32) + 1
    for i in range(first, steps, UNROLL):
        for k in tl.static_range(UNROLL):
            later = table + (i + k) * columns + W + j
            pulled = _plus_slot(pulled, adjoints + (i + k) * stride, later, lane, left, i + k < steps)
    if PAIR and ADDED:
        column = W + steps + 1 + j
        difference = tl.load(scalars + column) * own
        for i in range(first, steps, UNROLL):
            for k in tl.static_range(UNROLL):
                later = table + (i + k) * columns + column
                difference = _plus_slot(difference, adjoints + (i + k) * stride, later, lane, left, i + k < steps)

    dx = tl.where(active, _plus(tl.load(scalars + A) * own, tl.load(scalars + P), pulled), 0.0)
    tl.store(_here(dx_ptr, row, size, start) + lane, _as(dx, dx_ptr), mask=mask)
    grad_m = tl.where(active, tl.load(scalars + Q) * pulled, 0.0)
    if PAIR:
        scale = tl.load(scalars + G)
        uncond, cond = (1 - scale) * grad_m, scale * grad_m
        if ADDED:
            moved = tl.where(active, tl.load(scalars + Q) * (scale - 1) * difference, 0.0)
            uncond, cond = uncond - moved, cond + moved
        tl.store(_here(doutput_ptr, row, size, start) + lane, _as(uncond, doutput_ptr), mask=mask)
        tl.store(_here(doutput_ptr, row + batch, size, start) + lane, _as(cond, doutput_ptr), mask=mask)
    else:
        tl.store(_here(doutput_ptr, row, size, start) + lane, _as(grad_m, doutput_ptr), mask=mask)


def multistep_pull(adjoints: Tensor, weights: Tensor, index: Tensor, pair: bool = False) -> tuple[Tensor, Tensor]:
    check_pull(adjoints, weights, index)
    batch, steps = adjoints.shape[:2]
    dx, doutput = shapes.multistep_pull(adjoints, weights, index, pair)
    adjoints, weights, index = _samples_contiguous(adjoints), weights.contiguous(), index.contiguous()
    tensors = adjoints, weights, index, dx, doutput
    kind, pointers = kind_of(tensors, "pull")
    known = Launch.known.get(kind)
    if known is not None:
        known(*pointers)
    elif dx.numel():
        size = dx.numel() // batch
        blocks = triton.cdiv(size, BLOCK)
        launch(
            kind, _pull_kernel, batch * blocks, tensors,
            (size, adjoints.stride(0), adjoints.stride(1), batch, blocks, steps, weights.shape[2] - table.HISTORY),
            PAIR=pair, ADDED=pair and weights.shape[2] - table.HISTORY > steps + 1, ROW_WEIGHTS=weights.shape[0] != 1,
            ROW_INDEX=index.shape[0] != 1, UNROLL=trip(steps), BLOCK=BLOCK, **options(adjoints.dtype, adjoints.dtype),
        )  # fmt: skip
    return dx, doutput
