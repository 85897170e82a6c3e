"""compare: its figures against hand-computed ones, its table and pictures."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dss_fast import Flow, Target, find_solver, handmade, sample
from dss_fast.compare import compare
from dss_fast.distance import frechet_distance
from dss_fast.draws import Draws
from dss_fast.plots import plot_solver

SHIFT = torch.linspace(-1, 1, 4)[:, None, None]


def model(x, t, y):
    """A flow towards the condition, curved in time, so that solvers differ."""
    return torch.tanh(y[:, None, None, None] + SHIFT.to(x) - x * (1 + t[:, None, None, None]).to(x))


def draw(n, generator):
    return {"y": torch.randint(0, 2, (n,), generator=generator).float()}


TARGET = Target(model, (4, 2, 2), cond=draw)


@pytest.fixture(scope="module")
def result():
    return compare(
        TARGET,
        ["euler", "ab3", "sit-xl-2-256/10"],
        num_steps=(5, 10),
        samples=24,
        batch_size=16,
        features=lambda x: x.flatten(1)[:, :3],
        classify=lambda x: torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.4], 1),
        labels=lambda cond: cond["y"],
        decode=lambda x: x[:, :1].sigmoid(),
        progress=False,
    )


def test_rows(result):
    rows = {r["solver"]: r for r in result.rows}
    assert list(rows) == ["euler/5", "euler/10", "ab3/5", "ab3/10", "sit-xl-2-256/10"]
    assert rows["euler/5"]["rmse"] > 1.5 * rows["euler/10"]["rmse"] > 3 * rows["ab3/10"]["rmse"]
    for row in rows.values():
        assert row["rmse_low"] <= row["rmse"] <= row["rmse_high"] and row["samples"] == 24
        assert row["median"] <= row["p90"] and row["frechet"] >= 0 and math.isfinite(row["energy"])
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["switched"] <= 1 and row["ms_per_sample"] > 0
        assert row["nfe"] == str(row["num_steps"]) and not row["searched"]
    assert len({row["frechet_floor"] for row in rows.values()}) == 1 and rows["ab3/5"]["energy_floor"] > 0


def test_rmse_is_the_distance_to_a_fine_solution(result):
    """The same noises by hand, against Adams-Bashforth with 400 steps."""
    draws = Draws.of(TARGET, 20_000)
    squares = []
    for number, size in enumerate((16, 8)):
        batch = draws.batch("compare", number, size)
        fine = sample(model, batch.noise, "ab4/400", cond=batch.cond)
        coarse = sample(model, batch.noise, "euler/5", cond=batch.cond)
        squares.append((fine - coarse).square().flatten(1).mean(1))
    squares = torch.cat(squares).double()
    row = result.rows[0]
    assert math.isclose(row["rmse"], float(squares.mean().sqrt()), rel_tol=1e-3)
    half = 1.96 * float(squares.std()) / math.sqrt(24)
    assert math.isclose(row["rmse_high"], math.sqrt(float(squares.mean()) + half), rel_tol=1e-3)


def test_table_files_and_pictures(result, tmp_path):
    pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")
    text = str(result)
    assert "Frechet (floor" in text and "label acc." in text and text.index("ab3/5") < text.index("euler/5")
    result.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == result.rows
    result.plot(tmp_path / "c.png")
    result.plot_samples(tmp_path / "s.png", ["euler/5", "ab3/10"], count=4)
    plot_solver(find_solver("dit-xl-2-256/7"), tmp_path / "t.png")
    for name in ("c.png", "s.png", "t.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 4


def test_the_answer_to_better_than_hand_made():
    """A line per N: the best solver that was not searched, and the parts of its errors that each searched one has."""
    mine = replace(handmade("ab4", 5), name="mine/5", source="dss_fast.search")
    result = compare(TARGET, ["euler", "ab2", "sit-xl-2-256/10", mine], num_steps=(5, 10), samples=16, progress=False)
    rows = {row["solver"]: row for row in result.rows}
    assert [name for name, row in rows.items() if row["searched"]] == ["mine/5"]
    assert result.best(5) is min((rows["euler/5"], rows["ab2/5"]), key=lambda row: row["rmse"])
    assert result.best(5, searched=True) is rows["mine/5"] and result.best(10, searched=True) is None
    assert result.best(7) is None
    *_, five, ten = str(result).splitlines()
    ratios = (rows["mine/5"][key] / result.best(5)[key] for key in ("rmse", "median"))
    assert five == (
        "N = 5: the best hand-made or published solver is {}; mine/5 against it: RMSE x {:#.3g}, median x {:#.3g}"
    ).format(result.best(5)["solver"], *ratios)
    assert ten == f"N = 10: the best hand-made or published solver is {result.best(10)['solver']}"


def test_small_errors_keep_three_digits():
    """Errors of 1e-5 printed as 0.0000."""
    target = Target(lambda x, t: 1 - 1e-4 * x.tanh(), (4, 2, 2))
    result = compare(target, ["euler/4"], samples=4, progress=False)
    (row,) = result.rows
    assert 0 < row["rmse"] < 5e-5
    printed = str(result).splitlines()[2].split()
    assert math.isclose(float(printed[2]), row["rmse"], rel_tol=6e-3) and "0.0000" not in printed


def test_distances_are_to_independent_samples(result):
    """A fine solver is the reference but for 1e-5: what is left of Frechet's distance is the floor."""
    fine = compare(TARGET, ["ab4/80"], samples=24, progress=False, features=lambda x: x.flatten(1)[:, :3]).rows[0]
    assert fine["frechet_floor"] > 0 and math.isclose(fine["frechet"], fine["frechet_floor"], rel_tol=1e-3)
    assert abs(fine["energy"]) < 1e-3 < fine["energy_floor"]
    real = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    against = compare(
        TARGET, ["ab4/80"], samples=24, progress=False, features=lambda x: x.flatten(1)[:, :3], real_features=real
    ).rows[0]
    draws = Draws.of(TARGET, 20_000).batch("compare", 0, 24)
    features = sample(model, draws.noise, "ab4/400", cond=draws.cond).flatten(1)[:, :3]
    assert math.isclose(against["frechet"], frechet_distance(features, real), rel_tol=1e-3)


