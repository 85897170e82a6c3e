"""compare: solvers side by side on one model, from the same noise, against a fine reference and all their rivals."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import adaptive
from .bench import CHECKED, COARSER, PLANE, Bench, Row
from .denoiser import not_finite
from .distance import ratio_of, three_digits
from .draws import Draws
from .files import shortened, write_json
from .methods import SOURCE, calls_within
from .modes import on_host
from .names import Name, find_solver, is_file, known, printable, published_steps
from .plots import plot_errors, plot_points, plot_samples
from .progress import bar
from .rivals import Contest, calls_like, contest, contest_cost, handmade_tables, is_rival, published_tables, ranked_on
from .schedule import Schedule
from .solver import Solver
from .target import Model, Target

REFERENCE_EVALUATIONS = 160  # with so many calls the fourth-order teacher errs far less than any few-step solver
# Samples and calls of the reference, by what a budget allows; 48 err by 0.0006 on the MNIST flow.
LADDER = ((256, REFERENCE_EVALUATIONS), (128, 96), (64, 48), (32, 32))
FEW = 8  # samples have no interval to speak of
CONTEST = 0.75  # of what a budget leaves goes into the hand-made names, the rest into how many calls they need

Given = Solver | str | os.PathLike[str]


@dataclass(frozen=True)
class Verdict:
    """Whether a table errs less than the best of all rivals.

        ratio = RMSE / min over rivals of their RMSE

    low, high: its 95 % interval, over resampled noises, each of which chooses its own best rival. median: the ratio of
    the medians. nearer: the samples on which the table errs less. tried, known: hand-made names; others: further
    rivals. calls: as many of the best hand-made solver, ``like``, err no more than ``num_steps`` of this; without
    ``like`` more than ``calls`` are needed. guided_calls: of a table that calls the unconditional branch at some steps
    only; ``num_steps`` and ``calls`` are then those of rivals that call both at all steps. doubt: why the figures mean
    nothing, "" where they do.
    """

    solver: str
    num_steps: int
    best: str
    ratio: float
    low: float
    high: float
    median: float
    nearer: int
    samples: int
    tried: int
    known: int
    others: int
    calls: int | None = None
    like: str | None = None
    doubt: str = ""
    guided_calls: int | None = None

    @property
    def word(self) -> str:
        """Yes where the interval is below 1, No where it is at 1 or above; neither on fewer than ``FEW`` samples."""
        if self.doubt:
            return "No answer"
        if self.samples < FEW:
            return "Not clearly"
        return "Yes" if self.high < 1 else "No" if self.low >= 1 else "Not clearly"

    def sentence(self, code: Callable[[str], str] = str) -> str:
        """The figures in words. code: how names are written."""
        tried = f"all {self.known}" if self.tried == self.known else f"{self.tried} tried of {self.known}"
        others = f"{self.others} other rival{'s' * (self.others > 1)}"
        ranked = ranked_on(self.samples)
        names = f"{tried} hand-made names" + f" (ranked on {ranked} samples)" * (ranked < self.samples)
        rivals = [names] * bool(self.known) + [others] * bool(self.others)
        digits = [three_digits(value) for value in (self.ratio, self.low, self.high, self.median)]
        text = (
            f"{code(self.solver)} against {code(self.best)}, the best of {' and '.join(rivals)}: RMSE x {digits[0]} "
            f"(95 % interval {digits[1]} to {digits[2]}), median x {digits[3]}, nearer to the reference on "
            f"{self.nearer} of {self.samples} samples."
        )
        if self.calls is not None and self.word == "Yes":
            calls = f"{self.calls}" if self.like else f"more than {self.calls}"
            by = f", {code(self.like)}," if self.like else ""
            mine = f"{self.num_steps} calls"
            if self.guided_calls is not None:  # its steps are more than those of the rivals, its calls are not
                mine, calls = f"{self.guided_calls} calls in all", f"{calls} steps of both branches"
            text += f" {mine} of this table err like {calls} of the best hand-made solver"
            text += f"{by} of those that are best at {self.num_steps}."
        return f"{self.doubt} {text}".strip()


@dataclass(frozen=True, repr=False)
class Comparison:
    """What tables are worth: what :func:`compare` measured, and what the report of a search shows.

    rows: one per solver. verdicts: one per table that is neither hand-made nor published, where it has rivals.
    evaluations: of the model, spent on all this. reference: calls of the fine reference. reach: how far from it a
    sample counts as another one, None where a classifier says it. unseen: why there are no images. images: title -> its
    first samples (B, C, H, W), "reference" among them; of two numbers and without a decode all, (B, 2). worst: title ->
    its samples that err most, each with the reference from the same noise on its right, (B, C, H, 2 W).
    """

    rows: list[Row]
    verdicts: list[Verdict]
    evaluations: int
    reference: int
    reach: float | None
    unseen: str
    images: dict[str, Tensor] = field(repr=False)
    worst: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        said = ", ".join(f"{v.solver}: {v.word}" for v in self.verdicts)
        return f"<Comparison of {len(self.rows)} solvers, {self.cost}{'; ' * bool(said)}{said}>"

    def table(self) -> str:
        """The rows as aligned text, best error first within each number of steps, and the verdicts below; errors in
        three digits, the noise floor of a distance in its title."""
        rows = sorted(self.rows, key=lambda r: (r.num_steps, r.rmse))
        titles = {"solver": "solver", "nfe": "NFE", "rmse": "RMSE", "interval": "95 % interval"}
        titles |= {k: t for k, t in _OPTIONAL.items() if any(getattr(r, k) is not None for r in rows)}
        for key in ("frechet", "energy"):
            floor = next((f for r in rows if (f := getattr(r, f"{key}_floor")) is not None), None)
            if key in titles and floor is not None:
                titles[key] += f" (floor {three_digits(floor)})"
        titles["ms_per_sample"] = "ms/sample"
        lines = [list(titles.values())]
        for row in rows:
            interval = f"{three_digits(row.rmse_low)} to {three_digits(row.rmse_high)}"
            lines.append([_cell(key, interval if key == "interval" else getattr(row, key)) for key in titles])
        widths = [max(len(line[k]) for line in lines) for k in range(len(titles))]
        text = [
            "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        said = [f"N = {v.num_steps}: {v.word}. {v.sentence()}" for v in self.verdicts]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", *said, self.cost])

    @property
    def points(self) -> bool:
        """Whether the samples are points of a plane, which :meth:`plot_samples` draws as such."""
        reference = self.images.get("reference")
        return reference is not None and reference.ndim < 4 and reference[0].numel() == PLANE

    @property
    def cost(self) -> str:
        """What it took, in words."""
        about = f"{self.rows[0].samples} samples, a reference of {self.reference} calls"
        return f"{about}, {self.evaluations:,} model evaluations in all"

    def best(self, num_steps: int, searched: bool = False) -> Row | None:
        """The row of least RMSE among the hand-made and published solvers, or among the others, of N; None: none."""
        rows = [r for r in self.rows if r.num_steps == num_steps and r.searched == searched]
        return min(rows, key=lambda r: r.rmse, default=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Rows, verdicts and cost as JSON, null for what is infinite."""
        parts: dict[str, Sequence[Row | Verdict]] = {"rows": self.rows, "verdicts": self.verdicts}
        data = {key: [{k: _json(v) for k, v in asdict(one).items()} for one in part] for key, part in parts.items()}
        write_json(path, {**data, "evaluations": self.evaluations, "reference": self.reference})

    def plot(self, path: str | os.PathLike[str], *, metric: str = "rmse") -> Path:
        """Error against steps, a line per method. Needs matplotlib."""
        return plot_errors(self.rows, path, metric=metric)

    def plot_samples(
        self, path: str | os.PathLike[str], solvers: Sequence[str] | None = None, *, count: int = 8
    ) -> Path:
        """Samples above each other from the same noise, the reference last; at the end of each row the solver's own
        worst, beside the reference from the same noise. Samples of two numbers are dots, a panel for each solver. Needs
        matplotlib; raises ValueError where there are none."""
        if self.unseen:
            raise ValueError(self.unseen)
        titles = list(self.images) if solvers is None else [*solvers, "reference"]
        if self.points:
            return plot_points({t: self.images[t] for t in titles if t in self.images}, path)
        worst = {t: self.worst[t] for t in titles if t in self.worst}
        return plot_samples({t: self.images[t] for t in titles if t in self.images}, path, count=count, worst=worst)


