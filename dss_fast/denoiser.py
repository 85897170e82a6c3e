"""The network as a solver sees it: (x, t) -> output. Conditions, guidance's doubled batch, dtypes, count, checks."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .modes import as_given, readable

CALLED = "model(x (B, *S), t (B,), **cond)"
TIMES = ("t", "ts", "time", "times", "timestep", "timesteps", "sigma", "sigmas")
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what layers compute in
NO_GRAPH = (
    "the model returns an output without a graph for an x that requires grad, so nothing can be learned through it: "
    "take torch.no_grad(), torch.inference_mode() and .detach() out of its forward"
)


class Denoiser:
    """Calls a model the way every part of this package needs it called.

    model(x, t, **cond) -> output of x's shape. x: (B, *S); t: (B,), float32 (float64 for float64 x), in the
    units of the schedule. A module that computes in another dtype gets x in that, see :func:`compute_dtype`.

    cond: keyword arguments of the model; tensors of B rows go with their samples, the rest is passed on.
    uncond: what replaces entries of cond in the unconditional branch; given, each call is made once with a
        doubled batch, unconditional rows first, and the output has 2B rows. Values: anything that
        expands to B rows. None: no guidance.
    guided_channels: guide only the first channels of a sample, as DiT does with 3 of 4: the unconditional rows get
        the conditional ones' other channels, where guidance then changes nothing. None: all.
    check_finite: raise FloatingPointError when the output holds NaN or Inf. Reads one number back from
        the device per call. None: on the CPU only, and not where values cannot be read (torch.export, vmap, meta).
        Where it looks, the first call is also compared with what it was given: a write through ``x.data`` or NumPy
        counts no version, which is what later calls are checked by.

    nfe: network evaluations per sample so far; a doubled call counts 2.
    """

    def __init__(
        self,
        model: Callable[..., Any],
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
        self._known: dict[bool, dict[str, Any]] = {}  # the arguments of a call, of both branches and of one
        self._held: dict[bool, dict[str, Tensor | np.ndarray]] = {}
        self._dtype = compute_dtype(model) if isinstance(model, nn.Module) else None
        _check_signature(model, {**self._cond, **self._uncond})
        _warn_of_train_mode(model)

    def __call__(self, x: Tensor, t: Tensor, both: bool = True) -> Tensor:
        """The output (B, *S) for x (B, *S) at t (B,), or the guided pair (2B, *S), unconditional rows first.

        both: run the unconditional branch too, where there is one.

        Raises ValueError for an output of another shape or kind, and for a model that writes into what it is given;
        FloatingPointError, where the output is checked, for NaN and Inf.
        """
        both = both and self.guided
        cond, channels = self._arguments(x, both), self.guided_channels
        if channels is not None and (x.ndim < 2 or not 0 < channels <= x.shape[1]):
            raise ValueError(
                f"guided_channels={channels!r}: samples of shape {tuple(x.shape[1:])} have 1 to {x.shape[1:2].numel()}"
            )
        if both:
            x, t = torch.cat([x, x]), torch.cat([t, t])
        # An inference tensor counts no versions, so that a write into it would pass unseen: the model gets copies.
        own = x.is_inference() and not both
        given = {"x": x.to(self._dtype or x.dtype, copy=own), "t": t.clone() if own else t, **cond}
        held = self._held[both] if both in self._held else tensors_in(cond)
        if cond is self._known.get(both):
            self._held[both] = held
        passed = held if own or both else {"x": given["x"], "t": given["t"], **held}  # of x and t copies are fair
        looks = self.looks(x)
        copies = copied(passed) if looks and self.nfe == 0 else {}
        held = {"x": given["x"], "t": given["t"], **held}
        before = {} if torch.compiler.is_compiling() else versions(held)
        try:
            with as_given():
                returned: Any = self.model(given["x"], given["t"], **cond)
        except Exception as error:
            error.add_note(f"called as model({', '.join(_described(k, v) for k, v in given.items())})")
            raise
        check_untouched(held, before, copies)
        tensor = output_of(returned)
        self._check(tensor, x, t, both, looks)
        output: Tensor = tensor
        self.nfe += 2 if both else 1
        if both and channels is not None:
            uncond, guided = output.chunk(2)
            output = torch.cat([torch.cat([uncond[:, :channels], guided[:, channels:]], 1), guided])
        return output

    def looks(self, x: Tensor) -> bool:
        """Whether values are read back from the device, to be checked."""
        return self.check_finite or (self.check_finite is None and x.device.type == "cpu" and readable(x))

    def _arguments(self, x: Tensor, both: bool) -> dict[str, Any]:
        """The keyword arguments of a call, made once, or anew for each call when a condition is differentiated."""
        if both in self._known:
            return self._known[both]
        rows = len(x)
        for key, value in self._cond.items():
            if isinstance(value, Tensor) and value.ndim and len(value) not in (1, rows):
                raise ValueError(
                    f"cond[{key!r}] has {len(value)} rows for {rows} samples; give {rows} rows, or 1 for all"
                )
        arguments = {k: _rows(v, rows, x.device) for k, v in self._cond.items()}
        if self.guided:
            null = {**arguments, **{k: _rows(v, rows, x.device) for k, v in self._uncond.items()}}
            now = {k: arguments.get(k, null[k]) for k in null}
            arguments = {k: _pair(k, null[k], now[k], rows) for k in null} if both else now
        given = (*self._cond.values(), *self._uncond.values())
        if not any(isinstance(v, Tensor) and v.requires_grad for v in given):
            self._known[both] = arguments
        return arguments

    def _check(self, output: Any, x: Tensor, t: Tensor, both: bool, looks: bool) -> None:
        if not isinstance(output, Tensor) or output.shape != x.shape or not output.is_floating_point():
            got = "an empty tuple" if output == () else type(output).__name__
            if isinstance(output, Tensor):
                got = _described("", output)
            raise ValueError(
                f"the model returned {got} for an input of {tuple(x.shape)}; called as {CALLED}, it must return "
                "floats of x's shape (a model that also predicts variances needs a wrapper that drops them)"
            )
        if looks:
            detached = output.detach()
            if bad := not_finite(detached):
                time = float(t.detach()[0])
                raise FloatingPointError(
                    f"the model returned NaN or Inf for {bad} of {len(x)} samples at time {time:.6g}"
                )
            if both and self.nfe == 0 and len(x) and self._cond:
                uncond, cond = detached.chunk(2)
                if torch.equal(uncond, cond):
                    warnings.warn(
                        f"the model gives the same output with and without {', '.join(self._uncond or self._cond)}: "
                        "does it ignore that keyword? Guidance has no effect",
                        stacklevel=4,
                    )


def compute_dtype(model: nn.Module) -> torch.dtype | None:
    """What a network computes in, however its weights are stored; None where nothing says, and x stays as it is.

    The dtype that most of its numbers have. Where that is one that nothing is computed in, as float8 of layerwise
    casting, int8, or the bytes of nf4 and GGUF: what a module says, from the outermost in, as ``dtype`` (diffusers,
    transformers, which know of the casting) or ``compute_dtype`` (bitsandbytes, GGUF); or else the dtype of most of
    what is left, norms and biases as a rule.
    """
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    most = sorted(counts, key=counts.__getitem__, reverse=True)
    if most and most[0] not in COMPUTED:
        said = (getattr(module, word, None) for module in model.modules() for word in ("dtype", "compute_dtype"))
        most = [dtype for dtype in said if isinstance(dtype, torch.dtype)] + most
    return next((dtype for dtype in most if dtype in COMPUTED), None)


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


def _check_signature(model: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises before any work when the model cannot be called as it will be."""
    try:
        parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    except (TypeError, ValueError):
        return
    kinds = {p.kind for p in parameters.values()}
    places = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(places) < 2:
        raise ValueError(f"the model is called as {CALLED}; it takes only {', '.join(places) or 'no argument'}")
    if len(places) > 1 and places[0] in TIMES and places[1] not in TIMES:
        raise ValueError(
            f"the model is called as {CALLED}; it takes {places[0]} first: give "
            "lambda x, t, **cond: model(t, x, **cond)"
        )
    for key in arguments if inspect.Parameter.VAR_KEYWORD not in kinds else ():
        if key not in parameters:
            accepted = ", ".join(list(parameters)[2:]) or "none"
            raise ValueError(f"the model takes no keyword {key!r}; beside x and t it takes: {accepted}")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.POSITIONAL_ONLY]
    needed = [n for n in needed if n not in places[:2] and parameters[n].kind not in _VARIABLE and n not in arguments]
    if needed:
        raise ValueError(
            f"the model is called as {CALLED}; it needs {', '.join(needed)} too: give cond={{{needed[0]!r}: ...}}"
        )


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def not_finite(x: Tensor) -> int:
    """How many of the samples x (B, *S) hold NaN or Inf."""
    # One sum is 3x cheaper than isfinite().all(); a sum that overflows is settled by the count.
    if x.numel() == 0 or math.isfinite(x.sum(dtype=torch.float32).item()):
        return 0
    x = x if x.dtype in COMPUTED else x.float()  # isfinite knows not all float8 there are
    return int((~x.isfinite()).reshape(len(x), -1).any(1).sum())


