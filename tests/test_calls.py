"""The unconditional branch at some steps only: what is called, the table's arithmetic, its gradients, its search."""

import json
import math
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from dss_fast import VP, Flow, GaussNewton, Solver, Target, compare, find_solver, plan, sample, search
from dss_fast.__main__ import main
from dss_fast.denoiser import Denoiser
from dss_fast.draws import Draws
from dss_fast.methods import handmade
from dss_fast.searching import descent
from dss_fast.searching.budget import Ledger
from dss_fast.searching.calls import Worth, forecast, splits, worth
from dss_fast.searching.space import Space, free_places
from dss_fast.searching.starts import Start
from dss_fast.searching.teacher import Teacher
from dss_fast.serving import Batch
from dss_fast.step import added_by_guidance, multistep_step, multistep_update
from dss_fast.table import StepTable
from dss_fast.unroll import Rollout
from helpers.step_inputs import implementation

pytestmark = pytest.mark.fast
plans = import_module("dss_fast.searching.plan")
F64 = torch.float64
SHAPE, STEPS = (6,), (0, 1, 3)
MIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) * 0.3
SHIFT = torch.randn(6, generator=torch.Generator().manual_seed(4))


def model(x, t, y):
    return torch.tanh(x @ MIX.to(x) + (y[:, None] * (1 + t[:, None])).to(x) * SHIFT.to(x))


