"""The default search: its matrices against dense autograd, its costs, its resumption, its gains."""

import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from dss_fast import VP, Flow, GaussNewton, Grid, Solver, Target, handmade, sample, search
from dss_fast.denoiser import Denoiser
from dss_fast.draws import Draws
from dss_fast.searching.best import better
from dss_fast.searching.budget import Ledger, default_budget
from dss_fast.searching.descent import Point, descend
from dss_fast.searching.folder import flatten, unflatten
from dss_fast.searching.gauss_newton import Charge
from dss_fast.searching.job import Job
from dss_fast.searching.rounds import Candidate, Look, Rounds
from dss_fast.searching.space import Space
from dss_fast.searching.teacher import Teacher
from dss_fast.trajectory import dense_grid, integrate
from dss_fast.unroll.kept import AUTO_BYTES, AUTO_SHARE, budget_bytes
from examples.mixture import Mixture
from helpers import processes

F64 = torch.float64
SHAPE = (1, 2, 3)
CENTRES = torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
FLOW = Mixture(CENTRES, 0.35)


def vp_model(x, t):
    """epsilon of the same mixture under the VP schedule, from the flow's velocity at equal signal to noise."""
    t = t / 1000
    log_alpha = -0.5 * (0.1 * t + 9.95 * t * t)
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    total = (alpha + sigma).reshape(-1, 1, 1, 1)
    u = alpha / (alpha + sigma)
    scaled = x / total
    return scaled - u.reshape(-1, 1, 1, 1) * FLOW(scaled, u)


MODELS = {"flow": (FLOW, Flow()), "vp": (vp_model, VP())}
SMALL = dict(samples=48, batch_size=16, held_out_samples=16, teacher_evaluations=20)


def draws_of(family="flow", seed=3):
    model, schedule = MODELS[family]
    return Draws.of(Target(model, SHAPE, schedule, dtype=F64), seed)


def events(budget=None, steps=(4,), state=None, **settings):
    """The ledger and the events of a search."""
    job = Job(draws_of(), GaussNewton(**settings), steps)
    ledger = Ledger(default_budget(job.settings, steps) if budget is None else budget)
    return ledger, descend(job, ledger, state)


def rounds_of(teacher, **settings):
    """The rounds of a search on one set of samples, which are also those held out."""
    return Rounds(Job(teacher.draws, GaussNewton(**settings), (3,)), teacher.ledger, teacher, teacher, teacher)


def accepted(point, rounds):
    """The point after a trial of its candidate that is accepted."""
    trial = rounds.attempt(point.candidate, point.round, 1)
    return point.accepted(trial, rounds.differentiate(trial), rounds.job.settings)


def fresh_error(solver, family="flow", count=256):
    batch = draws_of(family, seed=77).batch("fresh", 0, count)
    with torch.no_grad():
        last = integrate(batch.predictor(), batch.noise, dense_grid(batch.schedule, 100)).last
    x = sample(batch.target, batch.noise, solver)
    return float((x - last).square().mean().sqrt())