_OPTIONAL = {"median": "median", "p90": "90 %", "switched": "switched", "frechet": "Frechet", "energy": "energy"}
_OPTIONAL |= {"accuracy": "label acc."}


@torch.inference_mode(False)  # the reference's grid is made with gradients
@torch.no_grad()
def compare(
    target: Target | Model,
    solvers: Sequence[Given] | Given,
    *,
    num_steps: int | Sequence[int] = (5, 10),
    rivals: Sequence[Given] | Given = ("all",),
    samples: int | None = None,
    budget: int | None = None,
    batch_size: int = 64,
    seed: int = 20_000,
    real_features: Tensor | None = None,
    progress: bool = True,
    **fields: Any,
) -> Comparison:
    """Runs each solver on the same fresh noise, measures it, and says whether a searched one beats all rivals.

        RMSE = sqrt(mean over samples and elements of (x_solver - x_reference)^2)

    with a 95 % interval over noises; median and 90 %: of the samples' own root mean squares. The reference is the
    fourth-order teacher with ``REFERENCE_EVALUATIONS`` calls from the same noise. A few samples that end elsewhere
    can carry a whole RMSE: ``switched`` is their share (another class, or, without ``classify``, further off than half
    of the median distance between two different samples). Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1
    C2)^(1/2)) and energy distance 2 E d(a, b) - E d(a, a') - E d(b, b') are between independent draws: the solver's
    samples and the reference's from other noises. Their floor is what two draws of the reference have, half of the
    noises each: Frechet's, which is biased, counts by how much it is above; see
    :meth:`dss_fast.distance.Reference.distances`.

    target: a Target with a shape, or the model alone, with ``fields`` of a :class:`Target` as keyword arguments.
        Its ``features`` are what both distances compare, or else the flattened samples; its ``classify`` and
        ``labels`` give the share of samples read as what was asked; its ``decode`` the pictures. Samples live where
        the target does, each at a guidance of its own where the target has a range.
    real_features: (R, F) to compare the features of all samples with, instead of the reference's from other noises.
    solvers: Solvers, names or paths, or one of these; a name without ``/N`` is run at each of num_steps, a published
        one at those of them that it exists for, ``"heun"``, whose calls are odd, with one less where they are even.
        ``"rk45"``: scipy's adaptive Runge-Kutta solver, at the tolerances whose calls come nearest to num_steps and to
        two and four times the most of them; no rival, as no tolerance gives a number of calls.
    rivals: what a table that is neither hand-made nor published has to beat at its N, beside such solvers named above.
        ``"all"``: every hand-made name on seven spacings, by successive halving, and the published tables of the path;
        Solvers, names and paths beside or instead of it. The best of them gets a row.
    samples: 256 without a budget, or as many as the budget allows.
    budget: the most model evaluations to spend, which chooses samples, calls of the reference and how many names are
        tried; not less than the solvers named take on 32 samples. None: as many as it takes.
    batch_size, seed: of the noise. The seed's noises are used by no search.

    Returns a :class:`Comparison`. A solver that diverges has infinite errors. Raises ValueError before any work when a
    solver does not fit the target's schedule, and FloatingPointError when the reference itself diverges.
    """
    with on_host():
        draws = Draws.of(Target.of(target, **fields), seed).alone  # each process of a group measures everything
        for name, value in (("samples", samples), ("budget", budget), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: give a whole number from 1")
        if real_features is not None:
            _check_real(real_features)
        num_steps = [num_steps] if isinstance(num_steps, int) else list(num_steps)
        solvers, adapts = _without_adaptive(_several(solvers), budget)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in num_steps):
            raise ValueError(f"num_steps={num_steps!r}: give a whole number from 1, or several")
        named = _expand(solvers, draws.schedule, num_steps)
        if not named and not adapts:
            raise ValueError("no solvers to compare")
        judged = [title for title, solver in named.items() if not is_rival(solver)]
        guided = draws.target.guided
        steps = tuple(dict.fromkeys(_steps_of_rivals(named[title], guided) for title in judged))
        rivals = _several(rivals)
        if adaptive.NAME in rivals:
            raise ValueError(
                f"rivals: {adaptive.NAME} is none, as no tolerance gives a number of calls; name it among the solvers"
            )
        every, further = "all" in rivals, _expand([r for r in rivals if r != "all"], draws.schedule, steps, named)
        if every and steps:
            published = [table for n in steps for table in published_tables(draws.schedule, n)]
            further = _expand(published, draws.schedule, (), {**named, **further}) | further
        count, calls, left = _effort(draws.schedule, {**named, **further}, steps if every else (), samples, budget)
        with bar(progress, leave=False, unit=" evaluations") as shown:
            bench = Bench(draws, count, calls, batch_size, real_features, shown)
            for title, solver in {**named, **further}.items():
                bench.measure(title, solver, searched=title in judged)
            if adapts:
                bench.measure_adaptive(num_steps)
            contests = {
                n: contest(bench.squares, draws.schedule, n, count, CONTEST * left * n / sum(steps))
                for n in steps
                if every
            }
            share = left if left == math.inf else (1 - CONTEST) * left / max(1, len(judged))
            ours = {title: _steps_of_rivals(named[title], guided) for title in judged}
            verdicts = [_judged(bench, title, ours[title], contests.get(ours[title]), share) for title in judged]
        rows, found = [run.row for run in bench.runs.values()], [verdict for verdict in verdicts if verdict is not None]
        reach = bench.reference.reach if bench.reference.classes is None else None
        return Comparison(rows, found, bench.evaluations, calls, reach, *_images(bench))


