"""Solvers that call the unconditional branch at some steps only, in the hosts, against ``sample``."""

import types
from dataclasses import replace

import pytest
import torch

from dss_fast import VP, Flow, sample
from dss_fast.integrations.comfyui import Branches, make_sampler, numbers
from dss_fast.integrations.k_diffusion import sample_dss, sigmas_of
from dss_fast.methods import handmade
from dss_fast.searching.calls import forecast

F64 = torch.float64
SCALE, STEPS = 1.7, (0, 1, 3)
MIX = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=F64) * 0.3
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=F64)


def solver_of(family):
    schedule = Flow() if family == "flow" else VP()
    base = handmade("ab3" if family == "flow" else "dpmpp_2m", 5, schedule, spacing="shift2")
    rows = forecast(base, STEPS)
    rows[3, 0] += 0.1
    rows[3, 3] -= 0.1
    called = (*base.timesteps[:-1],)
    times = (called[0] + 0.02, *called[1:])
    rows = tuple(map(tuple, rows.tolist()))
    return replace(base, guided_steps=STEPS, guidance_coeffs=rows, network_timesteps=times, noise_coeffs=(0.01,) * 5)


def clean(z, level, label):
    """What a denoiser returns of z at a k-diffusion sigma: any smooth function of both."""
    return torch.tanh(z @ MIX + label * (1 + level.view(-1, 1).log1p())) / (1 + level.view(-1, 1))


def network(family):
    """The same as a velocity or an epsilon, as ``sample`` calls it."""

    def model(x, t, y):
        label = y.view(-1, 1)
        if family == "flow":
            sigma = 1 - t
            return (x - clean(x, sigma, label)) / -sigma.view(-1, 1)
        u = 0.999 - t / 1000
        alpha, sigma = VP().alpha_sigma(u.double())
        alpha, sigma = alpha.view(-1, 1), sigma.view(-1, 1)
        return (x - alpha * clean(x / alpha, (sigma / alpha).flatten(), label)) / sigma

    return model


def branches(calls):
    def run(x, sigma, both):
        calls.append(2 if both else 1)
        cond = clean(x, sigma, 1.0)
        return torch.cat([clean(x, sigma, 0.0), cond]) if both else cond

    return run


@pytest.mark.parametrize("family", ["flow", "vp"])
def test_sample_dss_is_sample(family):
    solver, calls, seen = solver_of(family), [], []
    labels = {"cond": {"y": torch.ones(2, dtype=F64)}, "uncond": {"y": 0.0}}
    wanted = sample(network(family), X, solver, **labels, guidance_scale=SCALE)
    ends = [1.0, 1.0] if family == "flow" else VP().alpha_sigma(torch.tensor([0.0, 1.0], dtype=F64))[0].tolist()
    given = {"branches": branches(calls), "guidance_scale": SCALE, "callback": seen.append, "disable": True}
    found = sample_dss(None, X / ends[0], sigmas_of(solver).double(), solver=solver, **given)
    torch.testing.assert_close(found * ends[1], wanted, rtol=1e-5, atol=1e-5)
    assert calls == [2, 2, 1, 2, 1] and all(told["denoised"].shape == X.shape for told in seen)


def test_a_table_of_scales_calls_once_where_it_is_one():
    calls = []
    given = {"branches": branches(calls), "guidance_scale": [3, 3, 1, 1, 1], "disable": True}
    sample_dss(None, X, torch.linspace(1, 0, 6, dtype=F64), solver="ab2", family="flow", **given)
    assert calls == [2, 2, 1, 1, 1]


def test_a_model_that_shows_one_output_is_refused():
    solver = solver_of("flow")
    sigmas = sigmas_of(solver).double()
    with pytest.raises(ValueError, match="give branches and guidance_scale"):
        sample_dss(None, X, sigmas, solver=solver, disable=True)
    with pytest.raises(ValueError, match="needs branches"):
        sample_dss(None, X, sigmas, solver=solver, guidance_scale=2.0, disable=True)
    with pytest.raises(ValueError, match="need guidance_scale"):
        sample_dss(None, X, sigmas, solver=solver, branches=branches([]), disable=True)


class CONST:
    pass


class CFGGuider:
    """As ComfyUI's: leaves the unconditional branch out at a cfg of 1, then runs the functions that look on."""

    def __init__(self, cfg):
        self.cfg, self.calls = cfg, []
        self.inner_model = types.SimpleNamespace(model_sampling=CONST())

    def predict_noise(self, x, sigma, model_options):
        alone = self.cfg == 1.0
        self.calls.append(1 if alone else 2)
        cond = clean(x, sigma, 1.0)
        uncond = torch.zeros_like(cond) if alone else clean(x, sigma, 0.0)
        result = cond if alone else uncond + self.cfg * (cond - uncond)
        for function in model_options.get("sampler_post_cfg_function", []):
            result = function({"denoised": result, "cond_denoised": cond, "uncond_denoised": uncond})
        return result


