"""What the step's kernels reach of a device's memory bandwidth, beside a copy and torch.compile captured the same way.

    python benchmarks/bandwidth.py ROWS.jsonl [--ops forward list backward pull gradient] [--seconds 120] [--tiny]

On a GPU by graph replay, 20 launches a graph. Cold: the launches rotate over sets of tensors of more than 200 MB
together, four times the L2 of an H100, as after a model call. Warm: all on one set, where that fits into the L2. Two
yardsticks read and write as many bytes: "copy", an elementwise kernel, which starts as our kernels do, and "memcpy".
--warm-up only compiles, for a measurement that follows. On a CPU the same without graphs, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE, conditions
from step_ways import Setting
from torch import Tensor

from dss_fast.step import multistep_pull, multistep_step, multistep_update

SHAPES = (
    (1, 4, 32, 32), (16, 4, 32, 32), (1, 16, 128, 128), (4, 16, 128, 128), (1, 16, 21, 90, 160), (4, 16, 21, 90, 160)
)  # fmt: skip
TINY = ((1, 4, 8, 8),)
# What is measured first where the time may not last: the sizes that have goals, the network's own dtype.
URGENT = (4, 5, 2, 3, 1, 0)
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"bf16": (BF16, BF16), "mixed": (F32, BF16), "fp32": (F32, F32)}  # of the state and of the network
STEPS, LAUNCHES, BEYOND = 10, 20, 200e6
L2 = 40e6  # bytes that stay there on every GPU with 50 MB of it

Call = Callable[[Setting], Any]


def forward_bytes(n: int, state: int, network: int) -> int:
    """x, the output and N - 1 slots read, x_next and a slot written."""
    return n * (2 * state + (1 + STEPS) * network)


def backward_bytes(n: int, state: int, network: int) -> int:
    """The gradient, x, the output and N - 1 slots read; the gradients of x, the output and N - 1 slots written."""
    return n * (3 * state + 2 * STEPS * network)


def pull_bytes(n: int, state: int, network: int) -> int:
    """N adjoints read, the gradients of x and of the output written, all in the history's dtype here."""
    return n * (STEPS + 2) * network


def gradient_bytes(n: int, state: int, network: int) -> int:
    """Forward and backward of one step."""
    return forward_bytes(n, state, network) + backward_bytes(n, state, network)


BYTES = {
    "forward": forward_bytes,
    "list": forward_bytes,
    "backward": backward_bytes,
    "pull": pull_bytes,
    "gradient": gradient_bytes,
}


def setting(shape: tuple[int, ...], types: str) -> Setting:
    """Tensors of a cell, with the last step's weights apart: torch.compile copies what is not aligned to 16 bytes."""
    made = Setting(shape, STEPS, DTYPES[types], device=DEVICE)
    made.row = made.weights[0, -1].clone()
    return made


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward() -> dict[str, Call]:
    """The last of N steps into tensors that are there."""
    last = STEPS - 1

    @compiled
    def step(x, output, history, row):
        history[:, last] = output
        weighted = row[4:].view(1, -1, *[1] * (x.dim() - 1)) * history
        return (x + weighted.sum(1)).to(x.dtype)

    return {
        "ours": lambda s: multistep_step(s.x, s.outputs[last], s.history, s.weights, s.index[last:], out=s.out),
        "compiled": lambda s: step(s.x, s.outputs[last], s.history, s.row),
    }


def listed() -> dict[str, Call]:
    """The last of N steps with its history as a list, y returned."""
    last = STEPS - 1

    @compiled
    def step(x, output, row, *past):
        y = (row[1] * x + row[2] * output).to(output.dtype)
        total = row[0] * x + row[4 + last] * y
        for j in range(last):
            total = total + row[4 + j] * past[j]
        return total.to(x.dtype), y

    return {
        "ours": lambda s: multistep_update(s.x, s.outputs[last], s.outputs[:last], s.weights, last),
        "compiled": lambda s: step(s.x, s.outputs[last], s.row, *s.outputs[:last]),
    }


