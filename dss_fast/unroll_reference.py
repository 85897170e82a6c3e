"""The unrolled rollout in plain PyTorch: what csrc/unroll.cpp does, and what runs where there is no compiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .step import multistep_pull, multistep_step


class Rollout:
    """See dss_fast.unroll.Rollout. Arguments are checked there; call is (step, x, t) -> output."""

    def __init__(
        self,
        call: Callable[[int, Tensor, Tensor], Tensor],
        x: Tensor,
        weights: Tensor,
        times: Tensor,
        guided: int,
        budget: int | None,
        offload: bool,
        parameters: list[Tensor],
        needs: list[bool],
    ):
        self.call, self.weights, self.times = call, weights, times
        self.guided, self.parameters = guided, parameters
        self.needs_x, self.needs_weights, self.needs_times = needs
        self.device, self.x = x.device, x
        self.index = torch.arange(weights.shape[1], device=x.device)
        self.home = torch.device("cpu") if offload else x.device
        self.autocast = _autocast_state(x.device)
        self.rng: list[dict | None] = [None] * weights.shape[1]
        self.graphs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.first_output: Tensor | None = None

        with torch.no_grad(), _autocast(_off(self.autocast)):
            self._run(budget)

    def _run(self, budget: int | None) -> None:
        x, weights = self.x, self.weights
        N, K = weights.shape[1], weights.shape[2] - 4
        states = x.new_empty((N, *x.shape))
        history = x.new_empty((len(x), K, *x.shape[1:]))
        if K > N:
            history[:, N] = x
        kept, size = 0, None
        for i in range(N):
            output = self._forward(i, x, i >= N - kept or (i == 0 and budget is not None))
            output = output.detach()
            if i == 0 and budget is not None:
                output = output.clone()
                kept, size = self._measure(budget, N)
            if i == 0 and not self._live(0):
                self.first_output = output
            multistep_step(
                x,
                output,
                history,
                weights,
                self.index[i : i + 1],
                guided=self.guided,
                out=states[i],
            )
            x = states[i]
        self.plan = kept, size
        self.states, self.history = states.movedim(0, 1).to(self.home), history.to(self.home)
        self.version = self.states._version
        self.done = False

    def _live(self, i: int) -> bool:
        """Whether anything call i takes is to be differentiated."""
        return i > 0 or self.needs_x or self.needs_times or bool(self.parameters)

    def _measure(self, budget: int, steps: int) -> tuple[int, int]:
        """How many graphs fit, and the bytes of one: all it refers to if that fits, else what letting it go frees."""
        storages = _saved_storages(self.graphs[0][2])
        size = sum(bytes for _, bytes in storages)
        if size * steps <= budget:
            return steps, size
        self.graphs.clear()
        size = sum(bytes for storage, bytes in storages if storage.expired())
        return (min(steps - 1, budget // size) if size else 0), size

    def _forward(self, i: int, x: Tensor, keep: bool) -> Tensor:
        before = _rng_state(self.device)
        if keep:
            output = self._with_graph(i, x)
        else:
            with torch.no_grad(), _autocast(self.autocast):
                output = self.call(i, x, self.times[:, i].clone())
        after = _rng_state(self.device)
        if any(not torch.equal(before[k], after[k]) for k in before):
            self.rng[i] = before
        return output

    def _with_graph(self, i: int, x: Tensor) -> Tensor:
        # Not detach: x would share its version with the states written later, and count as modified.
        x = x.data.requires_grad_(i > 0 or self.needs_x)
        t = self.times[:, i].clone().requires_grad_(self.needs_times)
        with torch.enable_grad(), _autocast(self.autocast):
            output = self.call(i, x, t)
        self.graphs[i] = x, t, output
        return output

    def _mix(self, i: int, output: Tensor) -> list[Tensor]:
        """m_i, and with guidance m_cond - m_uncond over the guided elements, (B, D) each."""
        output = output.flatten(1).to(self.weights.dtype)
        if len(output) == len(self.x):
            return [output]
        uncond, cond = output.chunk(2)
        spread = cond - uncond
        if self.guided >= 0:
            spread[:, self.guided :] = 0
        return [cond + (self.weights[:, i, 3:4] - 1) * spread, spread]

    def pull(self, cotangents: Tensor, retain: bool):
        if self.done:
            raise RuntimeError(
                "Trying to use a rollout a second time: its states and graphs were let go by the first pull. "
                "Specify retain_graph=True in that one."
            )
        if self.states._version != self.version:
            raise RuntimeError("the states of a rollout were modified in place before its gradient was taken")
        self.done = not retain
        try:
            with torch.no_grad(), _autocast(_off(self.autocast)):
                return self._pull(cotangents, retain)
        finally:
            if self.done:
                self.states = self.history = self.first_output = None
                self.graphs.clear()

    def _pull(self, cotangents: Tensor, retain: bool):
        (B, N), C, K = self.times.shape, len(cotangents), self.weights.shape[2] - 4
        w, x0 = self.weights, self.x
        adjoints = w.new_zeros((C, B, N, *x0.shape[1:]))  # slot i holds g_{i+1}
        (adjoints if cotangents.ndim == adjoints.ndim else adjoints[:, :, -1]).copy_(cotangents)
        gx = w.new_empty((C, *x0.shape)) if self.needs_x else None
        gw = w.new_zeros((C, B, N, 4 + K)) if self.needs_weights else None
        gt = w.new_zeros((C, B, N)) if self.needs_times else None
        gp: list[list[Tensor | None]] = [[None] * len(self.parameters) for _ in range(C)]

        for j in reversed(range(N)):
            x = (self.states[:, j - 1].to(self.device) if j else x0).contiguous()
            kept = self.graphs.get(j) if retain else self.graphs.pop(j, None)
            graph = kept or self._recompute(j, x)
            output = (graph[2] if graph else self.first_output).detach()
            pair = len(output) == 2 * B
            for c, a in enumerate(adjoints):
                index = self.index[j : j + 1]
                g, grad_output = multistep_pull(a, w, index, pair=pair, guided=self.guided)
                if gw is not None:
                    y = self.history[:, j].to(self.device)
                    self._weight_gradients(j, gw[c], a.flatten(2), [x.flatten(1), y.flatten(1), *self._mix(j, output)])
                if graph:
                    retained = c < C - 1 or (retain and kept is not None)
                    vx, vt, vp = self._vjp(graph, grad_output, retained)
                    g = g if vx is None else g + vx
                    if vt is not None:
                        gt[c, :, j] = vt
                    gp[c] = [v if s is None else s if v is None else s + v for s, v in zip(gp[c], vp, strict=True)]
                if j:
                    a[:, j - 1] += g
                elif gx is not None:
                    if K > N:
                        g = g + torch.einsum("bn,bn...->b...", w[:, :, 4 + N].expand(B, N), a)
                    gx[c] = g
            del graph, output, kept
        none = [None] * C
        return (
            gx,
            gw,
            gt,
            [None if list(p) == none else torch.stack(p) for p in zip(*gp, strict=True)],
        )

    def _weight_gradients(self, j: int, gw: Tensor, adjoints: Tensor, probes: list[Tensor]) -> None:
        """With gy = sum_{i>=j} w_ij g_{i+1}: da = <g_{j+1}, x>, dp = <gy, x>, dq = <gy, m>, dg = q <gy, spread>,
        dw_ij = <g_{i+1}, y>."""
        w, N = self.weights, self.weights.shape[1]
        products = torch.einsum("bnd,bkd->bnk", adjoints[:, j:], torch.stack([p.to(w.dtype) for p in probes], 1))
        through = (w[:, j:, 4 + j, None] * products).sum(1)
        gw[:, j, 0], gw[:, j, 1], gw[:, j, 2] = products[:, 0, 0], through[:, 0], through[:, 2]
        if len(probes) == 4:
            gw[:, j, 3] = w[:, j, 2] * through[:, 3]
        gw[:, j:, 4 + j] = products[:, :, 1]
        if j == 0 and w.shape[2] - 4 > N:
            gw[:, :, 4 + N] = products[:, :, 0]

    def _recompute(self, j: int, x: Tensor):
        if not self._live(j):
            return None
        with _replay(self.rng[j], self.device):
            self._with_graph(j, x)
        return self.graphs.pop(j)

    def _vjp(self, graph: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, retain: bool):
        x, t, output = graph
        wanted = [v for v in (x, t) if v.requires_grad] + self.parameters
        if not output.requires_grad or not wanted:
            return None, None, [None] * len(self.parameters)
        grad_output = grad_output.to(output.dtype)
        found = list(torch.autograd.grad(output, wanted, grad_output, retain_graph=retain, allow_unused=True))
        vx = found.pop(0) if x.requires_grad else None
        vt = found.pop(0) if t.requires_grad else None
        return vx, vt, found


def _devices(device: torch.device) -> list[str]:
    return ["cpu"] if device.type == "cpu" else ["cpu", device.type]


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(device)
    return state


@contextmanager
def _replay(state: dict[str, Tensor] | None, device: torch.device):
    """Runs with the random state of the first run; None when that run drew nothing."""
    if state is None:
        yield
        return
    now = _rng_state(device)

    def write(states: dict[str, Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if device.type != "cpu":
            getattr(torch, device.type).set_rng_state(states[device.type], device)

    write(state)
    try:
        yield
    finally:
        write(now)


def _off(state: list[tuple]) -> list[tuple]:
    """The model casts as it likes; sums over steps and gradients keep their own precision."""
    return [(device, False, dtype) for device, _, dtype in state]


def _autocast_state(device: torch.device) -> list[tuple]:
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _devices(device)]


@contextmanager
def _autocast(state: list[tuple]):
    # No cache: a cast made without a graph would be reused where one is needed, or with one already freed.
    with ExitStack() as stack:
        for device, enabled, dtype in state:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def _saved_storages(output: Tensor) -> list[tuple[StorageWeakRef, int]]:
    """The distinct storages the graph of output saved, its leaves' aside, with their bytes."""
    seen, leaves, stack = set(), set(), [output.grad_fn]
    storages = {output.untyped_storage().data_ptr(): output.untyped_storage()}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable.untyped_storage().data_ptr())
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for item in [*saved, *getattr(node, "saved_tensors", ())]:
            for tensor in item if isinstance(item, list | tuple) else [item]:
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        stack += [following for following, _ in node.next_functions]
    return [(StorageWeakRef(s), s.nbytes()) for pointer, s in storages.items() if pointer not in leaves]
