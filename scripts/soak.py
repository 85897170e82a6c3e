"""A soak of ``serving.Batch``: threads with random admissions, cancellations and failures of their model.

    python -m scripts.soak --ticks 100000 --threads 8     # status 1 on a wrong bit, or growth of memory or objects

Every finished request is compared with :func:`dss_fast.sample` of it alone, to the bit.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading

import torch

from dss_fast import sample
from dss_fast.serving import Batch

SHAPE, SOLVERS = (3, 5), ("sit-xl-2-256/5", "ab2/3", "ab2/8", "ab3/5", "dpmpp_2m/4")


def model(x, t, y):
    return torch.sin(x * 1.5 + t[:, None, None]) - 0.3 * x * y[:, None, None]


def soak(ticks: int, seed: int, counts: dict[str, int], lock: threading.Lock) -> None:
    """So many ticks of a batch of this thread's own."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, running = Batch(4, SHAPE, max_steps=8, cond={"y": torch.zeros(4)}), {}
    mine = dict.fromkeys(counts, 0)

    def unwell(x, t, y):
        raise RuntimeError("unwell")

    for _ in range(ticks):
        if batch.free and choose.random() < 0.7:
            noise, solver, y = torch.randn(SHAPE, generator=generator), choose.choice(SOLVERS), choose.random()
            running[batch.admit(noise, solver, cond={"y": y})] = noise, solver, y
            mine["admitted"] += 1
        if running and choose.random() < 0.05:
            place = choose.choice(list(running))
            batch.retire(place)
            del running[place]
            mine["cancelled"] += 1
        if choose.random() < 0.05:
            try:
                batch.tick(unwell)
            except RuntimeError:
                mine["failed"] += 1
        for place in batch.tick(model):
            noise, solver, y = running.pop(place)
            alone = sample(model, noise[None], solver, cond={"y": torch.tensor([y])})[0]
            mine["finished"] += 1
            mine["wrong"] += not torch.equal(batch.retire(place), alone)
        mine["ticks"] += 1
    with lock:
        for key, value in mine.items():
            counts[key] += value


def resident() -> float:
    """MB of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured, counts = [], dict.fromkeys(("ticks", "admitted", "finished", "cancelled", "failed", "wrong"), 0)
    lock, each = threading.Lock(), options.ticks // 4 // options.threads
    for part in range(4):  # the first part warms up
        seeds = range(100 * part, 100 * part + options.threads)
        threads = [threading.Thread(target=soak, args=(each, seed, counts, lock)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        measured.append((resident(), len(gc.get_objects())))
        print(f"{counts}; {measured[-1][0]:.0f} MB, {measured[-1][1]} objects", flush=True)
    grown = measured[-1][0] - measured[0][0], measured[-1][1] - measured[0][1]
    print(f"growth after the first quarter: {grown[0]:.1f} MB, {grown[1]} objects")
    return int(counts["wrong"] > 0 or counts["finished"] == 0 or grown[0] > 20 or grown[1] > 500)


if __name__ == "__main__":
    sys.exit(main())
