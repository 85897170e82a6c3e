"""A run under fake tensors, in a traced graph or in a transform leaves nothing behind that a later run would meet."""

import threading
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dss_fast import DiscreteVP, graph, handmade, names, sample, table
from dss_fast.modes import kept, outside_modes
from dss_fast.table import StepTable
from helpers.graph_fakes import FakeDevice

pytestmark = pytest.mark.fast
NAMES = ("sit-xl-2-256/8", "dit-xl-2-256/7", "ab2/7@shift1.7")


def net(x, t):
    return 0.5 * x + t[:, None]


def run(x, name, **options):
    """With the check for NaN that is there by default, where values can be read."""
    return sample(net, x, name, **options)


class Sampler(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return run(x, self.name)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def faked(x, name, **options):
    mode = FakeTensorMode(**options)
    with mode:
        return run(mode.from_tensor(x), name).shape


def watched(x, name):
    with Watching():
        return run(x, name)


def by_default_on_meta(x, name):
    with torch.device("meta"):
        return run(x, name)


def in_a_transform(transform):
    """These refuse the step, or differentiate it; either way the table is made within."""

    def within(x, name):
        try:
            transform(lambda x: run(x, name), x)
        except RuntimeError as error:
            assert "multistep_step_" in str(error)

    return within


WAYS = {
    "export": lambda x, name: torch.export.export(Sampler(name), (x,), strict=False).module()(x),
    "traced": lambda x, name: make_fx(lambda x: run(x, name))(x)(x),
    "traced, fake": lambda x, name: make_fx(lambda x: run(x, name), tracing_mode="fake")(x)(x),
    "traced, symbolic": lambda x, name: make_fx(lambda x: run(x, name), tracing_mode="symbolic")(x)(x),
    "TorchScript": lambda x, name: torch.jit.trace(lambda x: run(x, name), (x,))(x),
    "fake": faked,
    "fake and real": lambda x, name: faked(x, name, allow_non_fake_inputs=True),
    "watched": watched,
    "meta by default": by_default_on_meta,
    "inference": lambda x, name: torch.inference_mode()(run)(x, name),
    "functionalised": in_a_transform(lambda f, x: torch.func.functionalize(f)(x)),
    "mapped": in_a_transform(lambda f, x: torch.func.vmap(f)(x[None])),
    "pulled back": in_a_transform(torch.func.vjp),
    "pushed forward": in_a_transform(lambda f, x: torch.func.jvp(f, (x,), (x,))),
    "hidden fakes": lambda x, name: run(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x), name).shape,
}


def forget():
    for cache in (table._made, table._sent, names._handmade):
        cache.cache_clear()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("way", ["reference, mapped", "meta", "functional"])
def test_values_that_nobody_can_read_are_not_read(way, guided):
    x = torch.randn(3, 5)

    def pair(x, t, y):
        return net(x, t) * y[:, None]

    def run(x):
        y = torch.ones(3, device=x.device)
        options = dict(cond={"y": y}, uncond={"y": 0 * y}, guidance_scale=2.0) if guided else dict(cond={"y": y})
        return sample(pair, x, "ab2/4", backend="reference", **options)

    if way == "meta":
        assert run(x.to("meta")).shape == x.shape
    elif way == "functional":
        torch.testing.assert_close(torch.func.functionalize(run)(x.clone()), run(x))
    else:
        torch.testing.assert_close(torch.func.vmap(run)(x[None])[0], run(x))


def test_nan_is_found_in_a_transform_that_shows_its_values():
    with pytest.raises(FloatingPointError, match="NaN"):
        torch.func.jvp(lambda x: sample(lambda x, t: x / 0, x, "ab2/4"), (torch.zeros(1, 2),), (torch.ones(1, 2),))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_later_run_is_what_it_would_have_been(name, way, before):
    """Whether or not the table was kept before, and the run itself is right where it gives numbers."""
    x = torch.randn(3, 5)
    forget()
    expected = run(x, name)
    if not before:
        forget()
    result = WAYS[way](x, name)
    assert torch.equal(run(x, name), expected)
    rows = StepTable.of(names.find_solver(name))
    assert type(rows.weights) is torch.Tensor and not rows.weights.is_inference() and not rows.weights.requires_grad
    if isinstance(result, torch.Tensor):
        torch.testing.assert_close(result, expected)
    elif result is not None:
        assert result == expected.shape


def test_a_schedule_made_under_fakes_is_a_schedule():
    alphas = tuple(0.99**k for k in range(1, 101))
    with FakeTensorMode():
        made = DiscreteVP(alphas)
    u = torch.linspace(0, 1, 5)
    assert torch.equal(made.alpha_sigma(u)[0], DiscreteVP(alphas).alpha_sigma(u)[0])
    assert handmade("ab2", 4, made) == handmade("ab2", 4, DiscreteVP(alphas))


@pytest.mark.parametrize("way", ["fake", "traced", "transformed"])
def test_a_graph_is_not_captured_where_operators_are_traced(monkeypatch, way):
    fake = FakeDevice(monkeypatch)
    x = torch.randn(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if way == "fake":
            run(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x), "ab2/4", cuda_graph=True)
        elif way == "traced":
            make_fx(lambda x: run(x, "ab2/4", cuda_graph=True))(x)
        else:
            torch.func.vjp(lambda x: run(x, "ab2/4", cuda_graph=True), x)
        assert "new graph" not in fake.calls and not graph._devices
        torch.testing.assert_close(run(x, "ab2/4", cuda_graph=True), run(x, "ab2/4"))
    assert fake.calls.count("new graph") == 1


def test_what_is_kept_is_made_once_for_all_threads_and_errors_are_not_kept():
    seen = []

    @kept(2)
    def made(number):
        seen.append(threading.current_thread())
        if len(seen) == 1:
            raise ValueError("no number yet")
        return torch.full((), float(number), requires_grad=False) + torch.is_grad_enabled()

    with pytest.raises(ValueError, match="no number yet"):
        made(3)
    assert made(3) is made(3) and float(made(3)) == 3 and len(seen) == 2
    assert threading.current_thread() not in seen


def test_a_compiler_that_traces_meets_no_thread():
    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return x + outside_modes(lambda: torch.ones(3))

    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))
