"""compare: its figures against hand-computed ones, its table and pictures."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dss_fast import VP, DiscreteVP, Flow, Grid, Target, adaptive, find_solver, handmade, sample
from dss_fast.compare import Verdict, compare
from dss_fast.distance import frechet_distance, ratio_of, squares
from dss_fast.draws import Draws
from dss_fast.methods import METHODS, calls_within
from dss_fast.plots import plot_solver
from dss_fast.rivals import SPACINGS, STARTS, calls_like, contest, handmade_tables, is_rival, published_tables
from dss_fast.trajectory import dense_grid, integrate
from examples import mixture
from examples.mixture import Mixture

SHIFT = torch.linspace(-1, 1, 4)[:, None, None]


def model(x, t, y):
    """A flow towards the condition, curved in time, so that solvers differ."""
    return torch.tanh(y[:, None, None, None] + SHIFT.to(x) - x * (1 + t[:, None, None, None]).to(x))


def draw(n, generator):
    return {"y": torch.randint(0, 2, (n,), generator=generator).float()}


TARGET = Target(model, (4, 2, 2), cond=draw)


@pytest.fixture(scope="module")
def result():
    return compare(
        TARGET,
        ["euler", "ab3", "sit-xl-2-256/10"],
        num_steps=(5, 10),
        samples=24,
        batch_size=16,
        features=lambda x: x.flatten(1)[:, :3],
        classify=lambda x: torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.4], 1),
        labels=lambda cond: cond["y"],
        decode=lambda x: x[:, :1].sigmoid(),
        progress=False,
    )


def test_rows(result):
    rows = {r.solver: r for r in result.rows}
    assert list(rows) == ["euler/5", "euler/10", "ab3/5", "ab3/10", "sit-xl-2-256/10"]
    assert rows["euler/5"].rmse > 1.5 * rows["euler/10"].rmse > 3 * rows["ab3/10"].rmse
    for row in rows.values():
        assert row.rmse_low <= row.rmse <= row.rmse_high and row.samples == 24
        assert row.median <= row.p90 and row.frechet >= 0 and math.isfinite(row.energy)
        assert 0 <= row.accuracy <= 1 and 0 <= row.switched <= 1 and row.ms_per_sample > 0
        assert row.nfe == str(row.num_steps) and not row.searched
    assert len({row.frechet_floor for row in rows.values()}) == 1 and rows["ab3/5"].energy_floor > 0


def test_rmse_is_the_distance_to_a_fine_solution(result):
    """The same noises by hand, against Adams-Bashforth with 400 steps."""
    draws = Draws.of(TARGET, 20_000)
    squares = []
    for number, size in enumerate((16, 8)):
        batch = draws.batch("compare", number, size)
        fine = sample(model, batch.noise, "ab4/400", cond=batch.cond)
        coarse = sample(model, batch.noise, "euler/5", cond=batch.cond)
        squares.append((fine - coarse).square().flatten(1).mean(1))
    squares = torch.cat(squares).double()
    row = result.rows[0]
    assert math.isclose(row.rmse, float(squares.mean().sqrt()), rel_tol=1e-3)
    half = 1.96 * float(squares.std()) / math.sqrt(24)
    assert math.isclose(row.rmse_high, math.sqrt(float(squares.mean()) + half), rel_tol=1e-3)


def test_table_files_and_pictures(result, tmp_path):
    pytest.importorskip("matplotlib", reason="the plots extra, in requirements.txt")
    text = str(result)
    assert "Frechet (floor" in text and "label acc." in text and text.index("ab3/5") < text.index("euler/5")
    result.save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    assert [row["solver"] for row in data["rows"]] == [row.solver for row in result.rows]
    assert data["rows"][0]["rmse"] == result.rows[0].rmse and data["evaluations"] == result.evaluations
    result.plot(tmp_path / "c.png")
    result.plot_samples(tmp_path / "s.png", ["euler/5", "ab3/10"], count=4)
    plot_solver(find_solver("dit-xl-2-256/7"), tmp_path / "t.png")
    for name in ("c.png", "s.png", "t.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 4


def searched(method, num_steps, **options):
    """A hand-made table that says it is not."""
    return replace(handmade(method, num_steps, **options), name=f"mine/{num_steps}", source="dss_fast.search")


@pytest.mark.parametrize("alone", ["euler/3", handmade("euler", 3, Flow())])
def test_a_solver_alone_is_one_of_several(alone):
    options = {"rivals": "ab2/3", "samples": 8, "progress": False}
    assert compare(TARGET, alone, **options).rows[0].rmse == compare(TARGET, [alone], **options).rows[0].rmse


def test_best_is_of_either_kind():
    mine = searched("ab4", 5)
    solvers = ["euler", "ab2", "sit-xl-2-256/10", mine]
    result = compare(TARGET, solvers, num_steps=(5, 10), rivals=(), samples=16, progress=False)
    rows = {row.solver: row for row in result.rows}
    assert [name for name, row in rows.items() if row.searched] == ["mine/5"]
    assert result.best(5) is min((rows["euler/5"], rows["ab2/5"]), key=lambda row: row.rmse)
    assert result.best(5, searched=True) is rows["mine/5"] and result.best(10, searched=True) is None
    assert result.best(7) is None
    (verdict,) = result.verdicts
    assert (verdict.known, verdict.others, verdict.best) == (0, 2, result.best(5).solver) and verdict.calls is None
    assert verdict.ratio == pytest.approx(rows["mine/5"].rmse / result.best(5).rmse)
    assert verdict.median == pytest.approx(rows["mine/5"].median / result.best(5).median)
    assert f"N = 5: {verdict.word}. mine/5 against {verdict.best}, the best of 2 other rivals: RMSE x " in str(result)


def test_heun_has_rows_and_rivals_of_as_many_calls_as_fit():
    """Its calls are odd: nine of ten. Against ab4 at 20 of its calls nothing of order 2 is nearer."""
    rows = compare(TARGET, ["heun", "heun/7"], num_steps=(5, 6, 10), samples=16, progress=False).rows
    assert [(row.solver, row.nfe) for row in rows] == [("heun/5", "5"), ("heun/9", "9"), ("heun/7", "7")]
    assert [table.num_steps for table in handmade_tables(Flow(), 10) if table.name.startswith("heun")] == [9] * 7
    assert not any(table.name.startswith(("heun", "unipc")) for table in handmade_tables(Flow(), 10, STARTS))

    def errors(solver, start, stop):
        """Heun's tables alone err little, the less the more calls they have."""
        return torch.full((stop - start,), 1.0 / solver.num_steps if solver.name.startswith("heun") else 9.0)

    found = contest(errors, Flow(), 10, 32)
    assert {table.num_steps for table in list(found.best)[:7]} == {9} and found.known == 112
    best = dict(list(found.best.items())[:7])
    assert calls_like(errors, Flow(), best, torch.full((32,), 1 / 13)) == (13, "heun/13")


