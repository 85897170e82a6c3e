"""unroll: N steps of a solver as one differentiable function, in the memory of one model call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..denoiser import NO_GRAPH, check_untouched, modules_of, naming_step, undonated, versions
from ..step.reference import fits
from ..table import HISTORY
from . import reference
from .kept import FirstCall, Kept, budget_bytes

__all__ = ["Gradients", "Kept", "Rollout", "backends", "unroll"]

INPUTS = ("x", "weights", "times")

Model = Callable[[Tensor, Tensor], Tensor]


class Gradients(NamedTuple):
    """What :meth:`Rollout.pull` returns, for C cotangents. Inputs outside ``wrt`` give None.

    x: (C, B, *S). weights: (C, B, N, 4 + K). times: (C, B, N). All per sample: sum over B for a shared table.
    parameters: one (C, *shape) per tensor of ``parameters``; None where no call of the model used it.
    """

    x: Tensor | None
    weights: Tensor | None
    times: Tensor | None
    parameters: tuple[Tensor | None, ...]


class Rollout:
    """N solver steps run forward once, pulled back for several cotangents at a time.

        m_i     = model(x_i, t_i)         [B rows, or 2B: m_u + g_i (m_c - m_u) of unconditional and conditional]
        y_i     = p_i x_i + q_i m_i
        x_{i+1} = a_i x_i + sum_{j<=i} w_ij y_j [+ w_iN x_0]

    The forward keeps the states and the y_j, not the activations. ``pull`` walks back, re-runs one model
    call at a time with gradients on, and pulls all cotangents through it before it goes on.

    model: called as model(x, t) -> (B, *S) or (2B, *S); any callable. The two runs of a call see the same
        random numbers and the same autocast. x: (B, *S), float. t: (B,), x's dtype, float32 for half precision.
    weights: (R, N, 4 + K), R = 1 or B: columns a, p, q, guidance, w_i0...; K = N, N + 1 for the noise x_0, or 2 N + 1
        for what guidance added to each prediction.
    times: (N,) or (B, N), fed to the model at each step.
    memory_budget: keeps as many of the last graphs as fit, which saves re-running those calls: None no graph, bytes
        (int), a fraction (float in (0, 1]) of the free device memory, or "auto", 512 MB, on a GPU half of what is free
        there. A graph counts with the tensors that it saves for its backward, the modules' own aside. The reference
        keeps none whatever the budget.
    parameters: other tensors the model reads, to differentiate: its weights, its conditions.
    both: of each step whether it calls both branches, as StepTable says; where it does not, the model is called with a
        third argument, False, and returns (B, *S). None: all are called alike.
    wrt: which of x, weights and times ``pull`` differentiates; leaving x and times out spares the first call.
    backend: "cpp", "reference", or None for the first of them that runs. The reference is plain autograd with
        torch.utils.checkpoint around the model, which runs again for each cotangent.

    states: (B, N, *S), x_1..x_N. history: (B, K, *S). kept: :class:`Kept`, the graphs in memory.

    Raises ValueError for what does not fit and for a named backend that cannot run, RuntimeError when the model changes
    its own buffers. What the model raises comes through as it is, with the step as a note.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        weights: Tensor,
        times: Tensor,
        *,
        memory_budget: int | float | str | None = None,
        parameters: Sequence[Tensor] = (),
        wrt: Sequence[str] = INPUTS,
        both: Sequence[bool] | None = None,
        backend: str | None = None,
    ):
        parameters = tuple(parameters)
        _check(x, weights, times, parameters, wrt)
        steps, budget = weights.shape[1], budget_bytes(memory_budget, x.device)
        self._dtypes = x.dtype, weights.dtype, times.dtype
        engine, first = _engine(backend), None
        if budget is not None and (wrt or parameters) and engine is not reference.Engine:
            first = FirstCall(steps, budget, model, (x, *parameters))
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            self._engine = engine(
                _guard(model, x, steps, first, both),
                x.detach().contiguous(),
                weights.detach().to(x.device, real).contiguous(),
                times.detach().to(x.device, real).expand(len(x), steps).contiguous(),
                first and first.graphs,
                list(parameters),
                [name in wrt for name in INPUTS],
            )
        self.kept = first.kept if first else Kept(steps, budget_bytes=budget)
        self._shape, self._device = (len(x), steps, *x.shape[1:]), x.device
        self.states, self.history = self._engine.states, self._engine.history

    def pull(self, cotangents: Tensor, *, retain_graph: bool = False) -> Gradients:
        """The gradients of <cotangents[c], states> for each c, sharing one re-run of the model.

        cotangents: (C, B, *S) at the end point, or (C, B, N, *S) along the trajectory.
        retain_graph: allow another pull; otherwise states, history and graphs are let go on the way.

        Raises RuntimeError at a second pull after one that did not retain.
        """
        B, N, *S = self._shape
        if tuple(cotangents.shape[1:]) not in ((B, *S), (B, N, *S)) or not cotangents.is_floating_point():
            raise ValueError(
                f"cotangents are {cotangents.dtype} {tuple(cotangents.shape)}; give floats of shape "
                f"{('C', B, *S)} at the end point or {('C', B, N, *S)} along the trajectory"
            )
        gx, gw, gt, gp = self._engine.pull(cotangents.detach().to(self._device), retain_graph)
        x, weights, times = (g if g is None else g.to(d) for g, d in zip((gx, gw, gt), self._dtypes, strict=True))
        return Gradients(x, weights, times, tuple(gp))


