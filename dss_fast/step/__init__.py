"""multistep_step: guidance, prediction, history write and multistep sum of one solver step, fused.

    m_i     = m_uncond + g_i * (m_cond - m_uncond)          when output holds both halves, 2B rows
    y_i     = p_i * x_i + q_i * m_i
    x_{i+1} = a_i * x_i + sum_{j<=i} w_ij * y_j [+ w_iN * x_init]

Gradients, with G that of x_{i+1}, H_j that of the new history's slot j and Y = w_ii G + H_i: grad x = a G + p Y,
grad m = q Y, grad y_j = w_ij G + H_j, and per sample d/da = <x, G>, d/dp = <x, Y>, d/dq = <m, Y>,
d/dg = q <m_cond - m_uncond, Y>, d/dw_ij = <y_j, G>, accumulated in the dtype of the weights.
"""

import os
import warnings

import torch
from torch import Tensor

from . import reference as step_reference

__all__ = ["backends", "multistep_pull", "multistep_step"]

_SCHEMAS = {
    "multistep_step": "(Tensor x, Tensor output, Tensor history, Tensor weights, Tensor index) -> (Tensor, Tensor)",
    "multistep_step_": "(Tensor x, Tensor output, Tensor(a!) history, Tensor weights, Tensor index, Tensor(b!) out)"
    " -> ()",
    # needs: whether the gradients of x, output, history and each row's weights are wanted; the others come back empty
    "multistep_step_backward": "(Tensor grad_x_next, Tensor? grad_history_next, Tensor x, Tensor output,"
    " Tensor history, Tensor weights, Tensor index, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "multistep_pull": "(Tensor adjoints, Tensor weights, Tensor index, bool pair=False) -> (Tensor, Tensor)",
}

try:
    if os.environ.get("DSS_FAST_NO_EXTENSION"):
        raise ImportError("DSS_FAST_NO_EXTENSION is set")
    import dss_fast._C  # noqa: F401  registers the ops' CPU kernels

    _no_extension = None
except ImportError as error:
    _no_extension = str(error)

_library = torch.library.Library("dss_fast", "DEF")


def _register(name, schema):
    """The reference serves every device, C++ the CPU where it is built, Triton CUDA."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    reference = getattr(step_reference, name)
    _library.impl(name, reference, "CompositeExplicitAutograd")

    def without_extension(*args):
        _warn_no_extension()
        return reference(*args)

    def triton(*args):
        from . import triton as step_triton

        with torch.cuda.device(args[0].get_device()):  # Triton launches on the current one
            return getattr(step_triton, name)(*args)

    if _no_extension is not None:
        _library.impl(name, without_extension, "CPU")
    _library.impl(name, triton, "CUDA")


_warned = False


def _warn_no_extension():
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"dss_fast runs its CPU step in plain PyTorch, several times slower: {_no_extension}. "
            "Install a C++ compiler and reinstall to build the extension.",
            RuntimeWarning,
            stacklevel=3,
        )


for _name, _schema in _SCHEMAS.items():
    _register(_name, _schema)
_ops = torch.ops.dss_fast
_step, _step_inplace = _ops.multistep_step.default, _ops.multistep_step_.default


@torch.library.register_fake("dss_fast::multistep_step", lib=_library)
def _(x, output, history, weights, index):
    return x.new_empty(x.shape), history.new_empty(history.shape)


@torch.library.register_fake("dss_fast::multistep_step_", lib=_library)
def _(x, output, history, weights, index, out):
    return None


@torch.library.register_fake("dss_fast::multistep_step_backward", lib=_library)
def _(grad_x_next, grad_history_next, x, output, history, weights, index, needs):
    shapes = (x, x.shape), (output, output.shape), (history, history.shape), (weights, (x.shape[0], weights.shape[2]))
    return tuple(t.new_empty(shape if need else 0) for need, (t, shape) in zip(needs, shapes, strict=True))


@torch.library.register_fake("dss_fast::multistep_pull", lib=_library)
def _(adjoints, weights, index, pair=False):
    batch, _, *sample = adjoints.shape
    return adjoints.new_empty(batch, *sample), adjoints.new_empty(2 * batch if pair else batch, *sample)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_x_next, grad_history_next, op=_ops.multistep_step_backward.default, needs=None):
    x, output, history, weights, index = ctx.saved_tensors
    if grad_x_next is None and grad_history_next is None:
        return None, None, None, None, None
    if grad_x_next is None:
        grad_x_next = torch.zeros_like(x)
    needs = list((ctx.needs_input_grad if needs is None else needs)[:4])
    gradients = op(grad_x_next, grad_history_next, x, output, history, weights, index, needs)
    grad_x, grad_output, grad_history, grad_row = (g if n else None for g, n in zip(gradients, needs, strict=True))
    grad_weights = None if grad_row is None else _scatter_rows(grad_row, weights, index)
    return grad_x, grad_output, grad_history, grad_weights, None


def _scatter_rows(grad_row, weights, index):
    """(B, 4 + K) per-sample gradients of each row's own step -> the gradient of `weights` (1 or B, N, 4 + K)."""
    here = index[:, None] == torch.arange(weights.shape[1], device=index.device)
    grad = torch.where(here[:, :, None], grad_row[:, None], 0)
    return grad if weights.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)


