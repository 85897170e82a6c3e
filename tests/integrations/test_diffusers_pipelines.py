"""DSSScheduler and from_pipeline in the pipelines of diffusers, on random networks of a few kilobytes."""

import warnings
from dataclasses import replace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dss_fast import VP, DiscreteVP, Flow, find_solver, handmade, sample  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler, from_pipeline  # noqa: E402
from examples.tiny_pipelines import FLOW, NAMES, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ROWS = tuple(
    f"{sign}{kind}"
    for sign in ("", "negative_")
    for kind in ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
) + ("prompt_embeds_mask", "class_labels")


def latents(pipe, arguments, n=5, **options):
    generator = torch.Generator().manual_seed(0)
    result = pipe(**{**arguments, **options}, num_inference_steps=n, generator=generator)
    return torch.as_tensor(result.images if hasattr(result, "images") else result.frames)


def learned(name):
    return "sit-xl-2-256" if name in FLOW else "dit-xl-2-256"


def scheduler_for(pipe, solver):
    return DSSScheduler.from_config(pipe.scheduler.config, solver=solver, strict=False)


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_run_and_equal_stock(name):
    pipe, arguments = build(name)
    stock = latents(pipe, arguments)
    config = pipe.scheduler.config
    pipe.scheduler = DSSScheduler.from_config(config, solver="euler")
    ours = latents(pipe, arguments)
    if name in FLOW:
        assert torch.equal(stock, ours)
    else:
        # random networks predict no noise: their latents grow to tens and hundreds, and the bound with them
        assert (stock - ours).abs().max() <= 1e-5 * max(1, stock.abs().max())
    if name in ("dit", "sd", "sdxl", "pixart", "wan"):  # the others give sigmas, which stock DPM++ refuses
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, **(flow if name in FLOW else {}))
        stock, config = latents(pipe, arguments), pipe.scheduler.config
        pipe.scheduler = DSSScheduler.from_config(config, solver="dpmpp_2m")
        assert (stock - latents(pipe, arguments)).abs().max() <= 1e-5 * max(1, stock.abs().max())
    pipe.scheduler = scheduler_for(pipe, learned(name))
    first = latents(pipe, arguments)
    assert first.isfinite().all() and torch.equal(first, latents(pipe, arguments))


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])
def test_a_users_sigmas_are_shifted_as_stock_shifts_them(name):
    pipe, arguments = build(name)
    config, sigmas = pipe.scheduler.config, [1.0, 0.8, 0.45, 0.2, 0.1]
    stock = latents(pipe, arguments, sigmas=sigmas)
    pipe.scheduler = DSSScheduler.from_config(config, solver="euler")
    assert torch.equal(stock, latents(pipe, arguments, sigmas=sigmas))
    pipe.scheduler = DSSScheduler.from_config(config, solver="sit-xl-2-256")
    with pytest.raises(ValueError, match="custom sigmas"):
        latents(pipe, arguments, sigmas=sigmas)


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_run_in_bfloat16(name):
    pipe, arguments = build(name, torch.bfloat16)
    pipe.scheduler = scheduler_for(pipe, [learned(name), "euler"])
    assert latents(pipe, arguments).float().isfinite().all()
    assert latents(pipe, arguments, n=4).float().isfinite().all()


def test_batch_sizes_and_step_counts_change_between_runs():
    pipe, arguments = build("sd3")
    pipe.scheduler = scheduler_for(pipe, "sit-xl-2-256")
    alone = latents(pipe, arguments)
    assert latents(pipe, build("sd3", batch=3)[1], n=8).shape[0] == 3
    assert torch.equal(alone, latents(pipe, arguments))
    with pytest.raises(ValueError, match="no table for 3 steps"):
        latents(pipe, arguments, n=3)


def test_an_aborted_run_leaves_nothing():
    pipe, arguments = build("flux")
    pipe.scheduler = scheduler_for(pipe, "sit-xl-2-256")
    clean = latents(pipe, arguments)

    def stop(pipe, i, t, kwargs):
        if i == 2:
            raise KeyboardInterrupt
        return {"latents": kwargs["latents"] * torch.nan}

    with pytest.raises(KeyboardInterrupt):
        latents(pipe, arguments, callback_on_step_end=stop)
    assert torch.equal(clean, latents(pipe, arguments))


