"""Nine pipelines of diffusers with random weights of a few kilobytes: what the examples and the tests run offline.

    pipe, arguments = build("flux")
    pipe(**arguments, num_inference_steps=8)

Text encoders and tokenizers are left out and embeddings passed in their place, so that nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

FLOW = ("sd3", "flux", "wan", "qwen", "sana")
VP = ("dit", "sd", "sdxl", "pixart")
NAMES = VP + FLOW
Randn = Callable[..., Tensor]
Built = tuple[Any, dict[str, Any]]


def build(name: str, dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 0) -> Built:
    """(pipeline, keyword arguments of a call giving latents), on the CPU and silent."""
    if name not in NAMES:
        raise ValueError(f"no tiny pipeline is called {name!r}; there are {', '.join(NAMES)}")
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe, arguments = globals()[f"_{name}"](batch, lambda *shape: torch.randn(shape).to(dtype))
    torch.set_rng_state(state)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # `to` warns of modules better kept in float32
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(dtype).eval().requires_grad_(False)
    diffusers.utils.logging.set_verbosity(verbosity)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"output_type": "latent", **arguments}


def _vae(channels: int, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


def _ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, **options)


def _latent_diffusion(**options: Any) -> Any:
    return _ddim(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **options)


def _shifted(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **options)


def _dit(batch: int, randn: Randn) -> Built:
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
    return diffusers.DiTPipeline(transformer, _vae(4), _ddim()), {"class_labels": labels, "output_type": "np"}


def _sd(batch: int, randn: Randn) -> Built:
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
        vae=_vae(4),
        scheduler=_latent_diffusion(set_alpha_to_one=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    embeds = {"prompt_embeds": randn(batch, 7, 32), "negative_prompt_embeds": _same(randn(1, 7, 32), batch)}
    return pipe, {**embeds, "height": 16, "width": 16}


def _sdxl(batch: int, randn: Randn) -> Built:
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
        vae=_vae(4),
        scheduler=_latent_diffusion(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    arguments = {
        "prompt_embeds": randn(batch, 7, 64),
        "negative_prompt_embeds": _same(randn(1, 7, 64), batch),
        "pooled_prompt_embeds": randn(batch, 32),
        "negative_pooled_prompt_embeds": _same(randn(1, 32), batch),
    }
    return pipe, {**arguments, "height": 16, "width": 16}


def _pixart(batch: int, randn: Randn) -> Built:
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
    pipe = diffusers.PixArtSigmaPipeline(None, None, _vae(4), transformer, _ddim())
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": randn(batch, 7, 32),
        "negative_prompt_embeds": _same(randn(1, 7, 32), batch),
        "prompt_attention_mask": torch.ones(batch, 7),
        "negative_prompt_attention_mask": torch.ones(batch, 7),
        "use_resolution_binning": False,
    }
    return pipe, {**arguments, "height": 8, "width": 8}


def _sd3(batch: int, randn: Randn) -> Built:
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
        vae=_vae(4, shift_factor=0.0609, scaling_factor=1.5035),
        scheduler=_shifted(),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )
    arguments = {
        "prompt_embeds": randn(batch, 7, 32),
        "negative_prompt_embeds": _same(randn(1, 7, 32), batch),
        "pooled_prompt_embeds": randn(batch, 64),
        "negative_pooled_prompt_embeds": _same(randn(1, 64), batch),
    }
    return pipe, {**arguments, "height": 8, "width": 8}


def _flux(batch: int, randn: Randn, guidance_embeds: bool = True) -> Built:
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
        vae=_vae(1, shift_factor=0.0609, scaling_factor=1.5035),
        scheduler=_shifted(use_dynamic_shifting=True),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    embeds = {"prompt_embeds": randn(batch, 7, 32), "pooled_prompt_embeds": randn(batch, 32)}
    return pipe, {**embeds, "height": 16, "width": 16}


def _wan(batch: int, randn: Randn) -> Built:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = diffusers.WanPipeline(
        transformer=transformer, vae=vae, scheduler=_shifted(), text_encoder=None, tokenizer=None
    )
    embeds = {
        "prompt_embeds": randn(batch, 16, 32),
        "negative_prompt_embeds": _same(randn(1, 16, 32), batch),
    }
    return pipe, {**embeds, "height": 16, "width": 16, "num_frames": 9}


def _qwen(batch: int, randn: Randn) -> Built:
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
        scheduler=_shifted(use_dynamic_shifting=True),
        text_encoder=None,
        tokenizer=None,
    )
    embeds = {
        "prompt_embeds": randn(batch, 16, 16),
        "prompt_embeds_mask": torch.ones(batch, 16, dtype=torch.long),
    }
    return pipe, {**embeds, "height": 16, "width": 16, "true_cfg_scale": 1.0}


def _sana(batch: int, randn: Randn) -> Built:
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
        "negative_prompt_embeds": _same(randn(1, 5, 8), batch),
        "prompt_attention_mask": torch.ones(batch, 5),
        "negative_prompt_attention_mask": torch.ones(batch, 5),
        "use_resolution_binning": False,
    }
    return pipe, {**arguments, "height": 32, "width": 32}


def _same(row: Tensor, batch: int) -> Tensor:
    return row.expand(batch, *row.shape[1:]).contiguous()