@pytest.mark.parametrize("where", ["rivals", "solvers"])
def test_heun_named_is_a_rival_where_even_steps_are_judged(where):
    """With no other rival there was no verdict."""
    named = {"solvers": [searched("ab4", 6)], "rivals": ()}
    named[where] = [*named[where], "heun"]
    (verdict,) = compare(TARGET, num_steps=6, samples=16, progress=False, **named).verdicts
    assert (verdict.num_steps, verdict.best, verdict.others) == (6, "heun/5", 1)


def test_an_adaptive_solver_is_no_rival():
    with pytest.raises(ValueError, match="rk45 is none, as no tolerance gives a number of calls; name it among"):
        compare(TARGET, [searched("ab4", 5)], rivals=["all", "rk45"], progress=False)


def test_an_adaptive_solver_stands_at_the_calls_it_took():
    """Eight at least; its error falls with its calls, which are those the model saw, and it ends where others end."""
    pytest.importorskip("scipy", reason="RK45 is scipy's")
    asked, moons = [], two_moons()

    def counted(x, t):
        asked.append(len(x))
        return moons.model(x, t)

    target = replace(moons, model=counted)
    result = compare(target, ["ab4", "rk45"], num_steps=(8, 20), samples=24, batch_size=16, progress=False)
    rows = [row for row in result.rows if row.method == "rk45"]
    assert result.evaluations == sum(asked) and not result.verdicts
    calls, errors = [row.num_steps for row in rows], [row.rmse for row in rows]
    assert calls[0] in (8, 14) and abs(calls[-2] - 40) <= 8 and abs(calls[-1] - 80) <= 8 and calls == sorted(calls)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 < errors[0]
    assert str(result).count("rk45/") == len(rows) >= 3
    assert [round(float(row.nfe)) for row in rows] == calls


