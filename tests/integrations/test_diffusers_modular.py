"""diffusers' modular pipelines: the scheduler is a component, so a table runs in blocks as it does in a pipeline."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
flux = pytest.importorskip("diffusers.modular_pipelines.flux.modular_blocks_flux")
qwen = pytest.importorskip("diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage")
wan = pytest.importorskip("diffusers.modular_pipelines.wan.modular_blocks_wan")

from dss_fast.integrations.diffusers import DSSScheduler, from_pipeline  # noqa: E402
from examples.tiny_pipelines import build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def blocks_of(kind, pipe, scheduler):
    """A modular pipeline on a pipeline's own parts, from embeddings to latents."""
    blocks = kind()
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    made = blocks.init_pipeline()
    made.update_components(transformer=pipe.transformer, vae=pipe.vae, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("solver", ["sit-xl-2-256", "dpmpp_2m"])
def test_flux_by_blocks_equals_flux(solver):
    pipe, arguments = build("flux")
    scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=solver)
    made, given = blocks_of(flux.FluxAutoBlocks, pipe, scheduler), dict(arguments)
    given = {key: given[key] for key in ("prompt_embeds", "pooled_prompt_embeds", "height", "width")}
    options = {"num_inference_steps": 5}
    ours = made(**given, **options, generator=torch.Generator().manual_seed(0), output="latents")
    pipe.scheduler = scheduler
    theirs = pipe(**{**arguments, **options}, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(ours if ours.ndim == 3 else pipe._pack_latents(ours, 1, 1, 16, 16), theirs)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_guider_works_beside_the_scheduler(scale):
    """Guidance is another component's; the table sees its result."""
    pipe, arguments = build("qwen")
    scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver="sit-xl-2-256")
    made = blocks_of(qwen.QwenImageAutoBlocks, pipe, scheduler)
    made.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=scale))
    null = {"negative_prompt_embeds": torch.randn(1, 16, 16), "negative_prompt_embeds_mask": torch.ones(1, 16).long()}
    given = {key: arguments[key] for key in ("prompt_embeds", "prompt_embeds_mask", "height", "width")} | null
    options = {"num_inference_steps": 5}
    ours = made(**given, **options, generator=torch.Generator().manual_seed(0), output="latents")
    pipe.scheduler = scheduler
    theirs = pipe(
        **{**arguments, **options, **null, "true_cfg_scale": scale}, generator=torch.Generator().manual_seed(0)
    )[0]
    assert ours.numel() == theirs.numel()
    packed = (
        ours
        if ours.shape == theirs.shape
        else pipe._pack_latents(ours[:, :, 0] if ours.ndim == 5 else ours, 1, 4, 4, 4)
    )
    torch.testing.assert_close(packed, theirs, rtol=1e-5, atol=1e-5)


def given(names, arguments):
    """Rows of three prompts, and the rest of the call."""
    return {k: arguments[k] for k in names}, {k: v for k, v in arguments.items() if k in ("height", "width")}


def equal(mine, theirs):
    """Both call the network alike."""
    rows, x = {k: v[:2] for k, v in mine.cond.conditions.items()}, torch.randn(2, *mine.shape)
    assert mine.shape == theirs.shape and mine.schedule == theirs.schedule
    assert mine.guidance_scale == theirs.guidance_scale and rows.keys() == theirs.cond.conditions.keys()
    t = torch.tensor([700.0, 300.0])
    torch.testing.assert_close(mine.model(x, t, **rows), theirs.model(x, t, **rows))


def test_flux_by_blocks_is_the_target_that_flux_is(caplog, capfd):
    pipe, arguments = build("flux", batch=3)
    rows, rest = given(("prompt_embeds", "pooled_prompt_embeds"), arguments)
    made, scheduler = blocks_of(flux.FluxAutoBlocks, pipe, pipe.scheduler), pipe.scheduler
    mine = from_pipeline(made, rows, **rest)
    equal(mine, from_pipeline(pipe, rows, **rest))
    assert made.scheduler is scheduler and mine.request["pipeline"] == "FluxModularPipeline"
    assert not caplog.records and "Error" not in "".join(capfd.readouterr())  # a recorded run is broken off


def test_a_guider_is_read_as_the_guidance_of_a_pipeline():
    pipe, arguments = build("wan", batch=3)
    rows = {key: arguments[key] for key in ("prompt_embeds", "negative_prompt_embeds")}
    rest = {key: arguments[key] for key in ("height", "width", "num_frames")}
    made = blocks_of(wan.WanBlocks, pipe, pipe.scheduler)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    made.update_components(guider=guider)
    mine = from_pipeline(made, rows, **rest)
    equal(mine, from_pipeline(pipe, rows, **rest, guidance_scale=4.0))
    assert mine.guidance_scale == 4.0 == mine.request["guidance_scale"]
    assert made.guider is guider and guider._step is None  # a copy has counted the steps
    made.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.6))
    with pytest.raises(ValueError, match="begins late"):
        from_pipeline(made, rows, **rest)


def test_what_blocks_do_beside_a_linear_guidance_is_refused():
    """Qwen-Image's blocks bring the guided output to the norm of the conditional one."""
    pipe, arguments = build("qwen", batch=3)
    rows, rest = given(("prompt_embeds", "prompt_embeds_mask"), arguments)
    null = {"negative_prompt_embeds": torch.randn(1, 16, 16).repeat(3, 1, 1)}
    null["negative_prompt_embeds_mask"] = torch.ones(3, 16).long()
    made = blocks_of(qwen.QwenImageAutoBlocks, pipe, pipe.scheduler)
    made.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0))
    with pytest.raises(ValueError, match="not a linear guidance"):
        from_pipeline(made, {**rows, **null}, **rest)
    with pytest.raises(ValueError, match="image: QwenImageModularPipeline would start from it"):
        from_pipeline(made, rows, image=torch.zeros(1, 3, 16, 16), **rest)


def test_blocks_without_a_network_are_refused():
    with pytest.raises(ValueError, match="no network with a scheduler"):
        from_pipeline(flux.FluxAutoBlocks().sub_blocks["decode"].init_pipeline(), ["a cat"])
