"""What a search leaves for people to keep: report.html, one file that holds all, and report.md with its pictures."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distance import Reference, squares, three_digits
from .draws import Draws
from .files import json_text, write_text
from .methods import handmade
from .page import Block, Code, Heading, Picture, Table, Text, code, html, markdown
from .plots import (
    SEARCHED,
    cells_height,
    draw_coefficients,
    draw_timesteps,
    log_scale,
    plot_samples,
    pyplot,
    write_figure,
)
from .sampling import sample
from .searching.lion import Lion
from .searching.runs import SearchResult
from .searching.two_stage import GaussNewton
from .solver import Solver
from .target import Samples, Target
from .trajectory import Trajectory, dense_grid, evaluations, integrate

FILES = ("report.html", "report.md")
SAMPLES = 32  # the report draws a batch of its own
REFERENCE_EVALUATIONS = 48  # its fine trajectories take so many calls, and err by 0.0006 on the MNIST flow
SCREENED = 8  # the first so many samples choose the best hand-made solver
RIVALS = tuple(
    f"{method}@{spacing}" for spacing in ("uniform", "shift3") for method in ("euler", "ab2", "dpmpp_2m", "unip2")
)
SHOWN, WORST = 8, 3  # of each solver the first samples are drawn, and those that err most
HAND_MADE = "#2980b9"
HELD_OUT = (
    "Held-out RMSE: the same unit, on other samples, those by which the search chose its table. The two often differ "
    "by a factor of two or three: a few samples carry most of a mean square (compare the median with the worst), and "
    "each set of samples has its own few."
)


@dataclass(frozen=True, eq=False)
class Run:
    """A solver on the report's noise.

    states: x_1..x_N, (B, N, *S). errors: (B,) float64, the mean square of each sample's difference from the reference.
    figures: see ``Reference.measure``.
    """

    name: str
    solver: Solver
    states: Tensor
    errors: Tensor
    figures: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Match:
    """The best hand-made solver of one N, and the searched one. screened: RMSE of all of ``RIVALS``, on few samples."""

    best: Run
    mine: Run
    screened: dict[str, float]

    @property
    def runs(self) -> tuple[Run, Run]:
        """Before and after."""
        return self.best, self.mine


Matches = dict[int, Match]
Draw = Callable[[str, str, Callable[[Path], object]], list[Block]]


@torch.no_grad()
def write_report(result: SearchResult, draws: Draws, config: dict[str, Any]) -> Path:
    """Writes report.html and report.md with its pictures into the run folder; returns the former.

    It compares with the best of a few hand-made solvers, on noise of its own that the search's evaluations do not
    include. Without matplotlib it has no pictures, and says so.
    """
    assert result.out is not None
    out, batch = result.out, draws.alone.batch("report", 0, SAMPLES)
    trajectory = integrate(batch.predictor(), batch.noise, dense_grid(batch.schedule, REFERENCE_EVALUATIONS))
    asked = None if batch.target.labels is None else batch.target.labels(batch.cond).cpu()
    reference = Reference(batch.target, trajectory.last, asked)
    matches = {n: _match(batch, solver, reference) for n, solver in result.solvers.items()}
    calls = evaluations(trajectory.grid)
    try:
        pyplot()
        missing: list[Block] = []
    except ImportError as error:
        warnings.warn(f"the report has no pictures: {error}", stacklevel=4)
        missing = [Text(f"This report has no pictures: {error}.")]

    def picture(name: str, alt: str, draw: Callable[[Path], object]) -> list[Block]:
        if missing:
            return []
        draw(out / name)
        return [Picture(out / name, alt)]

    blocks = [
        Heading("Better than the best hand-made solver?"),
        *([Text(_several(draws))] if draws.others else []),
        *_answer(result, matches, reference),
        *missing,
        Heading("Before and after"),
        *_samples(matches, reference, calls, picture),
        Heading("Error by stage"),
        *_stages(matches, trajectory, picture),
        Heading("Coefficients and timesteps"),
        *_tables(result, batch, picture),
        Heading("What it cost"),
        *_cost(result, batch, config, calls),
        Heading("Use a table"),
        *_use(result, batch),
        Heading("Search again"),
        *_again(config, "[target, *others]" if draws.others else "target"),
    ]
    named = "" if batch.target.name == Target.name else f" for {code(batch.target.name)}"
    title = f"Search{named}: {', '.join(f'N = {n}' for n in result.solvers)}"
    for name, page in zip(FILES, (html, markdown), strict=True):
        write_text(out / name, page(title, blocks))
    return out / FILES[0]


def _answer(result: SearchResult, matches: Matches, reference: Reference) -> list[Block]:
    """Whether each solver is better than the best hand-made one, the figures, and what they are."""
    digits = lambda value: "-" if value is None else three_digits(value)  # noqa: E731
    rows = []
    held_out = {n: min(values) for n in matches if (values := result.curve("held_out", n)[1])}
    for n, match in matches.items():
        for run, chosen_by in zip(match.runs, ("-", digits(held_out.get(n))), strict=True):
            f, worst = run.figures, math.sqrt(float(run.errors.max()))
            cells = [str(n), code(run.name), digits(f["rmse"]), f"{digits(f['rmse_low'])} to {digits(f['rmse_high'])}"]
            cells += [digits(value) for value in (f["median"], f["p90"], worst)]
            cells += ["-" if f["switched"] is None else f"{100 * f['switched']:.0f} %"]
            rows.append([*cells, digits(f["frechet"]), digits(f["energy"]), *([chosen_by] if held_out else [])])
    titles = ["N", "solver", "RMSE", "95 % interval", "median", "90 %", "worst", "switched", "Frechet", "energy"]
    few = [["searched", *(digits(float(m.mine.errors[:SCREENED].mean().sqrt())) for m in matches.values())]]
    few += [[code(name), *(digits(m.screened[name]) for m in matches.values())] for name in RIVALS]
    floor = reference.distances()
    switched = (
        "the classifier reads as another class than the reference's"
        if reference.target.classify is not None
        else f"ends further than {three_digits(reference.reach)} from the reference (root mean square, half of the "
        "median distance between two samples)"
    )
    compared = "features" if reference.target.features is not None else "samples"
    return [
        *(Text(_verdict(n, match)) for n, match in matches.items()),
        Table([*titles, *(["held-out RMSE"] if held_out else [])], rows),
        Text(
            "RMSE: the root mean square difference per element from a fine trajectory that starts at the same noise, "
            f"over {SAMPLES} samples that the search has not seen. Median, 90 % and worst: of the samples' own."
        ),
        *([Text(HELD_OUT)] if held_out else []),
        Text(
            f"Switched: the share of samples that {switched}. Frechet and energy: distances between distributions, of "
            f"{compared}, to the reference from other noises; two draws of the reference of {SAMPLES // 2} noises each "
            f"are {digits(floor['frechet'])} and {digits(floor['energy'])} apart."
        ),
        Text(f"RMSE on the first {SCREENED} samples of every hand-made solver tried, which chose the best of them:"),
        Table(["solver", *(f"N = {n}" for n in matches)], few),
        Text("`dss_fast.compare` measures more solvers on more samples."),
    ]


def _several(draws: Draws) -> str:
    """Which of several targets the figures are of."""
    others = ", ".join(code(other.name) for other in draws.others)
    return (
        f"The tables were searched for {len(draws.targets)} targets. All figures here but the held-out RMSE are of "
        f"the first, {code(draws.target.name)}; `dss_fast.compare` measures the same tables on the others, {others}."
    )


def _verdict(n: int, match: Match) -> str:
    """Yes where it errs less in mean and median, and is nearer on more samples than chance gives one time in forty."""
    mine, best = match.mine, match.best
    errors = [(title, mine.figures[k], best.figures[k]) for k, title in (("rmse", "RMSE"), ("median", "median"))]
    less, nearer = [own < other for _, own, other in errors], int((mine.errors < best.errors).sum())
    word = (
        "No" if not any(less) else "Yes" if all(less) and nearer > (SAMPLES + 2 * SAMPLES**0.5) / 2 else "Not clearly"
    )
    times = (
        f"{title} {three_digits(own)} against {three_digits(other)}"
        + (f" (x {three_digits(own / other)})" * (other > 0))
        for title, own, other in errors
    )
    return (
        f"N = {n}: **{word}**. Against {code(best.name)}, the best of {len(RIVALS)} hand-made ones: "
        f"{', '.join(times)}; nearer to the reference on {nearer} of {SAMPLES} samples."
    )


def _samples(matches: Matches, reference: Reference, calls: int, picture: Draw) -> list[Block]:
    """Samples of both solvers and the reference for each N, and each solver's own worst."""
    decode = reference.target.decode
    if decode is None:
        return [Text("The target has no `decode`, so there are no samples to look at.")]
    blocks: list[Block] = [
        Text(
            "From the same noise above each other: the best hand-made solver, the searched one, and the reference. At "
            f"the end of a row are the {WORST} samples at which that solver errs most, each beside its reference."
        )
    ]
    for n, match in matches.items():

        def draw(path: Path, n: int = n, match: Match = match) -> object:
            ends = {f"{run.name}\n{n} calls": run.states[:, -1] for run in match.runs}
            rows = {title: decode(x[:SHOWN]) for title, x in ends.items()}
            rows[f"reference\n{calls} calls"] = decode(reference.samples[:SHOWN])
            worst = {t: torch.cat([decode(part) for part in reference.worst(x, WORST)], -1) for t, x in ends.items()}
            return plot_samples(rows, path, count=SHOWN, worst=worst)

        blocks += picture(f"samples-{n}.png", f"samples at N = {n}", draw)
    return blocks


