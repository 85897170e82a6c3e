"""The transformer of FLUX.1 in plain PyTorch, with the names and shapes of diffusers' FluxTransformer2DModel.

19 double blocks, in which text and image have weights of their own, then 38 single ones; 3072 wide, 24 heads, 12
billion parameters. A checkpoint of the one loads into the other and gives the same outputs. Source:
black-forest-labs/flux, src/flux/model.py, and diffusers, transformer_flux.py, whose arguments `forward` takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FREQUENCIES, EPS = 256, 1e-6


class Embedding(nn.Module):
    """Two linear layers."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Condition(nn.Module):
    """What modulates all blocks: time, guidance scale and the pooled text, embedded and added."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.timestep_embedder, self.guidance_embedder = Embedding(FREQUENCIES, width), Embedding(FREQUENCIES, width)
        self.text_embedder = Embedding(pooled, width)

    def forward(self, t: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)

        def waves(value: Tensor) -> Tensor:
            angles = value[:, None].float() * rates
            return torch.cat([angles.cos(), angles.sin()], 1).to(pooled.dtype)

        return self.timestep_embedder(waves(t)) + self.guidance_embedder(waves(guidance)) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """`parts` vectors a sample, from the condition."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(width, parts * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(condition))[:, None].chunk(self.parts, -1)


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def rotations(ids: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, sum(axes)) of the angles that turn pairs of channels, ids (S, len(axes))."""
    angles = []
    for position, size in zip(ids.float().unbind(-1), axes, strict=True):
        rates = 1 / 10000 ** (torch.arange(0, size, 2, dtype=torch.float64, device=ids.device) / size)
        angles.append(torch.outer(position, rates).repeat_interleave(2, 1))
    found = torch.cat(angles, 1)
    return found.cos().float(), found.sin().float()


def turned(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, S, heads, head_dim) with each pair of channels turned by its position's angle."""
    cos, sin = (t[None, :, None] for t in turns)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    other = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + other.float() * sin).to(x.dtype)


class Attention(nn.Module):
    """Over text and image together. both: the text has projections of its own."""

    def __init__(self, width: int, heads: int, both: bool):
        super().__init__()
        self.heads, self.both = heads, both
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads, eps=EPS), nn.RMSNorm(width // heads, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        if both:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(width // heads, eps=EPS) for _ in range(2))
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.to_add_out = nn.Linear(width, width)

    def split(self, *projected: Tensor) -> list[Tensor]:
        return [p.unflatten(-1, (self.heads, -1)) for p in projected]

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image's part and the text's; without text of its own, all and nothing."""
        q, k, v = self.split(self.to_q(x), self.to_k(x), self.to_v(x))
        q, k, length = self.norm_q(q), self.norm_k(k), 0
        if text is not None:
            added = self.split(self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text))
            first = self.norm_added_q(added[0]), self.norm_added_k(added[1]), added[2]
            q, k, v = (torch.cat([one, two], 1) for one, two in zip(first, (q, k, v), strict=True))
            length = text.shape[1]
        q, k, v = (t.transpose(1, 2) for t in (turned(q, turns), turned(k, turns), v))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if text is None:
            return found, found[:, :0]
        return self.to_out[0](found[:, length:].contiguous()), self.to_add_out(found[:, :length].contiguous())


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = nn.Module()
        inner.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([inner, nn.Identity(), nn.Linear(4 * width, width)])  # diffusers' names

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class DoubleBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = Attention(width, heads, both=True)
        self.ff, self.ff_context = MLP(width), MLP(width)

    def forward(
        self, text: Tensor, x: Tensor, condition: Tensor, turns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        image, context = self.norm1(condition), self.norm1_context(condition)
        found = self.attn(normalised(x, *image[:2]), turns, normalised(text, *context[:2]))
        x, text = x + image[2] * found[0], text + context[2] * found[1]
        x = x + image[5] * self.ff(normalised(x, *image[3:5]))
        return text + context[5] * self.ff_context(normalised(text, *context[3:5])), x


class SingleBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp, self.proj_out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)
        self.attn = Attention(width, heads, both=False)

    def forward(
        self, text: Tensor, x: Tensor, condition: Tensor, turns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        length, both = text.shape[1], torch.cat([text, x], 1)
        shift, scale, gate = self.norm(condition)
        inner = normalised(both, shift, scale)
        mlp = F.gelu(self.proj_mlp(inner), approximate="tanh")
        both = both + gate * self.proj_out(torch.cat([self.attn(inner, turns)[0], mlp], 2))
        return both[:, :length], both[:, length:]


class Flux(nn.Module):
    """Arguments named as diffusers' model has them; its defaults are FLUX.1-dev's sizes."""

    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        guidance_embeds: bool = True,
    ):
        super().__init__()
        if not guidance_embeds:
            raise ValueError("guidance_embeds=False: this network takes the guidance scale as an input, as FLUX.1-dev")
        width, self.axes = num_attention_heads * attention_head_dim, axes_dims_rope
        self.time_text_embed = Condition(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, num_attention_heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, num_attention_heads) for _ in range(num_single_layers)
        )
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, in_channels)
        self.checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        """From now on each block's activations are computed again in the backward pass."""
        self.checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The velocity (B, S, in_channels) of packed latents, in a tuple.

        encoder_hidden_states (B, T, joint_attention_dim), pooled_projections (B, pooled_projection_dim): the text.
        timestep (B,): the noise level, 1 for noise. img_ids (S, 3), txt_ids (T, 3): positions. guidance (B,).
        """
        x, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        condition = self.time_text_embed(1000 * timestep.to(x.dtype), 1000 * guidance.to(x.dtype), pooled_projections)
        turns = rotations(torch.cat([txt_ids, img_ids]), self.axes)
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            if self.checkpointing and torch.is_grad_enabled():
                text, x = checkpoint(block, text, x, condition, turns, use_reentrant=False)
            else:
                text, x = block(text, x, condition, turns)
        scale, shift = self.norm_out(condition)
        return (self.proj_out(normalised(x, shift, scale)),)
