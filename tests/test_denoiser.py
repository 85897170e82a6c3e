"""What a model does wrong is found at its first call, by name, before any work is spent on it."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dss_fast import Flow, GaussNewton, Lion, Target, sample, search
from dss_fast.denoiser import compute_dtype, not_finite
from dss_fast.step import multistep_step
from dss_fast.unroll import unroll

pytestmark = pytest.mark.fast
F64 = torch.float64


def velocity(x, t):
    return torch.tanh(2 * x) * (1 - t[:, None]) - 0.7 * x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.inner(x)


def under_no_grad(x, t):
    with torch.no_grad():
        return velocity(x, t)


def under_inference_mode(x, t):
    with torch.inference_mode():
        return velocity(x, t)


def detached(x, t):
    return velocity(x, t).detach()


@pytest.mark.parametrize("model", [under_no_grad, under_inference_mode, detached, torch.no_grad()(Net())])
@pytest.mark.parametrize("method", [GaussNewton(gradients=True), "lion"])
def test_a_search_of_a_model_without_gradients_is_refused_before_the_work(tmp_path, model, method):
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return model(x, t)

    for key in (None, "named"):
        with pytest.raises(ValueError, match=r"without a graph.*no_grad.*inference_mode.*detach"):
            search(Target(counted, (3,), key=key), 3, method=method, out=tmp_path / "run", progress=False)
    assert sum(calls) <= 4 and not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("key", [None, "named"])
def test_a_search_that_differentiates_nothing_takes_such_a_model(key):
    method = GaussNewton(rounds=0, samples=16, held_out_samples=16)
    assert search(Target(detached, (3,), key=key), 3, method=method, progress=False).solver.num_steps == 3


@pytest.mark.parametrize("model", [under_no_grad, detached])
def test_an_unroll_of_a_model_without_gradients_is_refused(model, backend):
    weights, times = torch.rand(1, 3, 7), torch.linspace(0, 1, 4)[:3]
    assert unroll(model, torch.randn(2, 3), weights, times, backend=backend).shape == (2, 3, 3)
    weights.requires_grad_()
    with pytest.raises(RuntimeError, match=r"without a graph"):
        unroll(model, torch.randn(2, 3), weights, times, backend=backend).sum().backward()


def writes(x, t):
    return velocity(x.mul_(0.5), t)


def writes_the_time(x, t):
    return velocity(x, t.mul_(0.5))


def writes_a_condition(x, t, y):
    return velocity(x + y.mul_(0.5), t)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("model, name", [(writes, "x"), (writes_the_time, "t"), (writes_a_condition, "y")])
def test_a_model_that_writes_into_its_input_is_refused_at_the_first_call(model, name, rows):
    if name == "t" and rows > 1:
        pytest.skip("PyTorch refuses: one time is expanded over the samples")
    cond = {"y": torch.ones(rows, 3)} if name == "y" else {}
    with pytest.raises(ValueError, match=rf"writes into {name}\b.*clone"):
        sample(model, torch.randn(rows, 3), "ab2/4", cond=cond)
    with pytest.raises(ValueError, match=rf"writes into {name}\b"):
        search(Target(model, (3,), cond=cond and (lambda n, generator: {"y": torch.ones(n, 3)})), 3, progress=False)


def by_data(x, t):
    x.data.mul_(0.5)
    return velocity(x, t)


def by_numpy(x, t):
    x.detach().numpy()[:] *= 0.5
    return velocity(x, t)


def in_a_list(x, t, y):
    return velocity(x + y["parts"][0].mul_(0.5), t)


def by_data_in_a_dict(x, t, y):
    y["parts"][0].data.mul_(0.5)
    return velocity(x, t)


def an_array(x, t, y):
    y *= 0.5
    return velocity(x, t)


HIDDEN = {
    "x": [by_data, by_numpy],
    "y['parts'][0]": [in_a_list, by_data_in_a_dict],
    "y": [an_array],
}


@pytest.mark.parametrize("name, model", [(name, model) for name, models in HIDDEN.items() for model in models])
def test_a_write_that_counts_no_version_is_refused_too(name, model):
    cond = {"x": {}, "y": {"y": np.ones(3, np.float32)}}.get(name, {"y": {"parts": [torch.ones(4, 3)]}})
    with pytest.raises(ValueError, match=rf"writes into {re.escape(name)}, which"):
        sample(model, torch.randn(4, 3), "ab2/4", cond=cond)
    if name == "x":
        with pytest.raises(ValueError, match="writes into x"):
            search(Target(model, (3,)), 3, progress=False)


def test_what_a_model_reads_may_hold_nan():
    """A mask of NaN and a repeated value are equal to themselves; so are integers and booleans."""
    cond = {"y": {"a": torch.full((2, 3), torch.nan), "b": torch.ones(1).expand(4, 3), "c": [torch.tensor([True])]}}
    sample(lambda x, t, y: velocity(x, t), torch.randn(2, 3), "ab2/4", cond=cond)


def test_samples_of_one_number_that_are_nan_are_counted():
    noise = torch.tensor([0.1, float("nan"), 0.3])
    with pytest.raises(FloatingPointError, match="NaN or Inf in 1 of 3 samples"):
        sample(lambda x, t: -x, noise, "euler/3")
    with pytest.raises(FloatingPointError, match="NaN or Inf for 3 of 3 samples at time 0"):
        sample(lambda x, t: x / 0, noise.nan_to_num(), "euler/3")


def test_states_of_8_bits_are_refused_before_any_call():
    noise = torch.tensor([[0.5, float("nan")]]).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn cannot be stepped: give dtype=..., one of float32"):
        sample(lambda x, t: pytest.fail("called"), noise, "euler/3")
    assert not_finite(noise) == 1
    assert sample(lambda x, t: -x, noise.float().nan_to_num(), "euler/3", dtype=torch.float16).dtype == torch.float16


def test_nan_in_the_noise_is_seen_where_the_model_hides_it():
    noise = torch.randn(3, 3)
    noise[1] = torch.nan
    with pytest.raises(FloatingPointError, match="the noise holds NaN or Inf in 1 of 3 samples"):
        sample(lambda x, t: velocity(x.nan_to_num(), t), noise, "ab2/4")
    with pytest.raises(FloatingPointError, match="3 of 3 samples ended in NaN or Inf.*float16"):
        sample(lambda x, t: torch.full_like(x, 6e4), torch.full((3, 3), 6e4).half(), "ab2/4")


def test_the_noise_and_the_kept_table_stay_as_they_were():
    noise = torch.randn(1, 3)
    before, expected = noise.clone(), sample(velocity, noise, "ab2/4")
    for model in (writes, writes_the_time):
        with torch.inference_mode(), pytest.raises(ValueError, match="writes into"):
            sample(model, noise, "ab2/4")
        noise.copy_(before)
        with torch.inference_mode():  # whose own tensors count no versions: a model gets copies
            own = noise.clone()
            sample(model, own, "ab2/4")
            assert torch.equal(own, before)
    assert torch.equal(sample(velocity, noise, "ab2/4"), expected)


def test_an_unroll_refuses_a_model_that_writes(backend):
    weights, times = torch.rand(1, 3, 7), torch.linspace(0, 1, 4)[:3]
    with pytest.raises((RuntimeError, ValueError), match="writes into x"):
        unroll(writes, torch.randn(2, 3), weights, times, backend=backend)


class Dropped(Net):
    def forward(self, x, t):
        return nn.functional.dropout(self.inner(x), 0.5, self.training)


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, t):
        return self.norm(self.inner(x))


class Inside(Net):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1))


@pytest.mark.parametrize("make", [Dropped, Normed, Inside])
def test_train_mode_is_said_once(make):
    model, noise = make(), torch.randn(8, 3)
    for call in (model, lambda x, t: model(x, t)):
        model.train()
        with pytest.warns(UserWarning, match="train mode.*eval()") as caught:
            sample(call, noise, "ab2/4")
        assert len(caught) == 1
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(call, noise, "ab2/4")


def test_a_model_that_is_the_same_in_both_modes_is_not_spoken_of():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.LayerNorm(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(lambda x, t: model(x), torch.randn(2, 3), "ab2/4")


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("make", [Dropped, Normed, Inside])
def test_a_search_runs_in_eval_mode_and_puts_the_modes_back(tmp_path, make, closed):
    torch.manual_seed(0)
    model = make()
    model.inner.eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    method = Lion(samples=64, batch_size=16, check_samples=16, teacher_steps=10)
    target = Target((lambda x, t: model(x, t)) if closed else model, (3,))
    results = [search(target, 3, method=method, progress=False) for _ in range(2)]
    assert results[0].solver == results[1].solver
    assert modes == [m.training for m in model.modules()] and model.inner.parameters().__next__().requires_grad
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    search(target, 3, method=method, out=tmp_path, progress=False, report=False)
    search(target, 3, method=method, out=tmp_path, progress=False, report=False, resume=True)


def needs_y(x, t, y):
    return velocity(x, t) + y


def time_first(t, x):
    return velocity(x, t)


class TimeFirst(nn.Module):
    def forward(self, timesteps, sample):
        return velocity(sample, timesteps)


@pytest.mark.parametrize(
    "model, words",
    [
        (needs_y, (r"model\(x \(B, \*S\), t \(B,\), \*\*cond\)", "needs y", "cond=")),
        (time_first, (r"model\(x \(B, \*S\), t \(B,\), \*\*cond\)", "takes t first", "lambda x, t")),
        (TimeFirst(), ("takes timesteps first",)),
        (lambda x: x, (r"model\(x \(B, \*S\), t \(B,\), \*\*cond\)", "only x")),
    ],
)
def test_a_model_of_another_signature_is_told_what_it_is_called_as(model, words):
    for run in (
        lambda: sample(model, torch.randn(2, 3), "ab2/4"),
        lambda: search(Target(model, (3,)), 3, progress=False),
    ):
        with pytest.raises(ValueError, match=".*".join(words)):
            run()


def test_what_a_model_raises_comes_with_what_it_was_given():
    """Wrong shapes: the model's own error, and beside it what it was called with."""
    with pytest.raises(RuntimeError) as caught:
        sample(Net(), torch.randn(2, 5), "ab2/4")
    assert r"model(x (2, 5) float32, t (2,) float32)" in " ".join(caught.value.__notes__)
    with pytest.raises(IndexError) as caught:
        sample(lambda x, t, y: x + y[:, 7], torch.randn(2, 5), "ab2/4", cond={"y": torch.ones(2, 1)})
    assert r"t (2,) float32, y=(2, 1) float32)" in " ".join(caught.value.__notes__)