@pytest.mark.parametrize("schedule", [Flow(shift=3.0), VP(), DiscreteVP.cosine(), Grid.ve([14.0, 2.0, 0.5, 0.1, 0.0])])
def test_an_adaptive_solver_on_any_path(schedule):
    """Gaussian data, whose exact prediction is a line, and where a fine solver of our own ends."""
    pytest.importorskip("scipy", reason="RK45 is scipy's")
    schedule = replace(schedule, prediction_type="x0")
    batch = Draws.of(Target(lambda x, t: x, (3,), schedule=schedule)).batch("compare", 0, 16)

    def predict(x, u):
        alpha, sigma = schedule.alpha_sigma(u)
        clean = (0.3**2 * alpha * (x - 0.5 * alpha) / (0.3**2 * alpha**2 + sigma**2)) + 0.5
        p, q = schedule.prediction(u)
        return float(p) * x + float(q) * clean

    fine = integrate(predict, batch.noise.double(), dense_grid(schedule, 200))
    x, calls = adaptive.solve(predict, batch.noise.double(), schedule, fine.grid.end, 1e-6)
    assert float((x - fine.last).abs().max()) < 5e-3 and 30 < calls < 1000


def test_without_scipy_the_adaptive_rows_are_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="rk45 needs scipy, which is not installed.*left out"):
        rows = compare(TARGET, ["ab4", "rk45"], num_steps=(5,), samples=8, progress=False).rows
    assert [row.solver for row in rows] == ["ab4/5"]


class Posterior:
    """The clean sample D(z, s) that an exact mixture expects, z = x0 + s eps, behind EDM's preconditioning."""

    def __init__(self, centres, bandwidth, data=0.5):
        self.centres, self.bandwidth, self.data = centres, bandwidth, data

    def __call__(self, z, s):
        variance = self.bandwidth**2 + s * s
        mean = (-torch.cdist(z, self.centres).square() / (2 * variance)).softmax(1) @ self.centres
        clean = mean + self.bandwidth**2 / variance * (z - mean)
        skip, out = self.data**2 / (s * s + self.data**2), s * self.data / (s * s + self.data**2).sqrt()
        network = (clean - skip * z) / out
        return skip * z + out * network


def edm(x, t):
    """The velocity of the flow that an EDM net means: z = x / t, s = (1 - t) / t."""
    t = t.reshape(-1, 1).clamp(1e-4, 1 - 1e-4).to(x)
    centres = 0.5 * torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    return (Posterior(centres, 0.1)(x / t, (1 - t) / t) - x) / (1 - t)


def two_moons():
    angle = torch.linspace(0, math.pi, 100)
    moons = [torch.stack([angle.cos(), angle.sin()], 1), torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)]
    centres = torch.cat(moons)
    return Target(Mixture((centres - centres.mean(0)) / centres.std(), 0.05), (2,))


CASES = {
    "digits": (lambda: mixture.digits(), (10, 5)),
    "moons": (two_moons, (8, 5)),
    "edm": (lambda: Target(edm, (8,)), (8,)),
}


@pytest.mark.parametrize("name, num_steps", [(name, n) for name, (_, steps) in CASES.items() for n in steps])
def test_the_headline_is_over_all_hand_made_names(name, num_steps):
    """All 112 on the same noises: what the verdict is over errs at most by its interval more than the best of them."""
    if name == "digits":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    given, rows = CASES[name][0](), []

    def counted(x, t):
        rows.append(len(x))
        return given.model(x, t)

    target, mine = replace(given, model=counted, schedule=Flow()), searched("ab4", num_steps)
    result = compare(target, [mine], samples=128, progress=False)
    assert result.evaluations == sum(rows)
    batches = [Draws.of(target, 20_000).batch("compare", k, 64) for k in range(2)]
    fine = [integrate(b.predictor(), b.noise, dense_grid(Flow(), 160)).last for b in batches]

    def error(solver):
        ends = [sample(target, b.noise, solver) for b in batches]
        return float(torch.cat([squares(x, y) for x, y in zip(ends, fine, strict=True)]).mean().sqrt())

    every = {f"{m}@{s}": error(handmade(m, calls_within(m, num_steps), spacing=s)) for m in METHODS for s in SPACINGS}
    assert len(every) == 112
    (verdict,) = result.verdicts
    assert verdict.tried == verdict.known == 112
    assert verdict.low <= verdict.ratio <= error(mine) / min(every.values()) * 1.0001 <= verdict.high * 1.0002
    assert verdict.others == len(published_tables(Flow(), num_steps))


