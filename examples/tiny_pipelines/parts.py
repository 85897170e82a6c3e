"""What several tiny pipelines share: a small autoencoder, and one row for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

Randn = Callable[..., Tensor]
Built = tuple[Any, dict[str, Any]]


# Of Wan's transformer, and of SkyReels', which is made as it is.
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def video_vae(kind: str, down: tuple[str, ...], up: tuple[str, ...], **options: Any) -> Any:
    return getattr(diffusers, f"AutoencoderKL{kind}")(
        in_channels=3,
        out_channels=3,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        **options,
    )


def vae(channels: int, kind: str = "", **options: Any) -> Any:
    return getattr(diffusers, f"AutoencoderKL{kind}")(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


def same(row: Tensor, batch: int) -> Tensor:
    return row.expand(batch, *row.shape[1:]).contiguous()


def pair(randn: Randn, batch: int, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Embeddings by name, a row per prompt, and one row for all under ``negative_`` names."""
    rows = {name: randn(batch, *size) for name, size in sizes.items()}
    return {**rows, **{f"negative_{name}": same(randn(1, *size), batch) for name, size in sizes.items()}}


def masks(batch: int, length: int, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Attention masks of ones, also under ``negative_`` names."""
    return {f"{sign}{name}": torch.ones(batch, length, dtype=dtype) for name in names for sign in ("", "negative_")}