def output_of(returned: Any) -> Any:
    """What counts of what a model returned: the first of a tuple, or the attribute ``sample``, or all of it."""
    return returned[0] if isinstance(returned, tuple) and returned else getattr(returned, "sample", returned)


def tensors_in(values: Mapping[Any, Any], name: str = "{}", depth: int = 3) -> dict[str, Tensor | np.ndarray]:
    """Tensors and arrays by name, also those in lists, tuples and dicts."""
    found: dict[str, Tensor | np.ndarray] = {}
    for key, value in values.items():
        if isinstance(value, Tensor | np.ndarray):
            found[name.format(key)] = value
        elif depth and value and isinstance(value, Mapping | list | tuple):
            inner, parts = name.format(key).replace("{", "{{").replace("}", "}}"), value
            parts = value if isinstance(value, Mapping) else dict(enumerate(value))
            found |= tensors_in(parts, f"{inner}[{{!r}}]", depth - 1)
    return found


def versions(tensors: Mapping[str, Any]) -> dict[str, int]:
    """How often each tensor was written into so far; inference tensors do not count that."""
    return {k: v._version for k, v in tensors.items() if isinstance(v, Tensor) and not v.is_inference()}


def copied(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor | np.ndarray]:
    """Copies to compare with later, of what holds its values one by one."""
    found: dict[str, Tensor | np.ndarray] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            found[name] = value.copy()
        elif value.layout == torch.strided and not (value.is_nested or value.is_quantized) and readable(value):
            found[name] = value.detach().clone()
    return found


