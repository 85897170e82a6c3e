"""What a finished search writes for people: a view of a comparison, its pictures legible, nothing read as markup."""

import ast
import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dss_fast import GaussNewton, Solver, Target, compare, handmade, plots, report, search
from dss_fast.plots import cells_height, draw_coefficients, plot_overview, plot_points
from dss_fast.report import SearchRecord, write_report

plt = pytest.importorskip("matplotlib.pyplot", reason="the plots extra, in requirements.txt")


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text of each."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.texts.append((tag, []))
            self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, parts in self.open:
            parts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, tag):
        return ["".join(parts) for name, parts in self.texts if name == tag]


def model(x, t, y):
    """Towards the condition, curved in time."""
    column = [-1, *[1] * (x.ndim - 1)]
    return torch.tanh(y.to(x).reshape(column) - x * (1 + t.to(x).reshape(column)))


def draw(n, generator):
    return {"y": torch.rand(n, generator=generator)}


TARGET = Target(model, (1, 4, 4), cond=draw, decode=lambda x: x.sigmoid())


def record_of(*solvers, **told):
    """As if a search had found the solvers."""
    solvers = {s.num_steps: replace(s, source="dss_fast.search", name=s.name) for s in solvers}
    held_out = {n: ([7, 9], [0.05, 0.01234]) for n in solvers}
    about = {"evaluations": 1234, "call": "result = search(target, 6)", "settings": {"seed": 3}, "budget": 5_000}
    return SearchRecord(solvers, **{**about, "held_out": held_out, **told})


def written(folder, target, *solvers, **told):
    """The report's text."""
    assert write_report(folder, target, record_of(*solvers, **told)) == folder / "report.html"
    return (folder / "report.md").read_text()


def cells(text):
    """(N, solver) -> the cells of its row."""
    section = text.split("## ")[1].split("\n\n")
    head, _, *rows = next(part for part in section if part.startswith("| N |")).splitlines()
    titles, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in (head, *rows))
    return {(line[0], line[1].strip("`")): dict(zip(titles, line, strict=True)) for line in lines}


def test_it_says_what_compare_does(tmp_path):
    """One comparison: verdicts and rows of the report are those of ``compare`` with the same rivals and budget."""
    mine, start = replace(handmade("ab4", 6), name="mine/6"), replace(handmade("deis", 6), name="start/6")
    text = written(tmp_path, TARGET, mine, starts=[start])
    solver = record_of(mine).solvers[6]
    found = compare(TARGET, [solver], rivals=("all", start), budget=report.LEAST, progress=False)
    (verdict,) = found.verdicts
    assert f"N = 6: **{verdict.word}**. {verdict.sentence(lambda name: f'`{name}`')}" in text.splitlines()
    rows = cells(text)
    assert list(rows) == [("6", row.solver) for row in sorted(found.rows, key=lambda row: row.rmse)]
    for row in found.rows:
        shown = rows["6", row.solver]
        for title, value in (("RMSE", row.rmse), ("median", row.median), ("worst", row.worst)):
            assert float(shown[title]) == pytest.approx(value, rel=6e-3)
        assert shown["held-out RMSE"] == ("0.0123" if row.searched else "-")
    assert "1,234 model evaluations of at most 5,000" in text and "same unit" in text
    assert f"This report took {found.evaluations:,} more" in text and found.evaluations <= report.LEAST


@pytest.mark.parametrize(
    "decode, words", [(lambda x: [x], "list"), (lambda x: x[0], "(1, 4, 4)"), (lambda x: 1 / 0, "division")]
)
def test_a_decode_that_fails_costs_the_samples_alone(tmp_path, decode, words):
    text = written(tmp_path, replace(TARGET, decode=decode), handmade("ab4", 3))
    assert "no samples to look at: `the target's decode failed" in text and words in text
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.md", "overview.png", "stages.png"}


def test_what_the_model_raises_costs_the_report_alone(tmp_path, monkeypatch):
    """The search's result stands, and a warning says why there is no report."""
    monkeypatch.setattr(import_module("dss_fast.searching"), "doubt", lambda *what: (0, ""))  # no model of data
    calls = []

    def fails_later(x, t):
        calls.append(len(x))
        if sum(calls) > 1_000:
            raise RuntimeError("out of luck")
        return torch.sin(3 * t[:, None]) - 0.7 * x

    method = GaussNewton(samples=16, rounds=1, space="plain")
    target = Target(fails_later, (3,), key="bend")
    with pytest.warns(UserWarning, match="without its report: RuntimeError: out of luck"):
        result = search(target, 3, method=method, budget=900, out=tmp_path, progress=False)
    assert Solver.load(tmp_path / "solver-3.json") == result.solver and not (tmp_path / "report.html").exists()


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


HOSTILE = "<script>alert('1')</script> **a**|b`c`\nd & \"e\" ](http://example.org)"


