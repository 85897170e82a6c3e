"""Room: the memory that a search has, and a batch run in parts that fit it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..unroll.kept import AUTO_SHARE, free_bytes

HOST = 32 << 30  # bytes of trajectories on the host at most, of what is free there AUTO_SHARE at most
MEMORY = 1 << 29  # bytes of a round's rollouts that are kept
PART = 8 << 30  # bytes of a part of a batch that does not fit whole: from here on a card is busy, and more is no faster
WHOLE = 16 << 30  # bytes of graphs from which on activations are computed again rather than kept, where a network can


@dataclass
class Room:
    """rows: samples that run at a time on this process; None: whole batches. It is halved where memory runs out, which
    changes sums in their last bits only. host: bytes left for the inner states of trajectories. kept: bytes of a
    round's rollouts between its acceptance test and its backward; beyond, they run again. graphs: what their calls may
    keep beside, a memory budget of ``Rollout``."""

    rows: int | None = None
    host: int = HOST
    kept: int = MEMORY
    graphs: int | str | None = "auto"
    halved: bool = False

    def keeps(self, size: int) -> bool:
        """Takes so many bytes of the host, if there are."""
        if size > self.host:
            return False
        self.host -= size
        return True

    def over(self, rows: slice) -> Iterator[Part]:
        """Some rows in parts, each a context for the work on it: ``for part in room.over(...): with part as rows:``.

        Out of memory it goes on with parts of half as many, from the one that failed on. Raises
        torch.OutOfMemoryError where a single sample does not fit.
        """
        start = rows.start
        while start < rows.stop:
            stop = rows.stop if self.rows is None else min(start + self.rows, rows.stop)
            part = Part(self, slice(start, stop))
            yield part
            start = stop if part.done else start

    def halve(self, rows: int) -> None:
        self.rows = min(self.rows or rows, rows) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self.halved:
            warnings.warn(f"out of memory with {rows} samples at a time: going on with half as many", stacklevel=4)
        self.halved = True


@dataclass
class Part:
    """Some samples of a batch, while they run. done: whether their work came to its end."""

    room: Room
    rows: slice
    done: bool = False

    def __enter__(self) -> slice:
        return self.rows

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.done, count = error is None, self.rows.stop - self.rows.start
        if not isinstance(error, torch.OutOfMemoryError):
            return False
        if count == 1:
            error.add_note(f"of a single sample: {REMEDIES}")
            return False
        error.__traceback__ = None  # whose frames hold tensors
        self.room.halve(count)
        return True


REMEDIES = (
    "switch the network's gradient checkpointing on (Target(checkpointing=function) where it has none that is known), "
    "store its weights in fewer bytes (float8, nf4), offload them, or search at smaller samples, whose table is a "
    "start for these (initial=)"
)


def usable(device: torch.device, memory: int | None) -> tuple[int, int]:
    """Bytes of a device that a search may use beside the weights, and the most that a single sample may: those given,
    or half and nine tenths of what is free."""
    if memory is not None:
        return memory, memory
    free = free_bytes(device)
    return int(AUTO_SHARE * free), int(0.9 * free)


def host_room() -> int:
    """Bytes of trajectories that the host may keep."""
    return min(HOST, int(AUTO_SHARE * free_bytes(torch.device("cpu"))))