@pytest.mark.parametrize("method, word", [("ab4", "Yes"), ("euler", "No"), ("ab2", "No")])
def test_a_word_from_the_interval(method, word):
    """ab4 errs less than the rivals named; ab2, the best of them, is not better than itself."""
    (verdict,) = compare(TARGET, [searched(method, 8)], rivals=("ab2", "unip2"), samples=32, progress=False).verdicts
    assert verdict.word == word and verdict.best == "ab2/8"
    assert (verdict.ratio == verdict.low == verdict.high == 1) == (method == "ab2")


def test_the_interval_covers_the_ratio_of_all_noises():
    """Of 200 draws of 64 heavy-tailed pairs 95 % should; a bootstrap of such reaches 80 to 95. The choice of the best
    of several equal rivals is part of it: alone it would say Yes of a table that is none the better."""
    generator = torch.Generator().manual_seed(0)
    covered = better = 0
    for _ in range(200):
        shared = torch.randn(64, generator=generator).exp().double()
        rivals = torch.stack([shared * torch.randn(64, generator=generator).exp().double() for _ in range(4)])
        mine = 0.5 * shared * torch.randn(64, generator=generator).exp().double()
        _, low, high = ratio_of(mine, rivals[:1])
        covered += low <= 0.5**0.5 <= high
        better += ratio_of(2 * mine, rivals)[2] < 1
    assert covered >= 160 and better <= 5
    assert Verdict("a/2", 2, "b/2", 0.7, 0.5, 1.1, 0.7, 9, 16, 0, 0, 1).word == "Not clearly"
    assert Verdict("a/2", 2, "b/2", 0.7, 0.5, 0.9, 0.7, 3, 4, 0, 0, 1).word == "Not clearly"  # on four samples


def test_calls_of_the_best_hand_made_solver():
    """ab4 with 5 calls against Euler alone: the first number of calls at which Euler errs no more, or more than 12."""
    draws = Draws.of(TARGET)
    batch = draws.batch("compare", 0, 32)
    fine = sample(model, batch.noise, "ab4/400", cond=batch.cond)

    def errors(solver, start, stop):
        return squares(sample(model, batch.noise, solver, cond=batch.cond), fine)[start:stop]

    start = handmade("euler", 5)
    best, means = (
        {start: errors(start, 0, 32)},
        {n: float(errors(handmade("euler", n), 0, 32).mean()) for n in range(5, 13)},
    )
    for goal in (7, 9, 12):
        mine = errors(handmade("euler", goal), 0, 32) * 1.001
        assert calls_like(errors, draws.schedule, best, mine) == (goal, f"euler/{goal}")
        assert means[goal - 1] > float(mine.mean()) >= means[goal]
    assert calls_like(errors, draws.schedule, best, errors(handmade("ab4", 10), 0, 32)) == (12, None)
    assert calls_like(errors, draws.schedule, best, mine, limit=100) == (5, None)  # nothing tried, nothing said
    (verdict,) = compare(TARGET, [searched("ab4", 10)], samples=32, progress=False).verdicts
    assert verdict.calls is None or verdict.word == "Yes"
    said = replace(verdict, low=0.1, high=0.2, calls=14, like="ab3/14").sentence()
    assert said.endswith("err like 14 of the best hand-made solver, ab3/14, of those that are best at 10.")
    said = replace(verdict, low=0.1, high=0.2, calls=22, like=None).sentence()
    assert said.endswith("err like more than 22 of the best hand-made solver of those that are best at 10.")


