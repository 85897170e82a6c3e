"""The paper's recipe: its updates against an independent writing of Algorithms 1 and 2, its costs, its errors."""

import math
from importlib import import_module

import pytest
import torch
from torch import nn

from dss_fast import VP, Flow, Lion, Solver, Target, sample, search
from dss_fast.draws import Draws
from dss_fast.searching.budget import Ledger
from dss_fast.searching.job import prepare
from dss_fast.searching.lion import imitate
from dss_fast.searching.space import Space
from dss_fast.trajectory import dense_grid, integrate
from dss_fast.unroll import unroll
from helpers import processes

F64 = torch.float64
CENTERS = torch.tensor([[1.0, 0.2], [-0.7, 0.8], [0.1, -1.1]], dtype=F64)
SPREAD, NOWHERE = 0.25, torch.zeros(1)


def clusters(alpha, sigma, x, shift):
    """x0 and epsilon of three clusters, exactly."""
    alpha, sigma = alpha[:, None], sigma[:, None]
    centers = CENTERS.to(x) + shift.reshape(-1, 1, 1)
    variance = alpha**2 * SPREAD**2 + sigma**2
    offset = x[:, None] - alpha[:, :, None] * centers
    weight = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)
    center = torch.einsum("bk,bkd->bd", weight, centers)
    epsilon = sigma / variance * (x - alpha * center)
    return center + alpha * SPREAD**2 / variance * (x - alpha * center), epsilon


def flow_model(x, t, shift=NOWHERE):
    """The velocity of the clusters; t is 0 at noise, 1 at data."""
    x0, epsilon = clusters(t, 1 - t, x, shift)
    return x0 - epsilon


def vp_model(x, t, shift=NOWHERE):
    """Their epsilon; t is 1000 at noise."""
    t = t / 1000
    log_alpha = -0.5 * (0.1 * t + 9.95 * t * t)
    return clusters(log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt(), x, shift)[1]


MODELS = {"flow": (flow_model, Flow()), "vp": (vp_model, VP())}
QUICK = dict(shape=(2,), progress=False, dtype=F64)


def draw(n, generator):
    return {"shift": torch.rand(n, generator=generator, dtype=F64)}


def draws_of(family, seed=0, **fields):
    model, schedule = MODELS[family]
    return Draws.of(Target(model, (2,), schedule, dtype=F64, **fields), seed)


def events(family, steps=(4,), initial=None, **settings):
    job, ledger = prepare(draws_of(family).target, steps, method=Lion(**settings), initial=initial), Ledger()
    return ledger, list(imitate(job, ledger))


def by_hand(family, n, batches, batch_size, short_tail):
    """A1 to A4 written out: one loop per batch, plain autograd, Lion by its formula."""
    model, _ = MODELS[family]
    task = draws_of(family)
    raws, lower = torch.ones(n, dtype=F64), torch.zeros(n, n, dtype=F64)
    free = torch.ones(n, n).tril(-1).bool()
    if short_tail:
        for i in (n - 2, n - 1):
            free[i, : i - 1] = False
    momentum = [torch.zeros_like(raws), torch.zeros_like(lower)]
    for number in range(batches):
        x = task.batch("train", number, batch_size).noise
        target = [x]
        if family == "flow":
            for k in range(100):
                x = x + model(x, torch.full((len(x),), k / 100, dtype=F64)) / 100
                target.append(x)
        else:
            grid = [max(0.999 * (1 - k / 99), 1e-3) for k in range(100)]
            for now, later in zip(grid, grid[1:], strict=False):
                (a, s), (a2, s2) = ab(now), ab(later)
                epsilon = model(x, torch.full((len(x),), 1000 * now, dtype=F64))
                x = a2 * (x - s * epsilon) / a + s2 * epsilon
                target.append(x)
        values = [raws.clone().requires_grad_(), lower.clone().requires_grad_()]
        dt = values[0].softmax(0)
        time, x, history, loss = torch.zeros((), dtype=F64), target[0], [], 0.0
        for i in range(n):
            row = torch.where(free[i], values[1][i], 0.0)
            row = torch.cat([row[:i], (1 - row.sum())[None]])
            if family == "flow":
                history.append(model(x, time.expand(len(x))))
                x = x + dt[i] * sum(c * v for c, v in zip(row, history, strict=True))
                time = time + dt[i]
            else:
                now = (0.999 - time).clamp_min(1e-3)
                time = time + dt[i] if i < n - 1 else torch.ones((), dtype=F64)
                (a, s), (a2, s2) = ab(now), ab((0.999 - time).clamp_min(1e-3))
                epsilon = model(x, 1000 * now.expand(len(x)))
                history.append((x - s * epsilon) / a)
                x = s2 / s * x + s2 * (a2 / s2 - a / s) * sum(c * v for c, v in zip(row, history, strict=True))
            index = round(float(dt[: i + 1].detach().sum()) * (len(target) - 1))
            loss = loss + (x - target[index]).square().mean()
        e = (x - target[-1]).abs()
        loss = loss + 1000 * torch.where(e < 1e-3, 0.5 * e * e, 1e-3 * (e - 0.5e-3)).mean()
        loss.backward()
        for value, m, mine in zip(values, momentum, (raws, lower), strict=True):
            mine -= 0.01 * torch.sign(0.9 * m + 0.1 * value.grad)
            m.mul_(0.99).add_(0.01 * value.grad)
    return raws, torch.where(free, lower, 0.0), float(loss.detach())


