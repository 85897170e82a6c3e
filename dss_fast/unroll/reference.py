"""The unrolled rollout as the obvious loop: autograd through the steps, torch.utils.checkpoint around the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..denoiser import uncached_autocast
from ..step import added_by_guidance, multistep_update
from ..table import HISTORY


class Engine:
    """Runs what dss_fast.unroll.Rollout has checked; call is (step, x, t) -> output. It keeps no graphs.

    A model that writes into a tensor it has saved gets wrong gradients here instead of an error, as it does from
    torch.utils.checkpoint anywhere.
    """

    def __init__(
        self,
        call: Callable[[int, Tensor, Tensor], Tensor],
        x: Tensor,
        weights: Tensor,
        times: Tensor,
        kept: None,
        parameters: list[Tensor],
        needs: list[bool],
    ):
        B, N = len(x), weights.shape[1]
        # Every leaf has a row for each sample, so that its gradient comes out per sample.
        inputs = x.detach(), weights.expand(B, -1, -1).clone(), times.clone()
        self._leaves = [t.requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        self._parameters, self._differentiates = parameters, any(needs) or bool(parameters)
        x, weights, times = self._leaves
        noise, adds = [x] if weights.shape[2] - HISTORY > N else [], weights.shape[2] - HISTORY > N + 1
        added: list[Tensor] = []
        states: list[Tensor] = []
        history: list[Tensor] = []
        with torch.set_grad_enabled(self._differentiates):
            for i in range(N):
                run = (call, i, x, times[:, i].clone())
                # A cast cached by the first run would be missing from the graph of the second.
                with uncached_autocast(x.device):
                    output = checkpoint(*run, use_reentrant=False) if self._differentiates else call(*run[1:])
                if adds:
                    added.append(added_by_guidance(x, output, weights, i).to(x.dtype))
                x, y = multistep_update(x, output, [*history, *noise, *added], weights, i)
                states.append(x)
                history.append(y)
            self._graph: Any = torch.stack(states, 1)
        self.states: Any = self._graph.detach()
        self.history: Any = torch.stack([*history, *noise, *added], 1).detach()
        self._version = self.states._version

    def pull(self, cotangents: Tensor, retain: bool) -> tuple[Any, ...]:
        """(x, weights, times, parameters): the gradients of each cotangent."""
        if self._graph is None:
            raise RuntimeError(
                "Trying to use a rollout a second time: its states and graphs were let go by the first pull. "
                "Specify retain_graph=True in that one."
            )
        if self.states._version != self._version:
            raise RuntimeError("the states of a rollout were modified in place before its gradient was taken")
        target = self._graph if cotangents.dim() == self._graph.dim() + 1 else self._graph[:, -1]
        leaves = [t for t in self._leaves if t.requires_grad]
        wanted = leaves + self._parameters
        if not retain:
            self._graph = self.states = self.history = None
        found = []
        for c, cotangent in enumerate(cotangents):
            keep = retain or c < len(cotangents) - 1
            given = cotangent.to(target.dtype)
            row = torch.autograd.grad(target, wanted, given, retain_graph=keep, allow_unused=True)
            own = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, row, strict=False)]
            found.append([*own, *row[len(leaves) :]])
        stacked = iter([None if column[0] is None else torch.stack(column) for column in zip(*found, strict=True)])
        return *(next(stacked) if t.requires_grad else None for t in self._leaves), list(stacked)