def test_rivals_are_published_tables_the_start_and_what_is_named():
    """Each with a row; a published table moves along with a shift; hand-made solvers named are rivals too."""
    start = replace(handmade("ab4", 5), noise_coeffs=(0.1,) * 5, name="start/5", source="dss_fast.search")
    result = compare(
        TARGET, [searched("ab3", 5), "deis"], num_steps=(5,), rivals=("all", start), samples=16, progress=False
    )
    rows = {row.solver: row for row in result.rows}
    assert {"mine/5", "deis/5", "start/5", "sit-xl-2-256/5", "flowdcn-b-2-256/5", result.verdicts[0].best} == set(rows)
    assert [name for name, row in rows.items() if row.searched] == ["mine/5"] and result.verdicts[0].others == 3
    shifted = Flow(shift=3.0)
    target = replace(TARGET, schedule=shifted)
    rows = compare(target, [searched("ab2", 5, schedule=shifted)], samples=16, progress=False).rows
    moved = [table.name for table in published_tables(shifted, 5)]
    assert len(rows) == 4 and sorted(moved) == ["flowdcn-b-2-256/5@shift3", "sit-xl-2-256/5@shift3"]
    assert all(is_rival(table) for table in published_tables(shifted, 5))


def test_a_target_named_like_a_published_family_is_not_one():
    mine = replace(searched("ab4", 5), name="sit-xl-2-256/5")
    result = compare(TARGET, [mine], samples=16, progress=False)
    assert (
        [row.solver for row in result.rows if row.searched] == ["sit-xl-2-256/5"] == [v.solver for v in result.verdicts]
    )
    assert "sit-xl-2-256-2/5" in [row.solver for row in result.rows]
    assert is_rival(find_solver("sit-xl-2-256/5")) and not is_rival(mine)


def test_what_diverges_is_infinitely_bad(tmp_path):
    """A model that is NaN away from the tanh's range: some hand-made tables leave it, and a table of mine does."""

    def bounded(x, t, y):
        return torch.where(x.abs() < 12, model(x, t, y), math.nan)

    wild = replace(searched("ab2", 4), coeffs=((1.0, 0, 0, 0), (90.0, -89.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0)))
    target = replace(TARGET, model=bounded)
    result = compare(target, [wild, "ab2"], num_steps=(4,), samples=16, progress=False)
    rows = {row.solver: row for row in result.rows}
    assert rows["mine/4"].rmse == math.inf and rows["ab2/4"].rmse < 1 and result.verdicts[0].word == "No"
    assert "inf" in str(result)
    result.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["rmse"] is None
    result.plot(tmp_path / "c.png")
    better = compare(
        target, [searched("ab3", 4)], rivals=(replace(wild, name="wild/4"), "ab2"), samples=16, progress=False
    )
    assert math.isfinite(better.verdicts[0].high) and better.verdicts[0].best == "ab2/4"
    alone = compare(target, [searched("ab3", 4)], rivals=(replace(wild, name="wild/4"),), samples=16, progress=False)
    assert alone.verdicts[0].word == "No answer" and "Every rival diverges" in str(alone)


@pytest.mark.parametrize(
    "field, words",
    [
        (lambda x, t, y: 40 * y[:, None, None, None] + 0 * x, "root mean square of"),
        (lambda x, t, y: 4 * torch.sin(50 * (x + t[:, None, None, None])), "too far to measure"),
    ],
)
def test_garbage_gets_no_answer(field, words):
    """Samples of no data's scale, and a field that no reference resolves."""
    mine = searched("euler", 5, schedule=Flow())
    result = compare(replace(TARGET, model=field), [mine], rivals=("euler",), samples=16, progress=False)
    assert result.verdicts[0].word == "No answer" and words in str(result)


def test_a_reference_that_diverges_is_said():
    with pytest.raises(FloatingPointError, match="the fine reference diverges.*schedule"):
        compare(lambda x, t: x / 0.0, ["euler/3"], shape=(2,), samples=4, progress=False)


@pytest.mark.parametrize("budget, samples, tried", [(4_000, 32, 8), (40_000, 64, 112), (200_000, 256, 112)])
def test_a_budget_chooses_samples_and_names(budget, samples, tried):
    result = compare(TARGET, [searched("ab4", 8)], budget=budget, progress=False)
    (verdict,) = result.verdicts
    assert result.evaluations <= budget and result.rows[0].samples == samples and verdict.known == 112
    assert verdict.tried <= tried if tried < 112 else verdict.tried == 112
    said = str(result)
    assert (f"{verdict.tried} tried of 112" in said) == (verdict.tried < 112) and f"{result.evaluations:,}" in said


