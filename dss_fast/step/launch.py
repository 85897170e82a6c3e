"""Launches that go straight to a compiled kernel.

Triton's `kernel[grid](...)` inspects every argument of every launch, which takes 14 to 17 microseconds of the host's
time. Here that happens once for each kind of call: calls with the same devices, dtypes, shapes, strides and alignments
share a compiled kernel, its grid and its integers. Later calls hand their pointers to Triton's launcher, which takes 3.
That launcher is no public interface, so versions of Triton that were not tried make every launch in their own way.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["Kind", "Launch", "kind_of", "launch"]

KINDS = 4096  # launches kept, a kilobyte each
TRIED = {"3.6", "3.7", "3.8", "3.9"}  # versions of Triton that tests/step/test_launches.py has passed with
ALIGNED = 15  # Triton compiles wide accesses for pointers that are multiples of 16

Kind = tuple[Any, ...]


def kind_of(tensors: Sequence[Tensor], *rest: Any) -> tuple[Kind, list[int]]:
    """The kind of a call (devices, dtypes, shapes, strides, alignments and the rest), and its tensors' pointers."""
    pointers = [t.data_ptr() for t in tensors]
    each = [(t.get_device(), t.dtype, t.shape, t.stride(), p & ALIGNED) for t, p in zip(tensors, pointers, strict=True)]
    return (*each, *rest), pointers


class Launch:
    """A compiled kernel with its grid and its numbers; called with tensors of its kind.

    Triton's launch hooks, which its own profiler sets, are not called.
    """

    known: dict[Kind, "Launch"] = {}

    def __init__(self, compiled: Any, blocks: int, device: int, pointers: int, numbers: tuple[Any, ...]):
        self.compiled = compiled  # it is kept because it unloads its module when it goes
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.blocks, self.device, self.pointers, self.numbers = blocks, device, pointers, numbers
        self.driver = triton.runtime.driver.active

    def __call__(self, *pointers: Any) -> None:
        """Launches on the current stream of the tensors' device. pointers: of tensors of this kind, in order."""
        if len(pointers) != self.pointers:  # which Triton 3.9 would not notice
            raise TypeError(f"a kernel of {self.pointers} tensors is launched with {len(pointers)}")
        driver, device = self.driver, self.device
        if driver.get_current_device() != device:
            with torch.cuda.device(device):
                return self(*pointers)
        stream = driver.get_current_stream(device)
        self.run(
            self.blocks, 1, 1, stream, self.function, self.metadata, None, None, None, *pointers, *self.numbers
        )  # fmt: skip


def launch(
    kind: Kind, kernel: Any, blocks: int, tensors: Sequence[Any], numbers: Sequence[int], **options: Any
) -> None:
    """A launch in Triton's own way, the first of a kind, which compiles; `known` keeps what later ones need."""
    first = tensors[0]
    flags = tuple(options[name] for name in kernel.arg_names if name in options)
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        compiled = kernel[(blocks,)](*tensors, *numbers, **options)
    if compiled is not None and tried():  # the interpreter compiles nothing
        if len(Launch.known) >= KINDS:
            Launch.known.clear()
        Launch.known[kind] = Launch(compiled, blocks, first.get_device(), len(tensors), (*numbers, *flags))


def tried() -> bool:
    """Whether the launcher of this version of Triton is known to take what `Launch` hands it."""
    return ".".join(triton.__version__.split(".")[:2]) in TRIED