@pytest.mark.parametrize(
    "output, words",
    [
        ((), "an empty tuple"),
        (torch.ones(2, 3, dtype=torch.int64), r"\(2, 3\) int64"),
        (None, "NoneType"),
        ([], "list"),
    ],
)
def test_an_output_that_is_none_is_named(output, words):
    with pytest.raises(ValueError, match=f"the model returned {words}"):
        sample(lambda x, t: output, torch.randn(2, 3), "ab2/4")


def test_a_model_of_zeros_is_searched_without_blaming_the_table():
    with pytest.raises(ValueError, match="returns zero"):
        search(Target(lambda x, t: 0 * x, (3,)), 3, progress=False)


def test_guidance_that_is_not_finite_is_named():
    for value in (float("inf"), float("nan")):
        for scale in (value, [1.0, value, 1.0, 2.0], torch.tensor([2.0, value])):
            with pytest.raises(ValueError, match="(?s)guidance_scale=.*(inf|nan).*finite"):
                sample(needs_y, torch.randn(2, 3), "ab2/4", cond={"y": 1.0}, uncond={"y": 0.0}, guidance_scale=scale)
        with pytest.raises(ValueError, match="guidance_scale=(inf|nan)"):
            Target(needs_y, (3,), uncond={"y": 0.0}, guidance_scale=value)


