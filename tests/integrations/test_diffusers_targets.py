"""from_pipeline on the kinds of pipelines that once broke it, and the request that a table carries from its search."""

import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dss_fast import GaussNewton, Solver, handmade, plan, sample, search  # noqa: E402
from dss_fast.__main__ import main  # noqa: E402
from dss_fast.denoiser import compute_dtype  # noqa: E402
from dss_fast.integrations.diffusers import DSSScheduler, check_request, from_pipeline  # noqa: E402
from dss_fast.integrations.diffusers.recording import ASKED, record  # noqa: E402
from examples.tiny_pipelines import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = GaussNewton(samples=8, batch_size=4, held_out_samples=4, teacher_evaluations=16, rounds=1)


def split(name, batch=3):
    pipe, arguments = build(name, batch=batch)
    del arguments["output_type"]
    rows = {k: v for k, v in arguments.items() if isinstance(v, list | torch.Tensor) and "image" not in k}
    return pipe, rows, {k: v for k, v in arguments.items() if k not in rows}


def test_z_images_lists_become_rows():
    pipe, rows, arguments = split("z_image")
    target = from_pipeline(pipe, rows, **arguments)
    assert target.shape == (16, 32, 32) and target.guidance_scale == 6.0  # m_c + 5 (m_c - m_u)
    assert target.cond.conditions["cap_feats"].shape == (3, 7, 16)
    uneven = [*rows["prompt_embeds"][:2], torch.randn(9, 16)]
    with pytest.raises(ValueError, match="pad the prompts"):
        from_pipeline(pipe, {**rows, "prompt_embeds": uneven}, **arguments)


def test_animatediffs_rows_per_frame_belong_to_one_prompt():
    pipe, rows, arguments = split("animatediff")
    target = from_pipeline(pipe, rows, **arguments)
    assert target.cond.conditions["encoder_hidden_states"].shape == (3, 4, 7, 8)  # prompts, frames, tokens, width


@pytest.mark.parametrize("scale", [1.3, 4.0])
def test_lumina2s_normalised_guidance_is_refused(scale):
    """It rescales each pixel to the conditional branch's norm: near a linear guidance, and none."""
    pipe, rows, arguments = split("lumina2")
    plain = from_pipeline(pipe, rows, **{**arguments, "guidance_scale": scale})
    assert plain.guidance_scale == scale
    arguments["cfg_normalization"] = True
    with pytest.raises(ValueError, match="linear guidance"):
        from_pipeline(pipe, rows, **{**arguments, "guidance_scale": scale})
    with pytest.raises(ValueError, match="cfg_trunc_ratio=0.9"):
        from_pipeline(pipe, rows, **{**arguments, "cfg_trunc_ratio": 0.9})


@pytest.mark.parametrize(
    "name, cause",
    [("controlnet", "runs controlnet beside"), ("sd_img2img", "from an image"), ("flux_inpaint", "from an image")],
)
def test_the_cause_is_named(name, cause):
    pipe, rows, arguments = split(name, batch=1)
    with pytest.raises(ValueError, match=cause):
        from_pipeline(pipe, {k: v for k, v in rows.items() if "prompt" in k}, **arguments)


@pytest.mark.parametrize("name", ["ltx", "qwen", "mochi", "cogview4"])
def test_grids_that_need_two_steps_can_be_recorded(name):
    """Real Qwen-Image and LTX configs end their shift at a terminal sigma; Mochi divides by half the steps."""
    pipe, rows, arguments = split(name)
    if name == "qwen":
        terminal = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9}
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**terminal)
    own = pipe.scheduler
    target = from_pipeline(pipe, rows, **arguments, batch_size=1)
    assert pipe.scheduler is own and target.schedule.family == "flow"
    assert (
        target.model(torch.randn(2, *target.shape), torch.full((2,), 500.0), **target.cond(2, torch.Generator()))
        .isfinite()
        .all()
    )


def test_a_recorded_run_is_broken_off(monkeypatch):
    """Each prompt costs one network call, however many steps its grid needs."""
    pipe, rows, arguments = split("flux")
    first = {key: value[:1] for key, value in rows.items()}
    assert len(record(pipe, first, 1, None, arguments).steps) == 1
    whole = record(pipe, first, ASKED, None, arguments)
    assert len(whole.steps) == ASKED and all(len(step.calls) == 1 for step in whole.steps)


