"""The rows of benchmarks/few_steps.py, on the exact mixture."""

from dataclasses import asdict

import pytest

from benchmarks import few_steps, rows, search_table
from dss_fast import compare, find_solver
from dss_fast.rivals import handmade_tables

pytestmark = [pytest.mark.fast, pytest.mark.xdist_group("few_steps")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The rows of one small search and the two hand-made solvers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_steps, "RESULTS", tmp_path_factory.mktemp("results") / "few.jsonl")
        patch.setattr(few_steps, "known_best", lambda name, n: find_solver(f"ab2/{n}"))
        few_steps.run(["mixture"], [3], 2000, 0, 128)
        yield {(r["searched"], r["num_steps"]): r for r in rows.read(few_steps.RESULTS)}


def test_what_is_there_is_not_measured_again(ran, monkeypatch):
    monkeypatch.setattr(few_steps, "Fresh", None)
    few_steps.run(["mixture"], [3], 2000, 0, 128)
    with pytest.raises(TypeError):  # another seed is another search
        few_steps.run(["mixture"], [3], 2000, 1, 128)


def test_a_searched_and_two_hand_made_solvers_are_measured(ran):
    assert set(ran) == {(True, 3), (False, 3), (False, 10)}
    assert ran[True, 3]["rmse"] < ran[False, 3]["rmse"]
    (line,) = [line for line in few_steps.show().splitlines() if "**searched**" in line]
    assert f"{ran[True, 3]['rmse']:.4f}"[:5] in line and f"{ran[True, 3]['energy']:.1e}" in line


def test_the_figures_are_those_of_compare(ran):
    """On the same noises, which ``compare`` draws from another stream: within what 128 of them say."""
    (row,) = compare(few_steps.Fresh("mixture", 128).target, ["ab2/3"], samples=128, progress=False).rows
    mine = ran[False, 3]
    assert set(asdict(row)) & set(mine) >= {"rmse", "median", "switched", "frechet", "energy"}
    assert mine["rmse_low"] < row.rmse_high and row.rmse_low < mine["rmse_high"]
    assert mine["floor"] == pytest.approx(row.frechet_floor, rel=0.1)


def test_the_best_hand_made_is_of_all_names():
    """Some samples of a run are those of the whole, and the best found errs as the best of all on the same noises."""
    fresh = few_steps.Fresh("mixture", 128)
    solver = find_solver("ab2/3")
    assert fresh.squares(solver, 10, 100).tolist() == pytest.approx(
        fresh.squares(solver, 0, 128)[10:100].tolist(), rel=1e-4
    )
    row, best = search_table.best_of(fresh, 3)
    every = {table: fresh.row(table)["rmse"] for table in handmade_tables(fresh.target.schedule, 3)}
    assert row["rmse"] == pytest.approx(every[best]) == pytest.approx(min(every.values()), rel=0.05)