def test_the_worst_samples_are_shown_beside_the_reference(result, tmp_path):
    """Of 24 noises the four at which euler/5 errs most, worst first."""
    batches = [Draws.of(TARGET, 20_000).batch("compare", number, size) for number, size in enumerate((16, 8))]
    coarse, fine = (
        torch.cat([sample(model, b.noise, name, cond=b.cond) for b in batches]) for name in ("euler/5", "ab4/400")
    )
    rows = (coarse - fine).square().flatten(1).mean(1).argsort(descending=True)[:4]
    expected = torch.cat([coarse[rows, :1].sigmoid(), fine[rows, :1].sigmoid()], -1)
    torch.testing.assert_close(result.worst["euler/5"], expected, atol=1e-4, rtol=1e-4)


def test_bad_solvers_are_refused_before_any_work():
    calls = []

    def counting(x, t, y):
        calls.append(1)
        return model(x, t, y)

    for solvers, words in (
        ([], "no solvers"),
        (["dit-xl-2-256/5"], "vp"),
        (["heun"], "heun"),
        (["sit-xl-2-256"], "none of num_steps"),
        ([handmade("euler", 5, Flow(shift=3.0))], "another noise schedule"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(counting, solvers, num_steps=(99,), shape=(4, 2, 2), cond=draw, progress=False)
    with pytest.raises(ValueError, match="a range"):
        compare(counting, ["euler/3"], shape=(4, 2, 2), uncond={"y": 0.5}, guidance_scale=(1, 2), progress=False)
    with pytest.raises(ValueError, match="no such field"):
        compare(counting, ["euler/3"], shape=(4, 2, 2), draw=draw, progress=False)
    assert not calls


def test_guidance_counts_twice():
    def guided(x, t, y):
        return model(x, t, y)

    target = Target(guided, (4, 2, 2), cond=draw, uncond={"y": 0.5}, guidance_scale=2.0)
    table = compare(target, [handmade("euler", 3)], samples=4, progress=False)
    assert table.rows[0]["nfe"] == "3x2"


def test_a_family_runs_at_the_steps_it_has_and_names_stay_apart():
    twin = replace(handmade("ab2", 5), name="sit-xl-2-256/5")
    table = compare(TARGET, ["sit-xl-2-256", twin], num_steps=(3, 5, 10), samples=4, progress=False)
    names = [row["solver"] for row in table.rows]
    assert names == ["sit-xl-2-256/5", "sit-xl-2-256/10", "sit-xl-2-256-2/5"]
    assert table.rows[0]["rmse"] != table.rows[2]["rmse"]


def test_an_unmeasurable_distance_is_no_number(tmp_path):
    """One sample has no covariance; the file is still JSON."""
    table = compare(TARGET, ["euler/2"], samples=1, features=lambda x: x.flatten(1), progress=False)
    table.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())[0]["frechet"] is None
