"""What calls are worth where the unconditional branch runs at some steps only: docs/calls.md.

    python -m benchmarks.calls run --model flow --scale 1.5 --calls 10 11 --ways full chosen --seeds 0
    python -m benchmarks.calls run --scale 4 --at 5 --calls 10 --ways full     # a table searched at 4, run at 5
    python -m benchmarks.calls table --write docs/calls.md
    python -m benchmarks.calls worth                    # means, and the calls that full guidance takes
    python -m benchmarks.calls time                     # 7 steps of DiT-S/2, random weights; no rows

full: both branches at all of calls / 2 steps. chosen: search(calls=), its steps and its N found too. fixed: search(N,
calls=) at N = .66 calls. At that N too, each with its table searched: drop, both branches at the first steps and one
without guidance then; interval, in the middle alone; stale, the last difference used again. Errors are from a reference
of ``REFERENCE`` calls, on ``SAMPLES`` noises that no search has seen.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, geometric_mean
from types import SimpleNamespace

import torch

from dss_fast import Flow, GaussNewton, handmade, sample, search
from dss_fast.bench import Bench
from dss_fast.draws import Draws
from dss_fast.searching.calls import STEPS, forecast
from dss_fast.searching.space import Space

from . import rows
from .machine import conditions

RESULTS = Path(__file__).parent / "results" / "calls.jsonl"
SAMPLES, REFERENCE, SEED = 256, 48, 1234  # of the figures
WAYS = ("full", "chosen", "fixed", "drop", "interval", "stale")


@dataclass(frozen=True)
class Scaled(Space):
    """Plain tables that are run with guidance at some steps, and without at the others."""

    guided: tuple[int, ...] = ()

    def table(self, theta, guidance=1.0):
        table = Space.table(self, theta, 1.0)
        return table if guidance is None else table.guided(scales(guidance, self.guided, self.num_steps))


@dataclass(frozen=True)
class Stale(Space):
    """Tables that use the last difference again."""

    def sizes(self):
        sizes = Space.sizes(self)
        return [*sizes[:3], 0, sizes[4]]

    def theta(self, solver):
        whole = Space(self.kind, self.schedule, self.num_steps, guided_steps=self.guided_steps)
        parts = whole.theta(solver).split(whole.sizes())
        return torch.cat([*parts[:3], parts[4]])

    def numbers(self, theta):
        found = Space.numbers(replace_steps(self), theta)
        taken = torch.zeros(self.num_steps, self.num_steps, dtype=torch.float64)
        for k in range(self.num_steps):
            taken[k, max(j for j in self.guided_steps or (0,) if j <= k)] = 1
        steps = self.guided_steps
        return replace(found, guided_steps=steps, guidance_coeffs=None if steps is None else found.coeffs @ taken)


def replace_steps(space):
    """The space without its second triangle."""
    return Space(space.kind, space.schedule, space.num_steps)


@dataclass(frozen=True)
class Settings(GaussNewton):
    """The default search in another space."""

    way: str = ""
    guided: tuple[int, ...] = ()

    def space_of(self, schedule, num_steps):
        if self.way == "stale":
            return Stale(self.space, schedule, num_steps)
        return Scaled(self.space, schedule, num_steps, guided=self.guided)


def scales(scale, guided, num_steps):
    """One a step."""
    return tuple(scale if i in guided else 1.0 for i in range(num_steps))


def found(target, way, calls, budget, seed):
    """The solver that a way finds, and the guidance that it is run with."""
    options = {"budget": budget, "seed": seed, "progress": False, "report": False}
    scale, n = target.guidance_scale, round(STEPS * calls)
    if way == "full":
        return search(target, calls // 2, **options).solver, scale
    if way == "chosen":
        return search(target, calls=calls, **options).solver, scale
    if way == "fixed":
        return search(target, n, calls=calls, **options).solver, scale
    if way == "stale":
        return search(target, n, calls=calls, method=Settings(way="stale"), **options).solver, scale
    first = 0 if way == "drop" else (2 * n - calls) // 2
    guided = tuple(range(first, first + calls - n))
    return search(target, n, method=Settings(way=way, guided=guided), **options).solver, scales(scale, guided, n)


def run(options):
    """Appends a row for each way, number of calls and seed that is not there yet."""
    from examples import mnist

    target, at = getattr(mnist, options.model)(options.scale), options.at or options.scale
    draws = Draws.of([replace(target, guidance_scale=at)], SEED)
    shown = SimpleNamespace(update=lambda count: None, set_description=lambda *a, **k: None)
    with torch.no_grad():
        bench = Bench(draws, SAMPLES, REFERENCE, 64, None, shown)
    done = rows.read(RESULTS)
    for seed in options.seeds:
        for calls in options.calls:
            for way in options.ways:
                asked = {"model": options.model, "scale": options.scale, "calls": calls, "way": way}
                asked |= {"at": at, "budget": options.budget, "seed": seed}
                if any(asked.items() <= {"at": row["scale"], **row}.items() for row in done):
                    continue
                begin = time.perf_counter()
                solver, scale = found(target, way, calls, options.budget, seed)
                scale = tuple(1.0 if one == 1 else at for one in scale) if isinstance(scale, tuple) else at
                ends = [
                    sample(target, batch.noise, solver, cond=batch.cond, guidance_scale=scale)
                    for batch in bench.batches
                ]
                guided = solver.guided_steps
                if guided is None:
                    guided = [i for i in range(solver.num_steps) if not isinstance(scale, tuple) or scale[i] != 1]
                figures = {k: v for k, v in bench.reference.measure(torch.cat(ends)).items() if v is not None}
                row = {**asked, "num_steps": solver.num_steps, "guided": list(guided), **figures}
                row |= {"spent": solver.num_steps + len(guided), "seconds": time.perf_counter() - begin}
                rows.append(RESULTS, **row, **conditions())


def table(options):
    """The rows as Markdown: means over seeds, each over full guidance at equal calls of the same seeds."""
    titles = ("model, scale", "calls", "way", "both branches at", "seeds", "RMSE", "of full's", "lowest, highest")
    titles += ("median", "of full's", "label acc.", "Frechet")
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    groups = {}
    for row in rows.read(RESULTS):
        at = row.get("at", row["scale"])
        key = (row["model"], row["scale"], at, row["budget"] or 0, row["calls"], WAYS.index(row["way"]))
        groups.setdefault(key, []).append(row)
    for key, group in sorted(groups.items()):
        (model, scale, at, budget, calls, way), least = key, key[:4]
        # Calls that full guidance cannot take are held against the next fewer that it can.
        full = {row["seed"]: row for row in groups.get((*least, calls - calls % 2, 0), [])}
        pairs = [(row, full[row["seed"]]) for row in group if row["seed"] in full]
        over = {key: [row[key] / whole[key] for row, whole in pairs] for key in ("rmse", "median")}
        ratio = {key: f"{geometric_mean(values):.2f}" if values else "-" for key, values in over.items()}
        ends = f"{min(over['rmse']):.2f}, {max(over['rmse']):.2f}" if pairs else "-"
        marks = Counter("".join("01"[i in row["guided"]] for i in range(row["num_steps"])) for row in group)
        most = ", ".join(mark for mark, _ in marks.most_common(2)) + (", ..." if len(marks) > 2 else "")
        mean = {key: fmean(row[key] for row in group) for key in ("rmse", "median", "accuracy", "frechet")}
        where = f"{model}, {scale:g}" + f" at {at:g}" * (at != scale) + ", default budget" * (not budget)
        cells = [where, f"{calls}", WAYS[way], most, f"{len(group)}", f"{mean['rmse']:.4f}"]
        cells += [ratio["rmse"], ends, f"{mean['median']:.4f}", ratio["median"]]
        cells += [f"{100 * mean['accuracy']:.1f} %", f"{mean['frechet']:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    rows.written("\n".join(lines), options.write, "calls")


def worth(options):
    """For each model and scale: what the chosen tables leave of full guidance's error, in the mean of all runs and of
    the median sample, how many are above it, and with how many calls full guidance errs as much, log-linearly."""
    del options
    found = {}
    for row in rows.read(RESULTS):
        if row["budget"] == 20_000 and row.get("at", row["scale"]) == row["scale"]:
            found[row["model"], row["scale"], row["way"], row["calls"], row["seed"]] = row
    for model, scale in sorted({key[:2] for key in found}):
        mean, over, median = {}, [], []
        for way, calls in product(("full", "chosen"), (10, 12, 14, 16)):
            runs = {key[4]: row for key, row in found.items() if key[:4] == (model, scale, way, calls)}
            if runs:
                mean[way, calls] = geometric_mean(row["rmse"] for row in runs.values())
            pairs = [(row, found.get((model, scale, "full", calls, seed))) for seed, row in runs.items()]
            if way == "chosen":
                over += [row["rmse"] / full["rmse"] for row, full in pairs if full]
                median += [row["median"] / full["median"] for row, full in pairs if full]
        line = f"{model}, {scale:g}: {geometric_mean(over):.2f} of full's RMSE in {len(over)} runs, {min(over):.2f} to "
        line += f"{max(over):.2f}, {sum(one > 1.005 for one in over)} above; {geometric_mean(median):.2f} of its median"
        full = [(calls, error) for (way, calls), error in mean.items() if way == "full"]
        for calls in (calls for way, calls in mean if way == "chosen"):
            error = mean["chosen", calls]
            ends = [(a, b) for a, b in pairwise(full) if b[1] <= error <= a[1]]
            if ends:
                (low, most), (high, least) = ends[0]
                equal = low + (high - low) * math.log(most / error) / math.log(most / least)
                line += f"; {calls} calls do what {equal:.1f} do"
            else:
                line += f"; {calls} calls do what " + ("more than 16 do" if error < full[-1][1] else "fewer than 10 do")
        print(line)
        for way in ("drop", "interval", "stale"):  # beside the chosen tables at the same calls and seeds
            cells = [key[3:] for key in found if key[:3] == (model, scale, way)]
            full = [found[model, scale, "full", *cell]["rmse"] for cell in cells]
            ours, theirs = ([found[model, scale, one, *cell]["rmse"] for cell in cells] for one in ("chosen", way))
            if cells:
                left = [geometric_mean(a / b for a, b in zip(one, full, strict=True)) for one in (theirs, ours)]
                print(f"  {way} {left[0]:.2f}, chosen {left[1]:.2f} in the same {len(cells)} runs")


@torch.no_grad()
def timed(options):
    """Seconds of 7 steps of DiT-S/2 on latents of 32 x 32, four of them guided and all of them, in turn."""
    from examples.imagenet.model import Transformer

    torch.manual_seed(0)
    model = Transformer(depth=12, width=384, heads=6, variances=False).eval()
    whole = handmade("ab2", 7, Flow())
    steps = (0, 1, 3, 5)
    fewer = replace(whole, guided_steps=steps, guidance_coeffs=tuple(map(tuple, forecast(whole, steps).tolist())))
    x, given = torch.randn(1, 4, 32, 32), {"cond": {"y": torch.arange(1)}, "uncond": {"y": 1000}}
    seconds = {14: [], 11: []}
    for _ in range(options.repeats):
        for solver in (whole, fewer):
            begin = time.process_time() if options.processor else time.perf_counter()
            sample(model, x, solver, **given, guidance_scale=1.5)
            end = time.process_time() if options.processor else time.perf_counter()
            seconds[solver.guided_calls].append(end - begin)
    least, middle = ({k: f(v) for k, v in seconds.items()} for f in (min, lambda v: sorted(v)[len(v) // 2]))
    print(f"least {least}, {least[14] / least[11]:.3f} times; median {middle}, {middle[14] / middle[11]:.3f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "worth", "time"))
    parser.add_argument("--model", default="flow", help="a function of examples.mnist that takes a guidance scale")
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--at", type=float, help="another scale, that the tables are run at")
    parser.add_argument("--calls", type=int, nargs="+", default=[10, 12, 14, 16])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=int, default=None, help="of each search; the default one without")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    parser.add_argument("--repeats", type=int, default=9, help="of time")
    parser.add_argument("--processor", action="store_true", help="time in seconds of the processor, on a busy machine")
    options = parser.parse_args()
    {"run": run, "table": table, "worth": worth, "time": timed}[options.what](options)


if __name__ == "__main__":
    main()