def test_guidance_without_its_branch_is_refused_everywhere():
    cond = {"y": torch.ones(2, 3)}
    for run in (
        lambda: sample(needs_y, torch.randn(2, 3), "ab2/4", cond=cond, guidance_scale=5),
        lambda: sample(needs_y, torch.randn(2, 3), "ab2/4", cond=cond, guidance_scale=torch.tensor([2.0, 3.0])),
        lambda: sample(Target(needs_y, (3,)), 2, "ab2/4", cond=cond, guidance_scale=[1.0, 2.0, 2.0, 1.0]),
        lambda: search(needs_y, 3, shape=(3,), cond=cond, guidance_scale=5.0, progress=False),
    ):
        with pytest.raises(ValueError, match="guidance_scale=.*needs uncond"):
            run()


def test_tangents_go_through_a_step_and_through_sampling():
    """Forward mode against differences: of noise, guidance, and of a step's four inputs."""
    noise, direction = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    y = torch.randn(2, 3, dtype=F64)
    guided = dict(cond={"y": y}, uncond={"y": 0.0})

    def run(x, scale):
        return sample(needs_y, x, "sit-xl-2-256/5", guidance_scale=scale, **guided)

    scales = torch.tensor([1.5, 2.0], dtype=F64), torch.tensor([1.0, -1.0], dtype=F64)
    _, tangent = torch.func.jvp(run, (noise, scales[0]), (direction, scales[1]))
    h = 1e-6
    ends = [run(noise + s * h * direction, scales[0] + s * h * scales[1]) for s in (1, -1)]
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-7)

    step = lambda *inputs: multistep_step(*inputs, torch.tensor([1]))  # noqa: E731
    inputs = [torch.randn(s, dtype=F64) for s in ((2, 3), (4, 3), (2, 3, 3), (1, 3, 7))]
    torch.autograd.gradcheck(step, [t.requires_grad_() for t in inputs], check_forward_ad=True, check_backward_ad=False)


