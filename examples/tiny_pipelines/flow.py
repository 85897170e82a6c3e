"""Tiny pipelines of flow models: velocity predictors between noise and data."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .parts import WAN, Built, Randn, masks, pair, same, vae, wan_vae


def _shifted(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def sd3(batch: int, randn: Randn) -> Built:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae(4, shift_factor=0.0609, scaling_factor=1.5035),
        scheduler=_shifted(),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )
    arguments = {
        "prompt_embeds": randn(batch, 7, 32),
        "negative_prompt_embeds": same(randn(1, 7, 32), batch),
        "pooled_prompt_embeds": randn(batch, 64),
        "negative_pooled_prompt_embeds": same(randn(1, 64), batch),
    }
    return pipe, {**arguments, "height": 8, "width": 8}


def flux(batch: int, randn: Randn, guidance_embeds: bool = True) -> Built:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=guidance_embeds,
    )
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        vae=vae(1, shift_factor=0.0609, scaling_factor=1.5035),
        scheduler=_shifted(use_dynamic_shifting=True),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    embeds = {"prompt_embeds": randn(batch, 7, 32), "pooled_prompt_embeds": randn(batch, 32)}
    return pipe, {**embeds, "height": 16, "width": 16}


def wan(batch: int, randn: Randn) -> Built:
    transformer = diffusers.WanTransformer3DModel(**WAN)
    pipe = diffusers.WanPipeline(
        transformer=transformer, vae=wan_vae(), scheduler=_shifted(), text_encoder=None, tokenizer=None
    )
    embeds = {
        "prompt_embeds": randn(batch, 16, 32),
        "negative_prompt_embeds": same(randn(1, 16, 32), batch),
    }
    return pipe, {**embeds, "height": 16, "width": 16, "num_frames": 9}


def qwen(batch: int, randn: Randn) -> Built:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=_shifted(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        text_encoder=None,
        tokenizer=None,
    )
    embeds = {
        "prompt_embeds": randn(batch, 16, 16),
        "prompt_embeds_mask": torch.ones(batch, 16, dtype=torch.long),
    }
    return pipe, {**embeds, "height": 16, "width": 16, "true_cfg_scale": 1.0}


def sana(batch: int, randn: Randn) -> Built:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipe = diffusers.SanaPipeline(None, None, vae, transformer, _shifted())
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": randn(batch, 5, 8),
        "negative_prompt_embeds": same(randn(1, 5, 8), batch),
        "prompt_attention_mask": torch.ones(batch, 5),
        "negative_prompt_attention_mask": torch.ones(batch, 5),
        "use_resolution_binning": False,
    }
    return pipe, {**arguments, "height": 32, "width": 32}


def lumina2(batch: int, randn: Randn) -> Built:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    autoencoder = vae(4, shift_factor=0.0609, scaling_factor=1.5035)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = diffusers.Lumina2Pipeline(transformer, scheduler, autoencoder, None, None)
    arguments = pair(randn, batch, prompt_embeds=(7, 8)) | masks(batch, 7, "prompt_attention_mask", dtype=torch.bool)
    return pipe, {**arguments, "height": 32, "width": 32, "cfg_normalization": False}


def auraflow(batch: int, randn: Randn) -> Built:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipe = diffusers.AuraFlowPipeline(None, None, vae(4), transformer, scheduler)
    arguments = pair(randn, batch, prompt_embeds=(7, 32)) | masks(batch, 7, "prompt_attention_mask")
    return pipe, {**arguments, "height": 16, "width": 16}


def _ltx_parts() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return {"transformer": transformer, "vae": autoencoder, "text_encoder": None, "tokenizer": None}


def ltx(batch: int, randn: Randn) -> Built:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipe = diffusers.LTXPipeline(scheduler=scheduler, **_ltx_parts())
    arguments = pair(randn, batch, prompt_embeds=(16, 32)) | masks(batch, 16, "prompt_attention_mask")
    return pipe, {**arguments, "height": 32, "width": 32, "num_frames": 9}


def ltx_condition(batch: int, randn: Randn) -> Built:
    pipe = diffusers.LTXConditionPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **_ltx_parts())
    arguments = pair(randn, batch, prompt_embeds=(16, 32)) | masks(batch, 16, "prompt_attention_mask")
    return pipe, {**arguments, "height": 32, "width": 32, "num_frames": 9}


def hunyuan_video(batch: int, randn: Randn) -> Built:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, autoencoder, scheduler, None, None)
    arguments = {"prompt_embeds": randn(batch, 16, 16), "pooled_prompt_embeds": randn(batch, 8)}
    arguments["prompt_attention_mask"] = torch.ones(batch, 16, dtype=torch.long)
    return pipe, {**arguments, "height": 16, "width": 16, "num_frames": 9}


def z_image(batch: int, randn: Randn) -> Built:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        norm_eps=1e-5,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # they start as whatever lay in memory
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    autoencoder = vae(16, scaling_factor=0.3611, shift_factor=0.1159)
    pipe = diffusers.ZImagePipeline(scheduler, autoencoder, None, None, transformer)
    null = randn(7, 16)
    arguments = {"prompt": None, "prompt_embeds": [randn(7, 16) for _ in range(batch)]}
    return pipe, {**arguments, "negative_prompt_embeds": [null] * batch, "height": 32, "width": 32}


def chroma(batch: int, randn: Randn) -> Built:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    autoencoder = vae(1, shift_factor=0.0609, scaling_factor=1.5035)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    pipe = diffusers.ChromaPipeline(scheduler, autoencoder, None, None, transformer)
    arguments = pair(randn, batch, prompt_embeds=(7, 32)) | masks(batch, 7, "prompt_attention_mask")
    return pipe, {**arguments, "height": 16, "width": 16}


def mochi(batch: int, randn: Randn) -> Built:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    transformer.pos_frequencies.data.zero_()
    autoencoder = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(scheduler, autoencoder, None, None, transformer)
    arguments = pair(randn, batch, prompt_embeds=(16, 32)) | masks(batch, 16, "prompt_attention_mask", dtype=torch.bool)
    return pipe, {**arguments, "height": 16, "width": 16, "num_frames": 7}


def cogview4(batch: int, randn: Randn) -> Built:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        use_dynamic_shifting=True,
        time_shift_type="linear",
    )
    pipe = diffusers.CogView4Pipeline(None, None, vae(4), transformer, scheduler)
    return pipe, {**pair(randn, batch, prompt_embeds=(16, 32)), "height": 32, "width": 32}