def test_callbacks_preview_and_change_the_latents():
    pipe, arguments = build("flux")
    pipe.scheduler = scheduler_for(pipe, "ab2")
    previews = []

    def see(pipe, i, t, kwargs):
        previews.append(pipe.scheduler.predict_x0(kwargs["latents"]))
        return {}

    final = latents(pipe, arguments, callback_on_step_end=see)
    assert len(previews) == 5 and torch.equal(previews[-1], final)
    halved = latents(pipe, arguments, callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] / 2})
    assert halved.abs().max() < final.abs().max()


@pytest.mark.parametrize("name", ["flux", "sd", "sd3"])
def test_img2img_starts_part_way(name):
    pipe, arguments = build(name)
    kind = {"flux": "Flux", "sd": "StableDiffusion", "sd3": "StableDiffusion3"}[name]
    parts = pipe.components
    if name == "sd":
        parts = {**parts, "requires_safety_checker": False}
    image_pipe = getattr(diffusers, f"{kind}Img2ImgPipeline")(**parts)
    image_pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    if name == "sd":
        arguments = {k: v for k, v in arguments.items() if k not in ("height", "width")}

    def run(solver=None, **options):
        if solver:
            image_pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=solver, strict=False)
        return latents(image_pipe, arguments, 10, image=image, strength=0.6, **options)

    stock, ours = run(), run("euler")
    assert (stock - ours).abs().max() <= 1e-5 * max(1, stock.abs().max())
    started = []
    begin = DSSScheduler._begin

    def spy(self, i, sample):
        started.append(i)
        begin(self, i, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DSSScheduler, "_begin", spy)
        assert run(learned(name)).isfinite().all()
    assert started == [4]


@pytest.mark.parametrize("name", ["dit", "sd", "wan"])
def test_whole_pipelines_are_saved_and_loaded(name, tmp_path):
    pipe, arguments = build(name)
    own = handmade("ab2", 5, Flow()) if name in FLOW else find_solver("dit-xl-2-256/5")
    pipe.scheduler = scheduler_for(pipe, replace(own, name="mine/5"))
    before = latents(pipe, arguments)
    pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        absent = {key: None for key, value in pipe.components.items() if value is None}
        loaded = type(pipe).from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DSSScheduler
    torch.testing.assert_close(before, latents(loaded, arguments))  # Wan's weights come back in another layout
    assert loaded.scheduler.solver.name.partition("@")[0] == "mine/5"  # Wan's follows its shift


# ---- from_pipeline


def split(name, batch=3, **options):
    pipe, arguments = build(name, batch=batch, **options)
    del arguments["output_type"]
    rows = {key: arguments.pop(key) for key in ROWS if key in arguments}
    return pipe, rows, arguments


@pytest.mark.parametrize("name", NAMES)
def test_targets_do_what_the_pipeline_does(name):
    pipe, rows, arguments = split(name)
    scheduler = pipe.scheduler
    target = from_pipeline(pipe, rows, **arguments, batch_size=2)
    assert pipe.scheduler is scheduler
    assert type(target.schedule) is (Flow if name in FLOW else VP if name in ("dit", "pixart") else DiscreteVP)
    expected = {"dit": 4.0, "sd": 7.5, "sdxl": 5.0, "pixart": 4.5, "sd3": 7.0, "wan": 5.0, "sana": 4.5}
    assert target.guidance_scale == expected.get(name, 1.0)
    assert (target.uncond is None) == (name in ("flux", "qwen"))
    drawn = target.cond(7, torch.Generator().manual_seed(0))
    assert all(len(value) == 7 for value in drawn.values())
    table = handmade("ab2", 4, target.schedule)
    x = torch.randn(3, *target.shape, generator=torch.Generator().manual_seed(1))
    ours = sample(target, x, table, cond=target.cond.conditions)
    if target.decode is not None:
        images = target.decode(ours)
        assert images.shape[1] == 3 and 0 <= images.min() and images.max() <= 1
    if name == "dit":
        return  # takes no latents of the caller's
    pipe.scheduler = DSSScheduler.from_config(scheduler.config, solver=table)
    theirs = latents(pipe, {**arguments, **rows, "output_type": "latent"}, 4, latents=x.clone())
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_gradients_reach_the_time_and_the_sample():
    pipe, rows, arguments = split("flux")
    target = from_pipeline(pipe, rows, **arguments)
    x = torch.randn(3, *target.shape, requires_grad=True)
    t = torch.full((3,), 400.0, requires_grad=True)
    target.model(x, t, **target.cond.conditions).square().sum().backward()
    assert x.grad.abs().max() > 0 and t.grad.abs().max() > 0
    assert not any(p.requires_grad for p in target.model.parameters())