def test_a_table_carries_the_request_it_was_searched_for(tmp_path, capsys):
    pipe, rows, arguments = split("sd3")
    target = from_pipeline(pipe, rows, **arguments, guidance_scale=5.0)
    result = search(target, 4, method=SMALL, progress=False)
    result.solver.save(tmp_path / "mine.json")
    solver = Solver.load(tmp_path / "mine.json")
    assert solver.provenance["request"] == {
        "pipeline": "StableDiffusion3Pipeline", "height": 8, "width": 8, "latents": [4, 8, 8],
        "guidance_scale": 5.0, "skip_layer_guidance_scale": 2.8, "prompts": 3,
    }  # fmt: skip
    assert main(["show", str(tmp_path / "mine.json")]) == 0
    assert "searched for pipeline StableDiffusion3Pipeline, height 8" in capsys.readouterr().out

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert check_request(pipe, solver, height=8, width=8, guidance_scale=5.1) == []
        assert check_request(pipe, handmade("ab2", 4), height=64) == []
    with pytest.warns(UserWarning, match="height 16 instead of 8; guidance_scale 7.0 instead of 5.0"):
        assert check_request(pipe, solver, height=16, width=8) == ["height", "guidance_scale"]
    with pytest.warns(UserWarning, match="pipeline 'FluxPipeline' instead of 'StableDiffusion3Pipeline'"):
        check_request(build("flux")[0], solver, guidance_scale=5.0)

    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=solver)
    call = {**rows, **arguments, "num_inference_steps": 4, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(**call)
    with pytest.warns(UserWarning, match=r"latents of \(4, 16, 16\) instead of \(4, 8, 8\)"):
        pipe(**{**call, "height": 16, "width": 16})


@pytest.mark.parametrize(
    "name, why",
    [
        ("hunyuan_image", "is not a linear guidance"),  # its guider rescales
        ("skyreels_df", "copies of its scheduler"),
        ("lumina", "Its call has no switch for that"),  # guides three channels of four
        ("sd_pag", "pag_scale=3.0: perturbed attention"),
    ],
)
def test_what_is_no_linear_target_of_one_state_says_so(name, why):
    pipe, rows, arguments = split(name)
    with pytest.raises(ValueError, match=why) as caught:
        from_pipeline(pipe, rows, **arguments)
    assert "cfg_normalization" not in str(caught.value)


def test_a_guider_that_begins_late_is_seen():
    pipe, rows, arguments = split("hunyuan_image")
    pipe.guider = pipe.ocr_guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.5, start=0.6)
    with pytest.raises(ValueError, match="begins late"):
        from_pipeline(pipe, rows, **arguments)
    pipe.guider = pipe.ocr_guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.5)
    target = from_pipeline(pipe, rows, **arguments)  # whatever distilled_guidance_scale is by default
    assert target.guidance_scale == 3.5


def test_an_argument_that_changes_in_a_run_is_named():
    pipe, rows, arguments = split("sd3")
    forward, calls = pipe.transformer.forward, []

    def changing(hidden_states, encoder_hidden_states, pooled_projections, timestep, **rest):
        calls.append(1)
        return forward(hidden_states, encoder_hidden_states, pooled_projections, timestep, **rest)

    from functools import wraps

    pipe.transformer.forward = wraps(forward)(changing)
    plain = type(pipe.transformer).__call__

    def call(self, *args, **kwargs):
        kwargs["joint_attention_kwargs"] = {"sound": torch.full((1,), float(len(calls)))}
        return plain(self, *args, **kwargs)

    pipe.transformer.__class__ = type("Changing", (type(pipe.transformer),), {"__call__": call})
    with pytest.raises(ValueError, match="joint_attention_kwargs.sound.*another at step 1"):
        from_pipeline(pipe, rows, **arguments)


def test_two_schedulers_are_one_too_many():
    pipe, rows, arguments = split("sd3")
    pipe.register_modules(image_encoder=pipe.scheduler)
    with pytest.raises(ValueError, match="2 schedulers"):
        from_pipeline(pipe, rows, **arguments)


