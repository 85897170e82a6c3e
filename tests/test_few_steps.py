"""The rows of benchmarks/few_steps.py, on the exact mixture."""

from dataclasses import asdict

import pytest

from benchmarks import few_steps, rows, search_table
from benchmarks.few_steps import best_handmade
from dss_fast import compare, find_solver
from dss_fast.rivals import handmade_tables

pytestmark = [pytest.mark.fast, pytest.mark.xdist_group("few_steps")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The rows of one small search and the two hand-made solvers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_steps, "RESULTS", tmp_path_factory.mktemp("results") / "few.jsonl")
        patch.setattr(few_steps, "best_handmade", lambda fresh, n: (find_solver(f"ab2/{n}"), {"names": 1}))
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


def test_the_fewest_calls_are_the_first_below_the_hand_made_ten(monkeypatch, tmp_path):
    monkeypatch.setattr(few_steps, "RESULTS", tmp_path / "few.jsonl")
    told = {"model": "flow", "solver": "x", "rmse": 1.0, "switched": 0.0, "energy": 0.0, "floor": 1.0, "budget": None}
    rows.append(few_steps.RESULTS, **told, num_steps=10, searched=False, median=2.0, frechet=1.5, names=112)
    for n, median, frechet in ((3, 4.0, 1.8), (5, 3.0, 1.4), (6, 1.9, 1.3), (7, 2.1, 1.6)):
        rows.append(few_steps.RESULTS, **told, num_steps=n, searched=True, median=median, frechet=frechet)
    assert few_steps.show_fewest().splitlines()[2:] == ["| flow | 1.50 | 0.400 / 0.500 | 6 | 5 |"]
    rows.append(few_steps.RESULTS, **told, num_steps=10, searched=False, median=1.0, frechet=1.0, names=112)
    line = few_steps.show_fewest().splitlines()[-1]
    assert line == "| flow | 3.00 | 0.400 / 0.00 | more than 7 | more than 7 |"


def test_the_hand_made_row_says_how_many_names_there_were():
    fresh = few_steps.Fresh("mixture", 64)
    solver, about = best_handmade(fresh, 3)
    tables = handmade_tables(fresh.target.schedule, 3)
    assert solver in tables and about["names"] == sum(tables.values())
    assert about["least_median"] <= fresh.row(solver)["median"] * (1 + 1e-6)


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