def backward() -> dict[str, Call]:
    """All four gradients of the last step from that of x_next."""
    last, op = STEPS - 1, torch.ops.dss_fast.multistep_update_backward.default

    @compiled
    def pulled(grad, x, output, row, *past):
        a, p, q, w = row[0], row[1], row[2], row[4:]
        g, xf, m = grad.float(), x.float(), output.float()
        total = w[last] * g
        slots = [(w[j] * g).to(y.dtype) for j, y in enumerate(past)]
        sums = [(xf * g), (xf * total), (m * total), *(y.float() * g for y in past), ((p * xf + q * m) * g)]
        rows = torch.stack([s.flatten(1).sum(1) for s in sums], 1)
        return (a * g + p * total).to(x.dtype), (q * total).to(output.dtype), slots, rows

    return {
        "ours": lambda s: op(
            s.out, None, s.x, s.outputs[last], s.outputs[:last], s.weights, last, [True, True, True, True]
        ),
        "compiled": lambda s: pulled(s.out, s.x, s.outputs[last], s.row, *s.outputs[:last]),
    }


def pull() -> dict[str, Call]:
    """What N adjoints send back to the first step."""

    @compiled
    def pulled(adjoints, table):
        a, p, q, column = table[0, 0], table[0, 1], table[0, 2], table[:, 4]
        gy = (column.view(1, -1, *[1] * (adjoints.dim() - 2)) * adjoints).sum(1)
        return (a * adjoints[:, 0] + p * gy).to(adjoints.dtype), (q * gy).to(adjoints.dtype)

    return {
        "ours": lambda s: multistep_pull(s.history, s.weights, s.index[:1]),
        "compiled": lambda s: pulled(s.history, s.weights[0]),
    }


def gradient() -> dict[str, Call]:
    """Forward and backward of the last step by autograd, in list form."""
    last = STEPS - 1

    @compiled
    def step(x, output, row, *past):
        total = x + row[4 + last] * output
        for j in range(last):
            total = total + row[4 + j] * past[j]
        return total.to(x.dtype)

    def leaves(s: Setting, way: str, *tensors: Tensor) -> list[Tensor]:
        if not hasattr(s, way):
            setattr(s, way, [t.detach().requires_grad_() for t in tensors])
        return getattr(s, way)

    def ours(s: Setting) -> Any:
        held = leaves(s, "ours", s.x, s.outputs[last], s.weights, *s.outputs[:last])
        x, output, weights, *past = held
        with torch.enable_grad():
            return torch.autograd.grad(multistep_update(x, output, past, weights, last)[0], held, s.out)

    def theirs(s: Setting) -> Any:
        held = leaves(s, "theirs", s.x, s.outputs[last], s.row, *s.outputs[:last])
        with torch.enable_grad():
            return torch.autograd.grad(step(*held), held, s.out)

    return {"ours": ours, "compiled": theirs}


OPS: dict[str, Callable[[], dict[str, Call]]] = {
    "forward": forward, "list": listed, "backward": backward, "pull": pull, "gradient": gradient
}  # fmt: skip


class Replay:
    """Calls as CUDA graphs of at most LAUNCHES each; on a CPU the calls themselves."""

    def __init__(self, calls: list[Callable[[], Any]]):
        self.calls, self.graphs = calls, []
        if DEVICE.type != "cuda":
            return
        for call in calls[:2]:
            call()  # compiles and loads
        torch.cuda.synchronize()
        for start in range(0, len(calls), LAUNCHES):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                # What a launch returns lives until the capture ends: the next may not write into the same place.
                kept = [call() for call in calls[start : start + LAUNCHES]]
            del kept
            self.graphs.append(graph)

    def seconds(self, repeats: int) -> float:
        """Of one call."""
        if not self.graphs:
            begin = time.perf_counter()
            for _ in range(repeats):
                for call in self.calls:
                    call()
            return (time.perf_counter() - begin) / repeats / len(self.calls)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            for graph in self.graphs:
                graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats / len(self.calls)


