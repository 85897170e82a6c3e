"""The prior: coordinates in which data of any size are alike, and what curvature says there of a table's numbers."""

from dataclasses import replace

import pytest
import torch

from dss_fast import VP, Flow, find_solver
from dss_fast.searching.prior import coordinates, curvature, curvatures, directions, sizeless
from dss_fast.searching.space import Space
from dss_fast.x0form import X0Form

F64 = torch.float64


def table(kind="noise+start", n=5):
    space = Space(kind, Flow(), n)
    theta = space.theta(find_solver(f"ab2/{n}", Flow()))
    theta = theta + 0.05 * torch.randn(len(theta), generator=torch.Generator().manual_seed(1), dtype=F64)
    *parts, times = theta.split(space.sizes())
    return space, torch.cat([*parts, times.abs()])


def test_the_size_of_the_data_moves_the_noise_levels_alone():
    space, theta = table()
    form = X0Form.of(Flow(), space.solver(theta).tensors())
    here, there = coordinates(form), coordinates(form.moved(3.0))
    levels = slice(1, 5)
    torch.testing.assert_close(there[levels] - here[levels], torch.full((4,), 3.0, dtype=F64).log())
    torch.testing.assert_close(torch.cat([there[:1], there[5:]]), torch.cat([here[:1], here[5:]]))


@pytest.mark.parametrize("kind", ["plain", "noise", "noise+start"])
def test_directions_are_difference_quotients(kind):
    space, theta = table(kind)
    found, h = directions(space, theta), 1e-6

    def phi(theta):
        return coordinates(X0Form.of(Flow(), space.numbers(theta)))

    for k in range(len(theta)):
        step = torch.zeros_like(theta)
        step[k] = h
        torch.testing.assert_close(found[:, k], (phi(theta + step) - phi(theta - step)) / (2 * h), rtol=1e-5, atol=1e-5)


def test_along_the_size_of_the_data_nothing_is_charged():
    root = torch.randn(25, 25, generator=torch.Generator().manual_seed(2), dtype=F64)
    free = sizeless(root @ root.mT, 5)
    size = torch.zeros(25, dtype=F64)
    size[1:5] = 1
    assert float((free @ size).abs().max()) < 1e-9
    assert float(torch.linalg.eigvalsh(free)[0]) > -1e-9  # and nothing is rewarded


@pytest.mark.parametrize("n", [3, 8, 12])
def test_a_start_of_the_library_has_one_and_a_hand_made_start_has_none(n):
    space = Space("noise+start", Flow(), n)
    start = find_solver(f"general/{n}").moved(1.5)
    found = curvature(space, start)
    assert (
        found.shape == (sum(space.sizes()),) * 2
        and torch.equal(found, found.mT.contiguous())
        or (float((found - found.mT).abs().max()) < 1e-9 * float(found.abs().max()))
    )
    assert float(torch.linalg.eigvalsh(found)[-1]) > 0 and bool(found.isfinite().all())
    assert curvature(space, find_solver(f"ab2/{n}", Flow())) is None
    assert curvature(space, replace(start, provenance={})) is None
    there = Space("noise+start", VP(), n)
    assert curvature(there, find_solver(f"general/{n}").moved(1.5, VP())).isfinite().all()


def test_it_is_read_once():
    assert curvatures() is curvatures()
