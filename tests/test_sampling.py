"""The loop: any shape, dtype and model; conditions and guidance; what it reports and what it refuses."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from dss_fast import VP, Flow, Solver, find_solver, handmade, sample
from dss_fast.table import StepTable

pytestmark = pytest.mark.fast
GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(12, 12, generator=GENERATOR, dtype=torch.float64) / 4


def model(x, t, y=None, strength=1.0):
    """A nonlinear network over flattened samples that reads its time and its conditions."""
    flat = x.flatten(1)
    matrix = MIX[: flat.shape[1], : flat.shape[1]].to(x)
    out = torch.tanh(flat @ matrix + (t[:, None] / (1 + t[:, None])).to(x))
    if y is not None:
        out = out + strength * y[:, None].to(x)
    return out.reshape(x.shape)


def by_hand(solver, schedule, x, network, guidance=1.0):
    """The definition, written out."""
    table = StepTable.build(schedule, solver.tensors(), guidance)
    weights, times = table.weights, table.times
    first, history = x, []
    for i in range(solver.num_steps):
        a, p, q, g = weights[0, i, :4]
        history.append(p * x + q * network(x, times[i], g))
        x = a * x + sum(weights[0, i, 4 + j] * y for j, y in enumerate(history))
        if solver.noise_coeffs is not None:
            x = x + weights[0, i, -1] * first
    return x


SHAPES = [(3, 12), (1, 3, 4), (2, 3, 2, 2), (5, 1, 2, 3, 2), (4,), (0, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["sit-xl-2-256/5", "dit-xl-2-256/6", "ab4/7"])
def test_any_shape(shape, name):
    x = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    network = (lambda x, t: torch.sin(x + 0.01)) if len(shape) == 1 else model
    kept = x.clone()
    result = sample(network, x, name)
    solver = find_solver(name) if "xl" in name else handmade("ab4", 7)
    schedule = VP() if solver.family == "vp" else Flow()
    expected = by_hand(solver, schedule, x, lambda x, t, g: network(x, t.expand(len(x))))
    assert result.shape == x.shape and torch.allclose(result, expected, rtol=1e-10)
    assert torch.equal(x, kept), "the caller's noise was overwritten"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 1e-2)])
def test_dtypes(dtype, tolerance):
    x = torch.randn(4, 12, generator=GENERATOR, dtype=torch.float64)
    truth = sample(model, x, "sit-xl-2-256/8")
    result = sample(model, x.to(dtype), "sit-xl-2-256/8")
    assert result.dtype == dtype
    assert float((result.double() - truth).norm() / truth.norm()) < tolerance


def test_half_precision_module_in_a_float32_loop():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x, t):
            assert x.dtype == self.layer.weight.dtype and t.dtype == torch.float32
            return self.layer(x)

    net = Net().bfloat16()
    x = torch.randn(4, 12)
    result = sample(net, x, "euler/5")
    assert result.dtype == torch.float32
    assert sample(net, x, "euler/5", history_dtype=torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3.0, convention="diffusers"), VP()], ids=str)
def test_guidance(schedule):
    rows, n = 6, 5
    x = torch.randn(rows, 12, generator=GENERATOR, dtype=torch.float64)
    y = torch.arange(rows).double()
    solver = handmade("ab2", n, schedule)
    options = {"schedule": schedule, "cond": {"y": y}, "uncond": {"y": -1.0}}

    def guided(x, t, g):
        t = t.expand(len(x))
        u, c = model(x, t, torch.full((rows,), -1.0).double()), model(x, t, y)
        return u + g * (c - u)

    expected = by_hand(solver, schedule, x, guided, 2.5)
    assert torch.allclose(sample(model, x, solver, guidance_scale=2.5, **options), expected)
    per_sample = sample(model, x, solver, guidance_scale=torch.linspace(1, 3, rows), **options)
    for k in range(rows):
        scale = float(torch.linspace(1, 3, rows)[k])
        alone = sample(model, x, solver, guidance_scale=scale, **options)
        assert torch.allclose(per_sample[k], alone[k])
    per_step = [1.0, 2.0, 3.0, 2.0, 1.5]
    expected = by_hand(solver, schedule, x, guided, torch.tensor(per_step))
    assert torch.allclose(sample(model, x, solver, guidance_scale=per_step, **options), expected)
    both = torch.tensor(per_step).expand(rows, n)
    assert torch.allclose(sample(model, x, solver, guidance_scale=both, **options), expected)


def test_scale_one_runs_no_second_branch():
    sizes = []

    def counting(x, t, y):
        sizes.append(len(x))
        return model(x, t, y)

    x, y = torch.randn(3, 12), torch.ones(3)
    sample(counting, x, "euler/2", cond={"y": y}, uncond={"y": 0.0}, guidance_scale=1.0)
    assert sizes == [3, 3]
    sizes.clear()
    sample(counting, x, "euler/2", cond={"y": y}, uncond={"y": 0.0}, guidance_scale=1.5)
    assert sizes == [6, 6]


def test_guided_channels_as_dit_does():
    x = torch.randn(2, 3, 2, 2, generator=GENERATOR, dtype=torch.float64)
    y = torch.tensor([1.0, 2.0], dtype=torch.float64)
    options = {"cond": {"y": y}, "uncond": {"y": 0.0}}
    partly = sample(model, x, "euler/1", guidance_scale=3.0, guided_channels=2, **options)
    full = sample(model, x, "euler/1", guidance_scale=3.0, **options)
    plain = sample(model, x, "euler/1", cond={"y": y})
    assert torch.allclose(partly[:, :2], full[:, :2]) and torch.allclose(partly[:, 2:], plain[:, 2:])
    with pytest.raises(ValueError, match="guided_channels=4.*1 to 3"):
        sample(model, x, "euler/1", guidance_scale=3.0, guided_channels=4, **options)


def test_extended_table():
    solver = Solver(
        (0, 0.3, 0.6, 1),
        ((0.9, 0, 0), (-0.4, 1.3, 0), (0.1, -0.5, 1.5)),
        Flow(),
        noise_coeffs=(0.05, -0.1, 0.02),
        network_timesteps=(0.01, 0.33, 0.65),
        free_rows=True,
    )
    x = torch.randn(3, 12, generator=GENERATOR, dtype=torch.float64)
    expected = by_hand(solver, Flow(), x, lambda x, t, g: model(x, t.expand(len(x))))
    assert torch.allclose(sample(model, x, solver), expected)


def test_callback_and_trajectory():
    x, seen = torch.randn(2, 12, dtype=torch.float64), []
    result, states = sample(model, x, "ab3/4", callback=seen.append, return_trajectory=True)
    assert states.shape == (5, 2, 12) and torch.equal(states[0], x) and torch.equal(states[-1], result)
    assert [s["step"] for s in seen] == [0, 1, 2, 3] and seen[-1]["u"] == 1
    assert all(torch.equal(s["x"], states[s["step"] + 1]) for s in seen)
    assert torch.allclose(seen[-1]["x0"], result)  # at u = 1 of a flow nothing is left to remove
    constant = torch.full((2, 12), 0.7, dtype=torch.float64)
    sample(
        lambda x, t: constant, x, "euler/3", schedule=VP(prediction_type="x0"),
        callback=lambda s: torch.testing.assert_close(s["x0"], constant),
    )  # fmt: skip


def test_noise_from_a_generator():
    generator = torch.Generator().manual_seed(7)
    a = sample(model, (2, 12), "euler/3", generator=generator)
    b = sample(model, torch.randn(2, 12, generator=torch.Generator().manual_seed(7)), "euler/3")
    assert torch.equal(a, b)
    assert sample(model, (2, 12), "euler/3", dtype=torch.float64).dtype == torch.float64


def bad(x, t):
    out = model(x, t)
    if float(t[0]) > 0.5:
        out[1] = float("nan")
    return out


class Kinds(nn.Module):
    def forward(self, x, t, label):
        return x


@pytest.mark.parametrize(
    "run, kind, words",
    [
        (lambda x: sample(bad, x, "euler/4"), FloatingPointError, ("1 of 3 samples", "step 3 of 4")),
        (lambda x: sample(lambda x, t: x[:, :2], x, "euler/4"), ValueError, ("(3, 2)", "(3, 12)")),
        (lambda x: sample(lambda x, t: None, x, "euler/4"), ValueError, ("NoneType",)),
        (lambda x: sample(model, x, "euler/4", cond={"label": x}), ValueError, ("'label'", "y, strength")),
        (lambda x: sample(Kinds(), x, "euler/4", cond={"y": x}), ValueError, ("'y'", "label")),
        (lambda x: sample(model, x, "euler/4", cond={"y": torch.ones(2)}), ValueError, ("cond", "2 rows", "3 sam")),
        (lambda x: sample(model, x, "euler"), ValueError, ("euler/10",)),
        (lambda x: sample(model, x, "rk4/4"), ValueError, ("rk4/4", "sit-xl-2-256", "dpmpp_2m")),
        (lambda x: sample(model, x, "heun/4"), ValueError, ("num_steps=4", "odd", "3 or 5")),
        (lambda x: sample(model, x, "gone.json"), OSError, ("gone.json",)),
        (lambda x: sample(model, x, 10), ValueError, ("10", "Solver")),
        (lambda x: sample(model, x, "dit-xl-2-256/5", schedule=Flow()), ValueError, ("vp", "flow")),
        (lambda x: sample(model, x.long(), "euler/4"), ValueError, ("int64", "floating")),
        (lambda x: sample(model, x, "euler/4", cond={"y": x[:, 0]}, uncond={"y": 0.0}, guidance_scale=[1.0, 2.0]),
         ValueError, ("guidance_scale", "(2,)", "4 numbers")),
        (lambda x: sample(model, x, "euler/4", backend="metal"), ValueError, ("metal", "reference")),
    ],
)  # fmt: skip
def test_errors_say_what_and_where(run, kind, words):
    with pytest.raises(kind) as error:
        run(torch.randn(3, 12))
    text = " ".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert all(word in text for word in words), text


def test_the_models_own_exception_surfaces_unchanged():
    failure = KeyError("mine")

    def failing(x, t):
        raise failure

    with pytest.raises(KeyError) as error:
        sample(failing, torch.randn(1, 3), "euler/4")
    assert error.value is failure and "step 0 of 4" in error.value.__notes__[-1]


def test_a_model_that_ignores_its_condition_is_noticed():
    with pytest.warns(UserWarning, match="ignore"):
        sample(
            lambda x, t, **kwargs: -x,
            torch.randn(2, 3),
            "euler/2",
            cond={"y": torch.ones(2)},
            uncond={"y": 0.0},
            guidance_scale=2.0,
        )


def test_import_loads_no_compiler_no_triton_no_pictures():
    code = (
        "import sys, torch; before = set(sys.modules); import dss_fast; "
        "bad = 'triton diffusers lion_pytorch matplotlib jinja2 torch.utils.cpp_extension torch._dynamo'; "
        "found = set(bad.split()) & (set(sys.modules) - before); assert not found, found; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_conditions_can_be_differentiated_through_the_doubled_call():
    from dss_fast.denoiser import Denoiser

    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    denoise = Denoiser(model, {"y": y}, {"y": 0.0})
    x, t = torch.randn(3, 12, dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64)
    with torch.no_grad():
        denoise(x, t)
    (gradient,) = torch.autograd.grad(denoise(x, t).sum(), y)
    assert torch.allclose(gradient, torch.full_like(y, 12))
