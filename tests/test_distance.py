"""Distances of samples: against hand-computed ones, closed forms, and what makes them what they are called."""

import math

import pytest
import torch

from dss_fast import Target
from dss_fast.distance import Reference, criterion, energy_distance, frechet_distance, squares, three_digits

pytestmark = pytest.mark.fast
F64 = torch.float64


def gaussians(count, mean, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(scale, dtype=F64)
    return mean + scale * torch.randn(count, len(scale), generator=generator, dtype=F64)


def test_frechet_distance_of_gaussians():
    a, b = gaussians(20_000, 0, [1.0, 1.0, 1.0], 0), gaussians(20_000, 1, [1.0, 2.0, 0.5], 1)
    assert abs(frechet_distance(a, b) - (3 + 0 + 1 + 0.25)) < 0.15
    assert frechet_distance(a, a) < 1e-9


@pytest.mark.parametrize("rows", [(30, 20), (5, 4)])
def test_frechet_distance_is_the_textbooks_for_few_and_many_rows(rows):
    """Against the matrix square root by eigenvalues of C1 C2, of 8 features; also where covariances are singular."""
    a, b = (gaussians(n, k, [1.0 + j for j in range(8)], k) for k, n in enumerate(rows))
    c1, c2 = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(c1 @ c2).real.clamp_min(0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * roots
    assert math.isclose(frechet_distance(a, b), float(expected), rel_tol=1e-4)


def test_energy_distance_by_hand():
    """|0 - 3| and |4 - 3| in the mean, |0 - 4| and |3 - 3| between different rows; of one noise: |0 - 3|, |4 - 2|."""
    first = torch.tensor([[0.0], [4.0]])
    assert math.isclose(energy_distance(first, torch.tensor([[3.0], [3.0]])), 2 * 2 - 4 - 0)
    assert math.isclose(energy_distance(first, torch.tensor([[2.0], [3.0]]), same_noise=True), 2 * 2.5 - 4 - 1)
    assert energy_distance(first, first, same_noise=True) == 0


def test_energy_distance_sees_what_moments_do_not():
    """Two point masses at +-1 and a Gaussian of the same mean and variance, beyond what two draws of one have."""
    coin = torch.randint(0, 2, (4000, 1), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    normal, again = gaussians(4000, 0, [1.0], 1), gaussians(4000, 0, [1.0], 2)
    assert frechet_distance(coin, normal) < 0.01
    assert energy_distance(coin, normal) > 20 * abs(energy_distance(again, normal)) > 0


def test_energy_distance_has_no_bias():
    """The mean over 200 pairs of draws of 6 from one distribution is zero within three of its deviations."""
    found = torch.tensor([energy_distance(*gaussians(12, 0, [1.0] * 3, k).split(6)) for k in range(200)])
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(200) and 0.3 < (found < 0).double().mean() < 0.8


@pytest.mark.parametrize("distance", [frechet_distance, energy_distance])
def test_one_row_has_no_distribution(distance):
    assert math.isnan(distance(torch.zeros(1, 3), torch.zeros(5, 3)))


def test_criteria():
    errors = torch.tensor([1.0, 4.0, 100.0], dtype=F64)
    assert criterion("rmse", errors) == math.sqrt(35) and criterion("median", errors) == 2
    assert criterion("features", errors, torch.tensor([9.0, 9.0], dtype=F64)) == 3
    broken = torch.tensor([1.0, math.inf, 4.0], dtype=F64)
    assert criterion("rmse", broken) == math.inf and criterion("median", broken) == 2
    with pytest.raises(ValueError, match="select='best'.*rmse.*median.*features"):
        criterion("best", errors)
    with pytest.raises(ValueError, match="needs a target with features"):
        criterion("features", errors)


def test_squares():
    x = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    assert squares(x, torch.zeros(2, 1, 2)).tolist() == [5.0, 0.0]


def points(*values):
    return torch.tensor(values, dtype=F64)[:, None]


def reference(samples, **fields):
    return Reference(Target(lambda x, t: x, (1,), **fields), samples)


def test_switched_by_distance():
    """References 0, 10 and 20: pairs 10, 10 and 20 apart, so that a sample may be off by 5."""
    found = reference(points(0, 10, 20)).measure(points(4.9, 15.1, 20))
    assert found["switched"] == pytest.approx(1 / 3) and found["accuracy"] is None


def test_switched_by_class():
    """A sample near to the reference but of another class switches, one far off of the same class does not."""
    target = Target(lambda x, t: x, (1,), classify=lambda x: torch.cat([-x, x], 1))
    known = Reference(target, points(-0.1, 3, -3, 2), asked=torch.tensor([0, 1, 0, 0]))
    found = known.measure(points(0.1, 90, -3, 2))
    assert found["switched"] == 0.25 and found["accuracy"] == 0.5


def test_measures_by_hand():
    found = reference(points(*range(10))).measure(points(*[k + 0.1 * (k + 1) for k in range(10)]))
    errors = [0.1 * (k + 1) for k in range(10)]
    assert found["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 10)) and found["samples"] == 10
    assert found["rmse_low"] < found["rmse"] < found["rmse_high"]
    assert found["median"] == pytest.approx(0.5) and found["p90"] == pytest.approx(1.0)


def test_a_few_samples_that_switch_are_told_from_a_common_error():
    """The same RMSE, spread evenly or carried by one sample of a hundred."""
    base = gaussians(100, 0, [1.0] * 4, 0)
    even, one = base + 0.2, base.clone()
    one[0] += 2.0
    spread, single = reference(base).measure(even), reference(base).measure(one)
    assert spread["rmse"] == pytest.approx(single["rmse"]) == pytest.approx(0.2)
    assert single["median"] < 1e-12 and spread["median"] == pytest.approx(0.2)
    assert single["switched"] == 0.01 and spread["switched"] == 0


def test_distances_are_to_other_noises():
    """The reference itself is at the floor, which is that of halves; what is moved is far above."""
    base = gaussians(40, 0, [1.0] * 4, 0)
    known = reference(base)
    floor, itself, moved = known.distances(), known.measure(base), known.measure(base + 3)
    halves = [frechet_distance(base[a], base[b]) for a, b in known.splits]
    assert floor["frechet"] == itself["frechet"] == pytest.approx(sum(halves) / len(halves))
    assert all(sorted([*a.tolist(), *b.tolist()]) == list(range(40)) and len(a) == 20 for a, b in known.splits)
    assert floor["energy"] > 0 and itself["energy"] == 0
    assert moved["frechet"] > 30 + floor["frechet"] and moved["energy"] > 3
    assert known.measure(base.where(base < 1, math.inf))["frechet"] is None


def test_the_energy_distance_ranks_what_halves_cannot():
    """A scale 3 % off, of 200 samples in 8 dimensions: well below the floor, and always above no change at all."""
    for seed in range(5):
        known = reference(gaussians(200, 0, [1.0] * 8, seed))
        off, more = (known.measure(known.samples * scale)["energy"] for scale in (1.03, 1.06))
        assert 0 < off < more and off < known.distances()["energy"]


def test_the_worst_come_first():
    known = reference(points(0, 1, 2, 3))
    x, true = known.worst(points(0.5, 1, 5, 2), 2)
    assert x.flatten().tolist() == [5, 2] and true.flatten().tolist() == [2, 3]


@pytest.mark.parametrize(
    "value, text", [(0.0123456, "0.0123"), (1.2, "1.20"), (123.4, "123"), (1.234e-5, "1.23e-05"), (0.0, "0.00")]
)
def test_three_digits(value, text):
    assert three_digits(value) == text