def test_true_guidance_beside_a_distilled_one():
    pipe, rows, arguments = split("flux")
    rows |= {"negative_prompt_embeds": torch.randn(1, 7, 32), "negative_pooled_prompt_embeds": torch.randn(1, 32)}
    target = from_pipeline(pipe, rows, true_cfg_scale=3.0, guidance_scale=2.0, **arguments)
    assert target.guidance_scale == 3.0 and set(target.uncond) == {"encoder_hidden_states", "pooled_projections"}
    assert torch.equal(target.cond.conditions["guidance"], torch.full((3,), 2.0))
    assert target.schedule.shift != 3.0  # e^mu of this resolution


@pytest.mark.parametrize("name, options", [("sd", {"guidance_rescale": 0.7}), ("qwen", {"true_cfg_scale": 4.0})])
def test_guidance_that_is_not_linear_is_refused(name, options):
    pipe, rows, arguments = split(name)
    if name == "qwen":
        rows |= {"negative_prompt_embeds": torch.randn(1, 16, 16)}
        rows |= {"negative_prompt_embeds_mask": torch.ones(1, 16, dtype=torch.long)}
    with pytest.raises(ValueError, match="not a linear guidance"):
        from_pipeline(pipe, rows, **{**arguments, **options})


def test_what_cannot_be_a_target_is_named():
    pipe, rows, arguments = split("sd")
    with pytest.raises(ValueError, match="as many rows"):
        from_pipeline(pipe, {**rows, "negative_prompt_embeds": rows["prompt_embeds"][:2]}, **arguments)
    with pytest.raises(ValueError, match="one negative prompt"):
        from_pipeline(pipe, {**rows, "negative_prompt_embeds": torch.randn(3, 7, 32)}, **arguments)
    with pytest.raises(ValueError, match="num_images_per_prompt"):
        from_pipeline(pipe, rows, num_images_per_prompt=2, **arguments)


def test_a_target_at_zero_terminal_snr_gives_tables_that_its_pipeline_runs():
    pipe, rows, arguments = split("sd")
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **options)
    target = from_pipeline(pipe, rows, **arguments)
    table = handmade("ab2", 4, target.schedule)
    x = torch.randn(3, *target.shape, generator=torch.Generator().manual_seed(1))
    ours = sample(target, x, table, cond=target.cond.conditions)
    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=table)
    theirs = latents(pipe, {**arguments, **rows, "output_type": "latent"}, 4, latents=x.clone())
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


def test_half_precision_finds_the_exact_scale():
    pipe, rows, arguments = split("sd", dtype=torch.bfloat16)
    target = from_pipeline(pipe, rows, **arguments)
    assert target.guidance_scale == 7.5


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "qwen"])
def test_a_target_moves_as_one(name):
    """To the meta device, where a tensor left on the CPU cannot meet the rest."""
    pipe, rows, arguments = split(name)
    target = from_pipeline(pipe, rows, **arguments).to("meta")
    x = sample(target, 2, handmade("euler", 2, target.schedule))
    assert x.device.type == "meta" and x.shape == (2, *target.shape)
    assert target.decode is None or target.decode(x).device.type == "meta"


def dynamic(name):
    """Bria's or EasyAnimate's pipeline as published, with a shift that depends on the resolution, and its mu."""
    pipe, arguments = build(name)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    told = {}
    watched = pipe.scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        told["mu"] = mu
        return watched(num_inference_steps, device, sigmas, mu, timesteps)

    pipe.scheduler.set_timesteps = set_timesteps
    stock = latents(pipe, arguments)
    return pipe, arguments, stock, float(told["mu"])


