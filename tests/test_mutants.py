"""A few hundred mutants of each kind of file; ``python -m scripts.mutants`` runs as many as are wanted."""

import random
import warnings

import pytest

pytest.importorskip("hypothesis", reason="a test dependency, in requirements-test.txt")

from hypothesis import HealthCheck, given, settings, strategies

from scripts.mutants import KINDS, Bench

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=strategies.integers(0, 2**32))
def test_a_mutant_is_refused_by_name_or_says_what_is_read(bench, kind, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bench.judge(kind, random.Random(seed)) in ("refused", "same")
