"""What a host may ask of a scheduler, one list, asked of ours in place of every class that it stands in for.

A host is a pipeline of diffusers, ComfyUI, kohya's trainers, InvokeAI, SD.Next, SGLang or vLLM-Omni; each entry is
something that one of them does. `PYTHONPATH=/folder/with/another/diffusers` runs the list on another release.
"""

import copy
import inspect
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers.configuration_utils import ConfigMixin  # noqa: E402
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402

from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from helpers.diffusers_classes import made, stood_in_for  # noqa: E402
from helpers.diffusers_runs import network, noise, run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
N, OTHER = 6, 4  # steps of the learned table, and of the hand-made method beside it


@dataclass
class Asked:
    """A class of diffusers, and ours in its place."""

    stock: Any
    ours: Any

    @property
    def flow(self):
        return self.ours.config.family == "flow"

    def fresh(self):
        return DSSScheduler.from_config(self.ours.config)


CONTRACT = []


def ask(question):
    CONTRACT.append(pytest.param(question, id=question.__name__))
    return question


# ---- as an object


@ask
def is_a_scheduler_of_diffusers(a):
    assert isinstance(a.ours, SchedulerMixin) and isinstance(a.ours, ConfigMixin)
    assert a.ours.order == 1 and len(a.ours) == a.ours.config.num_train_timesteps
    assert {type(a.stock).__name__, "EulerDiscreteScheduler"} & {kind.__name__ for kind in a.ours.compatibles}


@ask
def saves_and_loads(a, tmp_path):
    a.ours.save_pretrained(tmp_path)
    loaded = DSSScheduler.from_pretrained(tmp_path)
    for n in (N, OTHER):
        assert torch.equal(run(loaded, n), run(a.ours, n))


@ask
def gives_its_config_back_to_the_class_it_came_from(a):
    back = type(a.stock).from_config(a.ours.config)
    assert all(value == a.stock.config[key] for key, value in back.config.items() if key in a.stock.config
               and not key.startswith("_"))  # fmt: skip


@ask
def is_copied_and_sent_to_other_processes(a):
    net, x = network(), noise()
    a.ours.set_timesteps(OTHER)
    x = a.ours.step(net(x, a.ours.timesteps[0]), a.ours.timesteps[0], x).prev_sample
    for other in (copy.deepcopy(a.ours), pickle.loads(pickle.dumps(a.ours))):
        mine, theirs = x, x
        for i in range(1, OTHER):
            t = other.timesteps[i]
            theirs = other.step(net(theirs, t), t, theirs).prev_sample
    for i in range(1, OTHER):
        t = a.ours.timesteps[i]
        mine = a.ours.step(net(mine, t), t, mine).prev_sample
    assert torch.equal(mine, theirs)


@ask
def takes_entries_into_its_config(a):
    a.ours.register_to_config(sigma_data=1.0)  # as Cosmos' pipelines do
    assert a.ours.config.sigma_data == 1.0


# ---- times


@ask
def names_what_set_timesteps_takes(a):
    """retrieve_timesteps reads the signature, and a **kwargs counts for nothing there."""
    parameters = inspect.signature(a.ours.set_timesteps).parameters
    assert list(parameters)[:5] == ["num_inference_steps", "device", "sigmas", "mu", "timesteps"]
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    for call in ((N,), (N, "cpu")):
        a.ours.set_timesteps(*call)
        assert len(a.ours.timesteps) == a.ours.num_inference_steps == N and len(a.ours.sigmas) == N + 1
    a.ours.set_timesteps(num_inference_steps=N, device=None, mu=1.0)
    assert a.ours.timesteps.device.type == a.ours.sigmas.device.type == "cpu"
    assert isinstance(float(a.ours.sigmas[0]), float) and a.ours.timesteps.dtype == torch.float32


@ask
def counts_its_steps(a):
    assert a.ours.step_index is None and a.ours.begin_index is None
    a.ours.set_timesteps(N)
    a.ours.set_begin_index(0)
    for i, t in enumerate(a.ours.timesteps):
        assert a.ours.index_for_timestep(t) == i
        a.ours.step(noise(), t, noise())
        assert a.ours.step_index == a.ours._step_index == i + 1 and a.ours.begin_index == 0
    a.ours.set_timesteps(N)
    assert a.ours.step_index is None and a.ours.begin_index is None


@ask
def takes_another_shift(a):
    """SGLang's set_shift and set_timesteps(shift=)."""
    if not a.flow:
        assert "shift" in inspect.signature(a.ours.set_timesteps).parameters
        return
    if a.ours.config.use_dynamic_shifting:
        return
    told = DSSScheduler.from_config(a.ours.config, **{a.ours._shift_key: 5.0})
    wanted = run(told, OTHER)
    assert told.shift == 5.0
    a.ours.set_shift(5.0)
    assert a.ours.shift == 5.0 and torch.equal(run(a.ours, OTHER), wanted)
    again = a.fresh()
    again.set_shift(1.0)
    assert torch.equal(run(again, OTHER, shift=5.0), wanted) and again.shift == 5.0


# ---- a step


