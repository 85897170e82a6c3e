"""The network as a solver sees it: (x, t) -> output. Conditions, guidance's doubled batch, dtypes, count, checks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Denoiser:
    """Calls a model the way every part of this package needs it called.

    model(x, t, **cond) -> output of x's shape. x: (B, *S); t: (B,), float32 (float64 for float64 x), in the
    units of the schedule. A module whose parameters have another floating dtype gets x in that dtype.

    cond: keyword arguments of the model; tensors of B rows go with their samples, the rest is passed on.
    uncond: what replaces entries of cond in the unconditional branch; given, each call is made once with a
        doubled batch, unconditional rows first, and the output has 2B rows. Values: anything that
        expands to B rows. None: no guidance.
    guided_channels: guide only the first channels of a sample, as DiT does with 3 of 4: the unconditional rows get
        the conditional ones' other channels, between which any guidance is none. None: all.
    check_finite: raise FloatingPointError when the output holds NaN or Inf. Reads one number back from
        the device per call. None: on the CPU only.

    nfe: network evaluations per sample so far; a doubled call counts 2.
    """

    def __init__(
        self,
        model: Callable,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        *,
        guided_channels: int | None = None,
        check_finite: bool | None = None,
    ):
        self.model, self.guided, self.guided_channels = model, uncond is not None, guided_channels
        self.check_finite = check_finite
        self.nfe = 0
        self._cond, self._uncond = dict(cond or {}), dict(uncond or {})
        self._doubled: dict[str, Any] | None = None
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self._dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else None
        _check_signature(model, {**self._cond, **self._uncond})

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        cond, channels = self._arguments(x), self.guided_channels
        if channels is not None and (x.ndim < 2 or not 0 < channels <= x.shape[1]):
            raise ValueError(
                f"guided_channels={channels!r}: samples of shape {tuple(x.shape[1:])} have 1 to {x.shape[1:2].numel()}"
            )
        if self.guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        output: Any = self.model(x if self._dtype is None else x.to(self._dtype), t, **cond)
        output = getattr(output, "sample", output[0] if isinstance(output, tuple) else output)
        self._check(output, x, t)
        self.nfe += 2 if self.guided else 1
        if self.guided and channels is not None:
            uncond, guided = output.chunk(2)
            output = torch.cat([torch.cat([uncond[:, :channels], guided[:, channels:]], 1), guided])
        return output

    def _arguments(self, x: Tensor) -> dict[str, Any]:
        """The keyword arguments of a call, made once, or anew for each call when a condition is differentiated."""
        if self._doubled is not None:
            return self._doubled
        rows = len(x)
        for key, value in self._cond.items():
            if isinstance(value, Tensor) and value.ndim and len(value) not in (1, rows):
                raise ValueError(
                    f"cond[{key!r}] has {len(value)} rows for {rows} samples; give {rows} rows, or 1 for all"
                )
        arguments = {k: _rows(v, rows, x.device) for k, v in self._cond.items()}
        if self.guided:
            null = {**arguments, **{k: _rows(v, rows, x.device) for k, v in self._uncond.items()}}
            arguments = {k: _pair(k, null[k], arguments.get(k, null[k]), rows) for k in null}
        given = (*self._cond.values(), *self._uncond.values())
        if not any(isinstance(v, Tensor) and v.requires_grad for v in given):
            self._doubled = arguments
        return arguments

    def _check(self, output: Any, x: Tensor, t: Tensor) -> None:
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the model returned {got} for an input of {tuple(x.shape)}; it must return x's shape "
                "(a model that also predicts variances needs a wrapper that drops them)"
            )
        if self.check_finite or (self.check_finite is None and x.device.type == "cpu"):
            detached = output.detach()
            # One sum is 3x cheaper than isfinite().all(); a sum that overflows is settled by the count.
            if not detached.sum(dtype=torch.float32).isfinite():
                bad = int((~detached.isfinite()).flatten(1).any(1).sum()) if detached.numel() else 0
                if bad:
                    raise FloatingPointError(
                        f"the model returned NaN or Inf for {bad} of {len(x)} samples at time {float(t[0]):.6g}"
                    )
            if self.guided and self.nfe == 0 and len(x) and self._cond:
                uncond, cond = detached.chunk(2)
                if torch.equal(uncond, cond):
                    warnings.warn(
                        f"the model gives the same output with and without {', '.join(self._uncond or self._cond)}: "
                        "does it ignore that keyword? Guidance has no effect",
                        stacklevel=4,
                    )


def _rows(value: Any, rows: int, device: torch.device) -> Any:
    """A tensor with a row per sample stays, one row is expanded, a scalar tensor becomes rows."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    if value.ndim == 0 or len(value) == 1 != rows:
        value = value.reshape(1, *value.shape[1:]).expand(rows, *value.shape[1:])
    return value


def _pair(key: str, uncond: Any, cond: Any, rows: int) -> Any:
    """Both branches' rows of one argument."""
    if isinstance(cond, Tensor):
        if isinstance(uncond, int | float):  # filled on the device: a copy from the host could not be captured
            uncond = torch.full_like(cond, uncond)
        elif not isinstance(uncond, Tensor):
            uncond = torch.as_tensor(uncond, device=cond.device)
        uncond = uncond.to(cond).expand(cond.shape)
        return torch.cat([uncond, cond]) if cond.ndim and len(cond) == rows else cond
    if uncond is not cond and uncond != cond:
        raise ValueError(
            f"uncond[{key!r}] differs from cond but is no tensor ({type(cond).__name__}); both branches run in "
            "one call, so it must be a tensor with a row per sample"
        )
    return cond


def _check_signature(model: Callable, arguments: Mapping[str, Any]) -> None:
    """Raises before any work when the model cannot take a keyword."""
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            accepted = ", ".join(list(parameters)[2:]) or "none"
            raise ValueError(f"the model takes no keyword {key!r}; beside x and t it takes: {accepted}")
