"""A whole sampling loop, model included, as one CUDA graph that is captured once and replayed.

A replay reads the noise, the conditions and the weights from the tensors the capture saw, so new values are
copied into those first; coefficients are data on the device, never kernel arguments, and cannot go stale.
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEPT = 8  # captured loops, least recently used dropped first; each holds its model's activations once
_captured: OrderedDict[Hashable, Callable[[Mapping[str, Tensor]], Tensor]] = OrderedDict()


class _Capture:
    """A captured function of named tensors: calling it copies new values in, replays, and clones the result."""

    def __init__(self, function: Callable[..., Tensor], tensors: Mapping[str, Tensor]):
        self.function = function  # holds the model alive, so that its id cannot be given to another
        self.inputs = {key: value.clone() for key, value in tensors.items()}
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            function(**self.inputs)  # lazily made handles, autotuning and Triton's modules must exist beforehand
            with _refusing_to_wait():
                function(**self.inputs)
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before, collecting = generator.clone_state(), gc.isenabled()
        gc.disable()  # a Triton kernel finalised during the capture would unload its module and break it
        try:
            with torch.cuda.graph(self.graph):
                self.output = function(**self.inputs)
        except BaseException:  # PyTorch leaves its stream current, its generator capturing (ACE-Step-1.5 issue 587)
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(before)
            raise
        finally:
            if collecting:
                gc.enable()

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        for key, value in tensors.items():
            self.inputs[key].copy_(value, non_blocking=True)
        self.graph.replay()
        return self.output.clone()


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """What waits for the device raises, here cleanly; in a capture the same would invalidate it."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def replay(key: Hashable, function: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """function(**tensors) by a captured graph; without one where that is impossible, saying why.

    key: everything beside the tensors' values that settles what the function does. Captures are kept
    per key and per shape, dtype and device of the tensors.
    """
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        warnings.warn(f"cuda_graph=True runs eagerly: the noise is on {device}, not on a GPU", stacklevel=4)
        return function(**tensors)
    key = (key, *((name, t.shape, t.dtype, t.device) for name, t in sorted(tensors.items())))
    if key not in _captured:
        try:
            with torch.cuda.device(device):
                _captured[key] = _Capture(function, tensors)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(
                f"cuda_graph=True runs eagerly: the model could not be captured ({reason}); a capture allows no "
                "copy to the host, no .item(), and no work on the CPU that depends on results",
                stacklevel=4,
            )
            _captured[key] = lambda tensors: function(**tensors)  # and is not tried again
        while len(_captured) > KEPT:
            _captured.popitem(last=False)
    _captured.move_to_end(key)
    return _captured[key](tensors)


def forget() -> None:
    """Drops all captured loops and the memory they hold."""
    _captured.clear()


def signature(arguments: Mapping[str, Any]) -> Hashable:
    """The part of keyword arguments that is no tensor, as a key; dicts and lists count by what they hold.

    Raises TypeError for what cannot be one, a tensor inside a dict or list among them: a replay could not change it.
    """
    return _frozen({k: v for k, v in arguments.items() if not isinstance(v, Tensor)})


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted((str(k), _frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, Tensor):
        raise TypeError("a tensor inside a dict or list")
    hash(value)
    return value
