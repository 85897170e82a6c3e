"""fit: a table chosen in a few hundred calls, forward only, that is hardly ever worse than the hand-made ones."""

import math
import statistics

import pytest
import torch
from torch import nn

from dss_fast import VP, Flow, GaussNewton, Target, compare, fit, sample, search
from dss_fast.draws import Draws
from dss_fast.names import find_solver, library, published_steps
from dss_fast.rivals import contest
from dss_fast.searching.job import prepare
from dss_fast.searching.plan import WORTHWHILE, Sizes
from dss_fast.searching.starts import SIZES, candidates
from dss_fast.trajectory import dense_grid, integrate
from examples.mixture import Mixture

F64 = torch.float64


class Plate(nn.Module):
    """A mixture that counts its calls and will not be differentiated."""

    def __init__(self, spread=1.0):
        super().__init__()
        centres = torch.randn(20, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
        self.mixture, self.calls = Mixture(spread * centres, 0.3 * spread), 0

    def forward(self, x, t):
        assert not torch.is_grad_enabled() or not x.requires_grad
        self.calls += len(x)
        with torch.no_grad():
            return self.mixture(x, t)


def target(spread=1.0):
    return Target(Plate(spread), (6,), Flow(), dtype=F64)


def squares_on(one, count=128):
    batch = Draws.of(one, 99).batch("fresh", 0, count)
    with torch.no_grad():
        last = integrate(batch.predictor(), batch.noise, dense_grid(Flow(), 96)).last

    def squares(solver, start, stop):
        found = sample(one, batch.noise[start:stop], solver)
        return (found - last[start:stop]).square().mean(1).double()

    return squares, count


@pytest.mark.parametrize("num_steps", [5, 8])
def test_data_of_any_size_get_a_table_below_the_best_hand_made(num_steps):
    """Of mean squares on fresh noise; six samples tell no more of one search than that it does not lose."""
    ratios = []
    for spread in (0.4, 1.0, 2.5):
        one = target(spread)
        result = fit(one, num_steps, progress=False)
        assert result.evaluations <= 500 and one.model.calls <= 520  # to look at what a folder would hold is free
        squares, count = squares_on(one)
        best = next(iter(contest(squares, Flow(), num_steps, count).best.values()))
        ratios.append(float(squares(result.solver, 0, count).mean() / best.mean()))
    assert statistics.geometric_mean(ratios) < 0.75 and max(ratios) < 1.05


def test_it_says_what_it_was_chosen_by():
    result = fit(target(), 8, progress=False)
    (event,) = [event for event in result.history if event.stage == "start"]
    assert event.choice in str(result) and "of the error of" in event.choice and "samples that chose it" in event.choice


def test_a_budget_that_pays_for_no_round_chooses():
    job = prepare(target(), 10, budget=500)
    sizes = Sizes.of(job, 500)
    assert sizes.rounds == 0 and sizes.fresh == 0 and sizes.samples >= WORTHWHILE
    assert Sizes.of(job, 3_000).rounds == GaussNewton().rounds
    given = prepare(target(), 10, budget=500, initial="ab2")
    assert Sizes.of(given, 500).rounds  # there is nothing to choose
    one = Target(Plate().mixture, (6,), Flow(), dtype=F64)
    assert search(one, 10, budget=500, progress=False).solver == fit(one, 10, progress=False).solver


def test_the_library_is_tried_at_every_size_beside_hand_made_tables():
    assert "general" in library() and set(range(3, 13)) <= set(published_steps("general"))
    assert set(published_steps("networks")) == set(published_steps("general"))
    whole = len(SIZES) * 3 // 2  # general at every size, and of networks one for two of them
    head = candidates(Flow(), 8, {})[: whole * 3 // 2]
    assert sum(table.source == "hand-made" for table in head) == whole // 2
    tried = [
        (table.name.split("/")[0], round(math.log2(k), 3)) for table in head if (k := table.provenance.get("moved"))
    ]
    sizes = [round(math.log2(k), 3) for k in SIZES]
    assert {k for name, k in tried if name == "general"} == set(sizes)
    assert [k for name, k in tried if name == "networks"] == sizes[: len(SIZES) // 2]
    shifted = candidates(Flow(shift=3.0), 8, {})[0]
    assert shifted == find_solver("general/8").moved(3.0, Flow(shift=3.0))


def test_a_vp_model_is_served_by_the_same_library():
    """The mixture in the coordinates of a VP path; a table that was searched on flows is chosen for it."""
    plate, schedule = Plate(), VP(prediction_type="x0")

    def model(x, t):
        alpha, sigma = schedule.alpha_sigma(schedule.t_start - t / schedule.time_scale)
        total, time = (alpha + sigma)[:, None], alpha / (alpha + sigma)
        return x / total + (1 - time)[:, None] * plate(x / total, time)

    one = Target(model, (6,), schedule, dtype=F64)
    result = fit(one, 5, progress=False)
    assert result.starts[5].name.startswith(("general/5", "networks/5")) and result.solver == result.starts[5]
    (verdict,) = compare(one, [result.solver], samples=64, progress=False).verdicts
    assert verdict.ratio < 1


def test_fit_has_its_own_method():
    with pytest.raises(ValueError, match="method='lion': fit has its own, GaussNewton"):
        fit(target(), 5, method="lion")