def _several(given: Sequence[Given] | Given) -> Sequence[Given]:
    return (given,) if isinstance(given, Solver | str | os.PathLike) else given


def _without_adaptive(solvers: Sequence[Given], budget: int | None) -> tuple[list[Given], bool]:
    """The solvers that are tables, and whether the adaptive one, which is none, is named and can run."""
    tables = [solver for solver in solvers if solver != adaptive.NAME]
    if len(tables) == len(solvers):
        return tables, False
    if budget is not None:
        raise ValueError(
            f"budget={budget!r}: {adaptive.NAME} takes as many calls as its tolerance needs, which no budget bounds; "
            f"give samples instead, or leave {adaptive.NAME} out"
        )
    if missing := adaptive.missing():
        warnings.warn(missing, stacklevel=4)
    return tables, not missing


def _check_real(features: Any) -> None:
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"real_features: {got}; give floats (R, F), a row for each real sample")
    if bad := not_finite(features):
        raise ValueError(f"real_features: {bad} of {len(features)} rows hold NaN or Inf")


def _images(bench: Bench) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Why there are none, the first samples and the worst by title."""
    try:
        return "", *bench.images()
    except Exception as error:  # the user's own code must not cost what was measured
        return f"the target's decode failed: {type(error).__name__}: {shortened(error)}", {}, {}


def _effort(
    schedule: Schedule, tables: Mapping[str, Solver], steps: Sequence[int], samples: int | None, budget: int | None
) -> tuple[int, int, float]:
    """Samples, calls of the reference, and what is left for the hand-made names of these steps: the first of ``LADDER``
    that tries every name within the budget, or else the last."""
    if budget is None:
        return samples or LADDER[0][0], REFERENCE_EVALUATIONS, math.inf
    own = sum(table.num_steps for table in tables.values()) + sum(steps)  # the best of each N runs once more
    for count, calls in LADDER:
        count = samples or count
        left = budget - count * (calls + own) - round(CHECKED * COARSER * calls)
        if left * CONTEST >= sum(n * contest_cost(len(handmade_tables(schedule, n)), count) for n in steps):
            break
    return count, calls, max(0, left)


def _steps_of_rivals(solver: Solver, guided: bool) -> int:
    """How many steps a rival may take that calls both branches at all of them: no more calls than this table's."""
    return solver.guided_calls // 2 if guided else solver.num_steps


