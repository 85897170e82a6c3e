"""unroll: N steps of a solver as one differentiable function, in the memory of one model call."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import NO_GRAPH, check_untouched, modules_of, versions
from ..table import HISTORY

__all__ = ["Gradients", "Plan", "Rollout", "unroll"]

BACKENDS = ("cpp", "reference")
INPUTS = ("x", "weights", "times")


class Gradients(NamedTuple):
    """What :meth:`Rollout.pull` returns, for C cotangents. Inputs outside ``wrt`` give None.

    x: (C, B, *S). weights: (C, B, N, 4 + K). times: (C, B, N). All per sample: sum over B for a shared table.
    parameters: one (C, *shape) per tensor of ``parameters``; None where no call of the model used it.
    """

    x: Tensor | None
    weights: Tensor | None
    times: Tensor | None
    parameters: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Plan:
    """What a rollout keeps between its forward and its backward.

    kept: the graphs of the last ``kept`` of ``steps`` calls. activation_bytes: what one such graph saves for its
    backward, measured at the first call; None when nothing was measured. budget_bytes: None when nothing is kept.
    """

    steps: int
    kept: int
    activation_bytes: int | None = None
    budget_bytes: int | None = None

    def __str__(self) -> str:
        text = f"keeps the graphs of {self.kept} of {self.steps} model calls, re-runs {self.steps - self.kept}"
        if self.activation_bytes is not None and self.budget_bytes is not None:
            text += f"; one graph {self.activation_bytes / 1e6:.3g} MB, budget {self.budget_bytes / 1e6:.3g} MB"
        return text


class Rollout:
    """N solver steps run forward once, pulled back for several cotangents at a time.

        m_i     = model(x_i, t_i)         [B rows, or 2B: m_u + g_i (m_c - m_u) of unconditional and conditional]
        y_i     = p_i x_i + q_i m_i
        x_{i+1} = a_i x_i + sum_{j<=i} w_ij y_j [+ w_iN x_0]

    The forward keeps the states and the y_j, not the activations. ``pull`` walks back, re-runs one model
    call at a time with gradients on, and pulls all cotangents through it before it goes on.

    model: called as model(x, t) -> (B, *S) or (2B, *S); any callable. The two runs of a call see the same
        random numbers and the same autocast. x: (B, *S), float. t: (B,), x's dtype, float32 for half precision.
    weights: (R, N, 4 + K), R = 1 or B: columns a, p, q, guidance, w_i0...; K = N, or N + 1 for the noise x_0.
    times: (N,) or (B, N), fed to the model at each step.
    memory_budget: None keeps no graph; bytes (int) or a fraction (float in (0, 1]) of the free device memory
        keeps as many of the last graphs as fit, which saves re-running those calls. A graph counts with the tensors
        that it saves for its backward, the modules' own aside. The reference keeps none whatever the budget.
    parameters: other tensors the model reads, to differentiate: its weights, its conditions.
    wrt: which of x, weights and times ``pull`` differentiates; leaving x and times out spares the first call.
    backend: "cpp", "reference", or None for the first of them that works. The reference is plain autograd with
        torch.utils.checkpoint around the model, which runs again for each cotangent.

    states: (B, N, *S), x_1..x_N. history: (B, K, *S). plan: a :class:`Plan`.

    Raises ValueError for what does not fit, RuntimeError when the model changes its own buffers. What the
    model raises comes through as it is, with the step as a note.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        weights: Tensor,
        times: Tensor,
        *,
        memory_budget: int | float | None = None,
        parameters: Sequence[Tensor] = (),
        wrt: Sequence[str] = INPUTS,
        backend: str | None = None,
    ):
        parameters = tuple(parameters)
        _check(x, weights, times, parameters, wrt)
        steps, budget = weights.shape[1], _budget_bytes(memory_budget, x.device)
        self._dtypes = x.dtype, weights.dtype, times.dtype
        engine, first = _engine(backend), None
        if budget is not None and (wrt or parameters) and engine is not _reference():
            first = _FirstCall(steps, budget, _kept_anyway(model, x, parameters))
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            self._engine = engine(
                _guard(model, x, steps, first),
                x.detach().contiguous(),
                weights.detach().to(x.device, real).contiguous(),
                times.detach().to(x.device, real).expand(len(x), steps).contiguous(),
                first and first.kept,
                list(parameters),
                [name in wrt for name in INPUTS],
            )
        self.plan = Plan(steps, first.kept() if first else 0, first.bytes if first else None, budget)
        self._shape, self._device = (len(x), steps, *x.shape[1:]), x.device
        self.states, self.history = self._engine.states, self._engine.history

    def pull(self, cotangents: Tensor, *, retain_graph: bool = False) -> Gradients:
        """The gradients of <cotangents[c], states> for each c, sharing one re-run of the model.

        cotangents: (C, B, *S) at the end point, or (C, B, N, *S) along the trajectory.
        retain_graph: allow another pull; otherwise states, history and graphs are let go on the way.

        Returns :class:`Gradients`. Raises RuntimeError at a second pull after one that did not retain.
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
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    weights: Tensor,
    times: Tensor,
    *,
    memory_budget: int | float | None = None,
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
    return _Unroll.apply(model, options, tuple(parameters), x, weights, times, *parameters)


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: Any, options: Any, parameters: Any, x: Any, weights: Any, times: Any, *_: Any
    ) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        ctx.wanted = [i for i, wanted in enumerate(needed[3:]) if wanted]
        wrt = [name for name, wanted in zip(INPUTS, needed[:3], strict=True) if wanted]
        chosen = [parameters[i] for i in ctx.wanted]
        rollout = Rollout(model, x, weights, times, parameters=chosen, wrt=wrt, **options)
        ctx.save_for_backward(x, weights, times)
        if wrt or chosen:
            ctx.rollout = rollout
        # The output is a tensor of its own, because the engine must not hold what holds the engine.
        return rollout.states.to(x.device).detach()

    @staticmethod
    def backward(ctx: Any, grad_states: Any) -> Any:
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
        gp = [None if found.get(i) is None else found[i][0] for i in range(len(ctx.needs_input_grad) - 6)]
        return None, None, None, gx, gw, gt, *gp  # model, options and the tuple of parameters have no gradient


@functools.cache
def _extension() -> Any:
    """The compiled engine, or the error that says why there is none."""
    step = importlib.import_module("dss_fast.step")  # registers the ops that the engine calls
    return ImportError(step._no_extension) if step._extension is None else step._extension.Rollout


def _reference() -> Callable:
    """The plain engine, imported when it is needed."""
    from .reference import Rollout as engine

    return engine


def _engine(backend: str | None) -> Callable:
    """The engine of a name, or the first that loads. Raises where a named one cannot run."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: choose None, {' or '.join(map(repr, BACKENDS))}")
    engine = None if backend == "reference" else _extension()
    if backend == "cpp" and isinstance(engine, Exception):
        raise RuntimeError(f"backend='cpp' cannot run here: {engine}; or use backend='reference'")
    return _reference() if engine is None or isinstance(engine, Exception) else engine