def check_untouched(
    tensors: Mapping[str, Any], before: Mapping[str, int], copies: Mapping[str, Tensor | np.ndarray] | None = None
) -> None:
    """Raises ValueError naming a tensor that a model has written into since its version, or its copy, was taken."""
    for name in (*before, *(copies or ())):
        counted = name in before and tensors[name]._version != before[name]
        if counted or (copies and name in copies and not _same(tensors[name], copies[name])):
            raise ValueError(
                f"the model writes into {name}, which is not its own and is read again: let it work on {name}.clone()"
            )


def _same(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> bool:
    """Whether all values are equal, NaN to NaN."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return first.tobytes() == second.tobytes() if first.dtype != object else True  # type: ignore[union-attr]
    first = first.detach()
    if torch.equal(first, second):
        return True
    return bool(((first == second) | ((first != first) & (second != second))).all())


@contextmanager
def naming_step(step: int, num_steps: int) -> Iterator[None]:
    """Adds the step to whatever the model raises, and leaves the exception as it is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step} of {num_steps}")
        raise


def uncached_autocast(device: torch.device) -> torch.autocast:
    """The caller's autocast without its cache of weights, which would outlive, or lack, the graph that needs a cast."""
    dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, dtype, enabled=enabled, cache_enabled=False)


def _described(name: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{name}={type(value).__name__}"
    text = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{name} {text}".strip() if name in ("x", "t", "") else f"{name}={text}"


def _warn_of_train_mode(model: Callable[..., Any]) -> None:
    for module in modules_of(model):
        for name, part in module.named_modules() if module.training else ():
            if part.training and _depends_on_mode(part):
                warnings.warn(
                    f"the model is in train mode and its {name or 'forward'} ({type(part).__name__}) depends on it: "
                    "its outputs are random or its statistics change with every call; call model.eval()",
                    stacklevel=5,
                )
                return


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module's own forward asks for its mode, as those of dropouts and batch norms do."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    rates = (getattr(module, name, None) for name in ("p", "dropout"))
    idle = any(isinstance(rate, int | float) and rate == 0 for rate in rates)  # a module's own p may be a parameter
    return code is not None and "training" in code.co_names and not idle


def modules_of(model: Any, depth: int = 3) -> list[nn.Module]:
    """The modules a callable visibly is or holds: its self, partial arguments, closure, attributes, named globals."""
    if isinstance(model, nn.Module):
        return [model]
    if depth == 0 or isinstance(model, type | types.ModuleType):
        return []
    return [module for item in _held_by(model) for module in modules_of(item, depth - 1)]


def _held_by(model: Any) -> list[Any]:
    """What a callable that is no module holds, in an order of its own."""
    held: list[Any] = []
    if isinstance(model, functools.partial):
        held = [model.func, *model.args, *model.keywords.values()]
    elif isinstance(model, types.MethodType):
        held = [model.__self__]
    elif isinstance(model, types.FunctionType):
        held = [cell.cell_contents for cell in model.__closure__ or () if cell != types.CellType()]  # not empty yet
        named = [model.__globals__.get(name) for name in model.__code__.co_names]
        held += [value for value in named if isinstance(value, nn.Module | Tensor)]
    elif callable(model):
        held = list(getattr(model, "__dict__", {}).values())
    return held


def state_of(model: Any) -> dict[str, Tensor]:
    """The tensors that a callable and its modules hold, by name: parameters, buffers, attributes, those of closures."""
    found = _tensors_of(model, "held", 3)
    seen: set[int] = set()
    for number, module in enumerate(modules_of(model)):
        for path, part in module.named_modules(prefix=f"{number}"):
            if id(part) in seen:
                continue
            seen.add(id(part))
            # What torch.compile wraps is the same model.
            path = path.replace("._orig_mod", "")
            held = {**part._parameters, **part._buffers, **vars(part)}
            found |= {f"{path}.{key}": value for key, value in held.items() if isinstance(value, Tensor)}
    return found


def _tensors_of(model: Any, path: str, depth: int) -> dict[str, Tensor]:
    if isinstance(model, nn.Module | type | types.ModuleType) or depth == 0:
        return {}
    found: dict[str, Tensor] = {}
    for number, item in enumerate(_held_by(model)):
        name = f"{path}.{number}"
        found |= {name: item} if isinstance(item, Tensor) else _tensors_of(item, name, depth - 1)
    return found


def undonated() -> Any:
    """A context in which torch.compile gives no buffers away that a backward needs again, where it is there at all."""
    config = sys.modules.get("torch._functorch.config")
    return config.patch(donated_buffer=False) if config is not None else nullcontext()


@contextmanager
def frozen(models: Sequence[Any]) -> Iterator[None]:
    """The models' modules in eval mode and their parameters out of autograd for a while; then as they were.

    What is compiled meanwhile keeps what it saves for its backward, which runs more than once.
    """
    modules = [part for model in models for module in modules_of(model) for part in module.modules()]
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    before = [p.requires_grad for p in parameters], [m.training for m in modules]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in modules:
            module.training = False
        with undonated():
            yield
    finally:
        for parameter, wanted in zip(parameters, before[0], strict=True):
            parameter.requires_grad_(wanted)
        for module, mode in zip(modules, before[1], strict=True):
            module.training = mode
