"""What a search leaves for people to keep: report.html, one file that holds all, and report.md with its pictures.

A view of a :class:`dss_fast.compare.Comparison`: what it says stands in templates/report.jinja, how it is written in
html.jinja and markdown.jinja beside it. A user's words (a model's name, an error) go in through their ``code``.
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .bench import PICTURES, Row
from .compare import Comparison, Given, Verdict, compare
from .distance import three_digits
from .files import json_text, write_text
from .plots import Curves, plot_overview, plot_stages, pyplot
from .schedule import Flow, Schedule
from .solver import Solver
from .target import Target

FILES = {"report.html": "html", "report.md": "markdown"}
LEAST = 4_000  # evaluations that a report may take, or as many as the search if those are more
NUMBER = re.compile(r"[\d\N{MINUS SIGN}-]")
DPI = 140  # of the pictures; a CSS pixel is 1/96 inch


def names_of(steps: Sequence[int]) -> list[str]:
    """The files that a report of tables of these N writes."""
    return [*FILES, "stages.png", "overview.png", *(f"samples-{n}.png" for n in steps)]


@dataclass(frozen=True)
class SearchRecord:
    """What a search tells of itself.

    solvers: its tables by N. starts: the tables that it started from, or their names. evaluations: spent, of at most
    budget. seconds: from the first event to the last. loss, held_out: evaluations and values by N. call: Python that
    searches again. settings: all of them, JSON data. others: the names of further targets of the same tables. doubt:
    why the target does not seem to be described rightly, "" where it is.
    """

    solvers: Mapping[int, Solver]
    evaluations: int
    call: str
    settings: Mapping[str, Any]
    starts: Sequence[Given] = ()
    budget: int | None = None
    seconds: float | None = None
    loss: Curves = field(default_factory=dict)
    held_out: Curves = field(default_factory=dict)
    others: Sequence[str] = ()
    doubt: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file in a section of the report, and what it shows in a few words."""

    section: str
    path: Path
    alt: str

    @property
    def data(self) -> str:
        """The file in base64."""
        return base64.b64encode(self.path.read_bytes()).decode()

    @property
    def width(self) -> int:
        """In CSS pixels, from the header of the file."""
        return int.from_bytes(self.path.read_bytes()[16:20]) * 96 // DPI


def write_report(out: Path, target: Target, record: SearchRecord, *, progress: bool = False) -> Path:
    """Writes report.html and report.md with its pictures into a folder; returns the former.

    It compares on noise of its own, for at most as many evaluations as the search, or ``LEAST``, which
    are not among them. Without matplotlib it has no pictures, without a decode that works no samples, and says so.
    Raises FloatingPointError where the fine reference diverges, OSError where it cannot write, and what the model
    raises.
    """
    budget = max(LEAST, record.evaluations)
    rivals = ("all", *record.starts)
    comparison = compare(target, list(record.solvers.values()), rivals=rivals, budget=budget, progress=progress)
    if record.doubt:  # an error against where a wrong description leads says nothing
        said = f"{record.doubt[0].upper()}{record.doubt[1:]}."
        comparison = replace(comparison, verdicts=[replace(v, doubt=said) for v in comparison.verdicts])
    pairs = {pair[1].num_steps: pair for pair in (_pair(comparison, v) for v in comparison.verdicts)}
    images, missing = [], ""
    try:
        pyplot()
        images = _pictures(out, target, record, comparison, pairs)
    except ImportError as error:
        missing = str(error)
        warnings.warn(f"the report has no pictures: {missing}", stacklevel=4)
    schedule = target.schedule or Flow()
    fewer = any(solver.guided_steps is not None for solver in record.solvers.values())
    told = {
        "target": target,
        "record": record,
        "comparison": comparison,
        "model": "" if target.name == Target.name else target.name,
        "steps": [f"N = {n}" for n in record.solvers],
        "others": record.others,
        "schedule": repr(schedule),
        "fewer": fewer,
        "calls": [solver.guided_calls if fewer else n for n, solver in record.solvers.items()],
        "images": images,
        "no_pictures": missing,
        "staged": min(PICTURES, comparison.rows[0].samples),
        "figures": _figures(comparison, record),
        "stages": [_stages(n, pair) for n, pair in pairs.items()],
        "tables": [_table(solver, schedule) for solver in record.solvers.values()],
        "curves": [_curve(n, *curve) for n, curve in record.held_out.items() if len(curve[1]) > 1],
        "request": ", ".join(f"{key} {value}" for key, value in (target.request or {}).items()),
        "use": _use(next(iter(record.solvers)), target),
        "settings": json.dumps(record.settings, indent=1),
    }
    for name, kind in FILES.items():
        write_text(out / name, _rendered(kind, told))
    return out / "report.html"