class Counted:
    """The model, and how many rows each call had."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        return model(x, t, y)


def table_of(family="flow", steps=STEPS, n=5):
    """A table with both branches at some steps, V random with rows that sum to one."""
    schedule = Flow() if family == "flow" else VP()
    base = handmade("ab3" if family == "flow" else "dpmpp_2m", n, schedule, spacing="shift2")
    generator, rows = torch.Generator().manual_seed(n), torch.zeros(n, n, dtype=F64)
    for i in range(n):
        known = [j for j in steps if j <= i]
        rows[i, known] = torch.randn(len(known), generator=generator, dtype=F64)
        rows[i, known[-1]] += 1 - rows[i].sum()
    return replace(base, noise_coeffs=(0.01,) * n, guided_steps=steps, guidance_coeffs=tuple(map(tuple, rows.tolist())))


def inputs(rows=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, *SHAPE, generator=generator), torch.randn(rows, generator=generator)
    return x.to(dtype), {"cond": {"y": y.to(dtype)}, "uncond": {"y": 0.0}}


def by_hand(solver, x, y, scale):
    """y^c and d as histories of their own, as the mathematics is written."""
    numbers, schedule = solver.tensors(), solver.schedule
    u, first = numbers.timesteps, x
    (a, b), (p, q), times = schedule.transition(u), schedule.prediction(u[:-1]), schedule.time(u[:-1])
    predictions, differences = [], {}
    for i in range(solver.num_steps):
        t = times[i].expand(len(x))
        cond = model(x, t, y)
        if i in solver.guided_steps:
            differences[i] = q[i] * (scale - 1) * (cond - model(x, t, 0 * y))
        predictions.append(p[i] * x + q[i] * cond)
        row = sum(numbers.coeffs[i, j] * predictions[j] for j in range(i + 1)) + numbers.noise_coeffs[i] * first
        row = row + sum(numbers.guidance_coeffs[i, j] * d for j, d in differences.items())
        x = a[i] * x + b[i] * row
    return x


@pytest.mark.parametrize("family", ["flow", "vp"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_it_is_the_mathematics(family, backend):
    solver, (x, given) = table_of(family), inputs(dtype=F64)
    counted = Counted()
    found = sample(counted, x, solver, **given, guidance_scale=1.7, backend=backend)
    torch.testing.assert_close(found, by_hand(solver, x, given["cond"]["y"], 1.7), rtol=1e-10, atol=1e-10)
    assert counted.rows == [6, 6, 3, 6, 3]


def test_triton_takes_the_same_step():
    ops, device = implementation("triton")
    reference, _ = implementation("reference")
    table = StepTable.of(table_of(), guidance=1.7, device=device)
    x, output = torch.randn(3, 40, device=device), torch.randn(6, 40, device=device)
    adjoints = torch.randn(3, 5, 40, device=device)
    for at, pair in ((0, True), (2, False), (3, True)):
        index, m = torch.tensor([at], device=device), output if pair else output[:3]
        found = []
        for module in (ops, reference):
            history, out = torch.ones(3, 11, 40, device=device), torch.empty_like(x)
            module.multistep_step_(x, m, history, table.weights, index, out)
            past = [*history[:, :at].unbind(1), history[:, 5], *history[:, 6 : 7 + at].unbind(1)]
            next_, y = module.multistep_update(x, m, past, table.weights, at)
            found.append([out, history, next_, y, *module.multistep_pull(adjoints, table.weights, index, pair)])
        for mine, wanted in zip(*found, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_both_at_all_steps_and_v_like_c_are_todays_bits(scale):
    plain, (x, given) = handmade("ab3", 5, Flow(), spacing="shift2"), inputs()
    full = replace(plain, guided_steps=tuple(range(5)), guidance_coeffs=plain.coeffs)
    wanted = sample(model, x, plain, **given, guidance_scale=scale)
    assert torch.equal(sample(model, x, full, **given, guidance_scale=scale), wanted)
    alone = sample(model, x, plain, cond=given["cond"])  # without guidance there is no difference to weigh
    assert torch.equal(sample(model, x, table_of(), **given, guidance_scale=1), sample_of_c(x, given))
    assert torch.equal(sample(model, x, full, **given, guidance_scale=1), alone)


def sample_of_c(x, given):
    plain = replace(table_of(), guided_steps=None, guidance_coeffs=None)
    return sample(model, x, plain, cond=given["cond"])


def test_a_scale_of_one_calls_once():
    x, given = inputs()
    for scale, rows in (
        ([3, 3, 1, 1, 1], [6, 6, 3, 3, 3]),
        ([1, 2, 2, 2, 1], [3, 6, 6, 6, 3]),
        (torch.tensor([[1.0] * 5, [1, 2, 1, 1, 1], [1, 1, 1, 3, 1]]), [3, 6, 3, 6, 3]),
        (torch.tensor([[1.0], [1.0], [2.0]]), [6] * 5),
    ):
        counted = Counted()
        found = sample(counted, x, "ab2/5", **given, guidance_scale=scale)
        assert counted.rows == rows
        table = StepTable.of(handmade("ab2", 5, Flow())).guided(scale if torch.is_tensor(scale) else tuple(scale))
        denoise, state = Denoiser(model, given["cond"], given["uncond"]), x
        history = table.new_history(x)
        for i in range(5):  # the same with both branches at all steps
            output = denoise(state, table.times[i].expand(len(x)))
            state, history = multistep_step(state, output, history, table.weights, torch.tensor([i]))
        torch.testing.assert_close(found, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, torch.tensor([[1.5], [2.0], [3.0]])])
def test_engines_agree_on_every_gradient(scale):
    x, given = inputs(dtype=F64)
    table = StepTable.of(table_of("vp"), guidance=scale, dtype=F64)
    cotangents = torch.randn(2, 3, 5, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = []
    for backend in ("cpp", "reference"):
        denoise = Denoiser(model, given["cond"], given["uncond"])
        rollout = Rollout(denoise, x, table.weights, table.times, both=table.both, backend=backend)
        found.append([rollout.states, *rollout.pull(cotangents)[:3]])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-9)


def test_the_gradient_in_the_weights_is_the_difference_quotient():
    x, given = inputs(dtype=F64)
    table = StepTable.of(table_of(), guidance=2.0, dtype=F64)
    denoise = Denoiser(model, given["cond"], given["uncond"])

    def loss(weights):
        rollout = Rollout(denoise, x, weights, table.times, both=table.both)
        return rollout, rollout.states[:, -1].square().sum()

    rollout, _ = loss(table.weights)
    gradient = rollout.pull(2 * rollout.states[None, :, -1]).weights[0].sum(0)
    for step, column in ((1, 3), (3, 2), (4, 4 + 5 + 1), (4, 4 + 5 + 1 + 3), (2, 4 + 5 + 1 + 1)):
        moved = torch.zeros_like(table.weights)
        moved[0, step, column] = 1e-6
        quotient = (loss(table.weights + moved)[1] - loss(table.weights - moved)[1]) / 2e-6
        torch.testing.assert_close(gradient[step, column], quotient, rtol=1e-6, atol=1e-7)


def test_the_step_with_a_gradient_is_the_step():
    table, x = StepTable.of(table_of(), guidance=2.0, dtype=F64), torch.randn(3, 6, dtype=F64)
    history = torch.randn(3, 11, 6, dtype=F64)
    for at, pair in ((1, True), (2, False), (3, True)):
        output = torch.randn(6 if pair else 3, 6, dtype=F64)
        index = torch.tensor([at])
        wanted = multistep_step(x, output, history.clone(), table.weights, index)
        leaf = output.clone().requires_grad_()
        found = multistep_step(x, leaf, history, table.weights, index)
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, other)

        def step(output, at=at):
            added = added_by_guidance(x, output, table.weights, at)
            past = [*history[:, :at].unbind(1), history[:, 5], *history[:, 6 : 6 + at].unbind(1), added]
            return multistep_update(x, output, past, table.weights, at)

        assert torch.autograd.gradcheck(step, (leaf,))


def test_a_solver_with_fewer_calls_is_data():
    solver = table_of()
    again = Solver.from_dict(json.loads(json.dumps(solver.to_dict())))
    assert again == solver and hash(again) == hash(solver) and again.guided_calls == 8
    assert solver != replace(solver, guided_steps=None, guidance_coeffs=None)
    assert handmade("ab2", 5, Flow()).guided_calls == 10


@pytest.mark.parametrize(
    "change, match",
    [
        ({"guided_steps": (1, 3)}, "guided_steps"),
        ({"guided_steps": (0, 5)}, "guided_steps"),
        ({"guided_steps": (0, 3, 1)}, "guided_steps"),
        ({"guided_steps": (0.0, 1)}, "guided_steps"),
        ({"guided_steps": (0, 1)}, r"guidance_coeffs\[3\]\[3\].*no difference"),
        ({"guided_steps": None}, "belong together"),
        ({"guidance_coeffs": None}, "belong together"),
        ({"guidance_coeffs": ((1.0, 0, 0, 0, 0),) * 4}, "need 5 rows"),
        ({"guidance_coeffs": ((2.0, 0, 0, 0, 0),) * 5}, r"guidance_coeffs\[0\]: must sum to 1"),
        ({"guidance_coeffs": ((0.0, 1.0, 0, 0, 0),) * 5}, "comes later"),
    ],
)
def test_a_table_that_cannot_be_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        replace(table_of(), **change)


def test_one_scale_for_all_steps_of_a_forecast():
    x, given = inputs()
    with pytest.raises(ValueError, match="one scale for all steps"):
        sample(model, x, table_of(), **given, guidance_scale=[2, 2, 3, 2, 2])
    with pytest.raises(ValueError, match="cannot start part-way"):
        StepTable.of(table_of(), guidance=2.0).tail(2)


def test_rows_of_a_batch_get_the_bits_they_get_alone():
    """Requests of fewer calls beside one with both branches at all steps and one without guidance."""
    x, given = inputs(4)
    y = given["cond"]["y"]
    wanted = [
        sample(model, x[:1], table_of(), cond={"y": y[:1]}, uncond={"y": 0.0}, guidance_scale=2.0),
        sample(model, x[1:2], "ab2/4", cond={"y": y[1:2]}, uncond={"y": 0.0}, guidance_scale=1.5),
        sample(model, x[2:3], "ab2/5", cond={"y": y[2:3]}),
        sample(model, x[3:], "ab2/5", cond={"y": y[3:]}, uncond={"y": 0.0}, guidance_scale=[2, 1, 1, 1, 1]),
    ]
    for few in (False, True):
        batch, rows = Batch(4, SHAPE, 5, cond={"y": torch.zeros(4)}, forecasts=True), []

        def guided(x, t, y, batch=batch, few=few, rows=rows):
            if not batch.guided:
                rows.append(0)
                return one_by_one(x, t, y)
            chosen = batch.guided if few else list(range(4))
            rows.append(len(batch.guided))
            null = one_by_one(x[chosen], t[chosen], 0 * y[chosen])
            return torch.cat([null, one_by_one(x, t, y)])

        scales = (2.0, 1.5, 1.0, [2, 1, 1, 1, 1])
        for k, solver in enumerate((table_of(), "ab2/4", "ab2/5", "ab2/5")):
            batch.admit(x[k], solver, cond={"y": y[k]}, guidance_scale=scales[k])
        found = {}
        while batch.running:
            for place in batch.tick(guided):
                found[place] = batch.retire(place)
        assert rows == [3, 2, 1, 2, 0]
        for place, alone in enumerate(wanted):
            torch.testing.assert_close(found[place], alone[0], rtol=1e-5, atol=1e-6)


def one_by_one(x, t, y):
    return torch.cat([model(x[k : k + 1], t[k : k + 1], y[k : k + 1]) for k in range(len(x))])


def test_a_batch_without_room_says_so():
    batch = Batch(1, SHAPE, 5, cond={"y": torch.zeros(1)})
    with pytest.raises(ValueError, match="forecasts=True"):
        batch.admit(torch.zeros(SHAPE), table_of(), cond={"y": 0.0}, guidance_scale=2.0)


def test_forecasts_continue_what_is_linear():
    solver = handmade("ab3", 6, Flow())
    rows = forecast(solver, (0, 1, 3))
    u = torch.tensor(solver.timesteps[:-1], dtype=F64)
    torch.testing.assert_close(rows @ (2 + 3 * u), torch.tensor(solver.coeffs, dtype=F64) @ (2 + 3 * u))
    torch.testing.assert_close(rows.sum(1), torch.ones(6, dtype=F64))
    assert not rows[:, [2, 4, 5]].any()


@pytest.mark.parametrize("schedule", [Flow(), VP(), VP(prediction_type="v_prediction")], ids=repr)
@pytest.mark.parametrize("k", [0.25, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("name", ["general/8", "sit-xl-2-256/8", "sit-xl-2-256/10"])
def test_tables_of_the_library_start_a_search_with_fewer_calls(name, k, schedule):
    base = find_solver(name).moved(k, schedule)
    steps = (0, 2, 3, 6)
    rows = forecast(base, steps)
    solver = replace(base, guided_steps=steps, guidance_coeffs=tuple(map(tuple, rows.tolist())), free_rows=True)
    space = Space("noise+start", schedule, base.num_steps, guided_steps=steps)
    assert Space("noise+start", schedule, base.num_steps).holds(base)
    back = space.solver(space.theta(solver))
    torch.testing.assert_close(back.tensors().guidance_coeffs[1:], rows[1:])


def test_theta_holds_the_second_triangle():
    solver = table_of()
    space = Space("noise", solver.schedule, 5, guided_steps=STEPS)
    assert space.sizes() == [5, 10, 5, len(free_places(5, STEPS)[0]), 0]
    back = space.solver(space.theta(solver))
    torch.testing.assert_close(back.tensors().guidance_coeffs, solver.tensors().guidance_coeffs)
    assert back.guided_steps == STEPS
    with pytest.raises(ValueError, match="as many calls: calls=8"):
        Space("noise", solver.schedule, 5).theta(solver)


def test_splits_of_so_many_calls():
    assert splits(11) == {5: 5, 7: 4}
    assert splits(10) == {5: 5, 7: 3}
    assert splits(2) == {1: 1}
    assert splits(11, (7,)) == {7: 4}
    for calls, steps in ((11, (5,)), (7, (7,))):
        with pytest.raises(ValueError, match=f"{steps[0]} steps take from"):
            splits(calls, steps)


def target_of(scale=2.0):
    def draw(n, generator):
        return {"y": torch.randn(n, generator=generator)}

    return Target(model, SHAPE, cond=draw, uncond={"y": 0.0}, guidance_scale=scale)


def test_a_search_for_calls_finds_steps_and_rows(tmp_path):
    quick = {"method": GaussNewton(rounds=2), "progress": False, "report": False, "budget": 3000}
    result = search(target_of(), 5, calls=8, out=tmp_path / "run", **quick)
    solver = result.solver
    assert solver.num_steps == 5 and solver.guided_calls == 8 and solver.guided_steps[0] == 0
    assert Solver.load(tmp_path / "run" / "solver-5.json") == solver
    assert result.evaluations <= 3000
    again = search(target_of(), 5, calls=8, out=tmp_path / "run", resume=True, **quick)
    assert again.solver == solver
    with pytest.raises(ValueError, match="calls was 8, now 9"):
        search(target_of(), 5, calls=9, out=tmp_path / "run", resume=True, **quick)


@pytest.mark.parametrize("budget", [150, 500, 700, 1000])
@pytest.mark.parametrize("calls", [6, 8, 11, 20])
def test_a_search_for_calls_alone_keeps_to_its_budget(calls, budget):
    """With the looks of the choice and the last one."""
    assert search(target_of(), calls=calls, budget=budget, progress=False).evaluations <= budget


@pytest.mark.parametrize(
    "scales, settings",
    [
        ([1.5, 3.0, (1.0, 4.0)], {}),
        ([2.0], {"samples": 80}),
        ([2.0], {"samples": 20, "held_out_samples": 7, "rounds": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [1000, 3000])
def test_several_targets_and_given_samples_keep_to_the_budget(scales, settings, budget):
    targets = [target_of(scale) for scale in scales]
    asked = {"calls": 11, "budget": budget, "method": GaussNewton(**settings), "progress": False}
    if settings.get("samples", 0) * 24 > budget:
        with pytest.raises(ValueError, match="give a larger budget or fewer samples"):
            search(targets, **asked)
    else:
        assert search(targets, **asked).evaluations <= budget


@pytest.mark.parametrize(
    "calls, budget, targets, settings",
    [
        (17, 1195, 1, {"held_out_samples": 20}),
        (13, 153, 2, {"batch_size": 1}),
        (5, 151, 1, {"samples": 5, "rounds": 0}),
        (14, 2430, 3, {"samples": 60}),
    ],
)
def test_samples_that_leave_nothing_for_the_choice_take_the_first_table(calls, budget, targets, settings):
    several = [target_of(1.5 + k) for k in range(targets)]
    method = GaussNewton(**settings)
    assert search(several, calls=calls, budget=budget, method=method, progress=False).evaluations <= budget


def test_uneven_batches_choose_among_fewer():
    """Of 48 samples in batches of 7 the second target has 21, for a choice among steps that takes 24."""
    method = GaussNewton(samples=48, batch_size=7)
    assert search([target_of(1.5), target_of(3.0)], 7, calls=11, budget=9000, method=method, progress=False).solver


def test_a_search_that_has_run_its_rounds_draws_no_more_samples():
    """With one round, all that was left went into 168 trajectories that no round followed."""
    found = search(target_of(), calls=20, budget=12_000, method=GaussNewton(rounds=1), progress=False)
    assert found.history[-1].samples == found.history[0].samples


@pytest.mark.parametrize("calls, budget", [(2, 8000), (16, 20_000)])
def test_the_plan_has_room_for_the_samples_that_a_choice_adds(calls, budget, monkeypatch):
    monkeypatch.setattr(descent, "BEYOND", 0.0)
    planned, of = [], plans.memory_of
    monkeypatch.setattr(plans, "memory_of", lambda job, sizes, *rest: planned.append(sizes) or of(job, sizes, *rest))
    last = search(target_of(), calls=calls, budget=budget, progress=False).history[-1]
    assert planned[0].samples < last.samples <= planned[0].training


def test_candidates_of_which_most_samples_are_exact_or_diverge_are_compared():
    """Their robust scale is 0 or Inf, and no robust mean."""
    inf = float("inf")
    for full, fewer, best in (
        ([0.0, 0, 0, 4], [0.0] * 4, 7),
        ([inf] * 4, [inf] * 3 + [1], 5),
        ([inf] * 4, [1.0] * 4, 7),
    ):
        errors = {5: torch.tensor(full, dtype=F64), 7: torch.tensor(fewer, dtype=F64)}
        points = {n: [SimpleNamespace(theta=None, candidate=n)] for n in errors}
        rounds = SimpleNamespace(look=lambda n, teacher, count, errors=errors: SimpleNamespace(errors=errors[n]))
        found = descent.Descent._losses_of(SimpleNamespace(racers=points), rounds, {"train": 1})
        assert min(found, key=found.__getitem__) == best and not any(map(math.isnan, found.values()))


def test_a_budget_without_a_look_at_each_target_is_refused():
    with pytest.raises(ValueError, match="96, and a sample of each target 32; give a larger budget"):
        search([target_of(1.5), target_of(3.0)], calls=14, budget=150, progress=False)


def test_each_target_says_what_its_differences_are_worth():
    """Of large batches the first alone has as many samples as are asked for."""
    draws, ledger = Draws.of([target_of(1.5), target_of(3.0)]), Ledger()
    teacher, called = Teacher(draws, ledger, "train", 80, 40, 24), []
    for k in range(2):
        batch, made = teacher[k]
        counted = replace(batch.target, model=lambda *args, k=k, **cond: called.append(k) or model(*args, **cond))
        teacher._batches[k], teacher._made[k] = replace(batch, target=counted), made
    before, start = ledger.evaluations, Start(handmade("ab2", 4, Flow()), (1.0, 1.0))
    worth(start, ledger, teacher, 10_000)
    assert set(called) == {0, 1}
    assert ledger.evaluations - before == 4 * 24 * 5
    assert not worth(start, ledger, teacher, 39).form.any()  # two samples of four steps take 40
    assert worth(start, ledger, teacher, 40).form.any()


@pytest.mark.parametrize("beyond", [1e9, 0.0], ids=["raced", "dismissed"])
def test_a_search_for_calls_alone_chooses_the_steps(tmp_path, monkeypatch, beyond):
    """Before any round, where the starts are far apart, or after the race; and one that fails on the way, wherever
    that is, goes on to the same table."""
    monkeypatch.setattr(descent, "BEYOND", beyond)
    quick = {"method": GaussNewton(rounds=6), "progress": False, "report": False, "budget": 4000}
    fails = [float("inf")]

    def failing(x, t, y):
        fails[0] -= len(x)
        if fails[0] < 0:
            raise RuntimeError("enough")
        return model(x, t, y)

    target = replace(target_of(), model=failing, schedule=Flow(prediction_type="v_prediction"), key="one")
    whole = search(target, calls=6, **quick)
    assert len(whole.solvers) == 1 and whole.solver.guided_calls <= 6
    chosen = [event.num_steps for event in whole.history if event.stage == "choice"]
    assert chosen == [whole.solver.num_steps] and list(whole.starts) == chosen
    rounds = [event.num_steps for event in whole.history if event.stage == "gauss-newton"]
    assert set(rounds) == ({3, 4} if beyond else {3})  # full guidance is never dismissed
    more = whole.history[-1].samples - whole.history[0].samples  # what the others left is samples, too
    assert more == 0 if beyond else more > 0  # the race of so small a search leaves none
    for number, spent in enumerate((1200, 2000, 2400, 3000)):
        fails[0] = spent
        with pytest.raises(RuntimeError, match="enough"):
            search(target, calls=6, out=tmp_path / str(number), **quick)
        fails[0] = float("inf")
        resumed = search(target, calls=6, out=tmp_path / str(number), resume=True, **quick)
        assert resumed.solver == whole.solver and resumed.evaluations == whole.evaluations
    assert [path.name for path in tmp_path.glob("0/solver-*")] == [f"solver-{whole.solver.num_steps}.json"]


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"calls": 11, "num_steps": 5}, "5 steps take from"),
        ({"calls": 1}, "calls=1"),
        ({"calls": True}, "calls=True"),
        ({}, "give num_steps"),
        ({"calls": 8, "num_steps": 5, "method": "lion"}, "lion"),
        ({"calls": 200}, "which of 132 steps call both branches is found for 40 steps at most"),
        ({"calls": 60, "num_steps": 41}, "which of 41 steps"),
    ],
)
def test_calls_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        search(target_of(), **arguments)


def test_a_start_of_other_calls_is_refused_by_what_it_has():
    with pytest.raises(ValueError, match="both branches at 3 steps, and this search at 4: .* its calls=8"):
        search(target_of(), 5, calls=9, initial=replace(table_of(), noise_coeffs=None), progress=False)


def test_the_command_line_and_its_report_count_calls(tmp_path, monkeypatch, capsys):
    (tmp_path / "guided_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = "search guided_model:target --steps 4 --calls 6 --budget 1500 --samples 8 -o out"
    assert main(line.split()) == 0
    assert "N = 4 in 6 calls a sample" in capsys.readouterr().out
    text = " ".join((tmp_path / "out" / "report.md").read_text().split())
    assert "N = 3" in text and "calls=6" in text and "A sample takes 6 calls" in text
    assert main("show out/solver-4.json".split()) == 0
    assert "both branches at steps 0, " in capsys.readouterr().out


MODULE = """
import torch
from dss_fast import Flow, Target

