"""What a finished search writes for people: its figures by hand, its pictures legible."""

import base64
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from test_page import Page

from dss_fast import Solver, Target, handmade, plots, report, sample, search
from dss_fast.draws import Draws
from dss_fast.plots import cells_height, draw_coefficients
from dss_fast.searching import GaussNewton, _config
from dss_fast.searching.runs import SearchResult

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
    draws, steps = Draws.of(target, 3), tuple(result.solvers)
    config = _config(draws, GaussNewton(space="plain"), steps, None, 5_000)
    assert report.write_report(result, draws, config) == folder / "report.html"
    return (folder / "report.md").read_text()


def cells(text):
    """(N, solver) -> the cells of its row."""
    section = text.split("## ")[1].split("\n\n")
    head, _, *rows = next(part for part in section if part.startswith("| N |")).splitlines()
    titles, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in (head, *rows))
    return {(line[0], line[1].strip("`")): dict(zip(titles, line, strict=True)) for line in lines}


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
    assert list(found) == [("6", best), ("6", "mine/6")]
    for row, squares in zip(found.values(), (errors[best], mine), strict=True):
        assert math.isclose(float(row["RMSE"]), float(squares.mean().sqrt()), rel_tol=0.02)
        assert math.isclose(float(row["median"]), float(squares.median().sqrt()), rel_tol=0.02)
        assert math.isclose(float(row["worst"]), float(squares.max().sqrt()), rel_tol=0.02)
    ratio = float((mine.mean() / errors[best].mean()).sqrt())
    (line,) = [line for line in text.splitlines() if line.startswith("N = 6: ")]
    assert best in line and math.isclose(float(line.split("(x ")[1].split(")")[0]), ratio, rel_tol=0.02)
    assert f"on {int((mine < errors[best]).sum())} of {report.SAMPLES} samples" in line
    for name in report.RIVALS:
        few = errors[name.replace("@", "/6@").removesuffix("@uniform")][: report.SCREENED].mean().sqrt()
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert math.isclose(float(row.split("|")[2]), float(few), rel_tol=0.02)
    assert [row["held-out RMSE"] for row in found.values()] == ["-", "0.0123"]
    assert "1,234 model evaluations of at most 5,000" in text and "same unit" in text


@pytest.mark.parametrize("mine, word", [("ab4", "Yes"), ("euler", "No"), ("ab2", "No")])
def test_it_says_whether_the_solver_is_better_than_the_best_hand_made(tmp_path, mine, word):
    """ab4 errs less than all of the rivals here; ab2, the best of them, is not better than itself."""
    (line,) = [line for line in written(tmp_path, TARGET, handmade(mine, 8)).splitlines() if line.startswith("N = 8: ")]
    assert line.startswith(f"N = 8: **{word}**. Against `ab2/8`")


def test_a_solver_that_is_better_on_half_of_the_samples_is_not_clearly_better():
    def run(errors, name):
        figures = {"rmse": float(errors.mean().sqrt()), "median": float(errors.median().sqrt())}
        return report.Run(name, handmade("ab2", 2), torch.empty(0), errors, figures)

    best = torch.full((report.SAMPLES,), 1.0, dtype=torch.float64)
    mine = best.clone()
    mine[:20] = 0.1  # of 32: a fair coin gives 20 or more once in nine times
    assert "**Not clearly**" in report._verdict(2, report.Match(run(best, "b"), run(mine, "m"), {}))
    mine[:22] = 0.1
    assert "**Yes**" in report._verdict(2, report.Match(run(best, "b"), run(mine, "m"), {}))


def test_pictures_and_what_a_plain_target_leaves_out(tmp_path):
    """No decode: no samples; no classifier: a distance says what switches; guidance drawn per sample."""
    plain = replace(TARGET, decode=None, uncond={"y": 0.5}, guidance_scale=(1.0, 2.0))
    solvers = handmade("ab2", 4), handmade("ab2", 7)
    text = written(tmp_path, plain, *solvers)
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.md", "overview.png", "stages.png"}
    assert "no `decode`" in text
    assert "ends further than" in text and "distances between distributions, of samples" in text
    known = replace(TARGET, classify=lambda x: x.flatten(1), features=lambda x: x.flatten(1)[:, :2])
    text = written(tmp_path, known, *solvers)
    assert "classifier reads" in text and "distances between distributions, of features" in text
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


SECTIONS = [
    "Better than the best hand-made solver?",
    "Before and after",
    "Error by stage",
    "Coefficients and timesteps",
    "What it cost",
    "Use a table",
    "Search again",
]


