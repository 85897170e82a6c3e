"""kill -9 at random points of a search, resumed until it ends: the table must be the uninterrupted one's to the bit.

    python -m scripts.kill --count 200          # both methods, one process and two; status 1 on any difference

A point is the n-th of all model calls, log lines, syncs and renames of a process; with two processes one of them
dies, and how long the other takes to leave is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch

from dss_fast import GaussNewton, Lion, Target, search
from dss_fast.searching import runs as running
from dss_fast.searching.folder import RunFolder

METHODS = {
    "lion": Lion(samples=96, batch_size=16, unique_samples=48, check_samples=16, check_every=2, teacher_steps=10),
    "gauss_newton": GaussNewton(samples=32, batch_size=16, held_out_samples=16),
}


def model(x, t):
    return torch.tanh(2 * x) * (1 - t[:, None]) + 0.5 * torch.sin(3 * t[:, None]) - 0.7 * x


def run(rank: int, world: int, port: int, out: Path, method: str, moment: int | None, where: Path) -> None:
    """A search as one of ``world`` processes that dies at its moment; writes what it found, and how many moments."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    running.CHECKPOINT_SECONDS = 0.0
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")  # no schedule is plausible for this field
    passed = [0]

    def lethal(original, *arguments, **options):
        passed[0] += 1
        if passed[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    os.replace, os.fsync = partial(lethal, os.replace), partial(lethal, os.fsync)
    note = RunFolder.note
    RunFolder.note = lambda self, event: lethal(note, self, event)
    target = Target(partial(lethal, model), (3,), dtype=torch.float64, key="bend")
    found = search(target, [3, 4], method=METHODS[method], out=out, resume=True, progress=False, report=False)
    if rank == 0:
        tables = {n: solver.to_dict() | {"provenance": {}} for n, solver in found.solvers.items()}
        curves = [found.curve(key, n) for key in ("loss", "held_out") for n in (3, 4)]
        where.write_text(json.dumps([tables, found.evaluations, curves, passed[0]]))


def attempt(context, world, out, method, moment, rank, where) -> tuple[list[int], float]:
    """Exit codes of the processes, of which ``rank`` has the moment, and seconds from the first death to the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=run, args=(r, world, port, out, method, moment if r == rank else None, where))
        for r in range(world)
    ]
    for worker in workers:
        worker.start()
    first = None
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.01)
        if first is None and not all(worker.is_alive() for worker in workers):
            first = time.monotonic()
        if first is not None and time.monotonic() - first > 60:
            for worker in workers:
                worker.kill()
    for worker in workers:
        worker.join()
    return [worker.exitcode for worker in workers], time.monotonic() - (first or time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator, bad = random.Random(options.seed), 0
    context = get_context("forkserver")
    context.set_forkserver_preload(["dss_fast", "lion_pytorch", "safetensors.torch"])
    with tempfile.TemporaryDirectory() as folder:
        for world, method in ((1, "lion"), (1, "gauss_newton"), (2, "lion"), (2, "gauss_newton")):
            where = Path(folder) / "found.json"
            attempt(context, world, Path(folder) / f"{world}{method}", method, None, 0, where)
            *expected, moments = json.loads(where.read_text())
            kills = differences = trial = 0
            longest = 0.0
            while kills < options.count // 4:
                trial += 1
                out = Path(folder) / f"{world}{method}{trial}"
                where = out.with_suffix(".json")
                for _ in range(3):
                    rank, moment = generator.randrange(world), generator.randint(1, moments)
                    codes, seconds = attempt(context, world, out, method, moment, rank, where)
                    if codes[rank] != -signal.SIGKILL:
                        break
                    kills, longest = kills + 1, max(longest, seconds)
                if not where.exists():
                    attempt(context, world, out, method, None, 0, where)
                *found, _ = json.loads(where.read_text()) if where.exists() else (None, None)
                differences += found != expected
            bad += differences
            print(
                f"{method}, {world} process{'es' * (world > 1)}: {kills} kills, {moments} moments, {trial} searches; "
                f"{differences} differ, the last process left {longest:.1f} s after the first",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
