"""The processes of a search: how those that torchrun starts find each other, and how all learn what one finds."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")
FAILED = "dss_fast/failed"
ANSWER_SECONDS = 10.0  # a store answers in milliseconds


@contextmanager
def joined() -> Iterator[Any]:
    """The process group that torchrun describes in the environment, for as long as the block runs; None where there is
    none, and beside a group that is there already, whose processes may share a model instead of samples.

    Each process takes the GPU of its local rank. PyTorch chooses the backend by the tensors: gloo and NCCL. An error
    is left for the other processes, which see a closed connection only, or gets what they left as a note. Without
    torchrun, and in a group that is there already, nothing is joined or left.
    """
    own = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined()
    if own:
        take_local_device()
        store, rank, world = _rendezvous()
        # In the store lie the addresses of the searches before, where nobody answers, and their errors: hence a prefix.
        prefixed = torch.distributed.distributed_c10d.PrefixStore(f"dss_fast/{next(_groups)}", store)
        torch.distributed.init_process_group(store=prefixed, rank=rank, world_size=world)
    try:
        yield torch.distributed.group.WORLD if own else None
    except Exception as error:
        if _joined():
            _name_the_first(error)
        raise
    finally:
        if own:  # after an error too: leaving the group frees those who wait for this process
            torch.distributed.destroy_process_group()


_groups = count()  # alike on every process, because all make the same searches in one order


@cache
def _rendezvous() -> tuple[Any, int, int]:
    """The store that the processes meet at, this one's rank and how many they are.

    Kept until the process ends: if each search made its own, a process that is early could meet the one before, just
    before the first process closes it.
    """
    from torch.distributed.rendezvous import rendezvous

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    taken = f"MASTER_PORT={port} of {host} is taken by another program: choose another one (torchrun --master-port)"
    # A store of torchrun's own is there before its processes.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ.get("RANK", "0") != "0":
        _await_store(host, port, taken)
    try:
        found: tuple[Any, int, int] = next(rendezvous("env://"))
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise OSError(taken) from error
        raise
    return found


def _await_store(host: str, port: str, taken: str) -> None:
    """Waits for the first process's store, as long as PyTorch does. Raises OSError saying that the port is ``taken``.

    Where nobody listens yet the constructor of a client ends with its timeout; where a store does, at once, because
    that answers from a thread of its own; where another program does, never.
    """
    if not (host and port.isdecimal()):
        return  # which PyTorch says
    end = time.monotonic() + torch.distributed.constants.default_pg_timeout.total_seconds()
    begun, answered = [time.monotonic()], threading.Event()

    def ask() -> None:
        client: Any = torch.distributed.TCPStore  # type: ignore[attr-defined]
        patience = timedelta(seconds=ANSWER_SECONDS)
        while not answered.is_set() and time.monotonic() < end:
            begun[0] = time.monotonic()
            with suppress(torch.distributed.DistError):
                client(host, int(port), is_master=False, timeout=patience, wait_for_workers=False)
                answered.set()
            time.sleep(0.05)

    threading.Thread(target=ask, daemon=True).start()
    while not answered.wait(ANSWER_SECONDS / 10) and time.monotonic() < end:
        if time.monotonic() - begun[0] > 2 * ANSWER_SECONDS:
            raise OSError(taken)


def take_local_device() -> None:
    """Makes the GPU of this process's local rank the current one, before any model is built there.

    Where there are fewer GPUs, as for processes with a model on the CPU, nothing happens.
    """
    rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if torch.cuda.is_available() and 0 <= rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)


def is_first() -> bool:
    """Whether this process is the one that writes, prints and reports."""
    return not _joined() or torch.distributed.get_rank() == 0


def from_first(work: Callable[[], T]) -> T:
    """What some work of the first process returns, or raises, on every process: none is left waiting."""
    found: T | None = None
    failed: Exception | None = None
    if is_first():
        try:
            found = work()
        except Exception as error:
            failed = error
    if _joined():
        shared: list[Any] = [found, failed]
        torch.distributed.broadcast_object_list(shared, src=0)
        found, failed = shared
    if failed is not None:
        raise failed
    return cast(T, found)


def agreed(config: dict[str, Any]) -> dict[str, Any]:
    """The first process's config, as JSON data. Raises ValueError on every process where one of them has another."""
    mine: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    if not _joined():
        return mine
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    for rank, other in enumerate(every):
        if found := differing(every[0], other):
            raise ValueError(
                f"process {rank} searches for another {', '.join(found)} than the first one: weights, conditions "
                "and settings must be the same in all processes"
            )
    return cast(dict[str, Any], every[0])


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two searches differ in, but for the date: names of settings, and instead of "targets" of what these are."""
    names = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key) and key != "date"]
    found = sorted(key for key in names if key != "targets")
    if "targets" in names:
        pairs = list(zip(first.get("targets") or (), second.get("targets") or (), strict=False))
        for number, (a, b) in enumerate(pairs):
            where = f" of target {number}" if len(pairs) > 1 else ""
            found += [f"{key}{where}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        found += ["targets"] if len(first.get("targets") or ()) != len(second.get("targets") or ()) else []
    return found


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _name_the_first(error: Exception) -> None:
    """Leaves word of an error for the other processes, or adds to it what they left."""
    with suppress(RuntimeError):  # the process that keeps the store may be the one that is gone
        store = torch.distributed.distributed_c10d._get_default_store()
        if store.check([FAILED]):
            error.add_note(f"the first to fail was {store.get(FAILED).decode()}")
        else:
            store.set(FAILED, f"process {torch.distributed.get_rank()}: {type(error).__name__}: {error}")
