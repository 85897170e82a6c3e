"""A serving loop: requests arrive at random, with solvers of 5 to 10 steps, and share every network call.

    python -m examples.serving

Each tick is one network call and one launch of the step for all places, whatever step each request stands at.
The network is a stand-in; put your own `model(x, t)` there.
"""

import random
from collections import deque

import torch

from dss_fast import Flow
from dss_fast.serving import Batch

SOLVERS = ["sit-xl-2-256/5", "sit-xl-2-256/8", "sit-xl-2-256/10", "ab2/10"]


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity of the flow from noise to a normal distribution of deviation 0.5 around 1."""
    t = t.reshape(-1, 1, 1, 1)
    variance = (0.5 * t) ** 2 + (1 - t) ** 2
    return 1 + (x - t) * (0.25 * t - (1 - t)) / variance


@torch.no_grad()
def main(requests: int = 40, places: int = 8, shape: tuple[int, ...] = (4, 32, 32)) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arrivals = random.Random(0)
    waiting = deque((number, arrivals.choice(SOLVERS)) for number in range(requests))
    batch = Batch(places, shape, max_steps=10, schedule=Flow(), device=device)
    holder, ticks = {}, 0
    while waiting or batch.running:
        while waiting and batch.free and arrivals.random() < 0.7:
            number, solver = waiting.popleft()
            place = batch.admit(torch.randn(shape, device=device), solver)
            holder[place] = number, solver, ticks
        busy = len(batch.running)
        for place in batch.step(model(batch.x, batch.times())):
            number, solver, since = holder.pop(place)
            x = batch.retire(place)
            print(
                f"tick {ticks:3}  {busy} of {places} places busy  request {number:2} by {solver:15} "
                f"since tick {since:3}: mean {x.mean():.3f}, deviation {x.std():.3f}"
            )
        ticks += 1


if __name__ == "__main__":
    main()