def ab(t):
    t = torch.as_tensor(t, dtype=F64)
    alpha = (-0.5 * (0.1 * t + 0.5 * 19.9 * t * t)).exp()
    return alpha, (1 - alpha**2).sqrt()


@pytest.mark.parametrize(("family", "n"), [("flow", 4), ("flow", 5), ("vp", 4), ("vp", 6)])
def test_it_is_the_papers_algorithm(family, n):
    raws, lower, loss = by_hand(family, n, 6, 8, short_tail=n in (5, 6))
    _, found = events(family, (n,), samples=48, batch_size=8, check_samples=0)
    theta = found[-1].state["points"][n]["theta"]
    assert torch.allclose(theta[:n], raws, rtol=0, atol=1e-9)
    row, column = torch.tril_indices(n, n, -1)
    if n in (5, 6):
        keep = (row < n - 2) | (column == row - 1)
        row, column = row[keep], column[keep]
    assert torch.allclose(theta[n:], lower[row, column], rtol=0, atol=1e-9)
    assert found[-1].loss[n] == pytest.approx(loss, rel=1e-9)


def test_short_tail_leaves_the_papers_number_of_free_entries():
    for n, free in ((5, 5), (6, 8), (7, 21)):
        _, found = events("flow", (n,), samples=8, batch_size=8, check_samples=0)
        assert len(found[-1].state["points"][n]["theta"]) == n + free
    _, found = events("flow", (5,), samples=8, batch_size=8, check_samples=0, short_tail=False)
    assert len(found[-1].state["points"][5]["theta"]) == 5 + 10


@pytest.mark.parametrize("family", ["flow", "vp"])
@pytest.mark.parametrize("guided", [False, True])
def test_gradient_through_the_whole_rollout(family, guided):
    extra = dict(uncond={"shift": torch.zeros(1, dtype=F64)}, guidance_scale=1.7) if guided else {}
    batch = draws_of(family, cond=draw, **extra).batch("train", 0, 3)
    space = Space("plain", batch.schedule, 4)

    def states(theta):
        table = space.table(theta, batch.guidance)
        return unroll(batch.denoiser(), batch.noise, table.weights, table.times)

    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(10, generator=generator, dtype=F64) / 3
    assert torch.autograd.gradcheck(states, theta.requires_grad_())


