"""The processes that torchrun starts: how a search joins them."""

from __future__ import annotations

import os
from functools import cache
from itertools import count
from typing import Any

import torch


def join_processes() -> bool:
    """Joins the process group that torchrun describes in the environment; whether there was one to join.

    Each process takes the GPU of its local rank. PyTorch chooses the backend by the tensors: gloo and NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        return False
    take_local_device()
    store, rank, world = _rendezvous()
    # In the store lie the addresses of the searches before, where nobody answers, and their errors: hence a prefix.
    own = torch.distributed.PrefixStore(f"dss_fast/{next(_groups)}", store)
    torch.distributed.init_process_group(store=own, rank=rank, world_size=world)
    return True


_groups = count()  # alike on every process, because all make the same searches in one order


@cache
def _rendezvous() -> tuple[Any, int, int]:
    """The store that the processes meet at, this one's rank and how many they are.

    Kept until the process ends: if each search made its own, a process that is early could meet the one before, just
    before the first process closes it.
    """
    return next(torch.distributed.rendezvous("env://"))


def take_local_device() -> None:
    """Makes the GPU of this process's local rank the current one, before any model is built there.

    Where there are fewer GPUs, as for processes with a model on the CPU, nothing happens.
    """
    rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if torch.cuda.is_available() and 0 <= rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)
