"""One table for several models: each counts by its error relative to the start's, whatever its scale."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from dss_fast import VP, Flow, GaussNewton, Lion, Target, handmade, plan, sample, search
from dss_fast.draws import Draws
from dss_fast.searching.budget import Ledger
from dss_fast.searching.folder import flatten, unflatten
from dss_fast.searching.job import Job
from dss_fast.searching.residual import residual
from dss_fast.searching.starts import candidates, ranked
from dss_fast.searching.teacher import Teacher
from dss_fast.trajectory import dense_grid, integrate
from examples.mixture import Mixture

descent = import_module("dss_fast.searching.descent")
F64 = torch.float64
SMALL = dict(samples=48, batch_size=16, held_out_samples=16, teacher_evaluations=20)


def mixture(seed, size, width, name):
    """A mixture of 12 points of so many dimensions, its samples ``size`` times as large."""
    centres = torch.randn(12, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return Target(Mixture(centres, width), (1, 1, size), Flow(), dtype=F64, name=name)


WIDE, NARROW = mixture(5, 6, 0.6, "wide"), mixture(6, 9, 0.2, "narrow")  # of different shapes, too


def error(target, solver, count=256):
    batch = Draws.of(target, 77).batch("fresh", 0, count)
    with torch.no_grad():
        last = integrate(batch.predictor(), batch.noise, dense_grid(batch.schedule, 100)).last
    return float((sample(target, batch.noise, solver) - last).square().mean().sqrt())


def test_one_table_serves_both_where_each_ones_own_serves_one():
    options = dict(method=GaussNewton(samples=96, held_out_samples=32), budget=40_000, progress=False)
    both = search([WIDE, NARROW], 4, **options).solver
    own = {target: search(target, 4, **options).solver for target in (WIDE, NARROW)}
    assert both.name == "wide+narrow/4"
    for target, other in ((WIDE, NARROW), (NARROW, WIDE)):
        hand_made = min(error(target, f"{method}/4") for method in ("ab2", "ab3", "dpmpp_2m"))
        assert error(target, both) < hand_made
        assert error(target, both) < error(target, own[other])  # better than the table of the other model


def test_batches_take_turns_and_units_make_scales_equal():
    """Residuals of a model that errs a thousand times more count as much: squares over the start's median are 1."""
    draws, ledger = Draws.of([WIDE, NARROW], 3), Ledger()
    teacher = Teacher(draws, ledger, "train", 64, 16, 24)
    assert [batch.target.name for batch, _ in teacher] == ["wide", "narrow", "wide", "narrow"]
    before, start = ledger.evaluations, handmade("ab2", 4, Flow())
    (found,) = ranked(draws, ledger, teacher, [start], 10**6)
    assert ledger.evaluations == before + 2 * 16 * 4
    for (batch, trajectory), unit in zip(list(teacher)[:2], found.units, strict=True):
        end = sample(batch.target, batch.noise, start)
        found = residual("end", 0.0, end[:, None], trajectory, torch.ones(1)).over(unit)
        torch.testing.assert_close(float(found.error.median()), 1.0, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.values.square().mean(1), found.error)
        cotangents = torch.randn(2, *found.values.shape, dtype=F64)
        torch.testing.assert_close(found.back(cotangents).flatten(2), cotangents * unit**-0.5)
    assert ranked(Draws.of(WIDE), ledger, teacher, [start], 10**6)[0].units == (1.0,)


def test_the_start_is_chosen_by_all_of_them():
    draws, ledger = Draws.of([WIDE, NARROW], 3), Ledger()
    teacher = Teacher(draws, ledger, "train", 64, 32, 24)
    tables = candidates(Flow(), 4, {})
    best = ranked(draws, ledger, teacher, tables, 10**6)[0].solver
    product = lambda solver: error(WIDE, solver) * error(NARROW, solver)  # noqa: E731
    assert product(best) < 1.1 * min(product(solver) for solver in tables)


