"""Tiny pipelines of the models that came last, flows and VP."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from .flow import _shifted, qwen
from .parts import WAN, Built, Randn, masks, pair, vae, video_vae, wan_vae
from .vp import _ddim


def _flux2(guidance_embeds: bool) -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    autoencoder = vae(1, kind="Flux2", **blocks)
    parts = {"transformer": transformer, "vae": autoencoder, "scheduler": _shifted(use_dynamic_shifting=True)}
    return {**parts, "text_encoder": None, "tokenizer": None}


def flux2(batch: int, randn: Randn) -> Built:
    pipe = diffusers.Flux2Pipeline(**_flux2(True))
    return pipe, {"prompt_embeds": randn(batch, 7, 16), "height": 8, "width": 8}


def flux2_klein(batch: int, randn: Randn) -> Built:
    pipe = diffusers.Flux2KleinPipeline(**_flux2(False))
    return pipe, {**pair(randn, batch, prompt_embeds=(7, 16)), "height": 8, "width": 8, "guidance_scale": 4.0}


def bria(batch: int, randn: Randn) -> Built:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    autoencoder = vae(4, shift_factor=0.0, scaling_factor=0.13025)
    pipe = diffusers.BriaPipeline(transformer, _shifted(), autoencoder, None, None)
    return pipe, {**pair(randn, batch, prompt_embeds=(7, 32)), "height": 16, "width": 16}


def easyanimate(batch: int, randn: Randn) -> Built:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    down = ("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3)
    up = ("SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3)
    autoencoder = video_vae("Magvit", down, up, spatial_group_norm=False)
    pipe = diffusers.EasyAnimatePipeline(autoencoder, None, None, transformer, _shifted())
    arguments = pair(randn, batch, prompt_embeds=(7, 16)) | masks(batch, 7, "prompt_attention_mask", dtype=torch.long)
    return pipe, {**arguments, "height": 16, "width": 16, "num_frames": 5}


def _skyreels() -> dict[str, Any]:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**WAN)
    parts = {"transformer": transformer, "vae": wan_vae(), "scheduler": _shifted()}
    return {**parts, "text_encoder": None, "tokenizer": None}


def skyreels(batch: int, randn: Randn) -> Built:
    pipe = diffusers.SkyReelsV2Pipeline(**_skyreels())
    return pipe, {**pair(randn, batch, prompt_embeds=(16, 32)), "height": 16, "width": 16, "num_frames": 9}


def skyreels_df(batch: int, randn: Randn) -> Built:
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0}
    parts = {**_skyreels(), "scheduler": diffusers.UniPCMultistepScheduler(**told)}
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**parts)
    return pipe, {
        "prompt": None,
        **pair(randn, batch, prompt_embeds=(16, 32)),
        "height": 16,
        "width": 16,
        "num_frames": 9,
    }


def ovis(batch: int, randn: Randn) -> Built:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    autoencoder = vae(1, shift_factor=0.0609, scaling_factor=1.5035)
    pipe = diffusers.OvisImagePipeline(_shifted(use_dynamic_shifting=True), autoencoder, None, None, transformer)
    arguments = {"negative_prompt": None, **pair(randn, batch, prompt_embeds=(7, 32))}
    return pipe, {**arguments, "height": 16, "width": 16, "guidance_scale": 2.0}


def prx(batch: int, randn: Randn) -> Built:
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=1,
        in_channels=4,
        context_in_dim=8,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    )
    pipe = diffusers.PRXPipeline(transformer, _shifted(), None, None, vae(4, shift_factor=0.0, scaling_factor=1.0))
    arguments = pair(randn, batch, prompt_embeds=(7, 8)) | masks(batch, 7, "prompt_attention_mask", dtype=torch.bool)
    return pipe, {**arguments, "height": 32, "width": 32, "use_resolution_binning": False, "guidance_scale": 1.0}


def krea2(batch: int, randn: Randn) -> Built:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
        rope_theta=1000.0,
    )
    scheduler = _shifted(use_dynamic_shifting=True, max_image_seq_len=6400)
    autoencoder = qwen(1, randn)[0].vae
    pipe = diffusers.Krea2Pipeline(scheduler, autoencoder, None, None, transformer, (0, 1, 2))
    arguments = pair(randn, batch, prompt_embeds=(16, 3, 16)) | masks(batch, 16, "prompt_embeds_mask", dtype=torch.bool)
    return pipe, {**arguments, "height": 32, "width": 32, "guidance_scale": 3.0}


def lumina(batch: int, randn: Randn) -> Built:
    transformer = diffusers.LuminaNextDiT2DModel(
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
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=8,
        scaling_factor=1.0,
    )
    pipe = diffusers.LuminaPipeline(transformer, _shifted(), vae(4), None, None)
    arguments = pair(randn, batch, prompt_embeds=(7, 8)) | masks(batch, 7, "prompt_attention_mask", dtype=torch.bool)
    return pipe, {**arguments, "height": 32, "width": 32}


def hunyuan_image(batch: int, randn: Randn) -> Built:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    autoencoder = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        sample_size=128,
    )
    guider = diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3)
    pipe = diffusers.HunyuanImagePipeline(
        _shifted(), autoencoder, None, None, None, None, transformer, guider=guider, ocr_guider=guider
    )
    embeds = pair(randn, batch, prompt_embeds=(7, 32), prompt_embeds_2=(7, 32))
    kept = masks(batch, 7, "prompt_embeds_mask", "prompt_embeds_mask_2", dtype=torch.long)
    return pipe, {**embeds, **kept, "height": 32, "width": 32}


def sana_video(batch: int, randn: Randn) -> Built:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0}
    scheduler = diffusers.DPMSolverMultistepScheduler(**told)
    pipe = diffusers.SanaVideoPipeline(None, None, wan_vae(), transformer, scheduler)
    arguments = {"prompt": None, "negative_prompt": None, **pair(randn, batch, prompt_embeds=(5, 8))}
    kept = masks(batch, 5, "prompt_attention_mask")
    return pipe, {**arguments, **kept, "height": 32, "width": 32, "frames": 9, "use_resolution_binning": False}


# ---- VP models


def allegro(batch: int, randn: Randn) -> Built:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    )
    down, up = ("AllegroDownBlock3D",) * 4, ("AllegroUpBlock3D",) * 4
    autoencoder = video_vae("Allegro", down, up, temporal_compression_ratio=4)
    pipe = diffusers.AllegroPipeline(None, None, autoencoder, transformer, _ddim())
    arguments = {"negative_prompt": None, **pair(randn, batch, prompt_embeds=(7, 24))}
    kept = masks(batch, 7, "prompt_attention_mask")
    return pipe, {**arguments, **kept, "height": 16, "width": 16, "num_frames": 8}


def latte(batch: int, randn: Randn) -> Built:
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
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
        video_length=2,
    )
    pipe = diffusers.LattePipeline(None, None, vae(4), transformer, _ddim())
    arguments = {"negative_prompt": None, **pair(randn, batch, prompt_embeds=(7, 32))}
    return pipe, {**arguments, "height": 8, "width": 8, "video_length": 2, "clean_caption": False}


def cogview3plus(batch: int, randn: Randn) -> Built:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=4.0,
        timestep_spacing="trailing",
    )
    pipe = diffusers.CogView3PlusPipeline(None, None, vae(4), transformer, scheduler)
    return pipe, {**pair(randn, batch, prompt_embeds=(16, 32)), "height": 16, "width": 16}


def kandinsky3(batch: int, randn: Randn) -> Built:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=32,
    )
    movq = diffusers.VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    told = {"beta_schedule": "squaredcos_cap_v2", "steps_offset": 1, "timestep_spacing": "trailing"}
    pipe = diffusers.Kandinsky3Pipeline(None, None, unet, _ddim(**told), movq)
    embeds = pair(randn, batch, prompt_embeds=(7, 32)) | masks(batch, 7, "attention_mask")
    return pipe, {**embeds, "height": 16, "width": 16}


def if_stage1(batch: int, randn: Randn) -> Built:
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=[8, 16],
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    told = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "variance_type": "learned_range"}
    scheduler = diffusers.DDPMScheduler(**told)
    pipe = diffusers.IFPipeline(None, None, unet, scheduler, None, None, None, requires_safety_checker=False)
    return pipe, {**pair(randn, batch, prompt_embeds=(7, 32)), "height": 32, "width": 32, "output_type": "pt"}
