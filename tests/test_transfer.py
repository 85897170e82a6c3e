"""The transfer matrix of benchmarks/transfer.py, on two bandwidths of the exact mixture."""

import math

import pytest

from benchmarks import transfer
from dss_fast import Solver, find_solver

pytestmark = pytest.mark.xdist_group("transfer")
MODELS = ["mixture", "mixture0.5"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The rows' file of a run with one N, few samples and a small search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "RESULTS", tmp_path_factory.mktemp("results") / "transfer.jsonl")
        patch.setattr(transfer, "MIXTURE_SAMPLES", 64)
        patch.setattr(transfer, "known_best", lambda name, n: find_solver(f"ab2/{n}"))
        transfer.run(MODELS, MODELS, [2], transfer.Settings("plain", 900))
        yield transfer.RESULTS


def test_every_pair_is_measured_once(ran, monkeypatch):
    rows = transfer.measured()
    assert [row["kind"] for row in rows].count("search") == 2
    assert {(r["source"], r["target"]) for r in rows if r["kind"] == "pair"} == {(a, b) for a in MODELS for b in MODELS}
    monkeypatch.setattr(transfer, "search", None)  # what is there is neither searched nor measured again
    monkeypatch.setattr(transfer, "Fresh", None)
    transfer.run(MODELS, MODELS, [2], transfer.Settings("plain", 900))
    assert transfer.measured() == rows


def test_a_figure_is_the_tables_error_over_hand_made_on_the_column(ran):
    rows = transfer.measured()
    solver = next(Solver.from_dict(r["solver"]) for r in rows if r["kind"] == "search" and r["source"] == "mixture")
    fresh = transfer.Fresh("mixture0.5", 64)
    ratio = fresh.row(solver)["rmse"] / fresh.row(find_solver("ab2/2"))["rmse"]
    (line,) = [line for line in transfer.show().splitlines() if line.startswith("| mixture |")]
    assert line.split(" | ")[2].rstrip(" |") == f"{ratio:.2f}"
    assert line.split(" | ")[1].startswith("**") and "--steps 2 --space plain --budget 900 --seed 0" in transfer.show()


def test_the_summary_leaves_the_diagonal_out(ran):
    text = transfer.show()
    figures = {}
    for line in text.splitlines():
        if line.startswith(("| mixture |", "| mixture0.5 |")):
            name, *cells = (cell.strip(" |*") for cell in line.split(" | "))
            figures |= {(name, column): float(cell) for column, cell in zip(MODELS, cells, strict=True)}
    away = [figures["mixture", "mixture0.5"], figures["mixture0.5", "mixture"]]
    said = text.splitlines()[-1]
    assert math.isclose(float(said.split("mean ")[1].split(",")[0]), math.sqrt(away[0] * away[1]), abs_tol=0.02)
    assert f"worst {max(away):.2f}" in said and f"{sum(a > 1 for a in away)} of 2 above 1" in said


def test_tables_stay_in_their_family():
    assert set(transfer.FLOWS) | set(transfer.VPS) == set(transfer.MODELS)
    for name in transfer.MODELS:
        assert transfer.target(name).schedule.family == ("vp" if name in transfer.VPS else "flow")