def test_a_plan_of_several_is_what_the_search_does(monkeypatch):
    """Samples, and the batch whose graphs are alive at once, of which the teacher's files are made."""
    said = plan([WIDE, NARROW], 4, budget=20_000)
    teachers = []

    class Watched(Teacher):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            teachers.append(self)

    monkeypatch.setattr(descent, "Teacher", Watched)
    found = search([WIDE, NARROW], 4, budget=20_000, progress=False)
    assert found.history[0].samples == said.samples == sum(teachers[0].sizes)
    assert said.batch_size == max(teachers[0].sizes) < said.samples / 2 and said.cost.saved > 0


def test_resumed_it_ends_with_the_same_bits(tmp_path):
    options = dict(method=GaussNewton(**SMALL), budget=12_000, seed=3, progress=False)
    whole = search([WIDE, NARROW], 3, **options)
    job, seen, ledger = Job(Draws.of([WIDE, NARROW], 3), GaussNewton(**SMALL), (3,)), [], Ledger(12_000)
    for event in descent.descend(job, ledger):
        tensors = {}
        data = json.dumps(flatten(event.state, tensors))
        tensors = {k: v.clone() for k, v in tensors.items()}
        seen.append((event, ledger.evaluations, set(ledger.counted), data, tensors))
    final = seen[-1][0].solvers[3]
    for event, evaluations, counted, data, tensors in seen[1:-1:3]:
        if event.state is not None:
            again = Ledger(12_000)
            again.restore(evaluations, counted)
            *_, last = descent.descend(job, again, unflatten(json.loads(data), tensors))
            assert last.solvers[3] == final
    folder = search([WIDE, NARROW], 3, out=tmp_path / "run", report=False, **options)
    assert folder.solver.tensors().coeffs.equal(whole.solver.tensors().coeffs)
    again = search([WIDE, NARROW], 3, out=tmp_path / "run", resume=True, report=False, **options)
    assert again.solver == folder.solver
    with pytest.raises(ValueError, match="cannot be resumed: it is a search for"):
        search([NARROW, WIDE], 3, out=tmp_path / "run", resume=True, report=False, **options)
    with pytest.raises(ValueError, match="cannot be resumed: it is a search for"):
        search(WIDE, 3, out=tmp_path / "run", resume=True, report=False, **options)


def test_what_does_not_fit_is_named():
    for targets, settings, message in (
        ([WIDE, replace(NARROW, schedule=VP())], {}, "schedule of wide is Flow.*of narrow VP.*needs the same"),
        ([WIDE, replace(NARROW, dtype=torch.float32)], {}, "dtype of wide is torch.float64"),
        ([WIDE, NARROW], {"method": Lion(samples=8)}, "'lion' takes one target, not 2"),
        ([WIDE, NARROW], {"guidance_scale": 2.0}, "guidance_scale: several targets say this themselves"),
        ([WIDE, NARROW.model], {}, "target=Mixture among several: each must be a Target"),
        ([WIDE, replace(NARROW, features=torch.tanh)], {"method": GaussNewton(select="features")}, "give all of them"),
        ([WIDE, replace(NARROW, shape=None)], {}, "the shape of one sample is not known"),
        ([WIDE, NARROW], {"method": GaussNewton(samples=1)}, "samples=1: of each of 2 targets .*; give 2 or more"),
        ([WIDE, NARROW], {"budget": 10}, "the look at the model alone takes 16"),
    ):
        with pytest.raises(ValueError, match=message):
            search(targets, 4, progress=False, **settings)


@pytest.mark.parametrize("budget", [237, 240, 250])
def test_the_first_of_several_ns_leaves_the_units_of_the_others(budget):
    """The choice of a table of 2 steps took 6 evaluations more than the look at three targets in 13 steps left."""
    targets = [WIDE, NARROW, replace(WIDE, name="third")]
    assert search(targets, [2, 13], budget=budget, progress=False).evaluations <= budget
