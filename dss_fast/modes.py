"""What is kept between calls is made outside the modes of the thread that asks for it.

Under fake tensors, in a graph that is traced (torch.export, make_fx), in a transform of torch.func, in inference mode
and under a default device, operators make tensors that are good there alone: fakes without values, proxies, wrappers.
All these modes belong to a thread, so a new thread has none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_modes(make: Callable[[], Result]) -> Result:
    """make() in a thread of its own, with gradients off; a call costs a tenth of a millisecond."""
    if torch.compiler.is_dynamo_compiling():  # it traces no threads, and keeps nothing
        return make()

    def alone() -> Result:
        with torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(alone).result()


def kept(size: int) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """``functools.lru_cache`` for functions that make tensors: what they return is made outside all modes."""

    def decorate(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @lru_cache(size)
        @wraps(make)
        def made(*args: Any, **options: Any) -> Result:
            return outside_modes(partial(make, *args, **options))

        return made  # type: ignore[return-value]  # lru_cache forgets the arguments' types

    return decorate


_default = threading.local()


@contextmanager
def on_host() -> Iterator[None]:
    """Tensors are made on the CPU for a while where no device is named, whatever ``torch.set_default_device`` says:
    what draws, plans and solves for tables is the host's. The model gets its default back, see :func:`as_given`."""
    default = None if torch.compiler.is_dynamo_compiling() else torch.get_default_device()
    if default is None or default.type == "cpu":
        yield
        return
    before, _default.given = getattr(_default, "given", None), default
    try:
        with torch.device("cpu"):
            yield
    finally:
        _default.given = before


def as_given() -> AbstractContextManager[None]:
    """The default device as it was before :func:`on_host`, for a call of the user's model."""
    given = None if torch.compiler.is_dynamo_compiling() else getattr(_default, "given", None)
    return _NOTHING if given is None else _back_on(given)


@contextmanager
def _back_on(given: torch.device) -> Iterator[None]:
    _default.given = None
    try:
        with torch.device(given):
            yield
    finally:
        _default.given = given


_NOTHING = nullcontext()


def traced(*tensors: Tensor) -> bool:
    """Whether a mode of this thread sees its operators, or a transform of torch.func, or one of these tensors is a
    fake: then only what is made here may meet them, and nothing made here may be kept."""
    modes = torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    return modes or any(hasattr(tensor, "fake_mode") for tensor in tensors)


def readable(tensor: Tensor) -> bool:
    """Whether the host may look at a tensor's values here: not where only shapes are known, where what is done is
    written down for other values, and not under vmap, where one tensor stands for many."""
    if tensor.is_meta or torch.compiler.is_exporting() or torch._is_functional_tensor(tensor):
        return False
    above = torch._C._functorch.get_interpreter_stack() if torch._C._functorch.peek_interpreter_stack() else None
    if any(layer.key() not in _READABLE for layer in above or ()):
        return False
    return not (torch._C._len_torch_dispatch_stack() > 0 or hasattr(tensor, "fake_mode"))


_READABLE = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