def _stages(matches: Matches, trajectory: Trajectory, picture: Draw) -> list[Block]:
    """How far the state after each step is from the fine trajectory at the same u."""

    def errors(run: Run) -> list[float]:
        u = torch.tensor(run.solver.timesteps[1:], dtype=torch.float64)
        return (run.states - trajectory.at(u)).square().flatten(2).mean((0, 2)).sqrt().tolist()

    found = {n: [(run, errors(run)) for run in match.runs] for n, match in matches.items()}
    blocks: list[Block] = [
        Text(
            "The RMSE of the state after each step, to the fine trajectory at the same u. The end, u = 1, is what "
            "counts: later rows of a table make up for earlier ones, so a larger error midway is no failure."
        ),
        *picture("stages.png", "error of the state after each step", lambda path: _draw_stages(found, path)),
    ]
    for n, pair in found.items():
        rows = []
        for run, values in pair:
            rows.append([code(run.name), "u", *(f"{u:.3f}" for u in run.solver.timesteps[1:])])
            rows.append(["", "RMSE", *map(three_digits, values)])
        blocks.append(Table(["after step", "", *(str(i + 1) for i in range(n))], rows))
    return blocks


def _draw_stages(found: dict[int, list[tuple[Run, list[float]]]], path: Path) -> Path:
    """Full dots at the end, which counts, and faint ones before it."""
    size = (4.6 * len(found), 3.6)
    figure, axes = pyplot().subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, (n, pair) in zip(axes[0], found.items(), strict=True):
        for (run, error), color in zip(pair, (HAND_MADE, SEARCHED), strict=True):
            u, last = run.solver.timesteps[1:], error[-1]
            axis.plot(u, error, marker="o", ms=4, mfc="white", lw=1, ls=":", color=color, alpha=0.7)
            axis.plot(1, last, marker="o", ms=9, ls="", color=color, label=run.name)
            beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "color": color}
            axis.annotate(three_digits(last), (1, last), **beside)
        axis.set(title=f"N = {n}", xlabel="u reached (0 noise, 1 data)", xlim=(0, 1.2))
        log_scale(axis)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8, title="at the end", title_fontsize=8)
    axes[0, 0].set_ylabel("RMSE to the fine trajectory")
    return write_figure(figure, path)