class Masked:
    """As ComfyUI's KSamplerX0Inpaint, around the guider."""

    def __init__(self, guider):
        self.inner_model = guider

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        return self.inner_model.predict_noise(x, sigma, model_options or {})


def test_comfyui_reads_both_branches_and_leaves_one_out():
    solver, guider = solver_of("flow"), CFGGuider(SCALE)
    sigmas, extra = sigmas_of(solver).double(), {"model_options": {"kept": 1}, "seed": 0}
    found = make_sampler({5: solver})(Masked(guider), X, sigmas, extra, disable=True)
    given = {"branches": branches([]), "guidance_scale": SCALE, "disable": True}
    torch.testing.assert_close(found, sample_dss(None, X, sigmas, solver=solver, **given))
    assert guider.calls == [2, 2, 1, 2, 1] and guider.cfg == SCALE and extra["model_options"] == {"kept": 1}


def test_comfyui_takes_a_cfg_for_each_step():
    guider, sigmas = CFGGuider(5.0), torch.linspace(1, 0, 6, dtype=F64)
    make_sampler("ab2", cfg=numbers("3, 3, 1,1 1"))(Masked(guider), X, sigmas, {}, disable=True)
    assert guider.calls == [2, 2, 1, 1, 1] and guider.cfg == 5.0
    assert numbers(" ") is None
    with pytest.raises(ValueError, match="a number for each step"):
        numbers("5,high")
    with pytest.raises(ValueError, match="give a number, 5 numbers"):
        make_sampler("ab2", cfg=[2.0, 1.0])(Masked(guider), X, sigmas, {}, disable=True)


@pytest.mark.parametrize(
    "extra, match",
    [
        ({"model_options": {"sampler_cfg_function": len}}, "sampler_cfg_function"),
        ({"model_options": {"sampler_post_cfg_function": [len]}}, "sampler_post_cfg_function"),
        ({"denoise_mask": torch.ones(1)}, "noise mask"),
    ],
)
def test_comfyui_refuses_what_would_be_lost(extra, match):
    with pytest.raises(ValueError, match=match):
        Branches(Masked(CFGGuider(2.0)), extra)
    with pytest.raises(ValueError, match="no CFGGuider"):
        Branches(Masked(types.SimpleNamespace()), {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", ["flow", "vp"])
def test_the_guider_folds_the_second_triangle_in(family):
    """The scheduler's plain steps on the guider's outputs are ``sample`` with the solver itself."""
    pytest.importorskip("diffusers")
    from dss_fast.integrations.diffusers.guider import DSSGuidance, scheduler_solver

    solver, calls = solver_of(family), []
    model, labels = network(family), {"cond": {"y": torch.ones(2, dtype=F64)}, "uncond": {"y": 0.0}}
    guider = DSSGuidance(solver.to_dict(), guidance_scale=SCALE).new()
    assert guider.solver == solver and guider.guidance_scale == SCALE

    def guided(x, t, y):
        guider.set_state(len(calls), 5, t)
        calls.append(guider.num_conditions)
        data = guider.prepare_inputs({"y": (y, 0 * y)})
        for one in data:
            one.noise_pred = model(x, t, one.y)
        return guider(data)[0]

    found = sample(guided, X, scheduler_solver(solver), cond=labels["cond"])
    torch.testing.assert_close(found, sample(model, X, solver, **labels, guidance_scale=SCALE), rtol=1e-6, atol=1e-6)
    assert calls == [2, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="has 5 steps, the run 7"):
        guider.set_state(0, 7, None)


def test_the_scheduler_refuses_what_it_cannot_see(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from dss_fast.integrations.diffusers import DSSScheduler

    path = tmp_path / "skips.json"
    replace(solver_of("flow"), network_timesteps=None).save(path)
    config = diffusers.FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ValueError, match="DSSGuidance"):
        DSSScheduler.from_config(config, solver=str(path)).set_timesteps(5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_classic_pipeline_runs_one_branch_from_a_step_on(kind):
    """Two prompts: the pipeline's own rows, doubled until then."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from dss_fast.integrations.diffusers import DSSScheduler
    from dss_fast.integrations.diffusers.guider import GuidanceOff
    from examples.tiny_pipelines import build

    pipe, arguments = build(kind, batch=2)
    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver="dpmpp_2m")
    network, rows = pipe.unet if kind == "sd" else pipe.transformer, []
    network.register_forward_hook(lambda module, args, kwargs, output: rows.append(len(output[0])), with_kwargs=True)
    given = {**arguments, "guidance_scale": 3.0, "num_inference_steps": 5}
    found = pipe(**given, callback_on_step_end=GuidanceOff(pipe, after=3))[0]
    assert rows == [4, 4, 4, 2, 2] and found.isfinite().all()
    rows.clear()
    pipe(**given)
    assert rows == [4] * 5


def test_a_pipeline_that_settles_its_guidance_once_is_refused():
    pytest.importorskip("diffusers")
    from dss_fast.integrations.diffusers.guider import GuidanceOff

    with pytest.raises(ValueError, match="settles its guidance once"):
        GuidanceOff(object(), after=3)
