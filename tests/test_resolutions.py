"""The rows of benchmarks/resolutions.py, on two bandwidths of the exact mixture."""

import math
from contextlib import nullcontext

import pytest

from benchmarks import resolutions, rows
from dss_fast import Solver, find_solver

pytestmark = pytest.mark.xdist_group("resolutions")
PAIR = ("mixture", "mixture0.5")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The rows of one pair with few samples and small searches; "sides" of 8 and 12 make the k 1.5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolutions, "RESULTS", tmp_path_factory.mktemp("results") / "resolutions.jsonl")
        patch.setattr(resolutions, "PAIRS", (PAIR,))
        patch.setattr(resolutions, "SIDES", dict(zip(PAIR, (8, 12), strict=True)))
        patch.setattr(resolutions, "SMALL", (600,))
        patch.setattr(resolutions, "fresh_of", lambda name: resolutions.Fresh(name, 64))
        patch.setattr(resolutions, "of_other_kinds", lambda name: nullcontext())
        resolutions.run([3], 900, 0)
        resolutions.start([3], 900, 0, [0])
        resolutions.again([3], 900, [1])
        yield rows.read(resolutions.RESULTS)


def test_what_is_there_is_not_measured_again(ran, monkeypatch):
    monkeypatch.setattr(resolutions, "search", None)
    monkeypatch.setattr(resolutions, "nearest", None)
    resolutions.run([3], 900, 0)
    resolutions.start([3], 900, 0, [0])
    resolutions.again([3], 900, [1])
    assert rows.read(resolutions.RESULTS) == ran
    with pytest.raises(TypeError):  # another seed is another search
        resolutions.start([3], 900, 0, [1])


def test_a_figure_is_the_moved_tables_error_over_that_of_its_own_search(ran):
    (pair,) = (row for row in ran if row["kind"] == "pair")
    searches = [row for row in ran if row["kind"] == "search" and row["seed"] == 0]
    tables = {row["model"]: Solver.from_dict(row["solver"]) for row in searches}
    fresh = resolutions.Fresh("mixture0.5", 64)
    assert pair["ratio"] == 1.5 and pair["own"] == pytest.approx(fresh.row(tables["mixture0.5"])["rmse"])
    assert pair["by_ratio"] == pytest.approx(fresh.row(tables["mixture"].moved(1.5))["rmse"])
    lines = resolutions.show().splitlines()
    line, beside = [line for line in lines if line.startswith("| mixture (8) | mixture0.5 (12) | 3 |")]
    assert f"| {pair['by_ratio'] / pair['own']:.2f} (k = 1.5) |" in line
    (again,) = (row for row in ran if row["kind"] == "again")
    assert beside.split(" | ")[3] == f"{again['rmse'] / pair['own']:.2f}"


def test_no_choice_of_k_serves_better_than_the_best_there_is(ran):
    (pair,) = (row for row in ran if row["kind"] == "pair")
    others = [pair["by_ratio"], pair["by_choice"], pair["by_more"]]
    assert pair["by_best"] <= min(others) * (1 + 1e-6)


def test_small_searches_begin_at_the_moved_table_and_at_the_library(ran):
    found = {row["source"]: row for row in ran if row["kind"] == "start"}
    assert set(found) == {"mixture", None} and all(row["evaluations"] <= 600 for row in found.values())
    (pair,) = (row for row in ran if row["kind"] == "pair")
    assert math.isclose(pair["handmade"], next(row["rmse"] for row in ran if row["kind"] == "handmade"))
    assert pair["handmade"] <= resolutions.Fresh("mixture0.5", 64).row(find_solver("ab2/3"))["rmse"] * (1 + 1e-6)
