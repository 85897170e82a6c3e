"""A whole sampling loop, model included, as one CUDA graph that is captured once and replayed.

A replay reads the noise, the conditions and the weights from the tensors the capture saw, so new values are
copied into those first; coefficients are data on the device, never kernel arguments, and cannot go stale.

Any thread may call, on any stream. One lock covers the captures and what a replay enqueues; the captures of a device
share one memory pool, so an event orders their replays over all streams. While one thread captures the others may use
the device, except that PyTorch 2.11 refuses random numbers drawn there from its default generator.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from .denoiser import uncached_autocast
from .modes import traced

LOOPS = 8  # loops a device keeps: the inputs and output of each, and the activations of the largest; a ninth ends all
CAPTURES = "cuda"  # the type of device that can capture

_lock = threading.RLock()
_devices: dict[torch.device, _Device] = {}
_abandoned: list[Any] = []  # graphs of failed captures live on: PyTorch's allocator of pinned memory may ask them


class _Loop:
    """One captured function of named tensors; ``graph`` is None where it could not be captured.

    inputs: what the capture reads, allocated on the stream ``home``. pool: where the rest of its memory lies.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.home = torch.cuda.current_stream()
        self.inputs = {key: value.clone() for key, value in tensors.items()}
        self.constants: dict[str, Tensor] = {}  # those that inputs hold
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None
        self.pool: Any = None

    def capture(self, function: Callable[..., Tensor], stream: torch.cuda.Stream, pool: Any) -> None:
        """Captures function(**inputs), which has run before, on a stream; raises what made that impossible."""
        device, graph, cause = self.home.device.index, torch.cuda.CUDAGraph(), None
        generator, collecting = torch.cuda.default_generators[device], gc.isenabled()
        state = generator.clone_state()
        gc.disable()  # a Triton kernel finalised during the capture would unload its module and break it
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    self.output = function(**self.inputs)
                except BaseException as error:  # the end of a broken capture raises another in its place
                    cause = error
                    raise
        except BaseException as error:
            generator.graphsafe_set_state(state)  # a failed capture leaves it capturing (ACE-Step-1.5 issue 587)
            self.output = None
            _abandon(graph, device, pool)
            raise cause or error from None
        finally:
            cause = None  # it holds this frame
            if collecting:
                gc.enable()
        self.graph, self.pool = graph, pool

    def replay(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
        """The result for new values, on the current stream."""
        assert self.graph is not None and self.output is not None
        for key, value in tensors.items():
            self.inputs[key].copy_(value)
        for key, value in constants.items():
            if self.constants.get(key) is not value:
                self.inputs[key].copy_(value)
                self.constants[key] = value
        self.graph.replay()
        return self.output.clone()


class _Device:
    """The loops of one GPU and what they share: the stream they are captured on, a memory pool, the last replay's end.

    A pool gives its memory out on one stream, hence one for all captures. Nothing else runs there, so that cuBLAS first
    needs its workspace for the stream in a capture, and gets it from the pool. There it stays when PyTorch lets it go:
    CUDAGraph.reset() clears those of the graph's stream, torch.compile(mode="reduce-overhead") all there are.
    """

    def __init__(self, device: torch.device):
        self.device, self.finished = device, torch.cuda.Event()
        self.loops: dict[Hashable, _Loop] = {}
        self.stream: Any = None
        self.pool: Any = None

    def add(self, key: Hashable, function: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> None:
        """A new loop, captured, or with a warning that says why where it cannot be. Raises what the function does."""
        reason = ""
        # Inputs made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad(), uncached_autocast(self.device):
            loop = _Loop(tensors)
            loop.home.wait_event(self.finished)  # the model may own memory that a replay writes too
            # What is made at the first call (handles, autotuning, Triton's modules) cannot be made in a capture.
            function(**loop.inputs)
            # Casts that the model's own autocast has cached would be freed while replays still read them.
            torch.clear_autocast_cache()
            if len(self.loops) >= LOOPS:
                self.retire()
            try:
                loop.capture(function, *self._place())
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            finally:
                torch.clear_autocast_cache()
                if loop.graph is None:
                    loop.inputs.clear()
                    self.pool = None  # PyTorch may think that it is still captured into
        self.loops[key] = loop  # a failed one is kept too, so that it is not tried again
        if reason:
            warnings.warn(
                f"cuda_graph=True runs eagerly: the model could not be captured ({reason}); a capture allows no copy "
                "to the host, no .item(), and no work on the CPU that depends on results",
                stacklevel=6,
            )

    def retire(self) -> None:
        """Lets all loops go, never one: the others might use a workspace that goes with it. Their memory is given out
        again on their home streams, which wait for the last replay."""
        for loop in self.loops.values():
            loop.home.wait_event(self.finished)
        self.loops.clear()

    def _place(self) -> tuple[torch.cuda.Stream, Any]:
        """Stream and pool of the loops there are; new ones when all that used them are gone: PyTorch then refuses the
        pool, and some versions keep the stream's workspace in it."""
        if not any(loop.graph is not None and loop.pool == self.pool for loop in self.loops.values()):
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        return self.stream, self.pool


def replay(
    key: Hashable,
    function: Callable[..., Tensor],
    tensors: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> Tensor:
    """function(**tensors, **constants) by a captured graph; without one where that is impossible, saying why.

    key: everything beside the tensors' values that settles what the function does, the model among it. Captures are
    kept per key, autocast state and shape and dtype of the tensors, :data:`LOOPS` on each device.
    tensors, constants: on one device; a constant's values never change, so that the same one is copied once.
    """
    given = {**tensors, **constants}
    device = next(iter(given.values())).device
    if device.type != CAPTURES:
        warnings.warn(f"cuda_graph=True runs eagerly: the noise is on {device}, not on a GPU", stacklevel=5)
        return function(**given)
    if traced(*given.values()) or torch.cuda.is_current_stream_capturing():  # it becomes part of the caller's graph
        return function(**given)
    key = (key, _autocast(device.type), *((name, given[name].shape, given[name].dtype) for name in given))
    with _lock, torch.cuda.device(device):
        here = _devices.get(device) or _devices.setdefault(device, _Device(device))
        if key not in here.loops:
            here.add(key, function, given)
        loop = here.loops[key]
        if loop.graph is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(here.finished)
            result = loop.replay(tensors, constants)
            here.finished.record(stream)
            return result
    return function(**given)


def forget() -> None:
    """Drops all captured loops and the memory they hold, as needed after a model's parameters moved or were replaced,
    which a replay reads where the capture found them, or after a number or flag in it changed, such as the scale of a
    LoRA: a capture holds what they were. (Looking for such changes would take 0.8 ms a call for 340 modules.)"""
    with _lock:
        for device in _devices.values():
            device.retire()


def _abandon(graph: Any, device: int, pool: Any) -> None:
    """Undoes what a failed capture left under way: capture_end raises before it tells the allocators (CUDAGraph.cpp).

    Until then empty_cache() may assert and what is short of memory cannot free any. The allocator of pinned memory has
    no such door: it will refuse this pool, and calls a function of the graph, which therefore stays.
    """
    graph.reset()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the capture had ended properly: the model in it failed
        return
    torch._C._cuda_releasePool(device, pool)
    _abandoned.append(graph)


def _autocast(kind: str) -> torch.dtype | None:
    """What the caller's autocast casts to; None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def signature(arguments: Mapping[str, Any]) -> Hashable:
    """The keyword arguments beside the tensors, as a key; dicts and lists count by what they hold.

    Raises TypeError for what cannot be hashed, and for a tensor inside a dict or list, which a replay could not change.
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
    return value  # type: ignore[no-any-return]