@pytest.mark.parametrize("family", ["flow", "vp"])
def test_it_improves_a_small_model(family):
    model, schedule = MODELS[family]
    repeats = Lion(samples=40 * 32, unique_samples=8 * 32, check_every=8, check_samples=64)
    result = search(model, [4, 5], schedule=schedule, seed=1, method=repeats, **QUICK)
    batch = draws_of(family, seed=99).batch("fresh", 0, 256)
    truth = integrate(batch.predictor(), batch.noise, dense_grid(schedule, 200)).last
    for n in (4, 5):
        error = {}
        for label, solver in (("euler", f"euler/{n}"), ("searched", result.solvers[n])):
            x = sample(model, batch.noise, solver, schedule=schedule)
            error[label] = float((x - truth).square().mean().sqrt())
        assert error["searched"] < 0.7 * error["euler"], (n, error)
        _, looks = result.curve("held_out", n)
        assert min(looks) < 0.7 * looks[0] and len(result.curve("loss", n)[0]) == 40


def test_several_numbers_of_steps_at_once_are_the_single_searches():
    _, both = events("flow", (3, 4), samples=64, batch_size=16, check_samples=16)
    for n in (3, 4):
        _, alone = events("flow", (n,), samples=64, batch_size=16, check_samples=16)
        assert alone[-1].solvers[n] == both[-1].solvers[n]


def test_evaluations_are_counted_as_the_paper_counts_and_the_budget_holds():
    options = dict(samples=320, batch_size=32, check_samples=64, check_every=5)
    task, found = events("flow", (3, 4), **options)
    looks = 3 * 64 * (3 + 4) + 64 * 100
    assert task.evaluations == 320 * (100 + 3 * 3 + 3 * 4) + looks
    task, _ = events("flow", (4,), samples=320, batch_size=32, unique_samples=64, check_samples=0)
    assert task.evaluations == 64 * 100 + 320 * 12
    task, _ = events("vp", (4,), samples=64, batch_size=32, check_samples=0)
    assert task.evaluations == 64 * (99 + 12)
    rows = []
    model = lambda x, t: (rows.append(len(x)), flow_model(x, t))[1]  # noqa: E731
    with pytest.raises(ValueError, match=f"budget=8: the first batch alone takes {32 * (100 + 3 * 4)}"):
        search(model, 4, method=Lion(), budget=8, key="m", **QUICK)
    for budget in (5_000, 12_345):
        result = search(model, 4, method=Lion(samples=10_000), budget=budget, key="m", **QUICK)
        assert result.evaluations <= budget and result.solver.num_steps == 4
    guided = dict(cond=draw, uncond={"shift": torch.zeros(1, dtype=F64)})
    doubled = []
    watch = lambda x, t, shift: (doubled.append(len(x)), flow_model(x, t, shift))[1]  # noqa: E731
    common = dict(method=Lion(samples=16, batch_size=16, check_samples=0), key="m", **QUICK, **guided)
    search(watch, 3, **common)
    assert set(doubled) == {1, 16}  # the probe, the search; scale 1: no second branch
    doubled.clear()
    result = search(watch, 3, guidance_scale=2.0, **common)
    assert set(doubled) == {2, 32} and result.evaluations == 16 * 109 + 8


def test_repeated_samples_repeat_their_teacher(monkeypatch):
    _, new = events("flow", (3,), samples=32, batch_size=16, check_samples=0)
    _, repeated = events("flow", (3,), samples=64, batch_size=16, unique_samples=32, check_samples=0)
    assert repeated[2].loss == new[2].loss
    assert repeated[3].loss != repeated[1].loss
    monkeypatch.setattr(import_module("dss_fast.searching.job"), "host_room", lambda: 0)
    task, made_again = events("flow", (3,), samples=64, batch_size=16, unique_samples=32, check_samples=0)
    assert made_again[-1].loss == repeated[-1].loss and task.evaluations == 64 * (100 + 9)


def test_nothing_of_the_model_needs_a_gradient_in_the_teacher_and_it_gets_its_parameters_back():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=F64))
            self.graphs = 0

        def forward(self, x, t):
            assert not self.scale.requires_grad
            self.graphs += torch.is_grad_enabled()
            return self.scale * flow_model(x, t)

    model = Network()
    result = search(model, 3, method=Lion(samples=16, batch_size=16, check_samples=0), **QUICK)
    assert model.scale.requires_grad and model.graphs <= 5  # only the student's calls, and two of the probe
    assert math.isclose(sum(result.solver.timedeltas), 1, rel_tol=1e-12)