def test_the_page_needs_no_other_file(tmp_path):
    """One HTML file: every section, all pictures inline, nothing to load, a hostile name as its letters."""
    hostile = "<img src=x onerror=alert(1)>`|"
    target = replace(TARGET, name=hostile)
    solvers = [replace(handmade("ab4", n), name=f"{hostile}/{n}") for n in (3, 5)]
    written(tmp_path, target, *solvers)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.words("h2") == SECTIONS
    pictures = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]
    files = ("samples-3.png", "samples-5.png", "stages.png", "overview.png")
    assert pictures == [(tmp_path / name).read_bytes() for name in files] and all(i["alt"] for i in page.all("img"))
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "a")
        assert not {"href", "srcset", "onerror", "onload", "style"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", text)
    assert "<img src=x onerror=alert(1)>'|/3" in page.words("code")
    (saved,) = [json.loads(code) for code in page.words("code") if code.startswith("{") and '"num_steps": 3,' in code]
    assert Solver.from_dict(saved) == solvers[0]


def test_both_pages_say_the_same(tmp_path):
    text = written(tmp_path, TARGET, handmade("ab4", 4))
    page = Page((tmp_path / "report.html").read_text())
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    cells = re.findall(r"(?<=\| )[^|]+(?= \|)", text)
    assert len(cells) > 60
    shown = page.words("td") + page.words("th") + page.words("code")
    assert all(cell.strip("`") in shown for cell in cells if cell != "---")


def test_the_lines_to_copy_run(tmp_path, monkeypatch):
    """Both snippets of a real search's report, as printed, in the run folder."""
    target = Target(lambda x, t: torch.sin(3 * t[:, None]) - 0.7 * x, (3,), key="bend")
    settings = GaussNewton(samples=16, rounds=1, space="plain")
    first = search(target, [3, 4], method=settings, budget=3_000, out=tmp_path, progress=False)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (tmp_path / "report.md").read_text(), re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, names := {"target": target})
    assert names["result"].solvers == first.solvers
    assert (tmp_path / "another-folder" / "report.html").exists()


def test_several_targets_are_told_apart(tmp_path):
    """The figures are of the first of them, and the page says so."""
    targets = [replace(TARGET, name=name, decode=None, key=name) for name in ("first", "second")]
    settings = GaussNewton(samples=16, rounds=1, space="plain")
    search(targets, 3, method=settings, budget=3_000, out=tmp_path, progress=False)
    text = (tmp_path / "report.md").read_text()
    assert "searched for 2 targets" in text and "first, `first`" in text and "the others, `second`" in text
    assert "search([target, *others], " in text


def test_without_matplotlib_the_report_has_no_pictures_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = Target(lambda x, t: torch.sin(3 * t[:, None]) - 0.7 * x, (3,), key="bend")
    with pytest.warns(UserWarning, match=r"no pictures.*dss_fast\[plots\]"):
        result = search(target, 3, method=GaussNewton(samples=16, rounds=1), budget=3_000, out=tmp_path, progress=False)
    assert result.solver.num_steps == 3 and (tmp_path / "solver-3.json").exists()
    page = Page((tmp_path / "report.html").read_text())
    assert page.words("h2") == SECTIONS and not page.all("img") and not list(tmp_path.glob("*.png"))
    assert (
        any("dss_fast[plots]" in words for words in page.words("p")) and "N = 3" in (tmp_path / "report.md").read_text()
    )


def test_an_empty_curve_is_no_empty_diagram(tmp_path, monkeypatch):
    """A search that held no samples out drew axes from 0.1 to 10 with nothing in them."""
    drawn = []
    monkeypatch.setattr(report, "write_figure", lambda figure, path: drawn.append(figure))
    solver = handmade("ab4", 3)
    history = [{"evaluations": 7, "loss": {3: 0.1}}]
    report.overview(SearchResult({3: solver}, history, 7), tmp_path / "o.png")
    (figure,) = drawn
    assert [axis.axison for axis in figure.axes[:2]] == [True, False] and len(figure.axes[0].lines) == 1
    plt.close(figure)


def test_all_of_the_samples_are_drawn(tmp_path, monkeypatch):
    """Rows of different lengths, and pairs at the end of those that have some."""
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure))
    rows = {"a": torch.zeros(5, 1, 4, 4), "b": torch.zeros(2, 3, 4, 4)}
    plots.plot_samples(rows, tmp_path / "s.png", count=4, worst={"b": torch.zeros(2, 3, 4, 8)})
    (figure,) = drawn
    assert sum(len(axes.images) for axes in figure.axes) == 4 + 2 + 2
    assert not any(axes.axison for axes in figure.axes)
    plt.close(figure)
