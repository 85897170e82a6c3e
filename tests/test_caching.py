"""The caching samplers of benchmarks/caching.py, on the exact flow of a mixture."""

import math

import pytest
import torch

from benchmarks import caching
from dss_fast import Target, find_solver, sample
from dss_fast.draws import Draws
from examples.mixture import Mixture

pytestmark = pytest.mark.fast
CENTRES = torch.tensor([[1.0, -1.0, 0.5], [-0.5, 1.0, 1.0], [0.0, 0.3, -1.0]])
TARGET = Target(Mixture(CENTRES), (3,), dtype=torch.float64)
BATCH = Draws.of(TARGET).batch("test", 0, 6)
STEPS = 12


def raw(x, u):
    return x


def end(base, cache=None):
    return caching.run(BATCH, find_solver(f"{base}/{STEPS}", BATCH.schedule), cache)


@pytest.mark.parametrize("base", ["euler", "ab2"])
def test_without_a_cache_it_is_the_solvers_run(base):
    torch.testing.assert_close(end(base), sample(TARGET, BATCH.noise, f"{base}/{STEPS}"))


@pytest.mark.parametrize("base", ["euler", "ab2"])
def test_caches_that_skip_nothing_change_nothing(base):
    reuse, forecast = caching.Reuse(raw, 0.0, STEPS), caching.Forecast(list(range(STEPS)), 2)
    assert torch.equal(end(base, reuse), end(base)) and torch.equal(end(base, forecast), end(base))
    assert reuse.calls == forecast.calls == STEPS


def test_forecasting_of_order_0_is_reuse():
    called = []

    class Noted(caching.Reuse):
        def __call__(self, i, x, u, call):
            return super().__call__(i, x, u, lambda: (called.append(i), call())[1])

    reuse = Noted(raw, 0.5, STEPS)
    x = end("euler", reuse)
    assert called[0] == 0 and called[-1] == STEPS - 1 and 2 < len(called) == reuse.calls < STEPS
    assert torch.equal(x, end("euler", caching.Forecast(called, 0))) and not torch.equal(x, end("euler"))


def test_forecasting_is_exact_for_a_polynomial():
    """Backward differences give a straight line from two calls on, whatever is between them."""
    line = lambda i: torch.tensor([2.0 + 3.0 * i])  # noqa: E731
    forecast = caching.Forecast([0, 2, 5], 1)
    found = [float(forecast(i, line(0), line(0), lambda i=i: line(i))) for i in range(9)]
    assert found == [2.0, 2.0, *(2.0 + 3.0 * i for i in range(2, 9))] and forecast.calls == 3


def test_second_order_uses_the_difference_of_differences():
    """y = i^2 called at 0, 2, 4: d1 = (16 - 4) / 2 = 6, d2 = (6 - 2) / 2 = 2; y(5) = 16 + 6 + 2 / 2."""
    forecast = caching.Forecast([0, 2, 4], 2)
    found = [float(forecast(i, None, None, lambda i=i: torch.tensor([float(i * i)]))) for i in range(6)]
    assert found[2] == 4 and found[4] == 16 and found[5] == 23


def test_a_higher_threshold_calls_less():
    calls = []
    for threshold in (0.0, 0.3, 1.0, 100.0):
        cache = caching.Reuse(raw, threshold, STEPS)
        end("euler", cache)
        calls.append(cache.calls)
    assert calls == sorted(calls, reverse=True) and calls[0] == STEPS and calls[-1] == 2


@pytest.mark.parametrize("calls", [4, 6, 9])
def test_the_threshold_is_found_for_a_number_of_calls(calls):
    solver = find_solver(f"euler/{STEPS}", BATCH.schedule)
    threshold = caching.threshold_for(calls, BATCH, solver, raw, (1.0, 0.0))
    cache = caching.Reuse(raw, threshold, STEPS)
    caching.run(BATCH, solver, cache)
    assert cache.calls == calls


@pytest.mark.parametrize("warm", [1, 2])
@pytest.mark.parametrize("calls", [5, 8, 10, 15])
def test_calls_are_spread_over_the_run(calls, warm):
    called = caching.spread(calls, 50, warm)
    assert len(set(called)) == calls and called == sorted(called)
    assert called[:warm] == list(range(warm)) and 50 - 50 / calls - 2 <= called[-1] < 50


def test_rescaling_maps_an_indicator_to_the_outputs_change():
    """Of an indicator that is the output itself the polynomial is the identity, where changes were seen."""
    predict = BATCH.predictor()
    poly = caching.rescaling(BATCH, predict, degree=2)
    x = BATCH.noise
    change = caching.relative_change(predict(x + 0.02, torch.tensor(0.02)), predict(x, torch.tensor(0.0)))
    assert math.isclose(caching.horner(poly, change), change, rel_tol=1e-6)


def test_psnr():
    x = torch.zeros(2, 1, 2, 2)
    assert math.isclose(caching.psnr(x, x + 0.1), 20, rel_tol=1e-6)