@ask
def names_what_step_takes(a):
    """Kandinsky's pipelines pass it by name, 91 look for eta and generator, InvokeAI for the rest."""
    parameters = list(inspect.signature(a.ours.step).parameters)
    assert parameters[:5] == ["model_output", "timestep", "sample", "generator", "return_dict"]
    assert (
        inspect.signature(a.ours.step).parameters["eta"].default == 0
    )  # pipelines that look for it pass it; what is no 0 is refused
    a.ours.set_timesteps(N)
    t, x = a.ours.timesteps[0], noise()
    scaled = a.ours.scale_model_input(x, t)
    result = a.ours.step(model_output=scaled, timestep=t, sample=x, generator=torch.Generator())
    tuple_ = a.ours.step(scaled, t, x, return_dict=False)
    assert (
        isinstance(tuple_, tuple) and torch.equal(result.prev_sample, tuple_[0]) and torch.equal(result[0], tuple_[0])
    )
    assert result.prev_sample.dtype == x.dtype and a.ours.init_noise_sigma > 0


@ask
def shows_the_clean_sample(a):
    """Previews of InvokeAI and SD.Next: what the network's own prediction at this step says."""
    a.ours.set_timesteps(N)
    x, net = noise(), network()
    for i, t in enumerate(a.ours.timesteps[:3]):
        m = net(x, t)
        result = a.ours.step(m, t, x)
        if a.flow:
            sigma = a.ours.sigmas[i]
            wanted = {None: x - sigma * m, "flow_prediction": x - sigma * m}[a.ours.config.prediction_type]
        else:
            alpha = 1 / (1 + a.ours.sigmas[i] ** 2).sqrt()
            sigma = a.ours.sigmas[i] * alpha
            x0s = {"epsilon": (x - sigma * m) / alpha, "sample": m, "v_prediction": alpha * x - sigma * m}
            wanted = x0s[a.ours.config.prediction_type or "epsilon"]
        torch.testing.assert_close(result.pred_original_sample, wanted, rtol=1e-4, atol=1e-3)
        x = result.prev_sample


# ---- noise and training


@ask
def adds_noise_as_trainers_do(a):
    """kohya and the training scripts of diffusers, before any run: times of training."""
    x0, eps = noise(), torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    if a.flow:
        kind = diffusers.FlowMatchEulerDiscreteScheduler
        flow = kind(num_train_timesteps=a.ours.config.num_train_timesteps, shift=a.ours.shift)
        if not a.ours.config.get("use_flow_sigmas") and not a.ours.config.use_dynamic_shifting:
            torch.testing.assert_close(a.ours.timesteps, flow.timesteps)
            torch.testing.assert_close(a.ours.sigmas, flow.sigmas)
            t = flow.timesteps[[10, 500, 900]]
            torch.testing.assert_close(a.ours.scale_noise(x0, t, eps), flow.scale_noise(x0, t, eps))
        assert torch.equal(a.ours.get_velocity(x0, eps, torch.tensor([1, 2, 3])), eps - x0)
        return
    t = torch.tensor([10, 500, 900])
    bar = a.ours.alphas_cumprod[t][:, None]
    torch.testing.assert_close(a.ours.add_noise(x0, eps, t), bar.sqrt() * x0 + (1 - bar).sqrt() * eps)
    torch.testing.assert_close(a.ours.get_velocity(x0, eps, t), bar.sqrt() * eps - (1 - bar).sqrt() * x0)
    if hasattr(a.stock, "alphas_cumprod"):
        torch.testing.assert_close(a.ours.alphas_cumprod.float(), a.stock.alphas_cumprod.float())
        torch.testing.assert_close(a.ours.betas, a.stock.betas.float())


@ask
def has_the_attributes_that_hosts_read(a):
    names = ["timesteps", "sigmas", "config", "order", "init_noise_sigma", "num_inference_steps", "step_index",
             "begin_index", "shift", "set_shift"]  # fmt: skip
    names += (
        ["sigma_min", "sigma_max"] if a.flow else ["alphas_cumprod", "alphas", "betas", "final_alpha_cumprod", "one"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a key of the config that is read as an attribute warns
        missing = [name for name in names if not hasattr(a.ours, name)]
    assert not missing
    for key in a.stock.config:  # such as lower_order_final, use_flow_sigmas or variance_type
        assert key.startswith("_") or key in a.ours.config, key


# ---- the classes we stand in for


@pytest.fixture(params=list(stood_in_for()))
def asked(request):
    stock = made(request.param)
    flow = DSSScheduler.from_config(stock).config.family == "flow"
    solver = ["sit-xl-2-256/6" if flow else "dit-xl-2-256/6", "dpmpp_2m"]
    return Asked(stock, DSSScheduler.from_config(stock, solver=solver, strict=False))


@pytest.mark.parametrize("question", CONTRACT)
def test_the_contract(question, asked, tmp_path):
    question(*([asked, tmp_path] if "tmp_path" in inspect.signature(question).parameters else [asked]))


def test_there_is_a_class_for_each_kind_of_grid():
    assert len(list(stood_in_for())) >= 20