def _tables(result: SearchResult, batch: Samples, picture: Draw) -> list[Block]:
    """Each searched table: in the picture, as numbers to read, and as a file to save."""
    blocks: list[Block] = [
        Text(
            "With the state x and the predictions y (velocities of a flow, clean samples for VP) a step is "
            "`x_{i+1} = a_i x_i + b_i (c_i0 y_0 + ... + c_ii y_i)`; a weight on the initial noise, where the table has "
            "one, adds to the sum. The scalars a and b follow from u and the schedule, "
            f"{code(repr(batch.schedule))}; the time is what the network is told."
        ),
        *picture("overview.png", "error, coefficients and timesteps", lambda path: overview(result, path)),
    ]
    for n, solver in result.solvers.items():
        u, noise, asked = solver.timesteps, solver.noise_coeffs, solver.network_timesteps
        times = batch.schedule.time(torch.tensor(asked or u[:-1], dtype=torch.float64)).tolist()
        rows = []
        for i, row in enumerate(solver.coeffs):
            weights = [*([] if noise is None else [noise[i]]), *row[: i + 1]]
            cells = [f"{value:.3f}".replace("-", "\N{MINUS SIGN}") for value in weights] + [""] * (n - 1 - i)
            told = [*([] if asked is None else [f"{asked[i]:.4f}"]), f"{times[i]:.4g}"]
            rows.append([str(i), f"{u[i]:.4f}", *told, *cells])
        titles = ["step", "u", *([] if asked is None else ["asked at"]), "time", *([] if noise is None else ["noise"])]
        data = {key: value for key, value in solver.to_dict().items() if key != "provenance"}
        blocks += [
            Text(f"{code(solver.name)}:"),
            Table([*titles, *(f"c_i{j}" for j in range(n))], rows),
            Code(json_text(data), "json", f"solver-{n}.json in full digits, to save where the file itself is lost"),
        ]
    return blocks