@pytest.mark.parametrize("name", ["bria", "easyanimate"])
@pytest.mark.parametrize("way", ["mu", "set_shift", "saved"])
def test_pipelines_that_pass_mu_to_flow_match_euler_alone(name, way, tmp_path):
    pipe, arguments, stock, mu = dynamic(name)
    own = pipe.scheduler.config
    with pytest.raises(ValueError, match=r"from_config as mu=\.\.\. \(EasyAnimate's is 1.*from 0.5 at 256 to 1.15 at"):
        pipe.scheduler = DSSScheduler.from_config(own, solver="euler")
        latents(pipe, arguments)
    if way == "set_shift":
        pipe.scheduler.set_shift(torch.e**mu)
    else:
        pipe.scheduler = DSSScheduler.from_config(own, solver="euler", mu=mu)
    if way == "saved":
        pipe.scheduler.save_pretrained(tmp_path)
        pipe.scheduler = DSSScheduler.from_pretrained(tmp_path)
    assert (latents(pipe, arguments) - stock).abs().max() <= 1e-5 * stock.abs().max()
    walked = pipe.scheduler.sigmas
    # Other methods on the same grid: those of a shift that does not change, along the same sigmas.
    pipe.scheduler = DSSScheduler.from_config(own, solver="dpmpp_2m", mu=mu)
    ours = latents(pipe, arguments)
    assert torch.allclose(pipe.scheduler.sigmas, walked, rtol=1e-6)
    stands = DSSScheduler.from_config(own, solver="dpmpp_2m", use_dynamic_shifting=False, shift=1.0)
    before = stands.set_timesteps
    stands.set_timesteps = lambda n=None, device=None, sigmas=None, timesteps=None: before(
        device=device, sigmas=walked[:-1].tolist()
    )
    pipe.scheduler = stands
    assert (latents(pipe, arguments) - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_learned_tables_follow_a_mu_that_is_told_and_say_when_there_is_none():
    pipe, arguments, _, mu = dynamic("bria")
    own = pipe.scheduler.config
    pipe.scheduler = DSSScheduler.from_config(own, solver="sit-xl-2-256", mu=mu)
    ours = latents(pipe, arguments)
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=torch.e**mu)
    pipe.scheduler = DSSScheduler.from_config(static.config, solver="sit-xl-2-256")
    assert torch.allclose(latents(pipe, arguments), ours, rtol=1e-5)
    pipe.scheduler = DSSScheduler.from_config(own, solver="sit-xl-2-256")
    with pytest.warns(UserWarning, match="no mu: solver sit-xl-2-256/5 stays at shift 1, .*from_config as mu="):
        assert not torch.allclose(latents(pipe, arguments), ours, rtol=1e-3)


def test_a_mu_that_is_told_for_nothing_is_named():
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(ValueError, match="mu=0.8 with use_dynamic_shifting=False.*shift=e.mu"):
        DSSScheduler.from_config(flow(shift=3.0).config, solver="euler", mu=0.8)
    scheduler = DSSScheduler.from_config(flow(use_dynamic_shifting=True).config, solver="euler", mu=0.8)
    with pytest.warns(UserWarning, match="mu=0.5, which this pipeline passes, goes before the mu=0.8"):
        scheduler.set_timesteps(5, mu=0.5)
    stock = flow(use_dynamic_shifting=True)
    stock.set_timesteps(5, mu=0.5)
    assert torch.equal(scheduler.sigmas, stock.sigmas)
    for kind, shift in (("exponential", 2.0), ("linear", 3.0)):
        stock = flow(use_dynamic_shifting=True, time_shift_type=kind)
        scheduler = DSSScheduler.from_config(stock.config, solver="euler")
        scheduler.set_shift(shift)
        scheduler.set_timesteps(5)
        stock.set_timesteps(5, mu=shift if kind == "linear" else float(torch.tensor(shift).log()))
        assert torch.allclose(scheduler.sigmas, stock.sigmas, rtol=1e-6)