def unroll(
    model: Model,
    x: Tensor,
    weights: Tensor,
    times: Tensor,
    *,
    memory_budget: int | float | str | None = None,
    parameters: Sequence[Tensor] = (),
    backend: str | None = None,
) -> Tensor:
    """The states x_1..x_N of a rollout, (B, N, *S), differentiable in x, weights, times and parameters.

    The formula, the arguments and the errors are those of :class:`Rollout`. Gradients are those of plain
    autograd through the loop; the peak is one model call's activations plus states and history instead of N
    calls', for one more run of each call not kept. Backward twice needs retain_graph, as anywhere;
    create_graph raises RuntimeError.
    """
    options = dict(memory_budget=memory_budget, backend=backend)
    return _unrolled(model, options, x, weights, times, *parameters)


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: Model, options: Any, x: Tensor, weights: Tensor, times: Tensor, *given: Any) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        ctx.wanted = [i for i, wanted in enumerate(needed[3:]) if wanted]
        wrt = [name for name, wanted in zip(INPUTS, needed[:3], strict=True) if wanted]
        parameters = [given[i] for i in ctx.wanted]
        rollout = Rollout(model, x, weights, times, parameters=parameters, wrt=wrt, **options)
        ctx.save_for_backward(x, weights, times)
        if wrt or parameters:
            ctx.rollout = rollout
        # The output is a tensor of its own: it holds this node, which holds the rollout and its states.
        states: Tensor = rollout.states.to(x.device).detach()
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "unroll has no second derivatives (create_graph=True): it re-runs the model to save memory; "
                "differentiate a loop over multistep_update instead"
            )
        _, weights, times = ctx.saved_tensors
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        rollout = ctx.rollout
        if not keep:
            del ctx.rollout
        gx, gw, gt, gp = rollout.pull(grad_states[None], retain_graph=keep)
        gx = None if gx is None else gx[0]
        gw = None if gw is None else gw[0].sum_to_size(weights.shape)
        gt = None if gt is None else gt[0].sum_to_size(times.shape)
        found = dict(zip(ctx.wanted, gp, strict=True))
        gp = [None if found.get(i) is None else found[i][0] for i in range(len(ctx.needs_input_grad) - 5)]
        return None, None, gx, gw, gt, *gp  # model and options have no gradient


_unrolled: Callable[..., Tensor] = _Unroll.apply


def backends() -> list[str]:
    """Names that `backend=` accepts."""
    return ["reference"] if extension.compiled is None else ["reference", "cpp"]


def _engine(backend: str | None) -> Any:
    """The engine of a name; None: the compiled one where there is one, else the reference."""
    if backend not in (None, *backends()):
        why = f": {extension.missing}" if backend == "cpp" else ""
        raise ValueError(f"backend {backend!r} cannot run here{why}; can: {backends()}, or None to choose")
    if backend == "reference" or extension.compiled is None:
        return reference.Engine
    return extension.compiled.Engine


def _guard(
    model: Callable[..., Tensor], x: Tensor, steps: int, first: FirstCall | None, both: Sequence[bool] | None
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """model as the engines call it, (step, x, t) -> output: errors name the step, output and buffers are checked."""
    watched = [(name, buffer) for module in modules_of(model) for name, buffer in module.named_buffers()]
    counts = [buffer._version for _, buffer in watched if not buffer.is_inference()]
    shapes = x.shape, (2 * len(x), *x.shape[1:])

    def call(step: int, x: Tensor, t: Tensor) -> Tensor:
        watching = first.watching(x) if first else nullcontext()
        given = {"x": x, "t": t}
        before = versions(given)
        with naming_step(step, steps):
            with undonated(), watching:
                output = model(x, t) if both is None or both[step] else model(x, t, False)
            check_untouched(given, before)
            if not isinstance(output, Tensor) or output.shape not in shapes or not output.is_floating_point():
                got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
                raise ValueError(
                    f"the model returned {got}; give floats of shape {tuple(shapes[0])}, or {tuple(shapes[1])} "
                    "for unconditional and conditional rows"
                )
            if torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
                raise RuntimeError(NO_GRAPH)
            changed = [n for (n, b), v in zip(watched, counts, strict=False) if b._version != v]
            if changed:
                raise RuntimeError(
                    f"the model changed its buffers {', '.join(changed[:3])} while running, so running it again "
                    "would not give the same gradients; call model.eval() or freeze those layers"
                )
            if first:
                first.settle(output)
        return output

    return call


def _check(x: Tensor, weights: Tensor, times: Tensor, parameters: Sequence[Tensor], wrt: Sequence[str]) -> None:
    """Raises what :class:`Rollout` says, before the model is called."""
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; give floats of shape (B, *S)")
    rows, steps = len(x), weights.shape[1] if weights.ndim == 3 else 0
    slots = weights.shape[-1] - HISTORY
    if weights.ndim != 3 or weights.shape[0] not in (1, rows) or not fits(steps, slots) or not steps:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; give (R, N, {HISTORY} + K) with R = 1 or {rows}, "
            "K = N, N + 1 or 2 N + 1"
        )
    if tuple(times.shape) not in ((steps,), (rows, steps)):
        raise ValueError(f"times have shape {tuple(times.shape)}; give ({steps},) or ({rows}, {steps})")
    if not (weights.is_floating_point() and times.is_floating_point()):
        raise ValueError(f"weights are {weights.dtype}, times {times.dtype}; both must be floating point")
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor) or not parameter.requires_grad:
            raise ValueError(f"parameters[{i}] is not a tensor that requires grad; leave it out or make it one")
    if set(wrt) - set(INPUTS):
        raise ValueError(f"wrt={tuple(wrt)!r}: choose from {', '.join(INPUTS)}")
    if torch.is_inference_mode_enabled() and (wrt or parameters):
        raise RuntimeError("a rollout to differentiate cannot run under torch.inference_mode(); use torch.no_grad()")