def _cost(result: SearchResult, batch: Samples, config: dict[str, Any], calls: int) -> list[Block]:
    """What the search and this report took, and what a sample takes from now on."""
    steps, twice = list(result.solvers), " guided calls" if batch.target.guided else " calls"
    own = SAMPLES * calls + sum((len(RIVALS) * SCREENED + 2 * SAMPLES) * n for n in steps)
    limit = f" of at most {config['budget']:,}" if isinstance(config["budget"], int) else ""
    times = [event["time"] for event in result.history if "time" in event]
    took = f", in {times[-1] - times[0]:,.0f} s from the first event to the last" if times else ""
    found = [
        f"{result.evaluations:,} model evaluations{limit}{took}; for each sample a forward counts 1 and a backward 2, "
        f"with guidance too. This report took {own:,} more. A sample takes {' or '.join(map(str, steps))}{twice} from "
        f"now on, where the reference takes {calls}."
    ]
    for n in steps:
        at, values = result.curve("held_out", n)
        if len(values) > 1:
            k = values.index(min(values))
            found.append(
                f"N = {n}: held-out RMSE {three_digits(values[0])} at the start, {three_digits(values[k])} after "
                f"{at[k]:,} evaluations, the least of {len(values)} looks."
            )
    return [Text(text) for text in found]


def _use(result: SearchResult, batch: Samples) -> list[Block]:
    """Lines to copy: in Python, in a shell and in a pipeline."""
    n, scale = next(iter(result.solvers)), batch.target.guidance_scale
    guided = f", guidance_scale={scale[1]}" if isinstance(scale, tuple) else ""
    python = [
        "from dss_fast import Solver, sample",
        "",
        f'solver = Solver.load("solver-{n}.json")  # in this folder',
        f"x = sample(target, 16, solver{guided})  # the Target searched on, or the bare model with your noise",
    ]
    pipeline = [
        "from dss_fast.integrations.diffusers import DSSScheduler",
        "",
        f'pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver="solver-{n}.json")',
        f"pipe(prompt, num_inference_steps={n})",
    ]
    found: list[Block] = [Code("\n".join(python), "python")]
    if batch.target.request:
        asked = ", ".join(f"{key} {value}" for key, value in batch.target.request.items())
        found = [Text(f"It was searched for {code(asked)}."), Code("\n".join(pipeline), "python")]
    return [
        *found,
        Text("A table is for the model, the schedule and the guidance that it was searched on."),
    ]


