"""benchmarks/zoo: each flow loads, is what its entry says, and has a gradient; the mixture of unequal axes is exact."""

import importlib.util

import pytest
import torch

from benchmarks import zoo
from benchmarks.zoo import data
from benchmarks.zoo.models import WideMixture
from dss_fast import Flow
from examples.mixture import Mixture

NEEDS = {"patches8_mixture": ("sklearn", "PIL"), "digits16_mixture": ("sklearn",)}


@pytest.mark.fast
@pytest.mark.parametrize("name", zoo.NAMES)
def test_each_is_a_frozen_flow_of_its_shape(name):
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"the centres are scikit-learn's, read with {missing}")
    found = zoo.target(name)
    assert isinstance(found.schedule, Flow) and found.name == name and zoo.KIND[name] == zoo.ZOO[name].kind
    tensors = [*found.model.parameters(), *found.model.buffers()]
    assert not any(x.requires_grad for x in tensors) and {x.dtype for x in tensors} == {torch.float32}
    assert not any(module.training for module in found.model.modules())
    samples = found.draw(2, torch.Generator().manual_seed(0))
    x, u = samples.noise.requires_grad_(), torch.tensor(0.4)
    velocity = samples.predictor()(x, u)
    assert velocity.shape == (2, *found.shape) and velocity.dtype == torch.float32 and velocity.isfinite().all()
    (gradient,) = torch.autograd.grad(velocity.square().sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    again = zoo.target(name).draw(2, torch.Generator().manual_seed(0))
    assert again.predictor()(again.noise, u).equal(velocity)
    if name in zoo.TRAINED:  # what no training leaves at 0: the last layer, and with it the output
        assert velocity.std() > 0.1 and found.model.final.weight.abs().max() > 0


def test_every_kind_is_there_and_weights_stay_small():
    assert set(zoo.KIND.values()) == {"mixture", "conv", "transformer", "mixer"}
    sizes = {path.stem: path.stat().st_size for path in zoo.WEIGHTS.glob("*.safetensors")}
    assert set(sizes) == set(zoo.TRAINED)
    assert max(sizes.values()) < 400_000 and sum(sizes.values()) < 2_500_000


def test_a_package_that_is_missing_is_named_as_it_is_installed(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match="comes with skimage: pip install scikit-image"):
        data.installed("skimage/data/brick.png")


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="name='digits9_mlp'.*digits8_mlp"):
        zoo.target("digits9_mlp")


def test_the_mixture_of_unequal_axes_is_the_other_at_equal_ones_and_each_axis_alone():
    generator = torch.Generator().manual_seed(0)
    centres, x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(5, generator=generator, dtype=torch.float64)
    equal = WideMixture(centres, torch.full((3,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(equal(x, t), Mixture(centres, 0.3)(x, t))
    widths = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    one = WideMixture(centres[:1], widths)(x, t)  # of one component every axis is a flow of its own
    for k, width in enumerate(widths.tolist()):
        alone = Mixture(centres[:1, k : k + 1], width)(x[:, k : k + 1], t)
        torch.testing.assert_close(one[:, k : k + 1], alone)
    with pytest.raises(ValueError, match="bandwidths.*above 0"):
        WideMixture(centres, -widths)
