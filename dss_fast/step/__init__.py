"""One solver step, fused: guidance, prediction and multistep sum, on a stacked history or on a list.

`multistep_step` writes y_i into a history that is one tensor and reads its index on the device: for sampling, graphs
and serving. `multistep_update` takes the history as a list, returns y_i and is differentiable: for training.

With 2 N + 1 slots the step also weighs e_j = q_j (g_j - 1) (m_cond - m_uncond), what guidance added to y_j, for tables
that call the unconditional branch at some steps only; without a pair e_i is zero. See `dss_fast.table`.

Gradients, with G that of x_{i+1}, H that of y_i and Y = w_ii G + H: grad x = a G + p Y, grad m = q Y,
grad y_j = w_ij G, and per sample d/da = <x, G>, d/dp = <x, Y>, d/dq = <m, Y>, d/dg = q <m_cond - m_uncond, Y>,
d/dw_ij = <y_j, G>, accumulated in the dtype of the weights.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import extension
from ..table import GUIDANCE, Q
from . import reference as step_reference
from . import shapes

__all__ = ["added_by_guidance", "backends", "multistep_pull", "multistep_step", "multistep_update"]

_SCHEMAS = {
    "multistep_step_": "(Tensor x, Tensor output, Tensor(a!) history, Tensor weights, Tensor index, Tensor(b!) out)"
    " -> ()",
    "multistep_update": "(Tensor x, Tensor output, Tensor[] history, Tensor weights, int step) -> (Tensor, Tensor)",
    # needs: whether the gradients of x, output, history and each row's weights are wanted; the others come back empty
    "multistep_update_backward": "(Tensor? grad_x_next, Tensor? grad_y, Tensor x, Tensor output, Tensor[] history,"
    " Tensor weights, int step, bool[4] needs) -> (Tensor, Tensor, Tensor[], Tensor)",
    "multistep_pull": "(Tensor adjoints, Tensor weights, Tensor index, bool pair=False) -> (Tensor, Tensor)",
}

_ops = torch.ops.dss_fast
# The ops belong to the process: a host that loads the package anew (importlib.reload, plug-ins, autoreload) finds those
# of the first time, and the library that holds them is kept where no module's end takes it along.
_first = "kept" not in vars(_ops)
_library = torch.library.Library("dss_fast", "DEF") if _first else vars(_ops)["kept"]
vars(_ops)["kept"] = _library


def _plain(device: str, why: str) -> ModuleType:
    """The reference, with a warning that says why."""
    message = f"dss_fast runs its {device} step in plain PyTorch, several times slower: {why}."
    warnings.warn(message, RuntimeWarning, stacklevel=6)
    return step_reference


@functools.cache
def _on_cpu() -> ModuleType:
    """What runs where the extension is missing; warns once."""
    return _plain("CPU", extension.missing)


@functools.cache
def _on_cuda() -> ModuleType:
    """Triton's kernels, or what runs where Triton cannot be imported; warns once."""
    try:
        from . import triton
    except ImportError as error:
        how = "Install Triton, `pip install triton`, on Windows `pip install triton-windows`"
        return _plain("CUDA", f"{error}. {how}")
    return triton


def _late(name: str, module: Callable[[], ModuleType]) -> Any:
    """A callable whose first call finds the function and from then on is that function, with no frame between."""

    def first(*args: Any) -> Any:
        function = getattr(module(), name)
        setattr(own, "__call__", staticmethod(function))  # noqa: B010
        return function(*args)

    own = type(name, (), {"__call__": staticmethod(first)})
    return own()


def _register(name: str, schema: str) -> None:
    """The reference serves every device, C++ the CPU where it is built, Triton CUDA where it is installed."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, getattr(step_reference, name), "CompositeExplicitAutograd")
    if extension.compiled is None:
        _library.impl(name, _late(name, _on_cpu), "CPU")
    _library.impl(name, _late(name, _on_cuda), "CUDA")
    torch.library.register_fake(f"dss_fast::{name}", getattr(shapes, name), lib=_library)


for _name, _schema in _SCHEMAS.items() if _first else ():
    _register(_name, _schema)
_step_inplace = _ops.multistep_step_.default
_update: Callable[..., tuple[Tensor, Tensor]] = _ops.multistep_update.default


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps the inputs of multistep_update for its gradient."""
    x, m, history, weights, ctx.step = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, m, weights, *history)


