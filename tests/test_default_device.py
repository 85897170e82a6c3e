"""torch.set_default_device is the model's business: all else is drawn, planned and solved where it is without one."""

import pytest
import torch

from dss_fast import GaussNewton, Target, compare, plan, sample, search

pytestmark = pytest.mark.fast
METHOD = GaussNewton(samples=4, held_out_samples=0, teacher_evaluations=16, rounds=1)
NOISE = torch.ones(2, 6)


class Asking(torch.nn.Module):
    """A model that makes a tensor where the default device says."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.tensor(-0.7)), set()

    def forward(self, x, t):
        self.seen.add(torch.ones(1).device.type)
        return torch.tanh(2 * x) * (1 - t[:, None].to(x)) + self.weight * x


def drawn(count, generator):
    assert torch.rand(count, generator=generator).device.type == "cpu"
    return {}


def found(net):
    """What all four say of a model."""
    target, seen = Target(net, (6,), key="asking", cond=drawn), []
    said = plan(target, 3, method=METHOD, budget=2_000).samples
    table = search(target, 3, initial="ab2", method=METHOD, budget=2_000, progress=False).solver
    measured = compare(target, ["ab2/3", table], rivals=["euler"], samples=4, progress=False)
    generator = torch.Generator().manual_seed(0)
    ends = [sample(target, noise, table, generator=generator, callback=seen.append) for noise in (4, (4, 6), NOISE)]
    return said, table.to_dict()["coeffs"], [row.rmse for row in measured.rows], ends, [one["x0"] for one in seen]


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_a_default_device_changes_nothing_but_for_the_model(default):
    whole, net = found(Asking()), Asking()
    torch.set_default_device(default)
    try:
        mine, alone = found(net), sample(lambda x, t: -x, (2, 6), "euler/2")
    finally:
        torch.set_default_device(None)
    assert net.seen == {default} and alone.device.type == default
    assert mine[:3] == whole[:3]
    for ours, theirs in zip((*mine[3], *mine[4]), (*whole[3], *whole[4]), strict=True):
        assert torch.equal(ours, theirs)
