"""compare: its figures against hand-computed ones, its table and pictures."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dss_fast import Flow, Target, find_solver, handmade, sample
from dss_fast.compare import compare, frechet_distance
from dss_fast.plots import plot_solver
from dss_fast.search.draws import Draws

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
        assert row["frechet"] >= 0 and 0 <= row["accuracy"] <= 1 and row["ms_per_sample"] > 0
        assert row["nfe"] == str(row["num_steps"]) and row["searched"] == (row["method"] == "sit-xl-2-256")


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
    assert "Frechet" in text and "label acc." in text and text.index("ab3/5") < text.index("euler/5")
    result.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == result.rows
    result.plot(tmp_path / "c.png")
    result.plot_samples(tmp_path / "s.png", ["euler/5", "ab3/10"], rows=4)
    plot_solver(find_solver("dit-xl-2-256/7"), tmp_path / "t.png")
    for name in ("c.png", "s.png", "t.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 4


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    b = 1 + scale * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    assert abs(frechet_distance(a, b) - (3 + 0 + 1 + 0.25)) < 0.15
    assert frechet_distance(a, a) < 1e-9


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