def test_a_users_words_are_read_as_words(tmp_path):
    """Names, a request, an error and settings that hold markup of both kinds, on both pages."""

    def decode(x):
        raise ValueError(HOSTILE)

    said = " ".join(HOSTILE.replace("`", "'").split())
    target = replace(TARGET, name=HOSTILE, decode=decode, request={"prompt": HOSTILE})
    solver = replace(handmade("ab4", 3), name=f"{HOSTILE}/3")
    start = replace(handmade("ab3", 3), name=f"{HOSTILE}@/3")
    told = {"starts": [start], "others": [HOSTILE], "settings": {HOSTILE: HOSTILE}, "call": f"# ``` {HOSTILE}"}
    text = written(tmp_path, target, solver, **told)
    page = Page((tmp_path / "report.html").read_text())
    assert not {tag for tag, _ in page.elements} & {"script", "a", "link", "iframe", "b", "i", "object", "base", "em"}
    assert page.words("code").count(said) == 3 and said in page.words("title")[0]  # title, first, others
    assert any(f"prompt {said}" == code for code in page.words("code")) and f"# ``` {HOSTILE}" in page.words("code")
    assert set(page.words("strong")) <= {"Yes", "No", "Not clearly", "No answer"}
    assert re.search(r"^(`{4,})python\n# ``` <script>", text, re.M)  # a fence longer than what the code holds
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for lines in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
    outside = re.sub(r"(`{3,})\w*\n.*?\n\1|`[^`\n]*`", "", text, flags=re.S)
    assert "<script>" not in outside and "**a**" not in outside and "](http" not in outside


def test_numbers_stand_to_the_right(tmp_path):
    written(tmp_path, TARGET, handmade("ab4", 3))
    page = Page((tmp_path / "report.html").read_text())
    (row, *_) = [[cell.get("class") for cell in page.all("td")[:4]]]
    assert row == ["number", None, "number", "number"]


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


def test_imports_go_one_way():
    """Nothing below the search imports it, and the package loads no templates before it writes some."""
    code = "import dss_fast.compare, dss_fast.report, sys; print('jinja2' in sys.modules, 'matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", f"import torch; {code}"], capture_output=True, text=True)
    assert run.stdout.split() == ["False", "False"], run.stderr
    for name in ("rivals", "bench", "compare", "report", "plots"):
        tree = ast.parse((Path(report.__file__).parent / f"{name}.py").read_text())
        found = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [module for module in found if module.startswith(("searching", "integrations"))]


def test_an_empty_curve_is_no_empty_diagram(tmp_path, monkeypatch):
    """A search that held no samples out drew axes from 0.1 to 10 with nothing in them."""
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure))
    plot_overview({3: handmade("ab4", 3)}, {3: ([7], [0.1])}, {3: ([], [])}, tmp_path / "o.png")
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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_are_pictures_from_0_to_255(tmp_path, monkeypatch, dtype):
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure))
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.int64)
    rows = {"whole": images.to(dtype), "float": images / 255}
    plots.plot_samples(rows, tmp_path / "s.png", worst={"whole": torch.cat([images, images], -1).to(dtype)})
    (figure,) = drawn
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for k in range(3):
        assert abs(shown[k] - images[k].permute(1, 2, 0).numpy() / 255).max() < 1e-6
        assert abs(shown[k] - shown[6 + k]).max() < 1e-6 and abs(shown[3 + k][:, :4] - shown[k]).max() < 1e-6
    plt.close(figure)


@pytest.mark.parametrize("dtype, low, high", [(torch.int16, -128, 127), (torch.int32, 0, 65535), (torch.int8, -1, 1)])
def test_whole_numbers_of_another_range_are_refused(tmp_path, dtype, low, high):
    images = torch.zeros(2, 1, 4, 4, dtype=dtype)
    images[1, 0, 0, 0], images[0, 0, 0, 0] = low, high
    for rows, worst in (({"mine": images}, {}), ({"mine": torch.zeros(2, 1, 4, 4)}, {"mine": images})):
        with pytest.raises(ValueError, match=rf"images of mine are {dtype} from {low} to {high}.*0 to 255"):
            plots.plot_samples(rows, tmp_path / "s.png", worst=worst)
    assert not list(tmp_path.iterdir())


def test_samples_of_two_numbers_are_dots_in_a_plane(tmp_path, monkeypatch):
    """All of them, where solver and reference end from the same noise; a decode's pictures go before."""
    pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")
    drawn = {}
    module = import_module("dss_fast.compare")
    monkeypatch.setattr(module, "plot_points", lambda rows, path: drawn.update(rows) or plot_points(rows, path))
    plane = Target(lambda x, t: torch.sin(3 * t[:, None]) - 0.7 * x, (2,))
    text = written(tmp_path, plane, handmade("ab4", 3))
    (count,) = re.findall(r"All (\d+) samples, of two numbers each", text)
    assert "(samples-3.png)" in text and (tmp_path / "samples-3.png").stat().st_size > 5_000
    assert len(drawn) == 3 and all(points.shape == (int(count), 2) for points in drawn.values()) and int(count) > 16
    found = compare(plane, ["euler/3", "ab3/9"], samples=24, progress=False)
    error = (found.images["euler/3"] - found.images["reference"]).double().square().mean().sqrt()
    assert found.points and float(error) == pytest.approx(found.rows[0].rmse, rel=1e-4)
    assert not compare(replace(plane, shape=(3,)), ["euler/3"], samples=8, progress=False).points
