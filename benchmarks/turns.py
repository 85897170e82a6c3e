"""The fixture ``turns``: the ways of a cell are measured in turns, and each is a benchmark of pytest-benchmark's.

pytest-benchmark measures one test after the other. On a machine that others use, a ratio of two tests then says what
the machine did meanwhile. So a round of every way is taken, in random order, then another one; its statistics, tables
and files are made from these rounds, by a timer that shows what was measured.
"""

import csv
import random
import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks.machine import DEVICE, conditions

RESULTS = Path(__file__).parent / "results"
LEAST, MOST = 5, 40  # rounds
SECONDS = 1.2 if DEVICE.type == "cpu" else 0.6  # for all ways of a cell, what is compiled apart
SHORT = 2e-3  # seconds: shorter calls are repeated within a round


class Shown:
    """What the timer of the statistics shows: 0, or a round's seconds once its benchmark has run."""

    seconds = 0.0


def timer():
    return Shown.seconds


def seconds_of(call, repeats=1):
    """Seconds a call. The first is not timed: it brings back into the cache what the other ways have evicted."""
    call()
    if DEVICE.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def take_turns(calls, seconds=SECONDS, once=seconds_of):
    """{way: seconds a call in each round}. once(call, repeats) -> seconds a call."""
    repeats = {}
    for name, call in calls.items():
        call()
        shortest = min(once(call, 1) for _ in range(3))  # one alone may hold a wait for somebody else's turn
        repeats[name] = max(1, min(200, int(SHORT / max(shortest, 1e-7))))
    a_round = sum(once(call, repeats[name]) * (repeats[name] + 1) for name, call in calls.items())
    rounds = max(LEAST, min(MOST, int(seconds / a_round)))
    return in_turns(calls, lambda name: once(calls[name], repeats[name]), rounds)


def in_turns(ways, once, rounds):
    """{way: what once(way) returns in each round}."""
    times, order, shuffle = {way: [] for way in ways}, list(ways), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # whoever follows the copy finds the cache full of it
        for way in order:
            times[way].append(once(way))
    return times


@pytest.fixture(scope="session")
def measured():
    """{(test, group): {way: seconds of each round}}, for the tests of a cell's other ways."""
    return {}


@pytest.fixture
def turns(request, benchmark, measured):
    """turns(group, build, ...): this test's way, measured in turns with those of its cell that are selected.

    group: the cell's name. build: way -> a function of no arguments. measure: {way: function} -> {way: seconds of each
    round}. per: calls in one of these. info: what stands beside the statistics in files, with ``bytes`` also their
    rate; so does, for every way that is a key of ``ratios``, its time over this one's. rows: the table of results that
    --rows appends to, unit: of its times. Returns {way: seconds a call in each round}.
    """

    def run(group, build, *, measure=take_turns, per=1, info=None, ratios=None, rows=None, unit="us"):
        node = request.node
        way, test = node.callspec.params["way"], node.function
        benchmark.group = group
        if not benchmark.enabled:  # --benchmark-disable: whether it runs
            build(way)()
            return {}
        if (test, group) not in measured:
            cell = {**node.callspec.params, "way": None}
            others = [item.callspec.params for item in request.session.items if getattr(item, "function", None) is test]
            ways = [params["way"] for params in others if {**params, "way": None} == cell]
            measured[test, group] = measure({name: build(name) for name in ways})
        times = {name: [s / per for s in taken] for name, taken in measured[test, group].items()}
        left = iter(times[way])

        def show():
            Shown.seconds = next(left)

        def reset():
            Shown.seconds = 0.0

        benchmark.pedantic(show, setup=reset, rounds=len(times[way]))
        about = {**(info or {}), **{title: ratio(times, other, way) for other, title in (ratios or {}).items()}}
        if "bytes" in about:
            about["gb_per_s"] = f"{about['bytes'] / per / statistics.median(times[way]) / 1e9:.2f}"
        benchmark.extra_info.update(about)
        if rows and request.config.getoption("--rows"):
            append(RESULTS / rows, {"group": group.split()[0], "way": way, **about, **spread(times[way], unit)})
        return times

    return run


def ratio(times, other, way):
    """How many times the other way's time this one takes less: the median of the ratios within a round."""
    if other not in times:
        return ""
    return f"{statistics.median(a / b for a, b in zip(times[other], times[way], strict=True)):.3f}"


def spread(seconds, unit):
    """The 20 %, 50 % and 80 % points of a way's rounds, and how many."""
    ordered, scale = sorted(seconds), {"us": 1e6, "ms": 1e3}[unit]
    points = {"p20": 0.2, "median": 0.5, "p80": 0.8}
    found = {f"{name}_{unit}": f"{scale * ordered[int(q * (len(ordered) - 1))]:.3f}" for name, q in points.items()}
    return {**found, "rounds": len(ordered)}


def append(path, row):
    """Adds a row, with what is known of the machine, under the columns that the table has."""
    row, new = {**conditions(), **row}, not path.exists()
    columns = list(row)
    if not new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerow(row)