def model(x, t, y):
    return torch.tanh(x + y[:, None] * (1 + t[:, None])) - x

def draw(n, generator):
    return {"y": torch.randn(n, generator=generator)}

target = Target(model, (6,), cond=draw, uncond={"y": 0.0}, guidance_scale=2.0, name="small")
"""


def test_calls_need_guidance():
    with pytest.raises(ValueError, match="no guidance"):
        search(target_of(1.0), 5, calls=8)


def test_the_plan_counts_calls():
    assert str(plan(target_of(), calls=11)).startswith("N = 5, 7 in 11 calls a sample:")
    assert str(plan(target_of(), 7, calls=11)).startswith("N = 7 in 11 calls a sample:")
    either, full = (plan(target_of(), n, calls=c, budget=20_000) for n, c in ((None, 11), (5, None)))
    assert either.samples < full.samples  # of both candidates, until one is chosen
    assert either.memory.teacher > 0.9 * full.memory.teacher  # of that one's set


def test_unroll_is_differentiable_through_the_table():
    x, given = inputs(dtype=F64)
    solver = table_of()
    space = Space("noise", solver.schedule, 5, guided_steps=STEPS)
    theta = space.theta(solver).requires_grad_()
    denoise = Denoiser(model, given["cond"], given["uncond"])
    table = space.table(theta, 2.0)
    assert table.both == (True, True, False, True, False)

    class Called:
        def __call__(self, x, t, both=True):
            return denoise(x, t, both)

    states = Rollout(Called(), x, table.weights.detach(), table.times.detach(), both=table.both).states
    end = sample(model, x, space.solver(theta.detach()), **given, guidance_scale=2.0)
    torch.testing.assert_close(states[:, -1], end)


def test_a_comparison_counts_calls():
    """The rivals of a table of 8 calls take 4 steps with both branches."""
    solver = replace(table_of(), name="fewer/5", source="searched", noise_coeffs=None)
    found = compare(target_of(), [solver], rivals=["ab2"], samples=40)
    assert [row.nfe for row in found.rows] == ["5+3", "4x2"]
    (verdict,) = found.verdicts
    assert verdict.num_steps == 4 and verdict.guided_calls == 8
    said = replace(verdict, ratio=0.5, low=0.4, high=0.6, calls=6, like="ab2/6", doubt="").sentence()
    assert "8 calls in all of this table err like 6 steps of both branches" in said


@pytest.mark.parametrize("told", [None, 0.03])
def test_a_moved_table_gives_samples_of_the_other_size(told):
    """A model of data k times as large, D_k(k (t'/t) x, t') = k D(x, t), and its table moved by k."""
    k, scale, solver = 1.6, 2.0, replace(table_of(), noise_coeffs=(0.01,) * 5)
    if told is not None:
        solver = replace(solver, network_timesteps=(told, *solver.timesteps[1:-1]))

    def larger(x, t, y):  # velocities of clean predictions: D = x + (1 - t) v
        t = t.double().view(-1, 1)
        before = k * t / (1 + (k - 1) * t)  # where the smaller model has its noise level (1 - t) / t over k
        shrunk = torch.where(t > 0, before / (k * t), 1.0)
        clean = k * (shrunk * x + (1 - before) * model(shrunk * x, before.flatten(), y))
        return (clean - x) / (1 - t)

    x, given = inputs(dtype=F64)
    moved = solver.moved(k)
    assert moved.guided_steps == STEPS and moved.guided_calls == 8
    wanted = k * sample(model, x, solver, **given, guidance_scale=scale)
    found = sample(larger, x, moved, **given, guidance_scale=scale)
    torch.testing.assert_close(found, wanted, rtol=1e-6 if told is None else 2e-2, atol=1e-6 if told is None else 2e-2)
    assert solver.moved(1.0) is solver


def test_what_the_form_finds_leaves_the_least_of_it():
    """No move that keeps a row's sum makes the form less by more than the ridge holds it back."""
    solver, steps = handmade("ab3", 5, Flow()), (0, 1, 3)
    rows = torch.randn(60, 25, dtype=F64, generator=torch.Generator().manual_seed(2))
    form = rows.mT @ rows / 60
    found = Worth(solver, form.reshape(5, 5, 5, 5))._table(steps).tensors()
    moves = torch.zeros(len(free_places(5, steps)[0]), 5, 5, dtype=F64)
    for move, i, j in zip(moves, *free_places(5, steps), strict=True):
        move[i, j], move[i, max(k for k in steps if k <= i)] = 1, -1
    flat, start = moves.flatten(1), forecast(solver, steps)
    coeffs = found.coeffs
    far = (found.guidance_coeffs - start).flatten()
    t = torch.linalg.lstsq(flat.mT, far).solution
    torch.testing.assert_close(t @ flat, far)
    ridge = 0.1 * (flat @ form @ flat.mT).diagonal().mean()
    slope = flat @ form @ (found.guidance_coeffs - coeffs).flatten() + ridge * t
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)


def test_what_the_form_finds_is_in_the_space():
    """Also where the first call is told another time, and rows sum to one after the first column is divided."""
    space = Space("noise+start", Flow(), 5)
    theta = space.theta(handmade("ab3", 5, Flow()))
    theta[-1] = 0.04
    rows = torch.randn(60, 25, dtype=F64, generator=torch.Generator().manual_seed(2))
    form = (rows.mT @ rows / 60).reshape(5, 5, 5, 5)
    for solver in Worth(space.solver(theta), form).best(3, 2):
        assert solver.guided_calls == 8
        steps = replace(space, guided_steps=solver.guided_steps)
        again = steps.solver(steps.theta(solver))
        torch.testing.assert_close(again.tensors().guidance_coeffs, solver.tensors().guidance_coeffs)