def _again(config: dict[str, Any], given_to: str) -> list[Block]:
    """The call that was made, and what to change in it. given_to: its first argument."""
    kind = {kind.name: kind for kind in (GaussNewton, Lion)}[config["method"]]
    defaults = {f.name: f.default for f in fields(kind)}
    given = {key: value for key, value in config["settings"].items() if value != defaults[key]}
    python, arguments = ["from dss_fast import compare, search"], [f"{given_to}, {config['num_steps']!r}"]
    if given or kind is Lion:
        python.append(f"from dss_fast.searching import {kind.__name__}")
        arguments.append(f"method={kind.__name__}({', '.join(f'{key}={value!r}' for key, value in given.items())})")
    if config["initial"] is not None:
        arguments.append(f"initial={config['initial']!r}" if isinstance(config["initial"], str) else "initial=solver")
    arguments += [f"{key}={config[key]!r}" for key in ("budget", "seed")]
    python += ["", f'result = search({", ".join(arguments)}, out="another-folder")', ""]
    python += ['compare(target, [*result.solvers.values(), "ab2", "unip3"], num_steps=list(result.solvers))']
    return [
        Code("\n".join(python), "python"),
        Text(
            "The same call gives the same table, a larger budget usually a better one, another seed one from other "
            "samples. Search again for another model, schedule or guidance. An interrupted search goes on with "
            "`resume=True` and its own folder."
        ),
        Code(json.dumps(config, indent=1), "json", "All settings of this search"),
    ]


def overview(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """One picture: error over evaluations, then coefficients and timesteps of each solver."""
    solvers = result.solvers
    heights = [2.8, *(cells_height(solver) for solver in solvers.values())]
    figure, axes = pyplot().subplots(
        1 + len(solvers),
        2,
        figsize=(5 + max(heights[1:]), sum(heights)),
        height_ratios=heights,
        width_ratios=[max(heights[1:]), 4.5],
        squeeze=False,
        layout="constrained",
    )
    for axis, key, title in (
        (axes[0, 0], "loss", "training loss"),
        (axes[0, 1], "held_out", "held-out RMSE"),
    ):
        curves = {n: curve for n in solvers if (curve := result.curve(key, n))[0]}
        for n, (at, values) in curves.items():
            axis.plot(at, values, marker="." if len(at) < 50 else None, lw=1, label=f"N = {n}")
        if curves:
            axis.set(title=title, xlabel="model evaluations")
            axis.locator_params(axis="x", nbins=5)
            log_scale(axis)
            axis.grid(alpha=0.3)
            axis.legend()
        else:
            axis.axis("off")
            axis.text(0.5, 0.5, f"no {title}: the budget allowed no such samples", ha="center", color="0.4")
    for row, (n, solver) in zip(axes[1:], solvers.items(), strict=True):
        draw_coefficients(row[0], solver, f"N = {n}")
        draw_timesteps(row[1], solver)
    write_figure(figure, path)


def _match(batch: Samples, solver: Solver, reference: Reference) -> Match:
    """A searched solver and the one of ``RIVALS`` that errs least on a few of the samples."""
    few, errors, tables = batch.rows(slice(SCREENED)), {}, {}
    for name in RIVALS:
        method, _, spacing = name.partition("@")
        tables[name] = handmade(method, solver.num_steps, batch.schedule, spacing=spacing)
        error = squares(_states(few, tables[name])[:, -1], reference.samples[:SCREENED]).mean()
        errors[name] = float(error.sqrt())
    best = tables[min(errors, key=lambda name: errors[name])]
    return Match(_run(batch, best, reference, best.name), _run(batch, solver, reference, solver.name), errors)


def _run(batch: Samples, solver: Solver, reference: Reference, name: str) -> Run:
    states = _states(batch, solver)
    return Run(name, solver, states, squares(states[:, -1], reference.samples), reference.measure(states[:, -1]))


def _states(batch: Samples, solver: Solver) -> Tensor:
    """The states x_1..x_N, (B, N, *S)."""
    target, scale = batch.target, batch.guidance
    _, states = sample(target, batch.noise, solver, cond=batch.cond, guidance_scale=scale, return_trajectory=True)
    return states[1:].transpose(0, 1)
