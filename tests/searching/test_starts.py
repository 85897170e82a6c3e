"""Where a search starts: every table there is, none twice; the best of them for few evaluations."""

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, GaussNewton, Target, handmade
from dss_fast.draws import Draws
from dss_fast.searching import starts
from dss_fast.searching.budget import Ledger
from dss_fast.searching.descent import descend
from dss_fast.searching.gauss_newton import robust
from dss_fast.searching.job import Job
from dss_fast.searching.starts import candidates, library_tables, ranked, respaced, rounds_of
from dss_fast.searching.teacher import Teacher
from examples.mixture import Mixture

F64 = torch.float64
MODEL = Mixture(torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=F64), 0.35)


def teacher_of(model, seed=3, count=32):
    draws, ledger = Draws.of(Target(model, (6,), dtype=F64), seed), Ledger()
    return draws, ledger, Teacher(draws, ledger, "train", count, count, 24)


@pytest.mark.parametrize("schedule", [Flow(), Flow(convention="diffusers", shift=3.0), VP(), DiscreteVP.linear()])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 16])
def test_every_table_runs_on_the_targets_schedule_and_stands_once(schedule, num_steps):
    found = candidates(schedule, num_steps, {})
    assert len(found) == len(set(found))
    assert all(table.num_steps == num_steps and table.schedule == schedule for table in found)
    if num_steps > 2:
        assert len(found) > 50
        names = {"ab2", "ab2@shift3"} if schedule.family == "flow" else {"dpmpp_2m", "unip3"}
        assert names <= {table.name.replace(f"/{num_steps}", "") for table in found}


def test_the_spacing_found_for_a_neighbour_is_tried_first():
    near = handmade("ab2", 8, Flow(), spacing="shift2")
    first = candidates(Flow(), 10, {5: handmade("ab2", 5), 8: near})[0]
    expected = respaced(torch.tensor(near.timesteps, dtype=F64), 10)
    torch.testing.assert_close(torch.tensor(first.timesteps, dtype=F64), expected)


def test_a_large_limit_finds_the_best_of_all_and_a_small_one_keeps_to_it():
    draws, ledger, teacher = teacher_of(MODEL)
    batch, trajectory = teacher[0]
    tables = candidates(Flow(), 6, {})

    def error(table):
        from dss_fast import sample

        return float((sample(batch.target, batch.noise, table) - trajectory.last).square().mean())

    best = min(map(error, tables))
    before = ledger.evaluations
    assert error(ranked(draws, ledger, teacher, tables, 100_000)[0].solver) < 1.2 * best
    before, limit = ledger.evaluations, 6 * 20
    few = ranked(draws, ledger, teacher, tables, limit)
    assert 0 < ledger.evaluations - before <= limit and len(few) >= 2
    before = ledger.evaluations
    assert [s.solver for s in ranked(draws, ledger, teacher, tables, 0)] == tables[:1] and ledger.evaluations == before


@pytest.mark.parametrize("rollouts, most", [(30, 8), (35, 6), (100, 16), (250, 40), (1500, 600)])
def test_what_is_paid_for_is_spent(rollouts, most):
    """Rounds of three times the samples ended, with 50 of 300 evaluations left, on three samples of eight."""
    rounds = rounds_of(100, rollouts, most)
    tables = [min(rounds[0][1], kept + (k > 0)) for k, (_, kept) in enumerate(rounds)]  # the best hand-made one as well
    runs = sum(
        count * (wanted - before)
        for count, (wanted, _), (before, _) in zip(tables, rounds, [(0, 0), *rounds], strict=False)
    )
    assert 0.8 * rollouts <= runs <= rollouts and rounds[-1][0] <= most
    assert [kept for _, kept in rounds] == sorted((kept for _, kept in rounds), reverse=True)
    assert rounds[-1][1] == 2 or rounds[-1][0] == most
    draws, ledger, teacher = teacher_of(MODEL, count=most)
    _ = teacher[0]
    before, found = ledger.evaluations, ranked(draws, ledger, teacher, candidates(Flow(), 4, {}), 4 * rollouts)
    assert 0.7 * 4 * rollouts <= ledger.evaluations - before <= 4 * rollouts
    assert len({start.solver for start in found}) == len(found) >= 3  # those that lost come after those that are left
    assert found[0].choice is not None and found[-1].choice is None


