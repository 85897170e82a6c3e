"""A searched table against caching at the same number of calls: rows in benchmarks/results/caching.jsonl.

    python -m benchmarks.caching run                   # MNIST flow, guidance 1.5; 5, 8, 10 and 15 calls
    python -m benchmarks.caching run --steps 5 --model flow --samples 64
    python -m benchmarks.caching show

Caching keeps the model's own run of 50 steps and replaces most of its network calls: by the last output (TeaCache,
arXiv 2411.19108) or by a Taylor series through the last outputs (TaylorSeer, arXiv 2503.06923). Here the guided output
of the whole network is cached, as neither needs more than outputs. Both are given what suits them best: TeaCache a
threshold found by bisection for each number of calls, TaylorSeer the best of three orders with and without a second
call at the start, and both Euler's run and Adams-Bashforth's.

PSNR: of images in [0, 1] to the model's run of 50 Euler steps, the mean over images, as their papers report. RMSE and
median: per element to the fine reference, on noise that no search draws.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dss_fast import Solver, Target, find_solver, sample, search
from dss_fast.distance import squares
from dss_fast.draws import Draws
from dss_fast.target import Samples
from examples.mnist.model import DiT

from . import rows
from .search_table import Fresh, known_best

RESULTS = Path(__file__).parent / "results" / "caching.jsonl"
LONG, BASES = 50, ("euler", "ab2")
BUDGET = 20_000
CALIBRATED = 16  # samples on which thresholds and the rescaling are found

Call = Callable[[], Tensor]
Indicator = Callable[[Tensor, Tensor], Tensor]


class Reuse:
    """TeaCache: the last output is used again while the accumulated change stays below the threshold.

        change += poly(mean |F_i - F_{i-1}| / mean |F_{i-1}|);   change >= threshold: call the network, change = 0

    F: the indicator at (x, u), the noisy input as the time embedding modulates it. poly: coefficients, highest power
    first, that map its relative change to the output's. The first and the last of num_steps are always called.
    """

    def __init__(self, indicator: Indicator, threshold: float, num_steps: int, poly: tuple[float, ...] = (1.0, 0.0)):
        self.indicator, self.threshold, self.num_steps, self.poly = indicator, threshold, num_steps, poly
        self.calls, self.change = 0, 0.0
        self.before = self.output = torch.empty(0)

    def __call__(self, i: int, x: Tensor, u: Tensor, call: Call) -> Tensor:
        now = self.indicator(x, u)
        if i:
            self.change += horner(self.poly, relative_change(now, self.before))
        self.before = now
        if i == 0 or i == self.num_steps - 1 or self.change >= self.threshold:
            self.output, self.change = call(), 0.0
            self.calls += 1
        return self.output


class Forecast:
    """TaylorSeer: between the steps ``called`` the output is a Taylor series around the last called one,

        y(i) = sum_{k<=order} d_k (i - last)^k / k!,   d_0 = y(last),  d_{k+1} = (d_k - d_k before) / (last - before)

    with as many differences as there are.
    """

    def __init__(self, called: list[int], order: int):
        self.called, self.order = set(called), order
        self.calls, self.last = 0, 0
        self.factors: list[Tensor] = []

    def __call__(self, i: int, x: Tensor, u: Tensor, call: Call) -> Tensor:
        if i in self.called:
            factors = [call()]
            for k in range(min(self.order, len(self.factors))):
                factors.append((factors[k] - self.factors[k]) / (i - self.last))
            self.factors, self.last, self.calls = factors, i, self.calls + 1
        distance = i - self.last
        return torch.stack([d * (distance**k / math.factorial(k)) for k, d in enumerate(self.factors)]).sum(0)


Cache = Callable[[int, Tensor, Tensor, Call], Tensor]


@torch.no_grad()
def run(batch: Samples, solver: Solver, cache: Cache | None = None) -> Tensor:
    """The end of a solver's run whose outputs come from a cache, (B, *S); without one from the network."""
    predict, x = batch.predictor(), batch.noise
    u = torch.tensor(solver.timesteps, dtype=torch.float64)
    a, b = batch.schedule.transition(u)
    history: list[Tensor] = []
    for i, row in enumerate(solver.coeffs):
        call = lambda x=x, i=i: predict(x, u[i])  # noqa: E731
        history.append(call() if cache is None else cache(i, x, u[i], call))
        mixed = sum(c * y for c, y in zip(row, history, strict=False) if c)
        x = float(a[i]) * x + float(b[i]) * mixed
    return x