def test_the_schedule_is_asked_for_by_what_it_is():
    for value in ("flow", Flow):
        with pytest.raises(ValueError, match=r"schedule=.*Flow\(\)"):
            sample(velocity, torch.randn(2, 3), "ab2/4", schedule=value)


def test_a_look_at_the_model_needs_its_budget():
    with pytest.raises(ValueError, match="budget=3: the look at the model alone takes 8"):
        search(velocity, 3, shape=(3,), budget=3, progress=False)


@pytest.mark.parametrize("shape", [(), 5, (3, 0), "ab", (2.0,)])
def test_a_shape_is_the_sizes_of_one_sample(shape):
    with pytest.raises(ValueError, match=r"shape=.*as in \(3, 32, 32\)"):
        Target(velocity, shape)


@pytest.mark.parametrize("seed", ["a", 1.5, True, None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed=.*whole number"):
        search(velocity, 3, shape=(3,), seed=seed, progress=False)


def test_a_number_of_samples_starts_at_one():
    for number in (0, -3):
        with pytest.raises(ValueError, match="from 1"):
            sample(Target(velocity, (3,)), number, "ab2/4")


def test_what_a_callback_keeps_stays():
    kept, (x, states) = [], sample(velocity, torch.randn(2, 3), "ab2/4", return_trajectory=True)
    x = sample(velocity, states[0], "ab2/4", callback=lambda at: kept.append(at["x"]))
    assert torch.equal(torch.stack(kept), states[1:]) and torch.equal(x, kept[-1])


def test_a_parameter_called_p_is_no_rate_of_a_dropout():
    """The look at what depends on train mode compared it with 0, and a tensor has no truth value."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(4))

        def forward(self, x, t):
            return x + self.p if self.training else x

    with pytest.warns(UserWarning, match=r"forward \(Learned\) depends on it"):
        assert sample(Learned().train(), torch.ones(2, 4), "euler/2").shape == (2, 4)


class Stored(nn.Linear):
    """Rests in a dtype that nothing is computed in, and computes in bfloat16, as storage casting has it."""

    def __init__(self, dtype):
        super().__init__(16, 16, bias=False)
        self.weight = nn.Parameter(self.weight.detach().mul(4).to(dtype), requires_grad=False)  # integers from 0 to 1

    def forward(self, x):
        return nn.functional.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16))


class Holds(nn.Module):
    """A network of such a layer, and what else there may be in one. seen: the dtypes that it was given."""

    def __init__(self, inner, extra=None, **said):
        super().__init__()
        self.inner, self.extra, self.seen = inner, extra, []
        for word, dtype in said.items():
            setattr(inner, word, dtype)

    def forward(self, x, t):
        self.seen.append(x.dtype)
        return self.inner(x.to(torch.bfloat16)).to(x.dtype)


def norm(dtype):
    return nn.LayerNorm(16).to(dtype)


half = nn.Linear(16, 16).to(torch.bfloat16)
DTYPES = {
    "float32": (Holds(nn.Linear(16, 16).to(torch.bfloat16), nn.Linear(64, 64)), torch.float32),
    "half, norms of float32 first": (nn.ModuleList([norm(torch.float32), half]), torch.bfloat16),
    "float64": (nn.Linear(2, 2).double(), torch.float64),
    "no parameters": (nn.ReLU(), None),
    "float8 alone": (Holds(Stored(torch.float8_e4m3fn)), None),
    "float8 e5m2 and norms": (Holds(Stored(torch.float8_e5m2), norm(torch.bfloat16)), torch.bfloat16),
    "float8, and says so": (
        Holds(Stored(torch.float8_e4m3fn), norm(torch.float32), dtype=torch.bfloat16),
        torch.bfloat16,
    ),
    "float8, and says that": (Holds(Stored(torch.float8_e4m3fn), dtype=torch.float8_e4m3fn), None),
    "int8 and norms": (Holds(Stored(torch.int8), norm(torch.float16)), torch.float16),
    "nf4, GGUF": (Holds(Stored(torch.uint8), compute_dtype=torch.bfloat16), torch.bfloat16),
    "nf4 before its first call": (Holds(Stored(torch.uint8), norm(torch.float16), compute_dtype=None), torch.float16),
}


@pytest.mark.parametrize("name", DTYPES)
def test_a_network_gets_what_it_computes_in_and_not_what_its_weights_rest_in(name):
    net, expected = DTYPES[name]
    assert compute_dtype(net.eval()) == expected
    if isinstance(net, Holds):
        x = torch.randn(4, 16)
        got, bare = sample(net, x, "ab2/4"), sample(lambda x, t: net(x.to(expected or x.dtype), t), x, "ab2/4")
        assert set(net.seen) == {expected or torch.float32} and torch.equal(got, bare)