def _meets(table: Solver, n: int, guided: bool) -> bool:
    """Whether a table is a rival where one of n steps is judged: it has as many, or the most that its method has."""
    within = calls_within(table.name.partition("/")[0], n) if table.source == SOURCE else n
    return _steps_of_rivals(table, guided) in (n, within)


def _judged(bench: Bench, title: str, n: int, contest: Contest | None, limit: float) -> Verdict | None:
    """Whether a table beats its rivals of n steps; None where it has none. limit: evaluations for the calls it is
    worth."""
    run, guided = bench.runs[title], bench.target.guided
    solver, mine = run.solver, run.errors
    assert solver is not None
    handmade = handmade_tables(bench.schedule, n) if contest else {}
    tables = {run.solver: run for run in bench.runs.values() if run.solver is not None and not run.row.searched}
    named = {table: run for table, run in tables.items() if _meets(table, n, guided)}
    rivals = {**(contest.best if contest else {}), **{solver: run.errors for solver, run in named.items()}}
    if not rivals:
        return None
    best = min(rivals, key=lambda solver: float(rivals[solver].mean()))
    if best not in named:
        titles = {title: run.solver for title, run in bench.runs.items() if run.solver is not None}
        named[best] = bench.measure(_free(best, titles), best, searched=False)
    theirs = rivals[best]
    ratio, low, high = ratio_of(mine, torch.stack([e for e in rivals.values() if bool(e.isfinite().all())] or [theirs]))
    found = Verdict(
        solver=title,
        num_steps=n,
        best=named[best].row.solver,
        ratio=ratio,
        low=low,
        high=high,
        median=math.sqrt(float(mine.median()) / max(float(theirs.median()), 1e-300)),
        nearer=int((mine < theirs).sum()),
        samples=len(mine),
        tried=contest.tried if contest else 0,
        known=contest.known if contest else 0,
        others=sum(solver not in handmade for solver in named),
        doubt=bench.doubt(mine, theirs),
        guided_calls=None if n == solver.num_steps else solver.guided_calls,
    )
    if found.word != "Yes" or contest is None:
        return found
    calls, best_like = calls_like(bench.squares, bench.schedule, contest.best, mine, limit)
    return replace(found, calls=calls, like=best_like) if calls > n else found