@pytest.mark.parametrize(
    "decode, words", [(lambda x: [x], "list"), (lambda x: x[:, 0, 0], "(16, 2)"), (lambda x: 1 / 0, "division")]
)
def test_a_decode_that_fails_costs_the_pictures_alone(decode, words, tmp_path):
    result = compare(replace(TARGET, decode=decode), ["euler/3"], samples=16, progress=False)
    assert result.rows[0].rmse > 0 and words in result.unseen and not result.images
    with pytest.raises(ValueError, match="decode failed"):
        result.plot_samples(tmp_path / "s.png")


def test_stages_are_errors_of_the_state():
    """The state after two of three steps, by hand against 400 steps to the same u."""
    (row,) = compare(TARGET, ["ab2/3"], samples=16, progress=False).rows
    batch = Draws.of(TARGET, 20_000).batch("compare", 0, 16)
    _, states = sample(model, batch.noise, "ab2/3", cond=batch.cond, return_trajectory=True)
    _, fine = sample(model, batch.noise, "ab4/300", cond=batch.cond, return_trajectory=True)
    by_hand = (states[1:] - fine[100::100]).square().flatten(1).mean(1).sqrt()
    assert row.stages == pytest.approx(by_hand.tolist(), rel=1e-3) and row.stages[-1] == pytest.approx(
        row.rmse, rel=1e-4
    )


def test_small_errors_keep_three_digits():
    """Errors of 1e-5 printed as 0.0000."""
    target = Target(lambda x, t: 1 - 1e-4 * x.tanh(), (4, 2, 2))
    result = compare(target, ["euler/4"], samples=4, progress=False)
    (row,) = result.rows
    assert 0 < row.rmse < 5e-5
    printed = str(result).splitlines()[2].split()
    assert math.isclose(float(printed[2]), row.rmse, rel_tol=6e-3) and "0.0000" not in printed


def test_distances_are_to_independent_samples(result):
    """A fine solver is the reference but for 1e-5: what is left of Frechet's distance is the floor."""
    fine = compare(TARGET, ["ab4/80"], samples=24, progress=False, features=lambda x: x.flatten(1)[:, :3]).rows[0]
    assert fine.frechet_floor > 0 and math.isclose(fine.frechet, fine.frechet_floor, rel_tol=1e-3)
    assert abs(fine.energy) < 1e-3 < fine.energy_floor
    real = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    against = compare(
        TARGET, ["ab4/80"], samples=24, progress=False, features=lambda x: x.flatten(1)[:, :3], real_features=real
    ).rows[0]
    draws = Draws.of(TARGET, 20_000).batch("compare", 0, 24)
    features = sample(model, draws.noise, "ab4/400", cond=draws.cond).flatten(1)[:, :3]
    assert math.isclose(against.frechet, frechet_distance(features, real), rel_tol=1e-3)


def test_the_worst_samples_are_shown_beside_the_reference(result, tmp_path):
    """Of 24 noises the four at which euler/5 errs most, worst first."""
    batches = [Draws.of(TARGET, 20_000).batch("compare", number, size) for number, size in enumerate((16, 8))]
    coarse, fine = (
        torch.cat([sample(model, b.noise, name, cond=b.cond) for b in batches]) for name in ("euler/5", "ab4/400")
    )
    rows = (coarse - fine).square().flatten(1).mean(1).argsort(descending=True)[:4]
    expected = torch.cat([coarse[rows, :1].sigmoid(), fine[rows, :1].sigmoid()], -1)
    torch.testing.assert_close(result.worst["euler/5"], expected, atol=1e-4, rtol=1e-4)


