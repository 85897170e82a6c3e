"""Processes of a test: forked from a server that has imported the package once, they start in milliseconds."""

import os
import socket
import time
import traceback
from multiprocessing import connection

from torch import multiprocessing

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["dss_fast", "dss_fast.unroll", "lion_pytorch", "safetensors.torch"])


def start(function, *arguments):
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def group(function, *arguments, world=2, stderr=None):
    """``function(rank, *arguments)`` as the processes of one torchrun; gives their exit codes, None for one that hangs:
    for 120 s, or for 30 s once another has ended.

    With a folder for `stderr`, what each process wrote there when it ended is in the files 0, 1, ...
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_member, function, arguments, rank, world, port, stderr) for rank in range(world)]
    end, left = time.monotonic() + 120, [process.sentinel for process in processes]
    while left and time.monotonic() < end:
        ended = connection.wait(left, end - time.monotonic())
        left = [sentinel for sentinel in left if sentinel not in ended]
        end = min(end, time.monotonic() + 30) if ended else end
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _member(function, arguments, rank, world, port, stderr):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if stderr is not None:
        os.dup2(os.open(stderr / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    try:
        function(rank, *arguments)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