def _expand(
    solvers: Sequence[Given], schedule: Schedule, num_steps: Sequence[int], before: Mapping[str, Solver] | None = None
) -> dict[str, Solver]:
    """title -> solver, in order, names without steps once for each number of steps; none that is there before."""
    table = dict(before or {})
    for item in solvers:
        for n in _open_steps(item, num_steps):
            solver = find_solver(item, schedule, n)
            solver = solver.following(schedule)
            table[_free(solver, table)] = solver
    return {title: solver for title, solver in table.items() if title not in (before or {})}


def _free(solver: Solver, table: Mapping[str, Solver]) -> str:
    """A title for a solver that no other one in the table has: two files may hold solvers of one name."""
    title = given = printable(solver.name) or f"solver {len(table) + 1}/{solver.num_steps}"
    name, slash, rest = given.partition("/")
    number, same = 1, (solver, is_rival(solver))
    while title in table and (table[title], is_rival(table[title])) != same:
        number += 1
        title = f"{name}-{number}{slash}{rest}"
    return title


def _open_steps(item: Given, num_steps: Sequence[int]) -> Sequence[int | None]:
    """The numbers of steps to run an item at; [None] where it says itself."""
    if not isinstance(item, str) or is_file(item):
        return [None]
    name = Name.parse(item)
    if name.num_steps is not None:
        return [None]
    if name.handmade:
        return list(dict.fromkeys(calls_within(name.name, n) for n in num_steps))
    steps = [n for n in num_steps if n in published_steps(name.name)]
    if not steps:
        raise ValueError(f"{item!r} exists for none of num_steps={tuple(num_steps)}; there are {known()}")
    return steps


def _cell(key: str, value: Any) -> str:
    """A figure as the table prints it: shares in percent, errors in three digits."""
    if value is None:
        return "-"
    if key in ("accuracy", "switched"):
        return f"{100 * value:.1f} %"
    return three_digits(value) if isinstance(value, float) else str(value)


def _json(value: Any) -> Any:
    """A value as JSON can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
