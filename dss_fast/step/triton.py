"""The multistep step in Triton: forward kernel, launcher, backward kernel, launcher, pull kernel, launcher.

Same names and signatures as `dss_fast.step.reference`. A program owns one block of one row; it reads its step index
and its scalars from device memory, so a captured graph replays any step. Slots that a step does not use are masked
off, which costs an instruction and no traffic. Under TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

import torch
import triton
import triton.language as tl

from .reference import SCALARS, check, check_dtypes

__all__ = ["multistep_pull", "multistep_step", "multistep_step_", "multistep_step_backward"]

# 8 elements a thread make one 128-bit access of a 16-bit tensor and two of a 32-bit one. An H100 needs about 15 KB
# under way on each multiprocessor (3.35 TB/s x 600 ns / 132); one block of 128 threads with 8 slots asks for 16 KB.
BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Left alone, ptxas aims the float64 backward at 168 registers and then spills some (sm_90, a float32 history).
DOUBLE_OPTIONS = {**OPTIONS, "maxnreg": 224}

_BY_VALUE = ["batch", "blocks", "steps", "slots"]  # no new compilation when one of these is 1 or 16


@triton.jit
def _here(pointer, row, stride, start):
    """Address of element `start` of a row, in 64 bits; lanes add their own 32-bit offset."""
    return pointer + row * stride + start


@triton.jit
def _as(value, pointer):
    """`value` as what `pointer` stores; sixteen bits are reached by way of float32."""
    if value.dtype == tl.float64 and pointer.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def _slot(past, weight_ptr, stride, lane, left, wanted):
    """weight * slot; the weight is not read unless wanted, nor the slot under a zero weight."""
    w = tl.load(weight_ptr, mask=wanted, other=0.0)
    slot = tl.load(past + stride + lane, mask=lane < tl.where(w != 0, left, 0), other=0.0)
    return w * slot.to(w.dtype)


@triton.jit(do_not_specialize=_BY_VALUE)
def _forward_kernel(
    x_ptr, output_ptr, history_ptr, weights_ptr, index_ptr, next_ptr, out_ptr,
    size, history_row, history_slot, next_row, next_slot, batch, blocks, steps, slots,
    PAIR: tl.constexpr, ROW_WEIGHTS: tl.constexpr, ROW_INDEX: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    left = size - start
    mask = lane < left
    dtype: tl.constexpr = weights_ptr.dtype.element_ty

    step = tl.load(index_ptr + row * ROW_INDEX)
    active = (step >= 0) & (step < steps)
    i = tl.where(active, step, 0)
    read = lane < tl.where(active, left, 0)
    scalars = weights_ptr + (row * ROW_WEIGHTS * steps + i) * (slots + 4)
    stored = tl.load(_here(x_ptr, row, size, start) + lane, mask=mask, other=0.0)
    m = tl.load(_here(output_ptr, row, size, start) + lane, mask=read, other=0.0).to(dtype)
    if PAIR:
        cond = tl.load(_here(output_ptr, row + batch, size, start) + lane, mask=read, other=0.0).to(dtype)
        m += tl.load(scalars + 3) * (cond - m)
    x = stored.to(dtype)
    y = tl.load(scalars + 1) * x + tl.load(scalars + 2) * m
    total = tl.load(scalars) * x + tl.load(scalars + 4 + i) * y

    past = _here(history_ptr, row, history_row, start)
    stride = tl.full((), history_slot, tl.int64)
    fresh = _here(next_ptr, row, next_row, start)
    width = tl.full((), next_slot, tl.int64)
    if IN_PLACE:
        used = tl.where(active, i, 0).to(tl.int32)
        for j in range(0, used, 8):
            for k in tl.static_range(8):
                total += _slot(past, scalars + 4 + j + k, (j + k) * stride, lane, left, j + k < used)
        noise = tl.where(active, slots, 0) > steps  # the slot past the last step holds the initial noise
        total += _slot(past, scalars + 4 + steps, steps * stride, lane, left, noise)
    else:  # a new history: every slot is copied, whatever it holds, and those of the past are summed on the way
        for j in range(0, slots, 4):
            for k in tl.static_range(4):
                wanted = active & ((j + k < i) | (j + k == steps)) & (j + k < slots)
                w = tl.load(scalars + 4 + j + k, mask=wanted, other=0.0)
                within = lane < tl.where(j + k < slots, left, 0)
                slot = tl.load(past + (j + k) * stride + lane, mask=within, other=0.0)
                total += w * tl.where(w != 0, slot.to(dtype), 0.0)  # so that it is one fused product and sum
                other = lane < tl.where((j + k < slots) & ((j + k != i) | (step != i)), left, 0)
                tl.store(fresh + (j + k) * width + lane, slot, mask=other)

    tl.store(_here(out_ptr, row, size, start) + lane, tl.where(active, _as(total, out_ptr), stored), mask=mask)
    tl.store(fresh + i * width + lane, _as(y, next_ptr), mask=read)


def _launch_forward(x, output, history, weights, index, history_next, out):
    batch, slots, steps = x.shape[0], history.shape[1], weights.shape[1]
    size = x.numel() // batch
    blocks = triton.cdiv(size, BLOCK)
    _forward_kernel[(batch * blocks,)](
        x, output, history, weights, index, history_next, out,
        size, history.stride(0), history.stride(1), history_next.stride(0), history_next.stride(1),
        batch, blocks, steps, slots,
        PAIR=output.shape[0] != batch, ROW_WEIGHTS=weights.shape[0] != 1, ROW_INDEX=index.shape[0] != 1,
        IN_PLACE=history_next is history, BLOCK=BLOCK, **OPTIONS,
    )  # fmt: skip


def multistep_step_(x, output, history, weights, index, out):
    check(x, output, history, weights, index)
    if out.shape != x.shape or out.dtype is not x.dtype:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}; needed is {x.dtype} {tuple(x.shape)} like x")
    if x.numel() == 0:
        return
    slots = _samples_contiguous(history)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    inputs = x.contiguous(), output.contiguous(), slots, weights.contiguous(), index.contiguous()
    _launch_forward(*inputs, slots, target)
    if slots is not history:
        history.copy_(slots)
    if target is not out:
        out.copy_(target)


def multistep_step(x, output, history, weights, index):
    check(x, output, history, weights, index)
    out, history_next = x.new_empty(x.shape), history.new_empty(history.shape)
    if x.numel():
        inputs = x.contiguous(), output.contiguous(), _samples_contiguous(history)
        _launch_forward(*inputs, weights.contiguous(), index.contiguous(), history_next, out)
    return out, history_next


def _samples_contiguous(history):
    """A slice of a larger history serves as long as every sample is contiguous."""
    return history if history.is_contiguous() or history[0, 0].is_contiguous() else history.contiguous()


@triton.jit
def _slot_backward(slot, g, grad, grad_ptr, sum_ptr, now, at_now, lane, left, valid,
                   HISTORY: tl.constexpr, ROW: tl.constexpr):  # fmt: skip
    """Stores grad y_j and d/dw_ij = <y_j, G> of one slot; slot i takes the sum it was given."""
    if HISTORY:
        tl.store(grad_ptr + lane, _as(grad, grad_ptr), mask=lane < tl.where(valid, left, 0))
    if ROW:
        tl.store(sum_ptr, tl.where(now, at_now, tl.sum(slot * g, axis=0)), mask=valid)


@triton.jit(do_not_specialize=_BY_VALUE)
def _backward_kernel(
    grad_ptr, grad_next_ptr, x_ptr, output_ptr, history_ptr, weights_ptr, index_ptr,
    dx_ptr, doutput_ptr, dhistory_ptr, sums_ptr,
    size, history_row, history_slot, batch, blocks, steps, slots,
    PAIR: tl.constexpr, ROW_WEIGHTS: tl.constexpr, ROW_INDEX: tl.constexpr, LATER: tl.constexpr,
    X: tl.constexpr, OUTPUT: tl.constexpr, HISTORY: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    left = size - start
    mask = lane < left
    dtype: tl.constexpr = weights_ptr.dtype.element_ty

    step = tl.load(index_ptr + row * ROW_INDEX)
    active = (step >= 0) & (step < steps)
    i = tl.where(active, step, 0)
    read = lane < tl.where(active, left, 0)
    scalars = weights_ptr + (row * ROW_WEIGHTS * steps + i) * (slots + 4)
    p, q, now = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 4 + i)

    incoming = tl.load(_here(grad_ptr, row, size, start) + lane, mask=mask, other=0.0).to(dtype)
    x = tl.load(_here(x_ptr, row, size, start) + lane, mask=read, other=0.0).to(dtype)
    m = tl.load(_here(output_ptr, row, size, start) + lane, mask=read, other=0.0).to(dtype)
    g = tl.where(active, incoming, 0.0).to(dtype)
    total = now * g
    width = tl.full((), size, tl.int64)
    later = _here(grad_next_ptr, row, slots * width, start)
    if LATER:
        total += tl.load(later + i * width + lane, mask=read, other=0.0).to(dtype)
    grad_m = q * total
    if PAIR:
        cond = tl.load(_here(output_ptr, row + batch, size, start) + lane, mask=read, other=0.0).to(dtype)
        scale = tl.load(scalars + 3)
        difference = cond - m
        m += scale * difference
        if OUTPUT:
            tl.store(_here(doutput_ptr, row, size, start) + lane, _as((1 - scale) * grad_m, doutput_ptr), mask=mask)
            tl.store(_here(doutput_ptr, row + batch, size, start) + lane, _as(scale * grad_m, doutput_ptr), mask=mask)
    elif OUTPUT:
        tl.store(_here(doutput_ptr, row, size, start) + lane, _as(grad_m, doutput_ptr), mask=mask)
    if X:
        dx = tl.where(active, tl.load(scalars) * g + p * total, incoming)
        tl.store(_here(dx_ptr, row, size, start) + lane, _as(dx, dx_ptr), mask=mask)

    sums = sums_ptr + program * (slots + 4)
    at_now = now
    if ROW:
        at_now = tl.sum((p * x + q * m) * g, axis=0)
        tl.store(sums, tl.sum(x * g, axis=0))
        tl.store(sums + 1, tl.sum(x * total, axis=0))
        tl.store(sums + 2, tl.sum(m * total, axis=0))
        if PAIR:
            tl.store(sums + 3, q * tl.sum(difference * total, axis=0))

    if HISTORY or ROW:
        stride = tl.full((), history_slot, tl.int64)
        past = _here(history_ptr, row, history_row, start)
        dpast = _here(dhistory_ptr, row, slots * width, start)
        for j in range(0, slots, 2):  # both loads stand before the stores, so that they are under way together
            past0 = active & ((j < i) | (j == steps))
            past1 = active & ((j + 1 < i) | (j + 1 == tl.where(slots > steps, steps, 0)))
            w0 = tl.load(scalars + 4 + j, mask=past0, other=0.0)
            w1 = tl.load(scalars + 5 + j, mask=past1, other=0.0)
            slot0, slot1 = g, g
            if ROW:
                slot0 = tl.load(past + j * stride + lane, mask=lane < tl.where(past0, left, 0), other=0.0).to(dtype)
                at1 = past + (j + 1) * stride + lane
                slot1 = tl.load(at1, mask=lane < tl.where(past1, left, 0), other=0.0).to(dtype)
            now0, now1 = active & (j == i), active & (j + 1 == i)
            grad0, grad1 = w0 * g, w1 * g
            if LATER and HISTORY:
                at0, at1 = later + j * width + lane, later + (j + 1) * width + lane
                grad0 += tl.load(at0, mask=lane < tl.where(now0, 0, left), other=0.0).to(dtype)
                kept = tl.where(now1 | (j + 1 >= slots), 0, left)
                grad1 += tl.load(at1, mask=lane < kept, other=0.0).to(dtype)
            _slot_backward(slot0, g, grad0, dpast + j * width, sums + 4 + j, now0, at_now,
                           lane, left, j < slots, HISTORY, ROW)  # fmt: skip
            _slot_backward(slot1, g, grad1, dpast + (j + 1) * width, sums + 5 + j, now1, at_now,
                           lane, left, j + 1 < slots, HISTORY, ROW)  # fmt: skip


def multistep_step_backward(grad_x_next, grad_history_next, x, output, history, weights, index, needs):
    check(x, output, history, weights, index)
    batch, slots, steps = x.shape[0], history.shape[1], weights.shape[1]
    dx, doutput, dhistory, row = needs
    blocks = triton.cdiv(x.numel() // batch, BLOCK) if x.numel() else 0
    grads = (
        x.new_empty(x.shape if dx else 0),
        output.new_empty(output.shape if doutput else 0),
        history.new_empty(history.shape if dhistory else 0),
    )
    sums = weights.new_zeros((batch, blocks, SCALARS + slots) if row else 0)
    if x.numel():
        past = _samples_contiguous(history)
        grad_x_next, x = grad_x_next.contiguous(), x.contiguous()
        size = x.numel() // batch
        _backward_kernel[(batch * blocks,)](
            grad_x_next, x if grad_history_next is None else grad_history_next.contiguous(),
            x, output.contiguous(), past, weights.contiguous(), index.contiguous(), *grads, sums,
            size, past.stride(0), past.stride(1), batch, blocks, steps, slots,
            PAIR=output.shape[0] != batch, ROW_WEIGHTS=weights.shape[0] != 1, ROW_INDEX=index.shape[0] != 1,
            LATER=grad_history_next is not None, X=dx, OUTPUT=doutput, HISTORY=dhistory, ROW=row,
            BLOCK=BLOCK, **(DOUBLE_OPTIONS if weights.dtype is torch.float64 else OPTIONS),
        )  # fmt: skip
    return *grads, sums.sum(1) if row else sums


@triton.jit(do_not_specialize=_BY_VALUE)
def _pull_kernel(
    adjoints_ptr, weights_ptr, index_ptr, dx_ptr, doutput_ptr,
    size, adjoints_row, adjoints_slot, batch, blocks, steps, slots,
    PAIR: tl.constexpr, ROW_WEIGHTS: tl.constexpr, ROW_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    left = size - start
    mask = lane < left
    dtype: tl.constexpr = weights_ptr.dtype.element_ty

    step = tl.load(index_ptr + row * ROW_INDEX)
    active = (step >= 0) & (step < steps)
    j = tl.where(active, step, 0)
    read = lane < tl.where(active, left, 0)
    columns = slots + 4
    table = weights_ptr + row * ROW_WEIGHTS * steps * columns
    scalars = table + j * columns
    stride = tl.full((), adjoints_slot, tl.int64)
    adjoints = _here(adjoints_ptr, row, adjoints_row, start)
    own = tl.load(adjoints + j * stride + lane, mask=read, other=0.0).to(dtype)
    pulled = tl.zeros_like(own)
    first = tl.where(active, j, steps).to(tl.int32)
    for i in range(first, steps, 4):
        for k in tl.static_range(4):
            later = table + (i + k) * columns + 4 + j
            pulled += _slot(adjoints, later, (i + k) * stride, lane, left, i + k < steps)

    dx = tl.where(active, tl.load(scalars) * own + tl.load(scalars + 1) * pulled, 0.0)
    tl.store(_here(dx_ptr, row, size, start) + lane, _as(dx, dx_ptr), mask=mask)
    grad_m = tl.where(active, tl.load(scalars + 2) * pulled, 0.0)
    if PAIR:
        scale = tl.load(scalars + 3)
        tl.store(_here(doutput_ptr, row, size, start) + lane, _as((1 - scale) * grad_m, doutput_ptr), mask=mask)
        tl.store(_here(doutput_ptr, row + batch, size, start) + lane, _as(scale * grad_m, doutput_ptr), mask=mask)
    else:
        tl.store(_here(doutput_ptr, row, size, start) + lane, _as(grad_m, doutput_ptr), mask=mask)


def multistep_pull(adjoints, weights, index, pair=False):
    batch, steps, *sample = adjoints.shape
    check_dtypes(adjoints, weights, index, batch)
    slots = weights.shape[-1] - SCALARS
    if weights.dim() != 3 or weights.shape[0] not in (1, batch) or weights.shape[1] != steps or slots < steps:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; adjoints {tuple(adjoints.shape)} need "
            f"(1 or {batch}, {steps}, {SCALARS} + slots)"
        )
    dx = adjoints.new_empty(batch, *sample)
    doutput = adjoints.new_empty(2 * batch if pair else batch, *sample)
    if dx.numel():
        adjoints, size = _samples_contiguous(adjoints), dx.numel() // batch
        blocks = triton.cdiv(size, BLOCK)
        _pull_kernel[(batch * blocks,)](
            adjoints, weights.contiguous(), index.contiguous(), dx, doutput,
            size, adjoints.stride(0), adjoints.stride(1), batch, blocks, steps, slots,
            PAIR=pair, ROW_WEIGHTS=weights.shape[0] != 1, ROW_INDEX=index.shape[0] != 1,
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return dx, doutput
