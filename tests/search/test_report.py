"""What a finished search writes for people: its figures by hand, its pictures legible."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from dss_fast import Target, handmade, sample, search
from dss_fast.plots import cells_height, draw_coefficients
from dss_fast.search import TwoStage, report
from dss_fast.search.draws import Draws
from dss_fast.search.runs import SearchResult

plt = pytest.importorskip("matplotlib.pyplot", reason="the plots extra, in requirements.txt")


def model(x, t, y):
    """Towards the condition, curved in time."""
    column = [-1, *[1] * (x.ndim - 1)]
    return torch.tanh(y.to(x).reshape(column) - x * (1 + t.to(x).reshape(column)))


def draw(n, generator):
    return {"y": torch.rand(n, generator=generator)}


TARGET = Target(model, (1, 4, 4), cond=draw, decode=lambda x: x.sigmoid())


def written(folder, target, *solvers):
    """The report's text on given solvers, as if a search had found them."""
    history = [{"evaluations": 7, "held_out": {s.num_steps: 0.01234 for s in solvers}}]
    result = SearchResult({s.num_steps: s for s in solvers}, history, 1234, out=folder)
    report.write_report(result, Draws.of(target, 3), {"method": "two_stage"})
    return (folder / "report.md").read_text()


def cells(text):
    """(N, solver) -> the cells of its row."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {(line[0], line[1]): dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_figures_are_those_of_the_solvers(tmp_path):
    """RMSE, median and the best hand-made solver by hand, from the report's noise, against 400 steps."""
    solver = replace(handmade("ab4", 6), name="mine/6")
    text = written(tmp_path, TARGET, solver)
    batch = Draws.of(TARGET, 3).batch("report", 0, report.SAMPLES)
    fine = sample(model, batch.noise, "ab4/400", cond=batch.cond)
    errors = {}
    for name, table in [("mine", solver)] + [(n.replace("@", "/6@"), n.replace("@", "/6@")) for n in report.RIVALS]:
        x = sample(model, batch.noise, table, cond=batch.cond)
        errors[name.removesuffix("@uniform")] = (x - fine).square().flatten(1).mean(1).double()
    mine = errors.pop("mine")
    best = min(errors, key=lambda name: float(errors[name][: report.SCREENED].mean()))
    found = cells(text)
    assert list(found) == [("6", best), ("6", "[solver-6.json](solver-6.json)")]
    for row, squares in zip(found.values(), (errors[best], mine), strict=True):
        assert math.isclose(float(row["RMSE"]), float(squares.mean().sqrt()), rel_tol=0.02)
        assert math.isclose(float(row["median"]), float(squares.median().sqrt()), rel_tol=0.02)
    ratio = float((mine.mean() / errors[best].mean()).sqrt())
    (line,) = [line for line in text.splitlines() if line.startswith("N = 6: against ")]
    assert best in line and math.isclose(float(line.split("RMSE x ")[1].split(",")[0]), ratio, rel_tol=0.02)
    assert [row["held-out RMSE"] for row in found.values()] == ["-", "0.0123"]
    assert "1,234 model evaluations" in text and "same unit" in text


def test_pictures_and_what_a_plain_target_leaves_out(tmp_path):
    """No decode: no samples; no classifier: a distance says what switches; guidance drawn per sample."""
    plain = replace(TARGET, decode=None, uncond={"y": 0.5}, guidance_scale=(1.0, 2.0))
    solvers = handmade("ab2", 4), handmade("ab2", 7)
    text = written(tmp_path, plain, *solvers)
    assert {p.name for p in tmp_path.iterdir()} == {"report.md", "overview.png", "stages.png"}
    assert "ends further than" in text and "Frechet and energy distance of samples" in text
    known = replace(TARGET, classify=lambda x: x.flatten(1), features=lambda x: x.flatten(1)[:, :2])
    text = written(tmp_path, known, *solvers)
    assert "classifier reads" in text and "Frechet and energy distance of features" in text
    for name in ("overview.png", "stages.png", "samples-4.png", "samples-7.png"):
        assert name in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_steps", [5, 10, 15])
def test_numbers_in_the_heat_map_keep_their_signs_and_do_not_touch(num_steps):
    noisy = replace(handmade("ab4", num_steps), noise_coeffs=tuple(-0.25 for _ in range(num_steps)))
    for solver in (handmade("ab4", num_steps), noisy):
        height = cells_height(solver)
        figure, axes = plt.subplots(figsize=(height + 1.2, height), layout="constrained")
        draw_coefficients(axes, solver, "title")
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == sum(1 for row in solver.coeffs for c in row if c) + len(solver.noise_coeffs or ())
        assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
        negative = [text.get_text() for text in axes.texts if not text.get_text()[0].isdigit()]
        values = [c for row in solver.coeffs for c in row] + list(solver.noise_coeffs or ())
        assert len(negative) == sum(c < 0 for c in values) and all(t[0] == "\N{MINUS SIGN}" for t in negative)
        plt.close(figure)


def test_without_matplotlib_the_search_ends_and_says_that_there_is_no_report(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = Target(lambda x, t: torch.sin(3 * t[:, None]) - 0.7 * x, (3,), key="bend")
    with pytest.warns(UserWarning, match=r"no report.*dss_fast\[plots\]"):
        result = search(target, 3, method=TwoStage(samples=16, rounds=1), budget=3_000, out=tmp_path, progress=False)
    assert result.solver.num_steps == 3 and (tmp_path / "solver-3.json").exists()
    assert not (tmp_path / "report.md").exists()
