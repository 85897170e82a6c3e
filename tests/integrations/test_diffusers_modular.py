"""diffusers' modular pipelines: the scheduler is a component, so a table runs in blocks as it does in a pipeline."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
flux = pytest.importorskip("diffusers.modular_pipelines.flux.modular_blocks_flux")
qwen = pytest.importorskip("diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage")

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


def test_a_search_needs_a_pipeline_and_says_so():
    pipe, _ = build("flux")
    made = blocks_of(flux.FluxAutoBlocks, pipe, pipe.scheduler)
    with pytest.raises(ValueError, match="modular.*FluxPipeline"):
        from_pipeline(made, ["a cat"])