torch.library.register_autograd("dss_fast::multistep_step", _backward, setup_context=_save, lib=_library)


class _ModuleStep(torch.autograd.Function):
    """The same gradient around a module's functions, for a backend the dispatcher would not have picked."""

    @staticmethod
    def forward(module, *inputs):
        return module.multistep_step(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.module = inputs[0]
        _save(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_backward(ctx, *grads, ctx.module.multistep_step_backward, ctx.needs_input_grad[1:])


def backends(device: torch.device) -> list[str]:
    """Names that `backend=` accepts for tensors on `device`."""
    names = ["reference"]
    if device.type == "cpu" and _no_extension is None:
        names.append("cpp")
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        names.append("triton")
    return names


def _module(backend, device):
    """None where the dispatcher picks `backend` by itself, else the module that holds it."""
    if backend not in backends(device):
        why = f": {_no_extension}" if backend == "cpp" and _no_extension else ""
        raise ValueError(f"backend {backend!r} cannot run on {device}{why}; can: {backends(device)}, or None to choose")
    if backend == "reference":
        return step_reference
    if backend == "triton" and device.type != "cuda":
        from . import triton as step_triton

        return step_triton
    return None


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
        x_{i+1} = a_i * x_i + sum_{j<=i} w_ij * y_j [+ w_iN * x_init]

    Args:
        x: (B, *S), float32, float64, bfloat16 or float16.
        output: (B, *S), or (2B, *S) with the unconditional rows first; any of these dtypes.
        history: (B, K, *S), any of these dtypes; slot j holds y_j. K = N, or N + 1 when the last slot holds the
            initial noise. Slots j > i are never read and those whose weight is exactly zero need not be.
        weights: (1 or B, N, 4 + K), float64 for a float64 state, else float32. Columns: a, p, q, guidance, then w_ij.
        index: (1,) or (B,), int64, on the same device: every row's step i. A row with i outside [0, N) stays as it is.
        out: where x_next goes when no gradient is needed; may be x itself.
        backend: "reference", "cpp" or "triton"; None picks the fastest that runs.

    Returns:
        (x_next, history). Without a gradient, history is written in place and returned. With one, both are new.

    Sums are taken in the dtype of the weights whatever the others are. Differentiable in x, output, history and
    weights; the gradient in the weights is the same bits on every run.

    Raises:
        ValueError: shapes or dtypes that do not fit, `out` together with a gradient, a named backend that cannot run.
    """
    module = None if backend is None else _module(backend, x.device)
    if torch.is_grad_enabled() and (
        x.requires_grad or output.requires_grad or history.requires_grad or weights.requires_grad
    ):
        if out is not None:
            raise ValueError("out= cannot be written where a gradient is needed; leave it out or use torch.no_grad()")
        inputs = (x, output, history, weights, index)
        return _step(*inputs) if module is None else _ModuleStep.apply(module, *inputs)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (_step_inplace if module is None else module.multistep_step_)(x, output, history, weights, index, out)
    return out, history


def multistep_pull(
    adjoints: Tensor, weights: Tensor, index: Tensor, *, pair: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """What the later steps of a rollout send back to step j = index; the path through the model is not included.

        gy = sum_{i>=j} w_ij * g_{i+1};   grad_x = a_j * g_{j+1} + p_j * gy;   grad_output = q_j * gy

    Args:
        adjoints: (B, N, *S); slot i holds g_{i+1}, the gradient of x_{i+1}. Slots below j are not read.
        weights, index, backend: as for `multistep_step`.
        pair: return grad_output as the guided pair (2B, *S): (1 - g_j) q_j gy, then g_j q_j gy.

    Returns:
        (grad_x, grad_output) in the dtype of the adjoints; zero for rows with j outside [0, N).
    """
    module = _ops if backend is None else _module(backend, adjoints.device) or _ops
    return module.multistep_pull(adjoints, weights, index, pair)