def test_few_rollouts_try_few_tables():
    assert rounds_of(60, 4, 1) == [(1, 4)] and rounds_of(60, 1, 9) == [(1, 1)] == rounds_of(60, 0, 9)
    assert rounds_of(1, 7, 8) == [(7, 1)] and rounds_of(5, 100, 0) == [] == rounds_of(5, 100, 23, first=24)


@pytest.mark.parametrize("limit", [-1, -50, -5_000])
def test_less_than_nothing_chooses_the_first(limit):
    """What samples that were asked for leave beside the later looks may be so."""
    draws, ledger, teacher = teacher_of(MODEL)
    tables = candidates(Flow(), 4, {})
    assert [start.solver for start in ranked(draws, ledger, teacher, tables, limit)] == tables[:1]
    assert ledger.evaluations == 0


def test_a_member_without_a_table_of_so_many_steps_leaves_the_others(monkeypatch):
    steps = starts.published_steps
    for gone, left in (("general", "networks"), ("networks", "general")):
        starts.moved_tables.cache_clear()
        monkeypatch.setattr(starts, "published_steps", lambda name, gone=gone: [] if name == gone else steps(name))
        for schedule in (Flow(), VP()):
            found = library_tables(schedule, 8)
            assert {table.name.split("/")[0] for table in found} == {left} and found[0] in candidates(schedule, 8, {})
    starts.moved_tables.cache_clear()
    assert library_tables(Flow(), 2) == library_tables(VP(), 13) == []


def test_a_table_that_diverges_comes_last():
    def model(x, t):
        return torch.where(t[:, None] > 0.9, x / 0, MODEL(x, t))

    draws, ledger, teacher = teacher_of(MODEL)
    broken = Draws.of(Target(model, (6,), dtype=F64), 3)
    late, early = handmade("ab2", 4, timesteps=torch.tensor([0, 0.3, 0.6, 0.95, 1.0])), handmade("ab2", 4)
    _, trajectory = teacher[0]
    teacher._batches[0] = broken.batch("train", 0, 32)
    assert ranked(broken, ledger, teacher, [late, early], 1_000)[0].solver == early


def test_a_spacing_carried_over_keeps_its_shape():
    u = torch.linspace(0, 1, 11, dtype=F64) ** 2
    torch.testing.assert_close(respaced(u, 10), u)
    torch.testing.assert_close(respaced(u, 5), u[::2])
    finer = respaced(u, 13)
    assert finer[0] == 0 and finer[-1] == 1 and bool((finer.diff() > 0).all())


def test_the_best_of_several_starts_goes_on():
    """Each runs three rounds on the same samples; the one of least loss then spends the rest, alone."""
    draws, ledger, _ = teacher_of(MODEL)
    method = GaussNewton(samples=48, batch_size=16, held_out_samples=0, teacher_evaluations=20)
    ledger = Ledger(20_000)
    events = list(descend(Job(draws, method, (4,)), ledger))
    (start,) = [event for event in events if event.stage == "start"]
    racers = start.state["racers"][4]
    count = len({tuple(point["candidate"][:4].tolist()) for point in racers})
    assert count == len(racers) and 1 < count <= 3
    raced = [event.state["racers"][4] for event in events if event.state and 4 in event.state["racers"]]
    rivals = [points for points in raced if len(points) == count]
    assert len(raced[-1]) == 1 and all(point["round"] <= 3 for points in rivals for point in points)
    (winner,), last = raced[len(rivals)], rivals[-1]
    known = [robust(p["known"]["values"], winner["known"]["scale"]) for p in last if p["round"] == 3]
    assert robust(winner["known"]["values"], winner["known"]["scale"]) <= min(known)
    assert winner["round"] == 3 and raced[-1][0]["spent"] > sum(point["spent"] for point in last)
    assert ledger.evaluations <= 20_000 and events[-1].complete
    few = Job(draws, GaussNewton(samples=24, teacher_evaluations=20), (4,))
    alone = list(descend(few, Ledger(20_000)))
    assert {len(event.state["racers"][4]) for event in alone if event.state} == {1}  # too few samples for a race
