"""`pytest benchmarks/ --benchmark` is pytest-benchmark's: groups, ratios and files, and nothing else is written."""

import json
from types import SimpleNamespace

import pytest

import benchmarks.turns  # noqa: F401  a run inside this one drops what it imports itself
import dss_fast  # noqa: F401

pytest.importorskip("pytest_benchmark")
pytest_plugins = ["pytester"]

CONFTEST = "from benchmarks.conftest import *  # noqa: F403\n"
BENCH = """
import pytest
from benchmarks import turns as module

SECONDS = {"fast": [1e-3, 2e-3, 4e-3], "slow": [2e-3, 6e-3, 4e-3], "other": [8e-3, 8e-3, 8e-3]}

@pytest.mark.parametrize("way", SECONDS)
@pytest.mark.parametrize("cell", ["small", pytest.param("large", marks=pytest.mark.full)])
def test_cell(turns, cell, way):
    def measure(calls):
        print("measured", cell, *calls)
        return {name: SECONDS[name] for name in calls}
    turns(f"step {cell}", lambda way: lambda: print("called", way), measure=measure, info={"bytes": 6000},
          ratios={"slow": "times_slow"}, rows="rows.csv")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(bench_tiny=BENCH)
    for key in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(key, raising=False)  # this run is no worker, whatever runs it
    monkeypatch.setattr("benchmarks.turns.RESULTS", pytester.path / "results")
    monkeypatch.setattr("benchmarks.turns.conditions", lambda: {"commit": "abc"})

    def run(*arguments):
        found = pytester.runpytest_inprocess("bench_tiny.py", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments)
        return SimpleNamespace(result=found, said=found.stdout.str(), path=pytester.path)

    return run


def test_ways_of_a_cell_share_a_group_with_ratios_and_take_turns(run):
    found = run("--benchmark", "-s", "-k", "not other", "--benchmark-json=found.json")
    found.result.assert_outcomes(passed=2, deselected=4)
    assert found.said.count("measured small fast slow\n") == 1 and "other" not in found.said  # once for both
    lines = {
        line.split("[")[1].split("]")[0]: line for line in found.said.splitlines() if line.startswith("test_cell[")
    }
    assert "2.0000 (1.0)" in lines["small-fast"] and "4.0000 (2.00)" in lines["small-slow"]  # medians, in ms
    fast, slow = json.loads((found.path / "found.json").read_text())["benchmarks"]
    assert fast["group"] == slow["group"] == "step small" and fast["stats"]["data"] == [1e-3, 2e-3, 4e-3]
    assert fast["extra_info"] == {"bytes": 6000, "times_slow": "2.000", "gb_per_s": "0.00"}
    assert not (found.path / "results").exists()


def test_all_cells_and_rows_when_asked(run):
    found = run("--benchmark", "--full", "--rows")
    found.result.assert_outcomes(passed=6)
    rows = (found.path / "results" / "rows.csv").read_text().splitlines()
    assert len(rows) == 7 and rows[0] == "commit,group,way,bytes,times_slow,gb_per_s,p20_us,median_us,p80_us,rounds"
    assert rows[1] == "abc,step,fast,6000,2.000,0.00,1000.000,2000.000,2000.000,3"


def test_skipped_unless_asked_and_only_run_when_disabled(run):
    run().result.assert_outcomes(skipped=6)
    found = run("--benchmark", "--benchmark-disable", "-s")
    found.result.assert_outcomes(passed=3, deselected=3)
    assert "called fast" in found.said and "measured" not in found.said


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    """Those of another choice are, and the table that is shown takes none of these."""
    from benchmarks import library, rows

    monkeypatch.setattr(library, "RESULTS", tmp_path / "library.jsonl")
    about = {"kind": "measure", "model": "mixture", "num_steps": 5, "budget": 500}
    rows.append(library.RESULTS, **about, seed=0, ratio=9.0)  # before rows told of the choice
    for seed in range(2):
        rows.append(library.RESULTS, **about, seed=seed, choice=library.CHOICE, ratio=0.5)
    assert "0.50" in library.show() and "9.00" not in library.show()

    def refused(*what):
        raise LookupError(what)

    monkeypatch.setattr(library.Member, "of", refused)
    library.measure(["mixture"], [5], [500], 2)
    with pytest.raises(LookupError):
        library.measure(["mixture"], [5], [500], 3)