def spread(calls: int, num_steps: int, warm: int = 1) -> list[int]:
    """The steps called: the first ``warm``, then equally far apart."""
    rest = torch.linspace(warm - 1, num_steps, calls - warm + 2)[1:-1]
    return [*range(warm), *(int(step) for step in rest.round())]


def relative_change(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


def horner(poly: tuple[float, ...], value: float) -> float:
    result = 0.0
    for coefficient in poly:
        result = result * value + coefficient
    return result


def modulated_input(target: Target, batch: Samples) -> Indicator:
    """TeaCache's indicator on the DiT: what the first block's attention reads."""
    model = target.model
    assert isinstance(model, DiT)

    def indicator(x: Tensor, u: Tensor) -> Tensor:
        time = batch.schedule.time(u.reshape(1)).to(x.dtype)
        h, condition = model.start(x, time.expand(len(x)), batch.cond["y"])
        shift, scale = model.blocks[0].modulation(condition)[:, None].chunk(6, dim=2)[:2]
        return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift

    return indicator


@torch.no_grad()
def rescaling(batch: Samples, indicator: Indicator, degree: int = 4) -> tuple[float, ...]:
    """The least-squares polynomial from the indicator's relative change to the output's, along Euler's run."""
    seen: list[tuple[Tensor, Tensor]] = []

    def every(i: int, x: Tensor, u: Tensor, call: Call) -> Tensor:
        seen.append((indicator(x, u), call()))
        return seen[-1][1]

    run(batch, find_solver(f"euler/{LONG}", batch.schedule), every)
    pairs = [[relative_change(b, a) for a, b in zip(*two, strict=True)] for two in zip(seen[1:], seen, strict=False)]
    changes = torch.tensor(pairs, dtype=torch.float64).T
    powers = torch.stack([changes[0] ** k for k in range(degree, -1, -1)], 1)
    return tuple(torch.linalg.lstsq(powers, changes[1], driver="gelsd").solution.tolist())


def threshold_for(calls: int, batch: Samples, solver: Solver, indicator: Indicator, poly: tuple[float, ...]) -> float:
    """The threshold at which the run makes that many calls; where none does, the largest that makes more."""
    low, high = 0.0, 4.0
    for _ in range(14):
        middle = (low + high) / 2
        cache = Reuse(indicator, middle, solver.num_steps, poly)
        run(batch, solver, cache)
        if cache.calls == calls:
            return middle
        low, high = (middle, high) if cache.calls > calls else (low, middle)
    return low


def psnr(x: Tensor, known: Tensor) -> float:
    """The mean over images in [0, 1] of -10 log10 of the mean squared difference."""
    return float((-10 * squares(x, known).clamp_min(1e-12).log10()).mean())


class Judge:
    """Fresh noise with the fine reference and the 50-step run on it."""

    def __init__(self, model: str, count: int) -> None:
        self.model, self.fresh = model, Fresh(model, count)
        self.target = self.fresh.target
        euler = find_solver(f"euler/{LONG}", self.target.schedule)
        self.long = torch.cat([run(batch, euler) for batch, _ in self.fresh.batches])
        self.fine = torch.cat([last for _, last in self.fresh.batches])

    def row(self, make: Callable[[Samples], Tensor]) -> dict[str, float]:
        x = torch.cat([make(batch) for batch, _ in self.fresh.batches])
        errors, decode = squares(x, self.fine), self.target.decode
        assert decode is not None
        return {
            "psnr": psnr(decode(x), decode(self.long)),
            "psnr_fine": psnr(decode(x), decode(self.fine)),
            "rmse": math.sqrt(float(errors.mean())),
            "median": math.sqrt(float(errors.median())),
        }


def measure(model: str, steps: list[int], count: int, budget: int, parts: list[str]) -> None:
    judge = Judge(model, count)
    tasks = [(LONG, "whole")] * ("whole" in parts)
    for n, part in tasks + [(n, part) for n in steps for part in parts if part != "whole"]:
        for row in PARTS[part](judge, n, budget):
            rows.append(RESULTS, model=model, num_steps=n, samples=judge.fresh.count, **row)


def whole(judge: Judge, n: int, budget: int) -> Iterator[dict[str, Any]]:
    """The runs that caching shortens, at no less than their 50 calls."""
    for base in BASES:
        solver = find_solver(f"{base}/{LONG}", judge.target.schedule)
        yield {"kind": "whole", "name": solver.name, "calls": LONG, **judge.row(lambda b, s=solver: run(b, s))}


def reuse(judge: Judge, n: int, budget: int) -> Iterator[dict[str, Any]]:
    target = judge.target
    small = Draws.of(target, 1).batch("calibration", 0, CALIBRATED)
    indicator = modulated_input(target, small)
    poly = rescaling(small, indicator)
    for base in BASES:
        solver, made = find_solver(f"{base}/{LONG}", target.schedule), []
        threshold = threshold_for(n, small, solver, indicator, poly)

        def reused(batch: Samples, s: Solver = solver, t: float = threshold, made: list[int] = made) -> Tensor:
            cache = Reuse(modulated_input(target, batch), t, LONG, poly)
            x = run(batch, s, cache)
            made.append(cache.calls)
            return x

        row = judge.row(reused)
        calls = sum(made) / len(made)
        yield {"kind": "reuse", "name": f"TeaCache on {solver.name}", "calls": calls, "threshold": threshold, **row}


def forecast(judge: Judge, n: int, budget: int) -> Iterator[dict[str, Any]]:
    for base in BASES:
        solver, rows = find_solver(f"{base}/{LONG}", judge.target.schedule), []
        for order in (1, 2, 3):
            for warm in (1, 2):
                called = spread(n, LONG, warm)
                row = judge.row(lambda b, s=solver, c=called, o=order: run(b, s, Forecast(c, o)))
                rows.append({"order": order, "warm": warm, **row})
        best = min(rows, key=lambda row: row["rmse"])
        yield {"kind": "forecast", "name": f"TaylorSeer on {solver.name}", "calls": n, **best}


def handmade(judge: Judge, n: int, budget: int) -> Iterator[dict[str, Any]]:
    solvers = find_solver(f"ab2/{n}", judge.target.schedule), known_best(judge.model, n)
    for kind, solver in zip(("textbook", "best hand-made"), solvers, strict=True):
        row = judge.row(lambda b, s=solver: run_table(judge.target, b, s))
        yield {"kind": kind, "name": solver.name, "calls": n, **row}


def searched(judge: Judge, n: int, budget: int) -> Iterator[dict[str, Any]]:
    result = search(judge.target, n, budget=budget, seed=0, progress=False)
    row = judge.row(lambda b: run_table(judge.target, b, result.solver))
    yield {"kind": "searched", "name": result.solver.name, "calls": n, "evaluations": result.evaluations, **row}


PARTS = {"whole": whole, "reuse": reuse, "forecast": forecast, "handmade": handmade, "searched": searched}


def run_table(target: Target, batch: Samples, solver: Solver) -> Tensor:
    x = sample(target, batch.noise, solver, cond=batch.cond)
    assert isinstance(x, Tensor)
    return x


def show() -> str:
    """The newest row of each kind as a table, by number of calls."""
    newest = {(row["model"], row["num_steps"], row["kind"], row["name"]): row for row in rows.read(RESULTS)}
    lines = [
        "| model | calls | solver | PSNR to 50 steps | PSNR to the reference | RMSE | median |",
        "| --- " * 7 + "|",
    ]
    for (model, _, kind, name), row in sorted(newest.items(), key=lambda item: (item[0][:2], item[1]["rmse"])):
        about = f"{name} ({kind})" if kind in ("best hand-made",) else name
        about += f", order {row['order']}" if "order" in row else ""
        figures = f"{row['psnr']:.1f} | {row['psnr_fine']:.1f} | {row['rmse']:.4f} | {row['median']:.4f}"
        lines.append(f"| {model} | {row['calls']:g} | {about} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--model", default="flow_guided", choices=("flow", "flow_guided"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 15])
    parser.add_argument("--samples", type=int, default=128, help="fresh noises to measure on, in batches of 64")
    parser.add_argument("--budget", type=int, default=BUDGET, help="model evaluations of each search")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    if options.what == "show":
        print(show())
    else:
        measure(options.model, options.steps, options.samples, options.budget, options.parts)


if __name__ == "__main__":
    main()