def _rendered(kind: str, told: Mapping[str, Any]) -> str:
    """The page in HTML, where all that is told is escaped, or in Markdown."""
    import jinja2
    from markupsafe import Markup

    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=kind == "html",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    whole = Markup if kind == "html" else str

    def sentence(verdict: Verdict, code: Callable[[str], str]) -> str:
        names: list[str] = []

        def mark(name: str) -> str:
            names.append(code(name))
            return f"\0{len(names) - 1}\0"

        parts = verdict.sentence(mark).split("\0")
        return whole("").join(names[int(part)] if k % 2 else part for k, part in enumerate(parts))

    page.filters |= {
        "flowing": lambda text: whole(" ".join(text.split())),
        "one_line": lambda text: " ".join(str(text).replace("`", "'").split()) or " ",
        "digits": _digits,
        "fence": lambda text: "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)),
        "numeric": lambda rows: [all(NUMBER.match(c or "0") for c in column) for column in zip(*rows, strict=True)],
    }
    text = page.get_template("report.jinja").render(told, format=kind, sentence=sentence)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _digits(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


def _pair(comparison: Comparison, verdict: Verdict) -> tuple[Row, Row]:
    """The rows of the best rival and of the table itself."""
    rows = {row.solver: row for row in comparison.rows}
    return rows[verdict.best], rows[verdict.solver]


def _figures(comparison: Comparison, record: SearchRecord) -> dict[str, Any]:
    """All rows, best first within each N."""
    held_out = {n: min(values) for n, (_, values) in record.held_out.items() if values}
    titles = ["N", "solver", "RMSE", "95 % interval", "median", "90 %", "worst", "switched", "Frechet", "energy"]
    rows, order = [], [*record.solvers, *(row.num_steps for row in comparison.rows)]
    for row in sorted(comparison.rows, key=lambda row: (order.index(row.num_steps), row.rmse)):
        cells = [str(row.num_steps), row.solver, _digits(row.rmse)]
        cells += [
            f"{_digits(row.rmse_low)} to {_digits(row.rmse_high)}",
            *map(_digits, (row.median, row.p90, row.worst)),
        ]
        cells += [
            "-" if row.switched is None else f"{100 * row.switched:.0f} %",
            *map(_digits, (row.frechet, row.energy)),
        ]
        chosen_by = held_out.get(row.num_steps) if row.searched else None
        rows.append([*cells, *([_digits(chosen_by)] if held_out else [])])
    return {"titles": [*titles, *(["held-out RMSE"] if held_out else [])], "rows": rows}


def _pictures(
    out: Path, target: Target, record: SearchRecord, comparison: Comparison, pairs: Mapping[int, tuple[Row, Row]]
) -> list[Picture]:
    """Samples of both solvers and the reference for each N, the errors by stage, and the tables."""
    found = []
    seen = (target.decode is not None or comparison.points) and not comparison.unseen
    for n, pair in pairs.items() if seen else ():
        path = comparison.plot_samples(out / f"samples-{n}.png", [row.solver for row in pair])
        found.append(Picture("samples", path, f"samples at N = {n}"))
    if pairs and all(row.stages for pair in pairs.values() for row in pair):
        path = plot_stages(pairs, out / "stages.png")
        found.append(Picture("stages", path, "error of the state after each step"))
    path = plot_overview(record.solvers, record.loss, record.held_out, out / "overview.png")
    return [*found, Picture("overview", path, "error, coefficients and timesteps")]


def _stages(n: int, pair: tuple[Row, Row]) -> dict[str, Any]:
    """How far the state after each step is from the fine trajectory at the same u."""
    rows = []
    for row in pair:
        none = [""] * (n - row.num_steps)
        rows.append([row.solver, "u", *(f"{u:.3f}" for u in row.timesteps[1:]), *none])
        rows.append(["", "RMSE", *(map(three_digits, row.stages) if row.stages else ["-"] * row.num_steps), *none])
    return {"titles": ["after step", "", *(str(i + 1) for i in range(n))], "rows": rows}


def _table(solver: Solver, schedule: Schedule) -> dict[str, Any]:
    """A searched table as numbers to read, and as a file to save."""
    u, noise, asked, n = solver.timesteps, solver.noise_coeffs, solver.network_timesteps, solver.num_steps
    times = schedule.time(torch.tensor(asked or u[:-1], dtype=torch.float64)).tolist()
    rows = []
    for i, row in enumerate(solver.coeffs):
        weights = [*([] if noise is None else [noise[i]]), *row[: i + 1]]
        cells = [f"{value:.3f}".replace("-", "\N{MINUS SIGN}") for value in weights] + [""] * (n - 1 - i)
        told = [*([] if asked is None else [f"{asked[i]:.4f}"]), f"{times[i]:.4g}"]
        rows.append([str(i), f"{u[i]:.4f}", *told, *cells])
    titles = ["step", "u", *([] if asked is None else ["asked at"]), "time", *([] if noise is None else ["noise"])]
    data = {key: value for key, value in solver.to_dict().items() if key != "provenance"}
    columns = [*titles, *(f"c_i{j}" for j in range(n))]
    return {"name": solver.name, "num_steps": n, "titles": columns, "rows": rows, "json": json_text(data)}


def _curve(n: int, at: Sequence[int], values: Sequence[float]) -> tuple[int, int, float, float, int]:
    """N, evaluations at the least held-out RMSE, the first, the least, and how many looks."""
    k = min(range(len(values)), key=lambda k: values[k])
    return n, at[k], values[0], values[k], len(values)


def _use(n: int, target: Target) -> str:
    """Lines to copy: in Python, or for a pipeline."""
    if target.request:
        lines = ["from dss_fast.integrations.diffusers import DSSScheduler", ""]
        given = f'pipe.scheduler.config, solver="solver-{n}.json"'
        lines += [f"pipe.scheduler = DSSScheduler.from_config({given})", f"pipe(prompt, num_inference_steps={n})"]
        return "\n".join(lines)
    scale = target.guidance_scale
    guided = f", guidance_scale={scale[1]}" if isinstance(scale, tuple) else ""
    lines = ["from dss_fast import Solver, sample", "", f'solver = Solver.load("solver-{n}.json")  # in this folder']
    lines += [f"x = sample(target, 16, solver{guided})  # the Target searched on, or the bare model with your noise"]
    return "\n".join(lines)