def yardsticks(size: int, count: int) -> dict[str, list[Callable[[], Any]]]:
    """What reads and writes as many bytes in all, each call between tensors of its own."""
    pairs = []
    for _ in range(count):
        a = torch.empty(size // 8, dtype=torch.int32, device=DEVICE).random_()
        pairs.append((a, torch.empty_like(a)))
    return {
        "copy": [lambda a=a, b=b: torch.bitwise_not(a, out=b) for a, b in pairs],
        "memcpy": [lambda a=a, b=b: b.copy_(a) for a, b in pairs],
    }


def cell(op: str, shape: tuple[int, ...], types: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one operation at one size."""
    state, network = DTYPES[types]
    n = torch.Size(shape).numel()
    size = BYTES[op](n, state.itemsize, network.itemsize)
    count = 1 + int(BEYOND / size) if DEVICE.type == "cuda" else 2
    if count > 1:
        count = -(-count // LAUNCHES) * LAUNCHES if DEVICE.type == "cuda" else count
    sets = [setting(shape, types) for _ in range(count)]
    launches = max(count, LAUNCHES) if DEVICE.type == "cuda" else count
    torch._dynamo.reset()
    ways = OPS[op]()
    for way in ways.values():
        way(sets[0])
    replays = {
        name: Replay([lambda s=sets[k % count], way=way: way(s) for k in range(launches)]) for name, way in ways.items()
    }
    plain = yardsticks(size, count)
    for name, calls in plain.items():
        replays[name] = Replay([calls[k % count] for k in range(launches)])
    cold = measured(replays, rounds)
    warm = {}
    if size < L2:
        one = {name: Replay([lambda way=way: way(sets[0])] * LAUNCHES) for name, way in ways.items()}
        warm = measured(one | {name: Replay([calls[0]] * LAUNCHES) for name, calls in plain.items()}, rounds)
    for name, (low, middle, high) in cold.items():
        yield {
            "stage": "bandwidth", "op": op, "way": name, "shape": "x".join(map(str, shape)), "elements": n,
            "steps": STEPS, "types": types, "bytes": size, "sets": count, "us": middle * 1e6, "p20_us": low * 1e6,
            "p80_us": high * 1e6, "gb_per_s": size / middle / 1e9, "of_copy": cold["copy"][1] / middle,
            "of_memcpy": cold["memcpy"][1] / middle, "warm_us": warm[name][1] * 1e6 if warm else None, **conditions(),
        }  # fmt: skip


def measured(replays: dict[str, Replay], rounds: int) -> dict[str, tuple[float, float, float]]:
    """p20, median and p80 of the seconds a call, the ways taking turns in random order."""
    repeats = {}
    for name, replay in replays.items():
        replay.seconds(1)
        repeats[name] = max(1, min(50, int(2e-3 / max(replay.seconds(1) * len(replay.calls), 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(sorted(replays), len(replays)):
            seconds[name].append(replays[name].seconds(repeats[name]))
    return {name: quantiles(found) for name, found in seconds.items()}


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    return ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="JSON lines are appended here as soon as they are known")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--types", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=120, help="no cell is begun later than this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm-up", action="store_true", help="only compile")
    parser.add_argument("--tiny", action="store_true", help="tiny tensors")
    options = parser.parse_args()
    begin, shapes = time.monotonic(), TINY if options.tiny else [SHAPES[k] for k in URGENT]
    cells = [(op, shape, types) for shape in shapes for op in options.ops for types in options.types]
    for op, shape, types in cells:
        if time.monotonic() - begin > options.seconds:
            print(f"no time for {op} {shape} {types}", flush=True)
            continue
        if options.warm_up:
            torch._dynamo.reset()
            one = setting(shape, types)
            for way in OPS[op]().values():
                way(one)
            continue
        for row in cell(op, shape, types, options.rounds):
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{op:9} {row['shape']:16} {types:5} {row['way']:9} {row['us']:10.2f} us {row['gb_per_s']:8.1f} GB/s "
                f"{100 * row['of_copy']:6.1f} % of the copy   warm {row['warm_us'] or float('nan'):9.2f} us",
                flush=True,
            )
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
