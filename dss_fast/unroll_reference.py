"""The unrolled rollout in plain PyTorch: what csrc/unroll.cpp does, and what runs where there is no compiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


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
        self.home = torch.device("cpu") if offload else x.device
        self.autocast = _autocast_state(x.device)
        N, K = weights.shape[1], weights.shape[2] - 4
        self.rng: list[dict | None] = [None] * N
        self.graphs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.first_output: Tensor | None = None

        states = x.new_empty((N, *x.shape))
        history = x.new_empty((len(x), K, *x.shape[1:]))
        if K > N:
            history[:, N] = x
        kept, size = 0, None
        for i in range(N):
            output = self._forward(i, x, i >= N - kept or (i == 0 and budget is not None))
            output = output.detach()
            if i == 0 and budget is not None:
                kept, size = self._measure(budget, N)
            if i == 0 and not self._live(0):
                self.first_output = output
            x = states[i].copy_(self._step(i, x, output, history))
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
        x = x.detach().requires_grad_(i > 0 or self.needs_x)
        t = self.times[:, i].clone().requires_grad_(self.needs_times)
        with torch.enable_grad(), _autocast(self.autocast):
            output = self.call(i, x, t)
        self.graphs[i] = x, t, output
        return output

    def _mix(self, i: int, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """m_i and m_cond - m_uncond over the guided elements, (B, D), None without guidance."""
        output = output.flatten(1).to(self.weights.dtype)
        if len(output) == len(self.x):
            return output, None
        uncond, m = output.chunk(2)
        m, limit = m.clone(), self.guided if self.guided >= 0 else None
        spread = m[:, :limit] - uncond[:, :limit]
        m[:, :limit] = uncond[:, :limit] + self.weights[:, i, 3:4] * spread
        return m, spread

    def _step(self, i: int, x: Tensor, output: Tensor, history: Tensor) -> Tensor:
        w, N = self.weights[:, i], self.weights.shape[1]
        real, flat = w.dtype, history.flatten(2)
        y = w[:, 1:2] * x.flatten(1).to(real) + w[:, 2:3] * self._mix(i, output)[0]
        history[:, i] = y.reshape(x.shape).to(history.dtype)
        used = [*range(i + 1), *range(N, history.shape[1])]
        row = w[:, None, [4 + j for j in used]].expand(len(x), 1, len(used))
        past = torch.bmm(row, flat[:, used].to(real)).squeeze(1)
        return (w[:, 0:1] * x.flatten(1).to(real) + past).reshape(x.shape)

    def pull(self, cotangents: Tensor, retain: bool):
        if self.done:
            raise RuntimeError(
                "Trying to pull a rollout a second time: its states and graphs were let go by the first pull. "
                "Specify retain_graph=True in the first one."
            )
        if self.states._version != self.version:
            raise RuntimeError("the states of a rollout were modified in place before its gradient was taken")
        self.done = not retain
        try:
            return self._pull(cotangents, retain)
        finally:
            if self.done:
                self.states = self.history = self.first_output = None
                self.graphs.clear()

    def _pull(self, cotangents: Tensor, retain: bool):
        (B, N), C = self.times.shape, len(cotangents)
        w, K = self.weights, self.weights.shape[2] - 4
        x0, real = self.x, w.dtype
        adjoints = x0.new_zeros((C, B, N, x0[0].numel()), dtype=real)  # slot i holds g_{i+1}
        if cotangents.ndim == x0.ndim + 2:
            adjoints.copy_(cotangents.flatten(3) if x0.ndim > 1 else cotangents[..., None])
        else:
            adjoints[:, :, -1] = cotangents.reshape(C, B, -1)
        gx = None
        gw = w.new_zeros((C, B, N, 4 + K)) if self.needs_weights else None
        gt = w.new_zeros((C, B, N)) if self.needs_times else None
        gp: list[list[Tensor | None]] = [[None] * len(self.parameters) for _ in range(C)]

        for j in reversed(range(N)):
            x = (self.states[:, j - 1].to(self.device) if j else x0).contiguous()
            kept = self.graphs.get(j) if retain else self.graphs.pop(j, None)
            inputs = kept or self._recompute(j, x)
            output = inputs[2] if inputs else self.first_output
            flat = x.flatten(1).to(real)
            y = self.history[:, j].to(self.device, real).flatten(1)
            m, spread = self._mix(j, output.detach()) if self.needs_weights else (None, None)
            for c in range(C):
                a = adjoints[c]
                gy = torch.bmm(w[:, None, j:, 4 + j].expand(B, 1, N - j), a[:, j:]).squeeze(1)
                g = w[:, j, 0:1] * a[:, j] + w[:, j, 1:2] * gy
                if inputs:
                    last = c == C - 1 and not (retain and kept)
                    vx, vt, vp = self._vjp(j, inputs, gy, retain=not last)
                    g = g if vx is None else g + vx.flatten(1)
                    if gt is not None and vt is not None:
                        gt[c, :, j] = vt
                    gp[c] = [v if s is None else s if v is None else s + v for s, v in zip(gp[c], vp, strict=True)]
                if gw is not None:
                    gw[c, :, j, 0] = (a[:, j] * flat).sum(1)
                    gw[c, :, j, 1] = (gy * flat).sum(1)
                    gw[c, :, j, 2] = (gy * m).sum(1)
                    if spread is not None:
                        gw[c, :, j, 3] = w[:, j, 2] * (gy[:, : spread.shape[1]] * spread).sum(1)
                    gw[c, :, j:, 4 + j] = torch.bmm(a[:, j:], y[:, :, None]).squeeze(2)
                    if j == 0 and K > N:
                        gw[c, :, :, 4 + N] = torch.bmm(a, flat[:, :, None]).squeeze(2)
                if j:
                    a[:, j - 1] += g
                elif self.needs_x:
                    if K > N:
                        g = g + torch.bmm(w[:, None, :, 4 + N].expand(B, 1, N), a).squeeze(1)
                    gx = x0.new_empty((C, *x0.shape), dtype=real) if gx is None else gx
                    gx[c] = g.reshape(x0.shape)
            del inputs, output, kept
        none = [None] * C
        stacked = [None if col == none else torch.stack(col) for col in map(list, zip(*gp, strict=True))]
        return gx, gw, gt, stacked

    def _recompute(self, j: int, x: Tensor):
        if not self._live(j):
            return None
        with _replay(self.rng[j], self.device):
            self._with_graph(j, x)
        return self.graphs.pop(j)

    def _vjp(self, j: int, inputs, gy: Tensor, retain: bool):
        x, t, output = inputs
        wanted = [v for v in (x, t) if v.requires_grad] + self.parameters
        if not output.requires_grad or not wanted:
            return None, None, [None] * len(self.parameters)
        w = self.weights[:, j]
        grad = w[:, 2:3] * gy
        if len(output) == 2 * len(x):
            limit = self.guided if self.guided >= 0 else grad.shape[1]
            scale = torch.ones_like(grad)
            scale[:, :limit] = w[:, 3:4]
            grad = torch.cat([(1 - scale) * grad, scale * grad])
        grad = grad.reshape(output.shape).to(output.dtype)
        with torch.no_grad():
            found = list(torch.autograd.grad(output, wanted, grad, retain_graph=retain, allow_unused=True))
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
    """The distinct storages the graph of output saved, with their bytes."""
    seen, storages, stack = set(), {}, [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for item in [*saved, *getattr(node, "saved_tensors", ())]:
            for tensor in item if isinstance(item, list | tuple) else [item]:
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        stack += [following for following, _ in node.next_functions]
    return [(StorageWeakRef(storage), storage.nbytes()) for storage in storages.values()]
