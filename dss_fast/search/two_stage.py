"""Stage 2, and the whole default search: teacher, closed form, then Gauss-Newton on the end-point error.

For sample b with residual e_b and J_b = d x_N / d theta, a backward with cotangent e_b gives J_b' e_b: its sum is
the gradient, and divided by |e_b| it is the row of J_b along the residual. A second backward, for half of
the samples, with a random sign vector orthogonal to e_b gives a row whose square averages to the rest of
J_b' J_b. So two rows of P numbers per sample stand for the whole Jacobian of D x P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..problem import Problem, mix
from ..sampling import find_solver
from ..solver import Solver
from ..teacher import Teacher
from .closed_form import Fit, extras, fit, stage_one
from .objective import Objective
from .point import Point
from .space import SPACES, Space

ROBUST = 10.0  # medians of |e|^2 at which a sample counts half
GROWTH = (0.12, 0.12, 0.2, 0.3, 0.4, 0.5, 0.7)  # share of the samples in each round; then all of them
FULL_ROUNDS = 2
SKETCHED = 2  # every so many batches a sketch
MEMORY = 0.5  # of J'J from one round to the next
LEAST_DAMPING, MOST_DAMPING = 1e-7, 1e6
PAPER_SHARE = 1 / 50  # default budget, of the paper's 50,000 samples x (100 + 3 N)


def gauss_newton(
    problem: Problem,
    steps: tuple[int, ...],
    *,
    state: dict | None = None,
    initial: str | Solver | None = None,
    cache: str | Path | None = None,
    key: str | None = None,
    space: str = "full",
    samples: int | None = None,
    batch_size: int = 64,
    held_out_samples: int | None = None,
    teacher_evaluations: int = 24,
    trials: int = 12,
    trial_samples: int = 96,
    rounds: int = len(GROWTH) + FULL_ROUNDS,
    robust: float = ROBUST,
    loss: str | Callable[[Tensor], Tensor] = "end",
    trajectory_weight: float = 0.1,
    tolerance: float = 1e-3,
    memory: int = 1 << 29,
    memory_budget: int | float | None = 1 << 29,
) -> Iterator[dict]:
    """min over theta  mean_b rho(|r_b|^2),  rho(z) = c log(1 + z / c),  c = ``robust`` medians of z

    loss: what r is: ``"end"``: x_N - teacher(1). ``"trajectory"``: that, and sqrt(trajectory_weight) times the
        differences of x_1..x_{N-1} where the network sees them. A function: feature(x_N) - feature(teacher(1)).
    space: ``"plain"``, the paper's, or with free rows (``"rows"``), a weight on the initial noise (``"rows+noise"``),
        network times of their own (``"rows+times"``), or all (``"full"``); see ``Space``.
    samples: of the training set; by default what the budget allows. held_out_samples: a fifth of them.
    problem.budget: by default 1/50 of the paper's recipe, 1000 (100 + 3 N) for each N.
    teacher_evaluations: model calls of each reference trajectory. trials: spacings tried in stage 1, on
        trial_samples of the samples. rounds: of Gauss-Newton. tolerance: stop a solver whose predicted
        relative gain is below. initial: adds a solver to what stage 1 may start from.
    memory: bytes of trajectories kept, and of rollouts between a round's acceptance test and its backward
        (beyond that they run again, N evaluations more per sample). memory_budget: of a
        rollout's graphs, see ``unroll``.

    A round costs N evaluations per sample for the candidate, which is also its acceptance test, and, once
    accepted, 2 N per backward. All N share the teacher; stage 1 of one N starts from the spacing of the last.
    """
    if space not in SPACES:
        raise ValueError(f"space={space!r}: choose {', '.join(SPACES)}")
    if isinstance(loss, str) and loss not in ("end", "trajectory"):
        raise ValueError(f"loss={loss!r}: 'end', 'trajectory' or a function of samples")
    if problem.budget is None:
        problem.budget = int(sum(50_000 * (100 + 3 * n) for n in steps) * PAPER_SHARE)
    samples, held_out_samples = _sizes(problem, steps, samples, held_out_samples, teacher_evaluations, trials, rounds)
    batch_size = min(batch_size, samples)
    options = dict(budget=teacher_evaluations, cache=cache, memory=memory, key=key)
    train = Teacher(problem, "train", samples, batch_size, **options)
    held_out = Teacher(problem, "held_out", held_out_samples, min(batch_size, held_out_samples), **options)
    objective = Objective(problem, loss, trajectory_weight, robust, memory_budget, memory)
    state = {"first": {}, "points": {}} if state is None else state
    points = {n: Point.load(saved) for n, saved in state["points"].items()}
    first = dict(state["first"])
    start = {n: find_solver(initial or "euler", problem.schedule, n) for n in steps}

    def event(stage: str, *, worth: bool = True, **values) -> dict:
        saved = {"first": first, "points": {n: point.save() for n, point in points.items()}}
        found = {int(n): solver for n, (solver, _) in first.items()}
        found |= {int(n): point.solver() for n, point in points.items() if point.best is not None}
        return {
            "stage": stage,
            "done": problem.evaluations,
            "total": problem.budget,
            "solvers": {n: found.get(n, start[n]) for n in steps},
            "state": saved if worth else None,
            "samples": samples,
            **values,
        }

    if not first and problem.evaluations + train.cost() + held_out.cost() > problem.budget:
        raise ValueError(
            f"budget={problem.budget!r}: the teacher's {samples + held_out_samples} trajectories alone take "
            f"{train.cost() + held_out.cost()}; give a larger budget or fewer samples"
        )
    if not first:
        yield event("teacher", worth=False)
    for teacher in (held_out, train):
        for k in range(len(teacher)):
            before = problem.evaluations
            _ = teacher[k]
            if problem.evaluations > before:  # a resumed search only reads it again
                yield event("teacher", worth=False)

    few, count = [], 0
    for n in steps:
        if str(n) in first:
            continue
        if not few:
            while count < min(trial_samples, samples) and len(few) < len(train):
                few.append(train[len(few)])
                count += few[-1][0].size
        found = None
        for tried in stage_one(problem, few, n, space, trials, first, start[n] if initial else None):
            found = tried if found is None or tried.score < found.score else found
            yield event("closed form", worth=False, spacing=tried.spacing, score=tried.score)
        more = _enough(train, 4 * count)
        if more > len(few) and problem.affords(2 * n * sum(train.sizes[:more])):
            u = torch.tensor(found.solver.timesteps, dtype=torch.float64)
            again, _ = fit(problem, (train[k] for k in range(more)), u, name=found.spacing, **extras(space))
            found = Fit(again.solver, found.score, found.spacing, again.ridges)
        first[str(n)] = [found.solver, found.score]
        yield event("closed form", spacing=found.spacing)
    del few

    for n in steps:
        point = points.get(str(n))
        if point is None:
            solver = first[str(n)][0]
            chart = Space(space, problem.schedule.family, solver.timesteps)
            share = _share(problem, steps, n)
            point = points[str(n)] = Point(chart, candidate=chart.theta(solver), share=share)
        while not point.finished:
            values = _round(point, objective, train, held_out, n, rounds, tolerance)
            yield event("gauss-newton", **values)


def _round(point: Point, objective: Objective, train: Teacher, held_out: Teacher, n, rounds, tolerance) -> dict:
    """Tries the candidate; accepted, it is differentiated and the next one made. Returns what to log."""
    problem = objective.problem
    growing = GROWTH[point.round] if rounds > len(GROWTH) > point.round else 1.0
    batches = _enough(train, math.ceil(growing * sum(train.sizes)))
    size, last = sum(train.sizes[:batches]), point.round >= rounds
    before, checks = problem.evaluations, n * sum(held_out.sizes)

    def afford(cost: int) -> bool:
        return problem.affords(cost) and point.spent + cost <= point.share

    cost = n * (4 if objective.keeps(n, size) else 5)
    while batches > 1 and not afford(cost * size + 2 * checks):
        batches -= 1
        size -= train.sizes[batches]
    if last or not afford(cost * size + 2 * checks) or size < 0.4 * (0 if point.values is None else len(point.values)):
        point.finished, values = True, {"num_steps": n}
        if afford(checks):
            values = _check(point, objective, held_out, point.candidate)
        if point.best is None:
            point.best = point.candidate.clone()
        point.spent += problem.evaluations - before
        return values
    try:
        runs = [_forward(point, objective, train, k, batches) for k in range(batches)]
    except FloatingPointError:
        if point.theta is None:
            raise
        runs = None  # a step too far, not a broken model: the table before it ran
    problem.spend(n * size)
    tried = math.inf if runs is None else _gathered(problem, runs)
    if point.theta is not None:
        common = min(len(point.values), size)
        old = _robust(point.values[:common], point.scale)
        new = math.inf if runs is None else _robust(tried[0, :common], point.scale)
        if not new < old:
            point.damping = min(6 * point.damping, MOST_DAMPING)
            point.tries += 1
            point.finished = point.tries > 4
            point.step()
            point.spent += problem.evaluations - before
            return {"accepted": False, "damping": point.damping, "num_steps": n}
        if old - new > 0.5 * point.predicted:
            point.damping = max(point.damping / 4, LEAST_DAMPING)
    point.tries, point.theta, point.values = 0, point.candidate, tried[0]
    point.scale = float(objective.robust * point.values.median())
    _differentiate(point, objective, train, runs, size)
    del runs
    point.step()
    point.round += 1
    gain = point.predicted / max(_robust(point.values, point.scale), 1e-300)
    point.small = point.small + 1 if gain < tolerance else 0
    if point.small > 1 and point.round >= min(len(GROWTH), rounds):
        point.round = rounds
    values = {"loss": {n: math.sqrt(float(tried[1].mean()))}, "accepted": True, "damping": point.damping}
    values |= {"gain": gain, "used": size, "num_steps": n}
    if point.round in (1, *range(4, rounds + 1)):
        values |= _check(point, objective, held_out, point.theta)
    point.spent += problem.evaluations - before
    return values


def _forward(point: Point, objective: Objective, train: Teacher, k: int, batches: int):
    """One batch under the candidate: (batch, rollout, error, residual, pull); its trajectory may be large."""
    batch, trajectory = train[k]
    kept = objective.keeps(point.space.num_steps, batches * batch.size)
    rollout = objective.rollout(point.space, point.candidate, batch, batches if kept else 0)
    targets = point.space.targets(point.candidate)
    found = objective.residual(rollout.states, trajectory, targets)
    return batch, rollout if kept else None, *found


def _gathered(problem: Problem, runs: list) -> Tensor:
    """(2, n) float64: |r|^2 and end-point error of all samples, over all processes, means of squares."""
    both, start = torch.zeros(2, sum(run[0].size for run in runs), dtype=torch.float64), 0
    for batch, _, error, residual, _ in runs:
        here = slice(start + problem.rank, start + batch.size, problem.world)
        both[0, here], both[1, here] = residual.double().square().mean(1).cpu(), error.cpu()
        start += batch.size
    problem.all_reduce(both)
    return both


def _differentiate(point: Point, objective: Objective, train: Teacher, runs: list, size: int) -> None:
    """Gradient and J'J at the accepted table, over all processes; J'J remembers the rounds before."""
    problem, space, theta = objective.problem, point.space, point.theta
    n, dim, start = space.num_steps, len(theta), 0
    gradient = torch.zeros(dim, dtype=torch.float64)
    along, beside = torch.zeros(2, dim, dim, dtype=torch.float64)
    sketched = 0
    for k, (batch, rollout, _, residual, pull) in enumerate(runs):
        values = point.values[start + problem.rank : start + batch.size : problem.world, None]
        weights = point.scale / (point.scale + values)
        cotangents = [residual]
        if (k + point.round) % SKETCHED == 0 or len(runs) < SKETCHED:
            cotangents.append(_signs(problem, residual, n, point.round, k, batch.size))
            sketched += batch.size
        scale = residual.shape[1] ** -0.5  # |r|^2 is averaged over its elements
        if rollout is None:  # all of them together did not fit
            rollout = objective.rollout(space, theta, batch, 1)
            problem.spend(n * batch.size)
        trajectory = train[k][1] if objective.weight else None
        rows = objective.rows(space, theta, rollout, trajectory, torch.stack(cotangents) * scale, pull)
        runs[k] = rollout = pull = None
        gradient += 2 * scale * (weights * rows[0]).sum(0)
        along += 2 * scale**2 * rows[0].mT @ (weights / values.clamp_min(1e-300) * rows[0])
        if len(rows) > 1:
            beside += 2 * rows[1].mT @ (weights * rows[1])
        problem.spend(2 * n * batch.size * len(cotangents))
        start += batch.size
    packed = torch.cat([gradient[None], along, beside])
    problem.all_reduce(packed)
    gradient, along, beside = packed[0], packed[1 : dim + 1], packed[dim + 1 :]
    matrix, kept = along / size + beside / sketched, MEMORY * point.mass
    if point.matrix is not None:
        matrix = (kept * point.matrix + size * matrix) / (kept + size)
    point.gradient, point.matrix, point.mass = gradient / size, matrix, kept + size


def _signs(problem: Problem, residual: Tensor, n: int, number: int, k: int, size: int) -> Tensor:
    """(B, R) random signs made orthogonal to the residual; the same for any number of processes."""
    generator = torch.Generator().manual_seed(mix(problem.seed, "sketch", n, number, k))
    signs = torch.randint(0, 2, (size, residual.shape[1]), generator=generator, dtype=torch.int8)
    signs = signs[problem.rank :: problem.world].to(residual) * 2 - 1
    unit = residual / residual.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return signs - (signs * unit).sum(1, keepdim=True) * unit


@torch.no_grad()
def _check(point: Point, objective: Objective, held_out: Teacher, theta: Tensor) -> dict:
    """Held-out loss, to choose the best table by, and RMSE at the end point."""
    problem, space, n = objective.problem, point.space, point.space.num_steps
    total = sum(held_out.sizes)
    both = torch.zeros(2, total, dtype=torch.float64)
    start = 0
    try:
        for batch, trajectory in held_out:
            states = objective.rollout(space, theta, batch, 0).states
            error, residual, _ = objective.residual(states, trajectory, space.targets(theta))
            here = slice(start + problem.rank, start + batch.size, problem.world)
            both[0, here] = residual.double().square().mean(1).cpu()
            both[1, here] = error.cpu()
            start += batch.size
    except FloatingPointError:
        both[:] = math.inf
    problem.spend(n * total)
    problem.all_reduce(both)
    if not point.held_out_scale:
        point.held_out_scale = objective.robust * float(both[0].median())
    rmse = math.sqrt(float(both[1].mean()))
    point.keep(theta, _robust(both[0], point.held_out_scale), rmse)
    return {"held_out": {n: rmse}, "num_steps": n}


def _robust(values: Tensor, scale: float) -> float:
    """mean of c log(1 + z / c)."""
    return float(values.div(scale).log1p().mean()) * scale


def _enough(teacher: Teacher, wanted: int) -> int:
    """How many batches hold that many samples."""
    total, k = 0, 0
    while total < wanted and k < len(teacher):
        total, k = total + teacher.sizes[k], k + 1
    return k


def _share(problem: Problem, steps: tuple[int, ...], n: int) -> float:
    """Evaluations stage 2 of one N may use: what is left, shared by N with those still to come."""
    later = steps[steps.index(n) :]
    return (problem.budget - problem.evaluations) * n / sum(later)


def _sizes(problem, steps, samples, held_out, teacher_evaluations, trials, rounds) -> tuple[int, int]:
    """Training and held-out samples that the budget pays for when all goes well: no rejected round."""
    per_round = sum(GROWTH[:rounds]) + max(0, rounds - len(GROWTH))
    stage_one = 96 * trials * max(steps) + 96 * 6 * (sum(steps) - max(steps))
    each = teacher_evaluations + sum(n * (4 * per_round + 0.5) for n in steps)
    looks = teacher_evaluations + sum(steps) * (rounds - 1)
    if samples is None:
        samples = int((problem.budget - stage_one) / (each + (looks / 5 if held_out is None else 0)))
        samples = max(16, samples // 16 * 16, problem.world)
    if held_out is None:
        held_out = max(16, min(256, samples // 5 // 16 * 16), problem.world)
    return samples, held_out