def test_a_table_runs_where_its_pipeline_passes_times_of_its_own(monkeypatch):
    """A spacing that only this pipeline knows is noted in the search, and no obstacle afterwards."""
    from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as module

    plain = module.retrieve_timesteps

    def own(scheduler, steps, device, sigmas=None, **told):
        return plain(scheduler, device=device, sigmas=[1 - (i / steps) ** 2 for i in range(steps)], **told)

    pipe, rows, arguments = split("sd3")
    published = from_pipeline(pipe, rows, **arguments)
    assert "passes" not in published.request
    monkeypatch.setattr(module, "retrieve_timesteps", own)
    target = from_pipeline(pipe, rows, **arguments)
    assert target.request["passes"] == ["sigmas"]
    solver = search(target, 4, method=SMALL, progress=False).solver
    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=Solver.from_dict(solver.to_dict()))
    with pytest.warns(UserWarning, match="passes sigmas of its own"):
        pipe(**rows, **arguments, num_inference_steps=4, output_type="latent")
    assert pipe.scheduler.solver == solver
    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver="sit-xl-2-256")
    with pytest.raises(ValueError, match="searched together with its own"):
        pipe(**rows, **arguments, num_inference_steps=6, output_type="latent")


def test_layerwise_casting_is_read_as_diffusers_says():
    """Its hooks cast the weights up for each call, to a dtype that no parameter may have."""
    net = diffusers.DiTTransformer2DModel(
        2, 32, 4, num_layers=2, sample_size=8, norm_num_groups=1, num_embeds_ada_norm=4
    ).eval()
    net = net.to(torch.bfloat16)
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    counts = [p.numel() for p in net.parameters() if p.dtype == torch.float8_e4m3fn]
    assert 2 * sum(counts) > sum(p.numel() for p in net.parameters()) and compute_dtype(net) == torch.bfloat16
    assert compute_dtype(torch.nn.Sequential(net)) == torch.bfloat16  # the outermost that says so


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_unconditional_pipelines_are_targets_and_run_their_tables(kind):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet, getattr(diffusers, f"{kind}Scheduler")())
    unet.eval()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="unconditional: leave prompts out"):
        from_pipeline(pipe, ["a cat"])
    target = from_pipeline(pipe)
    assert target.shape == (3, 8, 8) and not target.guided and target.cond(5) == {}
    assert plan(target, 2, method=SMALL).batch_size == 4
    found = handmade("ab2", 2, schedule=target.schedule)
    with pytest.warns(UserWarning, match="clip_sample=True"):
        pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=found)
    images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np").images
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = target.decode(sample(target, noise, found)).movedim(1, -1)
    torch.testing.assert_close(torch.as_tensor(images), ours, rtol=1e-4, atol=1e-4)
    if kind == "DDIM":
        with pytest.raises(ValueError, match="eta=0.5"):
            pipe(num_inference_steps=2, eta=0.5)


def test_a_network_in_train_mode_is_read_in_eval_mode():
    """A DiT that was built by hand drops labels at random there, so that no two of its calls agree."""
    pipe, arguments = build("dit")
    embedder = next(m for m in pipe.transformer.modules() if type(m).__name__ == "LabelEmbedding")
    embedder.dropout_prob = 1.0
    rows, wanted = {"class_labels": [1, 2, 3]}, torch.tensor([[1, 1000], [2, 1000], [3, 1000]])
    pipe.transformer.train()
    target = from_pipeline(pipe, rows, guidance_scale=4.0)
    assert pipe.transformer.training and target.guidance_scale == 4.0
    seen = torch.stack([target.cond.conditions["class_labels"], target.uncond["class_labels"].expand(3)], 1)
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_consistency_model_is_no_target(name):
    pipe, arguments = build("sd")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    rows = {key: arguments.pop(key) for key in list(arguments) if key.endswith("prompt_embeds")}
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"{name}: its network is a consistency model's"):
        from_pipeline(pipe, rows, **arguments)
    assert not calls
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    from_pipeline(pipe, rows, **{key: v for key, v in arguments.items() if key != "output_type"})


@pytest.mark.parametrize("name", ["bria", "easyanimate"])
def test_a_target_sees_the_mu_that_is_passed_to_flow_match_euler_alone(name):
    pipe, arguments = build(name, batch=2)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    rows = {k: arguments.pop(k) for k in list(arguments) if "prompt" in k}
    arguments.pop("output_type")
    target = from_pipeline(pipe, rows, **arguments)
    wanted = torch.e if name == "easyanimate" else 1.6  # e^mu, mu = 0.5 at 256 tokens and less below
    assert target.schedule.shift == pytest.approx(wanted, abs=0.1)