def test_nan_keeps_the_best_so_far():
    calls = []

    def breaks(x, t):
        calls.append(len(x))
        return flow_model(x, t) * (float("nan") if len(calls) > 900 else 1.0)

    with pytest.raises(FloatingPointError, match="NaN or Inf for 32 of 32 samples") as caught:
        search(breaks, 4, method=Lion(samples=3200, check_samples=32), key="m", **QUICK)
    assert isinstance(caught.value.result.solver, Solver)
    assert any("best so far" in note for note in caught.value.__notes__)
    with pytest.raises(FloatingPointError, match="NaN"):
        search(lambda x, t: x * float("nan"), 4, method=Lion(samples=64), **QUICK)


def test_initial_solver_is_where_it_starts():
    _, found = events("flow", (4,), samples=8, batch_size=8, check_samples=0, initial="ab2@shift2")
    start = found[0].starts[4]
    from dss_fast import find_solver

    given = find_solver("ab2/4@shift2", Flow())
    assert torch.allclose(torch.tensor(start.coeffs), torch.tensor(given.coeffs), atol=1e-12)
    assert torch.allclose(torch.tensor(start.timesteps), torch.tensor(given.timesteps), atol=1e-12)
    with pytest.raises(ValueError, match="3 steps"):
        events("flow", (4,), initial=find_solver("ab2/3"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=[5, 5]), "several different"),
        (dict(method="adam"), "'gauss_newton' or 'lion'"),
        (dict(learning_rate=1.0), "learning_rate=1.0: a Target has no such field"),
        (dict(method=lambda: Lion(samples=0)), "samples=0"),
        (dict(budget=0), "budget=0"),
        (dict(shape=(0,)), "shape"),
        (dict(guidance_scale=2.0), "needs uncond"),
        (dict(initial="rk4"), "no solver is called"),
        (dict(initial="ab3", num_steps=5), "ab3/5.*short_tail=False"),
        (dict(method=lambda: Lion(samples=64, unique_samples=33)), "multiple of batch_size"),
        (dict(cond=lambda n, g: {"style": torch.zeros(n)}), "no keyword 'style'.*shift"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"num_steps": 3, "method": "lion", **QUICK, **changes}
    with pytest.raises(ValueError, match=message):
        method = arguments.pop("method")
        search(flow_model, method=method() if callable(method) else method, **arguments)


SHARED = dict(method=Lion(samples=150, batch_size=15, check_samples=24, check_every=5), **QUICK)


def shared(rank, folder):
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")
    result = search(flow_model, [3, 5], cond=draw, out=folder, report=False, **SHARED)
    assert (result.out is not None) == (rank == 0)


def test_two_processes_find_what_one_finds(tmp_path):
    assert processes.group(shared, tmp_path / "two") == [0, 0]
    alone = search(flow_model, [3, 5], cond=draw, **SHARED)
    for n in (3, 5):
        together = Solver.load(tmp_path / "two" / f"solver-{n}.json")
        for key in ("timesteps", "coeffs"):
            mine, theirs = torch.tensor(getattr(alone.solvers[n], key)), torch.tensor(getattr(together, key))
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)
        assert together.provenance["evaluations"] == alone.solvers[n].provenance["evaluations"]


def refused(rank, folder):
    torch.distributed.init_process_group("gloo")  # one group for two searches
    search(flow_model, 3, cond=draw, out=folder, report=False, budget=4_000, **SHARED)
    with pytest.raises(ValueError, match="it is a search for"):
        search(lambda x, t, shift: x, 3, cond=draw, out=folder, resume=True, report=False, **SHARED)
    torch.distributed.destroy_process_group()


def test_what_the_first_process_refuses_all_refuse(tmp_path):
    """Another model may not go on with a search, and no process waits for one that has left."""
    assert processes.group(refused, tmp_path / "two") == [0, 0]