def _backward(
    ctx: Any,
    grad_x_next: Tensor | None,
    grad_y: Tensor | None,
    op: Any = _ops.multistep_update_backward.default,
    needs: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """The gradients of multistep_update's five inputs, None where they are not wanted.

    needs: of each input; None asks ``ctx``. The rows' gradients are summed where all samples share one row of weights.
    """
    x, output, weights, *history = ctx.saved_tensors
    if grad_x_next is None and grad_y is None:
        return None, None, [None] * len(history), None, None
    of_x, of_output, of_history, of_weights, _ = ctx.needs_input_grad if needs is None else needs
    of_history = any(of_history)
    wanted = [of_x, of_output, of_history, of_weights]
    grad_x, grad_output, grads, row = op(grad_x_next, grad_y, x, output, history, weights, ctx.step, wanted)
    grad_weights = None
    if of_weights:
        grad_weights = torch.zeros_like(weights)
        grad_weights[:, ctx.step] = row if len(row) == len(weights) else row.sum(0)
    return (
        grad_x if of_x else None,
        grad_output if of_output else None,
        grads if of_history else [None] * len(history),
        grad_weights,
        None,
    )


if _first:
    torch.library.register_autograd("dss_fast::multistep_update", _backward, setup_context=_save, lib=_library)


class _ModuleUpdate(torch.autograd.Function):
    """The same gradient around a module's functions, for a backend the dispatcher would not have picked."""

    @staticmethod
    def forward(module: ModuleType, step: int, x: Tensor, output: Tensor, weights: Tensor, *history: Tensor) -> Any:
        return module.multistep_update(x, output, history, weights, step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.module, step, x, m, weights, *history = inputs
        _save(ctx, (x, m, history, weights, step), output)

    @staticmethod
    def backward(ctx: Any, grad_x_next: Tensor | None, grad_y: Tensor | None) -> tuple[Any, ...]:
        _, _, x, output, weights, *history = ctx.needs_input_grad
        needs = x, output, history, weights, False
        op = ctx.module.multistep_update_backward
        x, output, history, weights, _ = _backward(ctx, grad_x_next, grad_y, op, needs)
        return None, None, x, output, weights, *history


_update_by: Callable[..., tuple[Tensor, Tensor]] = _ModuleUpdate.apply


def backends(device: torch.device) -> list[str]:
    """Names that `backend=` accepts for tensors on `device`."""
    names = ["reference"]
    if device.type == "cpu" and extension.compiled is not None:
        names.append("cpp")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (device.type == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None:
        names.append("triton")
    return names


def _module(backend: str, device: torch.device) -> ModuleType | None:
    """None where the dispatcher picks `backend` by itself, else the module that holds it."""
    if backend not in backends(device):
        why = f": {extension.missing}" if backend == "cpp" and extension.missing else ""
        raise ValueError(f"backend {backend!r} cannot run on {device}{why}; can: {backends(device)}, or None to choose")
    if backend == "reference":
        return step_reference
    if backend == "triton" and device.type != "cuda":
        return _on_cuda()
    return None


def _have_tangents(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation runs through one of them, or a transform of torch.func around them all."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def multistep_step(
    x: Tensor,
    output: Tensor,
    history: Tensor,
    weights: Tensor,
    index: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of any linear multistep solver, each tensor touched once.

        m_i     = m_uncond + g_i * (m_cond - m_uncond)     if output has 2B rows, else m_i = output
        y_i     = p_i * x_i + q_i * m_i
        x_{i+1} = a_i * x_i + sum_{j<=i} w_ij * y_j [+ w_iN * x_init [+ sum_{j<=i} r_ij * e_j]]

    Args:
        x: (B, *S), float32, float64, bfloat16 or float16.
        output: (B, *S), or (2B, *S) with the unconditional rows first; any of these dtypes.
        history: (B, K, *S), any of these dtypes; slot j holds y_j. K = N; N + 1 when the last slot holds the initial
            noise; 2 N + 1 when behind that stand the e_j, of which the step writes e_i. Slots j > i are never read and
            those whose weight is exactly zero need not be.
        weights: (1 or B, N, 4 + K), float64 for a float64 state, else float32. Columns: a, p, q, guidance, then w_ij,
            then r_ij.
        index: (1,) or (B,), int64, on the same device: every row's step i. A row with i outside [0, N) stays as it is.
        out: where x_next goes when no gradient is needed; may be x itself.
        backend: "reference", "cpp" or "triton"; None picks the fastest that runs.

    Returns:
        (x_next, history). Without a gradient, history is written in place and returned. With one, both are new: that
        is `multistep_update` with the history copied around it, and reads the index back from its device.

    Sums are taken in the dtype of the weights whatever the others are. With a forward-mode tangent on any of the
    tensors, and inside torch.func.grad or vmap, the reference runs, and x_next and history are new.

    Raises:
        ValueError: shapes or dtypes that do not fit, `out` together with a gradient, a gradient of rows at different
            steps, a named backend that cannot run.
    """
    if _have_tangents(x, output, history, weights):
        return _differentiable(x, output, history, weights, index, None, None)
    if torch.is_grad_enabled() and (
        x.requires_grad or output.requires_grad or history.requires_grad or weights.requires_grad
    ):
        return _differentiable(x, output, history, weights, index, out, backend)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    module = None if backend is None else _module(backend, x.device)
    (_step_inplace if module is None else module.multistep_step_)(x, output, history, weights, index, out)
    return out, history


def _differentiable(
    x: Tensor, output: Tensor, history: Tensor, weights: Tensor, index: Tensor, out: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    if out is not None:
        raise ValueError("out= cannot be written where a gradient is needed; leave it out or use torch.no_grad()")
    step_reference.check(x, output, history, weights, index)
    if len(index) != 1:
        raise ValueError(
            f"index has {len(index)} rows; with a gradient all rows take the same step, (1,): use multistep_update, "
            "one call for each step"
        )
    step = int(index)
    steps = weights.shape[1]
    past = [*history[:, :step].unbind(1), *history[:, steps : steps + 1].unbind(1)]
    if history.shape[1] <= steps + 1:
        x_next, y = multistep_update(x, output, past, weights, step, backend=backend)
        return x_next, torch.cat([history[:, :step], y[:, None].to(history.dtype), history[:, step + 1 :]], 1)
    first = steps + 1
    added = added_by_guidance(x, output, weights, step).to(history.dtype)
    past += [*history[:, first : first + step].unbind(1), added]
    x_next, y = multistep_update(x, output, past, weights, step, backend=backend)
    before, after = history[:, step + 1 : first + step], history[:, first + step + 1 :]
    return x_next, torch.cat([history[:, :step], y[:, None].to(history.dtype), before, added[:, None], after], 1)


def added_by_guidance(x: Tensor, output: Tensor, weights: Tensor, step: int) -> Tensor:
    """e_i = q_i (g_i - 1) (m_cond - m_uncond), (B, *S) in the dtype of the weights; zero without a pair."""
    if len(output) == len(x):
        return torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    uncond, cond = output.to(weights.dtype).chunk(2)
    q, g = weights[:, step, Q], weights[:, step, GUIDANCE]
    return (q * (g - 1)).reshape(-1, *[1] * (x.ndim - 1)) * (cond - uncond)


def multistep_update(
    x: Tensor,
    output: Tensor,
    history: Sequence[Tensor],
    weights: Tensor,
    step: int,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The step with its history as a list of tensors, as a training loop keeps it; differentiable, nothing copied.

        y = []
        for i in range(N):
            x, y_i = multistep_update(x, model(x, times[i]), y, weights, i)
            y.append(y_i)

    Args:
        x, output, weights, backend: as for `multistep_step`.
        history: y_0..y_{i-1}, each (B, *S), all of one dtype; where the weights have N + 1 history columns, the
            initial noise behind them; where 2 N + 1, e_0..e_i of :func:`added_by_guidance` behind that. A tensor whose
            weight is exactly zero need not be read.
        step: i, the same for all rows.

    Returns:
        (x_next, y_i), both new, y_i in the dtype of the history, or of x where that is empty.

    Differentiable in x, output, history and weights; the gradient in the weights is the same bits on every run.
    With a forward-mode tangent on any of them, and inside torch.func.grad or vmap, the reference runs.

    Raises:
        ValueError: shapes, dtypes, a step or a number of tensors that do not fit, a named backend that cannot run.
    """
    module = None if backend is None else _module(backend, x.device)
    if _have_tangents(x, output, weights, *history):
        # A registered op has no forward-mode and no batching rule; the reference is plain PyTorch.
        return step_reference.multistep_update(x, output, history, weights, step)
    if module is None:
        return _update(x, output, history, weights, step)
    return _update_by(module, step, x, output, weights, *history)


def multistep_pull(
    adjoints: Tensor, weights: Tensor, index: Tensor, *, pair: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """What the later steps of a rollout send back to step j = index; the path through the model is not included.

        gy = sum_{i>=j} w_ij * g_{i+1};   grad_x = a_j * g_{j+1} + p_j * gy;   grad_output = q_j * gy
        ge = sum_{i>=j} r_ij * g_{i+1}     where the weights have columns for the e_j

    Args:
        adjoints: (B, N, *S); slot i holds g_{i+1}, the gradient of x_{i+1}. Slots below j are not read.
        weights, index, backend: as for `multistep_step`.
        pair: return grad_output as the guided pair (2B, *S): (1 - g_j) q_j (gy + ge), then
            q_j (g_j gy + (g_j - 1) ge).

    Returns:
        (grad_x, grad_output) in the dtype of the adjoints; zero for rows with j outside [0, N).
    """
    module = _ops if backend is None else _module(backend, adjoints.device) or _ops
    return module.multistep_pull(adjoints, weights, index, pair)  # type: ignore[no-any-return]