def test_bad_solvers_are_refused_before_any_work():
    calls = []

    def counting(x, t, y):
        calls.append(1)
        return model(x, t, y)

    for solvers, words in (
        ([], "no solvers"),
        (["dit-xl-2-256/5"], "vp"),
        (["rk4"], "rk4"),
        (["sit-xl-2-256"], "none of num_steps"),
        ([handmade("euler", 2, Grid.flow([1.0, 0.9, 0.0], [1.0, 0.9]))], "another noise schedule"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(counting, solvers, num_steps=(99,), shape=(4, 2, 2), cond=draw, progress=False)
    for options in ({"samples": 0}, {"budget": 1.5}, {"batch_size": True}):
        with pytest.raises(ValueError, match="whole number from 1"):
            compare(counting, ["euler/3"], shape=(4, 2, 2), cond=draw, progress=False, **options)
    with pytest.raises(ValueError, match="nothere"):
        compare(counting, [searched("ab2", 3)], rivals=("nothere",), shape=(4, 2, 2), cond=draw, progress=False)
    with pytest.raises(ValueError, match="no such field"):
        compare(counting, ["euler/3"], shape=(4, 2, 2), draw=draw, progress=False)
    with pytest.raises(ValueError, match="budget=4000.*no budget bounds"):
        compare(counting, ["rk45"], budget=4000, shape=(4, 2, 2), cond=draw, progress=False)
    with pytest.raises(ValueError, match="do you mean 'rk45', in compare alone"):
        sample(model, torch.zeros(2, 4, 2, 2), "rk45/10")
    assert not calls


def test_a_range_of_guidance_is_drawn_from():
    ranged = replace(TARGET, uncond={"y": 0.5}, guidance_scale=(1.0, 3.0))
    (row,) = compare(ranged, ["ab4/40"], samples=8, progress=False).rows
    assert row.nfe == "40x2" and row.rmse < 1e-3


def test_guidance_counts_twice():
    def guided(x, t, y):
        return model(x, t, y)

    target = Target(guided, (4, 2, 2), cond=draw, uncond={"y": 0.5}, guidance_scale=2.0)
    table = compare(target, [handmade("euler", 3)], samples=4, progress=False)
    assert table.rows[0].nfe == "3x2"


def test_a_family_runs_at_the_steps_it_has_and_names_stay_apart():
    twin = replace(handmade("ab2", 5), name="sit-xl-2-256/5")
    table = compare(TARGET, ["sit-xl-2-256", twin], num_steps=(3, 5, 10), samples=4, progress=False)
    names = [row.solver for row in table.rows]
    assert names == ["sit-xl-2-256/5", "sit-xl-2-256/10", "sit-xl-2-256-2/5"]
    assert table.rows[0].rmse != table.rows[2].rmse


def test_an_unmeasurable_distance_is_no_number(tmp_path):
    """One sample has no covariance; the file is still JSON."""
    table = compare(TARGET, ["euler/2"], samples=1, features=lambda x: x.flatten(1), progress=False)
    table.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["rows"][0]["frechet"] is None


@pytest.mark.parametrize("way", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_whatever_mode_it_is_called_in(way):
    from dss_fast.trajectory import dense_grid

    def net(x, t, y):
        return torch.tanh(y - x)

    options = {"num_steps": [3], "samples": 32, "progress": False}
    target = Target(net, (4,), cond=lambda n, generator: {"y": torch.randn(n, 4, generator=generator)})
    wanted = compare(target, ["ab2"], **options)
    dense_grid.cache_clear()  # it is made in that mode
    with way():
        inside = compare(target, ["ab2", find_solver("ab3/3")], **options)
        assert torch.is_inference_mode_enabled() == (way is torch.inference_mode)
    assert inside.rows[0].rmse == wanted.rows[0].rmse
    assert not any(images.is_inference() for images in inside.images.values())
    assert compare(target, ["ab2"], **options).rows[0].rmse == wanted.rows[0].rmse


def test_names_that_a_terminal_would_obey_are_printed_escaped():
    named = replace(find_solver("ab2/3"), name="\x1b[2Jab2/3\nYes\u202e", source="me")
    table = compare(lambda x, t: -x, [named], shape=(4,), rivals=["euler"], num_steps=[3], samples=32, progress=False)
    assert table.rows[0].solver == r"\x1b[2Jab2/3\nYes\u202e" and table.rows[0].solver in str(table)
    assert str(table).replace("\n", "").isprintable() and len(table.verdicts) == 1


@pytest.mark.parametrize("part", ["features", "classify", "decode"])
def test_a_users_function_that_works_in_place_changes_no_figure(part):
    """It gets copies: else the reference, by which all are measured, would become what the function made of it."""
    change = {
        "features": lambda x: x.clamp_(-0.3, 0.3).flatten(1),
        "classify": lambda x: x.mul_(2).flatten(1),
        "decode": lambda x: x.zero_(),
    }[part]
    options = dict(samples=16, progress=False)
    plain = compare(TARGET, [searched("ab4", 5)], **options)
    changed = compare(replace(TARGET, **{part: change}), [searched("ab4", 5)], **options)
    assert [row.rmse for row in changed.rows] == [row.rmse for row in plain.rows]
    assert [v.ratio for v in changed.verdicts] == [v.ratio for v in plain.verdicts]


@pytest.mark.parametrize("seed, num_steps, count", [(1, 5, 64), (5, 5, 128), (2, 5, 64), (3, 8, 64), (3, 5, 32)])
def test_heavy_tails_hide_no_rival(seed, num_steps, count):
    """Mixtures of few points in eight dimensions, where two to sixteen samples named a rival 12 to 76 % too weak."""
    centres = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = Target(Mixture(centres, 0.15), (8,), dtype=torch.float64)
    (verdict,) = compare(target, [searched("ab4", num_steps)], samples=count, progress=False).verdicts
    batches = [Draws.of(target, 20_000).batch("compare", k, min(64, count - 64 * k)) for k in range(-(-count // 64))]
    fine = [integrate(b.predictor(), b.noise, dense_grid(Flow(), 160)).last for b in batches]

    def error(solver):
        ends = [sample(target, b.noise, solver) for b in batches]
        return float(torch.cat([squares(x, y) for x, y in zip(ends, fine, strict=True)]).mean().sqrt())

    best = min(error(handmade(m, calls_within(m, num_steps), spacing=s)) for m in METHODS for s in SPACINGS)
    assert error(handmade("ab4", num_steps)) / best < 1.03 * verdict.ratio


@pytest.mark.parametrize("part", ["features", "classify", "labels"])
def test_a_users_function_that_fails_costs_its_own_figures_alone(part):
    def broken(x):
        raise KeyError("no")

    classify = {"classify": lambda x: x.flatten(1)} if part == "labels" else {}
    target = replace(TARGET, **{part: broken}, **classify)
    with pytest.warns(UserWarning, match="features, classify or labels failed .KeyError: 'no'"):
        result = compare(target, [searched("ab4", 5)], samples=16, progress=False)
    assert [row.rmse for row in result.rows] and result.verdicts and result.rows[0].accuracy is None


def unread(x):
    return x * torch.nan


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(classify=unread), "classify returned NaN for 8 of 8 samples.*none is read as a class"),
        (dict(classify=lambda x: x, labels=lambda cond: torch.full((8,), torch.nan)), "labels returned NaN for 8 of 8"),
    ],
)
def test_what_reads_nan_is_said(given, words):
    with pytest.warns(UserWarning, match=words):
        found = compare(lambda x, t: -0.7 * x, ["ab2/4"], shape=(3,), samples=8, progress=False, **given)
    assert found.rows[0].accuracy is None


def test_a_sample_that_a_classifier_cannot_read_is_switched_and_wrong():
    calls = []

    def classify(x):
        calls.append(x)
        return x if len(calls) == 1 else unread(x)

    with pytest.warns(UserWarning, match="classify returned NaN for 8 of 8 samples: they count as switched"):
        found = compare(
            lambda x, t: -0.7 * x,
            ["ab2/4"],
            shape=(3,),
            samples=8,
            progress=False,
            classify=classify,
            labels=lambda cond: torch.zeros(8, dtype=torch.long),
        )
    assert found.rows[0].switched == 1.0 and found.rows[0].accuracy == 0.0


@pytest.mark.parametrize(
    "real, words",
    [
        (torch.full((9, 3), torch.nan), "9 of 9 rows hold NaN"),
        (torch.ones(9), "floats"),
        (torch.ones(9, 3).long(), "floats"),
        ([[1.0]], "list"),
        (torch.ones(9, 4), "4 columns.*are 3"),
    ],
)
def test_real_features_that_are_none_are_refused(real, words):
    with pytest.raises(ValueError, match=f"real_features.*{words}"):
        compare(lambda x, t: -0.7 * x, ["ab2/4"], shape=(3,), samples=8, progress=False, real_features=real)


def test_one_number_of_steps_is_one():
    target = Target(lambda x, t: torch.tanh(x), (4,))
    rows = compare(target, ["ab2", "euler"], num_steps=3, samples=4, progress=False).rows
    assert {row.num_steps for row in rows} == {3}
    for steps in (0, True, [5, 2.5], [0]):
        with pytest.raises(ValueError, match="num_steps=.*whole number from 1"):
            compare(target, ["ab2"], num_steps=steps, samples=4, progress=False)
    assert len(repr(compare(target, ["ab2"], num_steps=3, samples=4, progress=False))) < 200
