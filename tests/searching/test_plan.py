"""The plan of a search: counts that are kept to, times and memory measured on the model, a budget given as a time."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dss_fast import GaussNewton, Lion, Target, plan, search
from dss_fast.draws import Draws
from dss_fast.searching import budget as budgets
from dss_fast.searching.budget import Cost, Ledger, clocked, evaluations_in
from dss_fast.searching.plan import EXPECTED, expected, gigabytes
from dss_fast.searching.probe import CALLS, clock
from helpers.pages import ROOT

planning, rooms = (importlib.import_module(f"dss_fast.searching.{name}") for name in ("plan", "room"))
F64 = torch.float64


def model(x, t):
    return torch.tanh(2 * x) * (1 - t[:, None]) + 0.5 * torch.sin(3 * t[:, None]) - 0.7 * x


TARGET = Target(model, (64,), dtype=F64, key="bend")


def test_a_search_spends_what_its_plan_says():
    said = plan(TARGET, [3, 4], budget=6_000)
    result = search(TARGET, [3, 4], budget=6_000, progress=False)
    assert said.evaluations == 6_000 and 0.8 * 6_000 < result.evaluations <= 6_000
    assert result.history[0].samples == said.samples
    assert math.isclose(said.minutes, 6_000 * said.cost.seconds / 60) and said.cost.seconds > 0


def test_memory_is_what_one_call_saves_for_its_backward():
    """tanh keeps its output and the product its factors, of which one is that output: the state once or twice."""
    said = plan(TARGET, 4, budget=100_000)
    assert 64 * 8 <= said.cost.saved <= 2.5 * 64 * 8
    assert said.memory.graphs == said.cost.saved * (said.batch_size + 4 * said.samples)  # and those kept for a round


def test_it_prints_three_budgets_and_what_each_leaves():
    text = str(plan(TARGET, [3, 4], budget=20_000))
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == ["a quarter", "this budget", "four times"]
    assert "5,000 evaluations" in text and "80,000 evaluations" in text and text.count("hand-made error") == 3
    assert "less than any search was measured with" in str(plan(TARGET, 4, budget=1_600))
    assert len(str(plan(TARGET, 4, method=Lion())).splitlines()) == 1  # its samples settle what it takes


def test_a_search_prints_its_plan_first(capsys):
    search(TARGET, 3, method=GaussNewton(samples=16, rounds=1), budget=3_000)
    assert "this budget:     3,000 evaluations" in capsys.readouterr().out
    search(TARGET, 3, method=GaussNewton(samples=16, rounds=1), budget=3_000, progress=False)
    assert not capsys.readouterr().out


def test_a_time_is_a_budget_and_a_resumed_search_keeps_to_what_it_came_to(tmp_path, monkeypatch):
    searching = importlib.import_module("dss_fast.searching")
    measured = searching.probe
    monkeypatch.setattr(searching, "probe", lambda *a, **k: measured(*a, **k) and Cost(0.5, 1))
    options = dict(method=GaussNewton(samples=16, rounds=2), out=tmp_path, progress=False, report=False)
    first = search(TARGET, 3, budget="20min", **options)
    assert CALLS < first.evaluations <= 20 * 60 / 0.5
    monkeypatch.setattr(searching, "probe", None)  # finished: the model is not called
    again = search(TARGET, 3, budget="20min", resume=True, **options)
    assert again.solvers == first.solvers


@pytest.mark.parametrize("limit", ["20", "min", "20 parsecs", "-3min", "nan min", "infh", "0s"])
def test_what_is_no_duration_is_refused_before_any_work(limit):
    with pytest.raises(ValueError, match="give evaluations, or a time such as '20min'"):
        search(TARGET, 3, budget=limit, progress=False)


def test_times_in_all_units():
    cost = Cost(0.5, 0)
    assert [evaluations_in(t, cost) for t in ("30s", "1.5 min", "2h", "10 sec", "20m")] == [60, 180, 14_400, 20, 2_400]


def test_what_is_left_of_a_time_follows_the_speed_of_the_search(monkeypatch):
    """A search that runs at twice the speed it was planned for gets twice the evaluations, and none after the time."""
    now, ledger = [100.0], Ledger(1_000)
    monkeypatch.setattr(budgets.time, "monotonic", lambda: now[0])

    def events():
        for _ in range(100):
            if not ledger.affords(40):
                return
            ledger.spend(40)
            now[0] += 2
            yield None

    seen = [ledger.budget for _ in clocked(events(), ledger, "100s", began=90.0)]
    assert seen[:2] == [1_000, 1_800]  # an event is told before its time counts
    assert ledger.evaluations == 1_800 and ledger.budget == 1_800  # 20 a second in the 90 s from the first event on
    assert now[0] == 190


def test_the_clock_of_a_time_is_read_in_batches():
    """A call of one sample alone took up to ten times as long a sample, and 2min were 20 s."""
    rows = []

    def counted(x, t):
        rows.append(len(x))
        return TARGET.model(x, t)

    draws = Draws.of(replace(TARGET, model=counted))
    cost = clock(draws, Cost(1e-6, 0, calls=8), True, 1e9, 64)
    assert rows == [1, 4, 8, 16, 32, 64] and cost.calls == 8 + 3 * sum(rows) and cost.seconds <= 1e-6
    assert clock(draws, Cost(1e-6, 0, calls=8), False, 1e9, 4).calls == 8 + 5
    assert clock(draws, Cost(100.0, 0, calls=8), True, 120, 64).calls == 8  # nothing of what it would take is left


def test_the_error_to_expect_is_the_table_and_falls():
    assert all(math.isclose(expected(at), share) for at, share in EXPECTED)
    values = [expected(10**k) for k in (3, 3.3, 4, 4.5, 5, 6)]
    assert values == sorted(values, reverse=True) and expected(499) is None


@pytest.mark.parametrize("num_steps, parameters", [(5, 21), (60, 1891), (200, 20_301)])
def test_memory_holds_the_matrices_of_many_steps_and_the_states_of_large_samples(num_steps, parameters, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(rooms, "free_bytes", lambda device: 1 << 40)
    small, large = (plan(replace(TARGET, shape=(size,)), num_steps, budget=60_000) for size in (64, 64_000))
    assert 8 * 5 * parameters**2 < small.memory.algebra < 8 * 5 * parameters**2 + (2 << 30)
    grown = large.memory.states / small.memory.states
    assert 500 < grown <= 1_010 and large.memory.total > large.memory.states + large.memory.algebra
    assert f"{gigabytes(large.memory.total)} in all beside the model" in str(large)


def test_what_a_process_loads_once_is_not_counted_as_the_models():
    """The first gradient of a process took 0.3 s, and a model of a microsecond was said to need 70 ms a call."""
    code = (
        "import torch, dss_fast\n"
        "target = dss_fast.Target(lambda x, t: torch.sin(3 * t[:, None]) - 0.7 * x, (3,))\n"
        "print(60 * dss_fast.plan(target, 5, budget=10_000).minutes)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(shown.stdout) < 60, shown.stdout  # 700 before, 1 on a quiet machine
