"""Tiny pipelines of models with a VP schedule: noise predictors and v-predictors."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .parts import Built, Randn, masks, pair, same, vae, video_vae


def _ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, **options)


def _latent_diffusion(**options: Any) -> Any:
    return _ddim(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **options)


def dit(batch: int, randn: Randn) -> Built:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    labels = [(1 + 206 * i) % 1000 for i in range(batch)]
    return diffusers.DiTPipeline(transformer, vae(4), _ddim()), {"class_labels": labels, "output_type": "np"}


def sd(batch: int, randn: Randn) -> Built:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae(4),
        scheduler=_latent_diffusion(set_alpha_to_one=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    embeds = {"prompt_embeds": randn(batch, 7, 32), "negative_prompt_embeds": same(randn(1, 7, 32), batch)}
    return pipe, {**embeds, "height": 16, "width": 16}


def sdxl(batch: int, randn: Randn) -> Built:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(2, 4),
        layers_per_block=2,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=1,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=vae(4),
        scheduler=_latent_diffusion(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    arguments = {
        "prompt_embeds": randn(batch, 7, 64),
        "negative_prompt_embeds": same(randn(1, 7, 64), batch),
        "pooled_prompt_embeds": randn(batch, 32),
        "negative_pooled_prompt_embeds": same(randn(1, 32), batch),
    }
    return pipe, {**arguments, "height": 16, "width": 16}


def pixart(batch: int, randn: Randn) -> Built:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = diffusers.PixArtSigmaPipeline(None, None, vae(4), transformer, _ddim())
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": randn(batch, 7, 32),
        "negative_prompt_embeds": same(randn(1, 7, 32), batch),
        "prompt_attention_mask": torch.ones(batch, 7),
        "negative_prompt_attention_mask": torch.ones(batch, 7),
        "use_resolution_binning": False,
    }
    return pipe, {**arguments, "height": 8, "width": 8}


def hunyuan_dit(batch: int, randn: Randn) -> Built:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
        text_len=7,
        text_len_t5=7,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDPMScheduler(**betas, clip_sample=False, steps_offset=1, prediction_type="v_prediction")
    pipe = diffusers.HunyuanDiTPipeline(
        vae=vae(4),
        transformer=transformer,
        scheduler=scheduler,
        requires_safety_checker=False,
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor")
        ),
    )
    arguments = pair(randn, batch, prompt_embeds=(7, 32), prompt_embeds_2=(7, 32))
    arguments |= masks(batch, 7, "prompt_attention_mask", "prompt_attention_mask_2")
    return pipe, {**arguments, "height": 16, "width": 16, "use_resolution_binning": False}


def kolors(batch: int, randn: Randn) -> Built:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(2, 4),
        layers_per_block=2,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=56,
        cross_attention_dim=8,
        norm_num_groups=1,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1100,
        beta_start=0.00085,
        beta_end=0.014,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = diffusers.KolorsPipeline(vae(4), None, None, unet, scheduler)
    arguments = pair(randn, batch, prompt_embeds=(7, 8), pooled_prompt_embeds=(8,))
    return pipe, {**arguments, "height": 16, "width": 16}


def kandinsky22(batch: int, randn: Randn) -> Built:
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )
    movq = diffusers.VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        in_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        out_channels=3,
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        vq_embed_dim=4,
    )
    scheduler = _ddim(beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False, steps_offset=1)
    pipe = diffusers.KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)
    return pipe, {**pair(randn, batch, image_embeds=(32,)), "height": 64, "width": 64}


def animatediff(batch: int, randn: Randn) -> Built:
    channels = (8, 8)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=channels,
        layers_per_block=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    adapter = diffusers.MotionAdapter(
        block_out_channels=channels, motion_layers_per_block=2, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    pipe = diffusers.AnimateDiffPipeline(
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        motion_adapter=adapter,
        scheduler=_ddim(beta_start=0.00085, beta_end=0.012),
    )
    return pipe, {**pair(randn, batch, prompt_embeds=(7, 8)), "height": 8, "width": 8, "num_frames": 4}


def cogvideox(batch: int, randn: Randn) -> Built:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    down, up = ("CogVideoXDownBlock3D",) * 4, ("CogVideoXUpBlock3D",) * 4
    autoencoder = video_vae("CogVideoX", down, up, temporal_compression_ratio=4)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    pipe = diffusers.CogVideoXPipeline(None, None, autoencoder, transformer, scheduler)
    return pipe, {**pair(randn, batch, prompt_embeds=(16, 32)), "height": 16, "width": 16, "num_frames": 9}


def stable_audio(batch: int, randn: Randn) -> Built:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    projection = diffusers.StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    pipe = diffusers.StableAudioPipeline(autoencoder, None, projection, None, transformer, scheduler)
    arguments = pair(randn, batch, prompt_embeds=(7, 4))
    arguments |= {"attention_mask": torch.ones(batch, 7), "negative_attention_mask": torch.ones(batch, 7)}
    return pipe, {**arguments, "audio_end_in_s": 1.0}


def controlnet(batch: int, randn: Randn) -> Built:
    pipe, arguments = sd(batch, randn)
    network = diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(16, 32),
        norm_num_groups=2,
    )
    for block in network.controlnet_down_blocks:  # zeros when new, as if there were no control
        torch.nn.init.normal_(block.weight, std=0.3)
    parts = {**pipe.components, "controlnet": network, "requires_safety_checker": False}
    image = torch.rand(batch, 3, 32, 32)  # its embedding halves an image once where a full one does three times
    sizes = {"height": 32, "width": 32}
    made = diffusers.StableDiffusionControlNetPipeline(**parts)
    made.vae_scale_factor = 2
    return made, {**arguments, **sizes, "image": image}
