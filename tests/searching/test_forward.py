"""A search that only calls the model: by differences along a few directions, never by a gradient."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from dss_fast import Flow, GaussNewton, Target, compare, plan, search
from dss_fast.names import find_solver
from dss_fast.searching.budget import Ledger
from dss_fast.searching.descent import begun
from dss_fast.searching.forward import basis_of, directions_of
from dss_fast.searching.job import prepare
from dss_fast.searching.plan import Sizes
from dss_fast.searching.prior import curvature_at
from dss_fast.searching.rounds import Candidate
from dss_fast.searching.space import Space
from examples.mixture import Mixture

F64 = torch.float64
FORWARD = GaussNewton(gradients=False)


class Plate(nn.Module):
    """A mixture that counts its samples and refuses to be called where gradients are taken."""

    def __init__(self, strict=True):
        super().__init__()
        centres = torch.randn(12, 6, generator=torch.Generator().manual_seed(5), dtype=F64)
        self.mixture, self.strict, self.calls = Mixture(centres, 0.35), strict, 0

    def forward(self, x, t):
        assert not self.strict or not (torch.is_grad_enabled() or x.requires_grad or t.requires_grad)
        self.calls += len(x)
        with torch.no_grad():
            return self.mixture(x, t)


def target(strict=True):
    return Target(Plate(strict), (6,), Flow(), dtype=F64)


@pytest.mark.parametrize("num_steps", [3, 5, 12])
@pytest.mark.parametrize("name", ["general", "ab2", "dpmpp_2m"])
def test_the_basis_is_of_unit_curvature_and_of_the_largest(num_steps, name):
    space, start = Space("noise+start", Flow(), num_steps), find_solver(f"{name}/{num_steps}", Flow())
    basis, known = basis_of(space, start), curvature_at(space, start)
    directions = basis.shape[1]
    assert basis.shape[0] == len(known) and 1 < directions <= directions_of(num_steps)
    torch.testing.assert_close(basis.mT @ known @ basis, torch.eye(directions, dtype=F64), rtol=1e-6, atol=1e-6)
    assert bool((basis.norm(dim=0).diff() >= 0).all())  # the steepest first


@pytest.mark.parametrize("loss", ["trajectory", "end", torch.tanh])
def test_differences_are_the_gradient_and_all_of_the_jacobian(loss):
    """Beside the search's own backward: the same gradient, in the coordinates of the basis, up to the differences."""
    plain = Target(Plate().mixture, (6,), Flow(), dtype=F64)
    job = prepare(plain, 5, method=GaussNewton(samples=12, held_out_samples=0, loss=loss), budget=9_000)
    _, rounds = begun(job, Ledger(9_000))
    space = Space("noise+start", Flow(), 5)
    start = find_solver("general/5").moved(1.0)
    theta, basis = space.theta(start), basis_of(space, start) / 1_000  # so small that differences are derivatives
    candidate = Candidate(space, theta, (1.0,))
    there = rounds.attempt(candidate, 2, 2)
    by_gradient = rounds.differentiate(there)
    spent = rounds.ledger.evaluations
    trial = rounds.attempt(Candidate(space, theta, (1.0,), basis), 2, 2)
    by_differences = rounds.differentiate(trial)
    assert torch.equal(trial.values, there.values)
    wanted = basis.mT @ by_gradient.gradient
    torch.testing.assert_close(by_differences.gradient, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    each = (basis.shape[1] + 1) * 5 * sum(rounds.train.sizes[:2])
    assert rounds.ledger.evaluations - spent == each == rounds.cost(trial.candidate, 2, 2)
    # Along a step d of the basis the residual's squares bend by d'Hd, which values beside it say too.
    assert bool((torch.linalg.eigvalsh(by_differences.matrix) > 0).all())


def test_no_gradient_is_ever_taken_and_the_table_beats_hand_made_ones():
    one = target()
    result = search(one, 5, method=FORWARD, budget=3_000, progress=False)
    assert result.evaluations <= 3_000 and one.model.calls <= 3_000 + 20
    assert any(event.accepted for event in result.history if event.accepted is not None)
    first, last = result.starts[5], result.solver
    assert last != first
    (verdict,) = compare(one, [last], samples=96, progress=False).verdicts
    assert verdict.ratio < 1


def test_what_it_moves_stays_in_the_span_of_the_basis():
    space = Space("noise+start", Flow(), 4)
    result = search(target(), 4, method=FORWARD, budget=2_000, progress=False)
    start = result.starts[4]
    moved = space.theta(result.solver) - space.theta(start)
    moved[:4] -= moved[:4].mean()  # of the logarithms of the increments, which a Solver keeps to a constant
    basis = basis_of(space, start)
    within = basis @ torch.linalg.lstsq(basis, moved[:, None]).solution[:, 0]
    assert float((moved - within).norm()) < 1e-6 * max(1.0, float(moved.norm()))


def test_a_model_without_a_graph_is_searched_so_with_a_warning():
    with pytest.warns(UserWarning, match=r"without a graph: the search only calls it.*gradients=False"):
        found = search(target(strict=False), 4, budget=1_500, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = search(target(), 4, budget=1_500, method=FORWARD, progress=False)
    assert found.solver == asked.solver
    with pytest.warns(UserWarning, match="without a graph"):
        plan(target(strict=False), 4, budget=1_500)
    with pytest.raises(ValueError, match="without a graph"):
        search(target(strict=False), 4, budget=1_500, method=GaussNewton(gradients=True), progress=False)


@pytest.mark.parametrize("num_steps", [2, 13, [5, 20]])
def test_where_the_library_has_no_table_it_is_refused(num_steps):
    one = target()
    with pytest.raises(ValueError, match=r"num_steps=(2|13|20): without a gradient.*rounds=0"):
        search(one, num_steps, method=FORWARD, budget=3_000, progress=False)
    assert one.model.calls == 0
    guided = replace(one, cond={"y": torch.zeros(())}, uncond={"y": torch.zeros(())}, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"calls=8: .*gradient.*num_steps"):
        search(guided, 5, calls=8, method=FORWARD, progress=False)
    with pytest.raises(ValueError, match=r"without a graph.*num_steps=(2|13|20).*rounds=0"):
        search(target(strict=False), num_steps, budget=3_000, progress=False)


def test_a_killed_search_goes_on_to_the_same_table(tmp_path):
    """Every checkpoint of it: the basis is part of each."""
    options = dict(method=FORWARD, budget=2_000, progress=False, report=False)
    whole = search(target(), 4, **options).solver

    class Stopped(Plate):
        def forward(self, x, t):
            if self.calls > 1_200:
                raise KeyboardInterrupt
            return super().forward(x, t)

    halted = Target(Stopped(), (6,), Flow(), dtype=F64, key="plate")
    search(halted, 4, out=tmp_path / "run", **options)
    going = Target(Plate(), (6,), Flow(), dtype=F64, key="plate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert search(going, 4, out=tmp_path / "run", resume=True, **options).solver == whole


def test_a_small_budget_pays_for_fewer_directions():
    def directions(budget, steps):
        return Sizes.of(prepare(target(), steps, method=FORWARD, budget=budget), budget).directions

    assert directions(1_000, 8) < directions(3_000, 8) < directions(20_000, 8)
    assert directions(1_000, 8) == 6 and directions(3_000, [5, 8]) == 13
    assert Sizes.of(prepare(target(), 8, budget=1_000), 1_000).directions == 0


def test_a_start_by_hand_moves_too():
    result = search(target(), 5, method=FORWARD, initial="ab2", budget=2_500, progress=False)
    assert result.starts[5].name.startswith("ab2") and result.solver != result.starts[5]