@pytest.mark.parametrize("loss", ["end", "trajectory", "features"])
@pytest.mark.parametrize("kind", ["plain", "noise+times"])
def test_gradient_and_matrix_are_those_of_dense_autograd(kind, loss):
    draws, ledger = draws_of(), Ledger()
    mixing = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    feature = lambda x: (x.flatten(1) @ mixing).tanh()  # noqa: E731
    teacher = Teacher(draws, ledger, "train", 500, 500, 24)
    start = handmade("ab2", 3, Flow())
    space = Space(kind, Flow(), 3)
    theta = space.theta(start)
    if kind == "noise+times":
        theta[-3:] += 0.02
    rounds = rounds_of(teacher, loss=feature if loss == "features" else loss)
    start = handmade("ab2", 3, Flow())
    known = accepted(Point(start, Candidate(space, theta, (1.0,)), math.inf), rounds).known
    batch, trajectory = teacher[0]

    def residual(theta):
        table = space.table(theta)
        weights, times = table.weights, table.times
        x, ys, states = batch.noise, [], []
        for i in range(3):
            ys.append(FLOW(x, times[i].expand(len(x))))
            x = x + sum(weights[0, i, 4 + j] * y for j, y in enumerate(ys))
            x = x + weights[0, i, -1] * batch.noise if kind == "noise+times" else x
            states.append(x)
        if loss == "features":
            return feature(x) - feature(trajectory.last)
        if loss == "end":
            return (x - trajectory.last).flatten(1)
        wanted = torch.cat([trajectory.at(space.targets(theta)[:-1]), trajectory.last[:, None]], 1)
        scale = torch.tensor([3**0.5, 3**0.5, 1.0], dtype=F64).reshape(1, 3, 1, 1, 1)  # the first round's
        return ((torch.stack(states, 1) - wanted) * scale).flatten(1)

    r = residual(theta)
    values = r.square().mean(1).detach()
    torch.testing.assert_close(values, known.values)
    weights = known.scale / (known.scale + values)
    steps = 1e-5 * torch.eye(len(theta), dtype=F64)
    jacobian = torch.stack([(residual(theta + h) - residual(theta - h)).detach() / 2e-5 for h in steps], -1)
    r = r.detach()
    gradient = 2 * torch.einsum("b,br,brp->p", weights, r, jacobian) / r.shape[1] / 500
    matrix = 2 * torch.einsum("b,brp,brq->pq", weights, jacobian, jacobian) / r.shape[1] / 500

    torch.testing.assert_close(known.loss.gradient, gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    unit = matrix.diagonal().sqrt()
    difference = (known.loss.matrix - matrix) / unit[:, None] / unit
    assert float(difference.abs().max()) < 0.35  # 500 rows of a sketch: 1 / sqrt(500) and heavy tails
    assert float(difference.diagonal().mean().abs()) < 0.1


def test_generality_charges_for_the_weights_on_the_noise():
    """Loss, gradient and matrix of a stage with it are those of one without plus generality L sum d^2."""
    space, start = Space("noise+start", Flow(), 3), handmade("ab2", 3, Flow())
    first = space.theta(start)
    theta = first.clone()
    space.noise(theta).copy_(torch.tensor([0.02, -0.01, 0.03]))
    points = []
    for generality in (0.0, 2.0):
        teacher = Teacher(draws_of(), Ledger(), "train", 60, 60, 24)
        rounds = rounds_of(teacher, generality=generality)
        point = Point(start, Candidate(space, first, (1.0,)), math.inf)
        for candidate in (first, theta):
            point = replace(point, candidate=replace(point.candidate, theta=candidate))
            if candidate is theta:
                losses = point._losses(point.known, rounds.attempt(point.candidate, point.round, 1))
            point = accepted(point, rounds)
        points.append((point, losses))
    (free, (_, new)), (charged, (old, dear)) = points
    price = float(space.noise(charged.charged.matrix.diagonal())[0])
    assert free.charged is None and price == pytest.approx(2 * old)  # L: the loss at the start, whose weights are none
    assert dear - new == pytest.approx(price * (0.02**2 + 0.01**2 + 0.03**2))

    def loss(theta):
        return price * theta.split(space.sizes())[2].square().sum()

    gradient = torch.autograd.functional.jacobian(loss, theta)
    matrix = torch.autograd.functional.hessian(loss, theta)
    near = dict(rtol=1e-6, atol=1e-9 * price)
    torch.testing.assert_close(charged.known.loss.gradient - free.known.loss.gradient, gradient, **near)
    torch.testing.assert_close(charged.known.loss.matrix - free.known.loss.matrix, matrix, **near)


def test_the_start_is_charged_too_though_it_was_looked_at_before_there_was_a_price():
    space = Space("noise", Flow(), 3)
    dear = space.theta(handmade("ab2", 3, Flow()))
    cheap = dear.clone()
    space.noise(dear).fill_(0.1)
    ridge = torch.zeros_like(dear)
    space.noise(ridge).fill_(10.0)  # .3 for it
    charge = Charge(torch.diag(ridge), torch.zeros_like(dear))
    start = handmade("ab2", 3, Flow())
    point = Point(start, Candidate(space, dear, (1.0,)), math.inf, charged=charge, best=better(None, dear, 1.0))
    assert torch.equal(better(point.best, cheap, 1.2, point.charge).theta, cheap)
    assert torch.equal(better(point.best, cheap, 1.4, point.charge).theta, dear)
    assert torch.equal(better(point.best, cheap, 1.2).theta, dear)
    errors = torch.full((9,), 1.25, dtype=F64)
    looked = replace(point, held_out_scale=1e9)  # so large that the robust mean is the mean
    assert torch.equal(looked.looked(cheap, Look(errors), GaussNewton()).best.theta, cheap)
    assert torch.equal(looked.looked(cheap, Look(errors), GaussNewton(select="rmse")).best.theta, dear)


def test_generality_leads_from_its_space_to_the_papers():
    def found(generality, space="noise"):
        method = GaussNewton(**SMALL, space=space, generality=generality)
        solver = search(Target(FLOW, SHAPE, dtype=F64), 4, method=method, budget=20_000, progress=False).solver
        return math.hypot(*solver.noise_coeffs or (0.0,)), fresh_error(solver)

    (free, own), (less, general), (none, most), (_, plain) = found(0.0), found(0.1), found(1e4), found(0.0, "plain")
    assert none < 1e-3 < less < free
    assert general < 1.15 * own and most == pytest.approx(plain, rel=0.25)


@pytest.mark.parametrize("family", MODELS)
def test_it_halves_the_best_hand_made_error_within_its_budget(family):
    model, schedule = MODELS[family]
    method = GaussNewton(samples=192, held_out_samples=32, batch_size=64)
    target = Target(model, SHAPE, schedule, dtype=F64)
    result = search(target, [4, 6], method=method, budget=60_000, progress=False)
    assert result.evaluations <= 60_000
    for n, solver in result.solvers.items():
        names = [f"{m}/{n}@{s}" for m in ("ab2", "ab3", "dpmpp_2m", "unip3") for s in ("shift1", "lambda", "shift2")]
        assert fresh_error(solver, family) < 0.5 * min(fresh_error(name, family) for name in names), n


def test_the_default_budget_is_a_fiftieth_of_the_papers_and_kept_to():
    ledger, found = events(steps=(3,), teacher_evaluations=20)
    *_, last = found
    assert ledger.budget == 50_000 * 109 // 50
    assert 0.8 * ledger.budget < ledger.evaluations <= ledger.budget
    assert last.total == ledger.budget and last.complete


@pytest.mark.parametrize("budget", [3_000, 5_000, 9_000, 20_000])
def test_any_budget_is_respected(budget):
    ledger, found = events(budget, **SMALL)
    *_, event = found
    assert ledger.evaluations <= budget
    assert event.solvers[4].num_steps == 4


def test_a_budget_below_the_teachers_cost_is_refused():
    with pytest.raises(ValueError, match="budget=500: the teacher's 64 trajectories alone take 1280"):
        list(events(500, **SMALL)[1])


def test_resumed_at_any_event_it_ends_with_the_same_bits():
    settings, budget = {**SMALL, "rounds": 3}, 30_000
    whole, found = events(budget, (3, 4), **settings)
    seen = [(e, whole.evaluations, set(whole.counted)) for e in _kept(found)]
    final = seen[-1][0].solvers
    saved = [e for e in seen if e[0].state is not None and not e[0].complete]
    for event, evaluations, counted in saved[::3]:
        tensors = {}
        data = json.loads(json.dumps(flatten(event.state, tensors)))
        # Another budget does not change the samples that were planned.
        again, found = events(budget, (3, 4), state=unflatten(data, tensors), **settings)
        again.restore(evaluations, counted)
        *_, last = found
        assert last.solvers == final
        assert again.evaluations == whole.evaluations


def _kept(found):
    """Events whose state is copied, as writing it to disk would."""
    for event in found:
        tensors = {}
        data = flatten(event.state, tensors)
        yield replace(event, state=unflatten(data, {k: v.clone() for k, v in tensors.items()}))


def guided_model(x, t, y):
    return FLOW(x, t) + 0.2 * y.reshape(-1, 1, 1, 1).to(x) * x.tanh()


def test_a_range_of_guidance_scales():
    target = Target(
        guided_model, SHAPE, cond=lambda n, g: {"y": torch.randint(1, 3, (n,), generator=g)}, uncond={"y": 0},
        guidance_scale=(1.0, 3.0), dtype=F64,
    )  # fmt: skip
    result = search(target, 4, method=GaussNewton(**SMALL), budget=20_000, progress=False)
    first, *_, last = [e.held_out[4] for e in result.history if e.held_out]
    assert last < first


def test_what_does_not_fit_is_named():
    for settings, text in (
        ({"space": "half"}, "space='half'"),
        ({"loss": "ends"}, "loss='ends'"),
        ({"samples": 0}, "samples=0"),
        ({"teacher_evaluations": 8}, "teacher_evaluations=8.*16"),
        ({"generality": -1}, "generality=-1"),
        ({"generality": math.nan}, "generality=nan"),
        ({"generality": 0.1, "space": "plain"}, "generality=0.1: space 'plain' has no weights"),
    ):
        with pytest.raises(ValueError, match=text):
            GaussNewton(**settings)


SHARED = dict(method=GaussNewton(**SMALL), budget=20_000, seed=3, progress=False)


def shared(rank, folder):
    import_module("dss_fast.searching").doubt = lambda *what: (
        0,
        "",
    )  # as conftest.py does here; it counts
    search(Target(FLOW, SHAPE, dtype=F64), 4, **SHARED).solver.save(folder / f"{rank}.json")


def test_two_processes_find_the_table_of_one(tmp_path):
    assert processes.group(shared, tmp_path) == [0, 0]
    alone = search(Target(FLOW, SHAPE, dtype=F64), 4, **SHARED).solver
    for rank in range(2):
        found = Solver.load(tmp_path / f"{rank}.json")
        for key, value in vars(alone.tensors()).items():
            torch.testing.assert_close(getattr(found.tensors(), key), value, rtol=1e-6, atol=1e-6)


def doubled(solver):
    return replace(solver, coeffs=tuple(tuple(2 * c for c in row) for row in solver.coeffs), free_rows=True)


def test_initial_is_the_table_it_starts_from():
    """Coefficients included; what the search cannot hold is refused by its name."""
    method = GaussNewton(**{**SMALL, "held_out_samples": 64})  # so many choose as well as 256 fresh ones would
    target, options = Target(FLOW, SHAPE, dtype=F64), dict(method=method, budget=20_000, progress=False)
    start = search(target, 4, **options).solver
    further = search(target, 4, initial=start, **options)
    assert start.noise_coeffs is not None and further.history[0].stage == "teacher"
    assert not [e for e in further.history if e.stage == "start"]  # nothing to look for: the table is given
    _, errors = further.curve("held_out", 4)
    assert fresh_error(further.solver) <= 1.05 * fresh_error(start) and min(errors) <= errors[0]
    for initial, space, message in (
        (start, "plain", "searched/4 has weights on the noise, which this search does not move"),
        (doubled(start), "noise+start", "searched/4 has rows that do not sum to 1"),
        (handmade("ab2", 3), "noise", "ab2/3 has 3 steps; the search is for 4"),
        (handmade("ab2", 4, Grid.flow([1.0, 0.9, 0.5, 0.2, 0.0], [1.0, 0.9, 0.5, 0.2])), "noise", "another noise sch"),
        ("dit-xl-2-256", "noise", "no published solver is called dit-xl-2-256/4"),
    ):
        with pytest.raises(ValueError, match=message):
            search(target, 4, initial=initial, method=GaussNewton(**{**SMALL, "space": space}), progress=False)


@pytest.mark.parametrize("key", ["mixture", None])
def test_a_finished_search_only_asks_whether_it_is_the_same_model_whatever_the_budget(tmp_path, key):
    target = Target(Counting(), SHAPE, dtype=F64, key=key)
    options = dict(method=GaussNewton(**SMALL), out=tmp_path, progress=False, report=False)
    first = search(target, 3, budget=9_000, **options)
    target.model.calls = 0
    for budget in (9_000, 20_000, 100, None):
        again = search(target, 3, budget=budget, resume=True, **options)
        assert again.solvers == first.solvers and again.evaluations == first.evaluations
        assert again.history == first.history
    assert target.model.calls == (0 if key else 4 * 4)  # one sample at four times, unless the key says it


class Counting(torch.nn.Module):
    calls = 0

    def forward(self, x, t):
        self.calls += 1
        return FLOW(x, t)


@pytest.mark.parametrize("calls, words", [((1,), "along a rollout"), ((2,), None)])
def test_nan_is_noticed_once_a_round_where_no_call_is_looked_at(monkeypatch, calls, words):
    """As on a GPU. The first rollout must be numbers; a later one that is none is a step too far."""
    check, broken, seen = Denoiser._check, [], []
    monkeypatch.setattr(Denoiser, "_check", lambda self, *rest: self.check_finite and check(self, *rest))
    whole = Rounds.attempt

    def breaking(*arguments, **options):
        seen.append(1)
        broken[:] = [1] * (len(seen) in calls)
        try:
            return whole(*arguments, **options)
        finally:
            broken.clear()

    monkeypatch.setattr(Rounds, "attempt", breaking)
    method = GaussNewton(samples=32, batch_size=16, held_out_samples=16, teacher_evaluations=20)
    target = Target(lambda x, t: x + math.nan if broken else FLOW(x, t), SHAPE, Flow(), dtype=F64, key="moody")
    if words is not None:
        with pytest.raises(FloatingPointError, match=words):
            search(target, 4, method=method, progress=False)
        return
    result = search(target, 4, method=method, progress=False)
    rounds = [event for event in result.history if event.stage == "gauss-newton"]
    assert [event.accepted for event in rounds][:3] == [True, False, True]
    assert torch.tensor(result.solver.timesteps).isfinite().all()


def test_graphs_get_half_of_a_gpus_free_memory():
    assert budget_bytes("auto", torch.device("cpu")) == AUTO_BYTES == 1 << 29 and AUTO_SHARE == 0.5


def test_a_table_far_worse_than_its_start_on_fresh_samples_is_not_returned(monkeypatch):
    """Without held-out samples a few fresh ones decide, of which the search has spent nothing on the way."""
    target, options = Target(FLOW, SHAPE, dtype=F64, key="mixture"), dict(budget=1_000, progress=False)
    plain = search(target, 5, **options)
    assert plain.evaluations <= 1_000 and plain.solver != plain.starts[5]
    whole = Rounds.look

    def ruined(self, candidate, at):
        """As if the table found had learned its few samples by heart."""
        seen = whole(self, candidate, at)
        start = candidate.space.theta(plain.starts[5])
        return seen if torch.equal(candidate.theta, start) else Look(3 * seen.errors + 1)

    monkeypatch.setattr(Rounds, "look", ruined)
    again = search(target, 5, **options)
    torch.testing.assert_close(again.solver.tensors().coeffs, plain.starts[5].tensors().coeffs)
    torch.testing.assert_close(again.solver.tensors().timesteps, plain.starts[5].tensors().timesteps)
    assert again.evaluations == plain.evaluations


@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda x: x * torch.nan, "loss returned NaN"),
        (lambda x: x * 0, "loss returned the same for 4 different samples"),
        (lambda x: x.detach(), "loss returned what has no graph"),
        (lambda x: None, "loss returned NoneType"),
        (lambda x: x.long(), "loss returned torch.int64"),
        (lambda x: x.mean(), r"loss returned torch.float32 \(\)"),
    ],
)
def test_a_loss_that_tells_nothing_is_named_before_the_teacher(loss, words):
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return vp_model(x, t)

    with pytest.raises(ValueError, match=words):
        search(
            Target(counted, SHAPE, key="k"), 3, method=GaussNewton(samples=16, loss=loss), budget=2_000, progress=False
        )
    assert sum(calls) <= 8


def test_noise_that_is_zero_or_nan_is_not_taken_for_an_untrained_model():
    for value, words in (
        (0.0, "returned the same for both: all samples would begin at one point"),
        (math.nan, "returned NaN"),
    ):
        with pytest.raises(ValueError, match=rf"noise\(2, generator\).*{words}"):
            search(Target(vp_model, SHAPE, noise=lambda n, g, v=value: torch.full((n, *SHAPE), v)), 3, progress=False)