class _FirstCall:
    """Counts what the graph of the model's first call saves for its backward, and says how many such graphs fit.

    Every storage counts once; those in ``aside``, which live on without the graph, do not.
    """

    def __init__(self, steps: int, budget: int, aside: set[int]):
        self.steps, self.budget, self.aside = steps, budget, aside
        self.saved: dict[int, int] = {}
        self.bytes: int | None = None

    def watching(self, x: Tensor) -> Any:
        """A context for the first call, and none for the others."""
        if self.bytes is not None:
            return nullcontext()

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            if tensor.device == x.device and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self.saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach(), tensor._version  # undetached it would hold the graph that holds it

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

    def settle(self, output: Tensor) -> None:
        """Takes note of what the first call returned, which its graph holds too."""
        if self.bytes is None:
            self.saved[output.untyped_storage().data_ptr()] = output.untyped_storage().nbytes()
            self.bytes = sum(size for pointer, size in self.saved.items() if pointer not in self.aside)

    def kept(self) -> int:
        """How many such graphs fit."""
        assert self.bytes is not None
        return min(self.steps, self.budget // max(self.bytes, 1))


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """Autograd's own check of saved tensors, which hooks switch off."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError("a tensor that the model saved for its backward was modified by an inplace operation")
    return tensor


def _kept_anyway(model: Callable, x: Tensor, parameters: Sequence[Tensor]) -> set[int]:
    """Where the tensors live that a model saves and that are there without its graph too."""
    held = [t for module in modules_of(model) for t in (*module.parameters(), *module.buffers())]
    return {t.untyped_storage().data_ptr() for t in (x, *parameters, *held) if t.layout == torch.strided}


def _guard(model: Callable, x: Tensor, steps: int, first: _FirstCall | None) -> Callable:
    """model as the engines call it, (step, x, t) -> output: errors name the step, output and buffers are checked."""
    watched = [(name, buffer) for module in modules_of(model) for name, buffer in module.named_buffers()]
    counts = [buffer._version for _, buffer in watched if not buffer.is_inference()]
    shapes = x.shape, (2 * len(x), *x.shape[1:])

    def call(step: int, x: Tensor, t: Tensor) -> Tensor:
        try:
            # A compiled model may give its saved buffers away in backward, and then allows one cotangent only.
            config = sys.modules.get("torch._functorch.config")
            watching = first.watching(x) if first else nullcontext()
            given = {"x": x, "t": t}
            before = versions(given)
            with config.patch(donated_buffer=False) if config else nullcontext(), watching:
                output = model(x, t)
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
        except Exception as error:
            error.add_note(f"at step {step} of {steps}")
            raise
        return output

    return call


def _budget_bytes(budget: int | float | None, device: torch.device) -> int | None:
    """A memory budget in bytes; None: nothing is kept. Raises ValueError for what is no budget."""
    if budget is None:
        return None
    if isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        return budget
    if isinstance(budget, float) and 0 < budget <= 1:
        return int(budget * _free_bytes(device))
    raise ValueError(
        f"memory_budget={budget!r}: give None, a number of bytes (int), "
        "or a fraction of the free device memory (float above 0, at most 1)"
    )


def _free_bytes(device: torch.device) -> int:
    """What is free on a device now, PyTorch's own idle blocks included."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check(x: Tensor, weights: Tensor, times: Tensor, parameters: Sequence[Tensor], wrt: Sequence[str]) -> None:
    """Raises what :class:`Rollout` says, before the model is called."""
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; give floats of shape (B, *S)")
    rows, steps = len(x), weights.shape[1] if weights.ndim == 3 else 0
    slots = weights.shape[-1] - HISTORY
    if weights.ndim != 3 or weights.shape[0] not in (1, rows) or slots not in (steps, steps + 1) or not steps:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; give (R, N, 4 + K) with R = 1 or {rows}, K = N or N + 1"
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
