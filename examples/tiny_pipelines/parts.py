"""What several tiny pipelines share: a small autoencoder, and one row for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

Randn = Callable[..., Tensor]
Built = tuple[Any, dict[str, Any]]


def vae(channels: int, **options: Any) -> Any:
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


def same(row: Tensor, batch: int) -> Tensor:
    return row.expand(batch, *row.shape[1:]).contiguous()


def pair(randn: Randn, batch: int, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Embeddings by name, a row per prompt, and one row for all under ``negative_`` names."""
    rows = {name: randn(batch, *size) for name, size in sizes.items()}
    return {**rows, **{f"negative_{name}": same(randn(1, *size), batch) for name, size in sizes.items()}}


def masks(batch: int, length: int, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Attention masks of ones, also under ``negative_`` names."""
    return {f"{sign}{name}": torch.ones(batch, length, dtype=dtype) for name in names for sign in ("", "negative_")}
