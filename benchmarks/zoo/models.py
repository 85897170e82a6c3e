"""Small networks of other kinds than examples/mnist: a convolutional U-Net of any channels, patches that attend or
mix, a plain MLP; and an exact mixture whose components are wider along some axes than along others.

Each is model(x, t) or model(x, t, y) -> velocity x0 - eps at x = t x0 + (1 - t) eps: x (B, *S) of the module's dtype,
t (B,) in [0, 1], 0 noise, y (B,) int64, the number of classes meaning "no class". Smooth in x and t, the shape and
dtype of x, float64 after `.double()`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.mnist.model import Block, ConvBlock, sincos_positions


class Condition(nn.Module):
    """(B, width): what the blocks read of t and y."""

    def __init__(self, width: int, classes: int = 0):
        super().__init__()
        frequencies = math.pi * 2.0 ** torch.linspace(-1, 5, 16)  # faster ones would let the network wiggle in t
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes + 1, width) if classes else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        angles = t.to(x.dtype)[:, None] * self.frequencies
        h = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        return F.silu(h if self.classes is None else h + self.classes(y))


class UNet(nn.Module):
    """Convolutions at `len(widths)` resolutions, the first of them `stem` times coarser than x (B, channels, H, W).

    x itself enters the output times a learned function of t: a strided stem is too narrow to carry its noise.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], width: int = 64, stem: int = 1, classes: int = 0):
        super().__init__()
        self.stem = stem
        self.condition = Condition(width, classes)
        self.gain = nn.Linear(width, 1)
        self.embed = nn.Conv2d(channels * stem**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ConvBlock(a, b, width) for a, b in zip((widths[0], *widths), widths, strict=False))
        self.middle = ConvBlock(widths[-1], widths[-1], width)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.up = nn.ModuleList(ConvBlock(a + b, a, width) for a, b in reversed(pairs))
        self.norm = nn.GroupNorm(8, widths[0])
        self.final = nn.Conv2d(widths[0], channels * stem**2, 3, padding=1)
        for layer in (self.gain, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        condition = self.condition(x, t, y)
        h, kept = self.embed(F.pixel_unshuffle(x, self.stem)), []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if k else h, condition)
            kept.append(h)
        h = self.middle(h, condition)
        for block, before in zip(self.up, reversed(kept[:-1]), strict=True):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0), before], dim=1), condition)
        h = F.pixel_shuffle(self.final(F.silu(self.norm(h))), self.stem)
        return h + self.gain(condition)[:, :, None, None] * x


class MixerBlock(nn.Module):
    """h + gate * mix(modulate(h)) along the tokens, then h + gate * mlp(modulate(h)) along the width; gates start at 0.

    h (B, tokens, width), condition (B, width): the mixer of Tolstikhin et al., arXiv 2105.01601, with DiT's modulation.
    """

    def __init__(self, tokens: int, width: int, mlp_ratio: int):
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU("tanh"), nn.Linear(2 * tokens, tokens))
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=2)
        z = F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1
        h = h + gate1 * self.mix(z.transpose(1, 2)).transpose(1, 2)
        z = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        return h + gate2 * self.mlp(z)


class Patches(nn.Module):
    """Blocks over the patches of x (B, channels, side, side), whose tokens attend (`heads`) or mix (`heads` of 0)."""

    def __init__(
        self,
        channels: int,
        side: int,
        patch: int,
        width: int,
        depth: int,
        heads: int = 0,
        mlp_ratio: int = 2,
        classes: int = 0,
    ):
        super().__init__()
        self.patch, self.side = patch, side // patch
        self.condition = Condition(width, classes)
        self.embed = nn.Linear(channels * patch**2, width)
        self.positions = nn.Parameter(sincos_positions(self.side, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio) if heads else MixerBlock(self.side**2, width, mlp_ratio)
            for _ in range(depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, channels * patch**2)
        for layer in (self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        condition = self.condition(x, t, y)
        h = self.embed(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, dim=2)
        h = self.final(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch)


class MLPBlock(nn.Module):
    """h + gate * mlp(modulate(h)), h and condition (B, width); the gate starts at 0."""

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        return h + gate * self.down(F.silu(self.up(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)))


class MLP(nn.Module):
    """Residual blocks over all the numbers of x (B, *S) at once, of which there are `size`."""

    def __init__(self, size: int, width: int, depth: int, mlp_ratio: int = 2, classes: int = 0):
        super().__init__()
        self.condition = Condition(width, classes)
        self.embed = nn.Linear(size, width)
        self.blocks = nn.ModuleList(MLPBlock(width, mlp_ratio) for _ in range(depth))
        self.final = nn.Linear(width, size)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        condition = self.condition(x, t, y)
        h = self.embed(x.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        return self.final(F.layer_norm(h, h.shape[-1:])).reshape(x.shape)


class WideMixture(nn.Module):
    """The marginal velocity of x = t x0 + (1 - t) eps, x0 = mu_k + h * xi with k uniform and h of its own on each axis:

        w = softmax_k(-sum_d (x_d - t mu_kd)^2 / 2 s_d^2),  s_d^2 = t^2 h_d^2 + (1 - t)^2
        v = mean + (t h^2 - (1 - t)) / s^2 * (x - t mean),  mean = sum_k w_k mu_k

    centres: (K, D) mu. bandwidths: (D,) h, above 0. model(x, t) -> v, x: (B, D), in its dtype; `examples.mixture`
    has the one of equal axes.
    """

    def __init__(self, centres: Tensor, bandwidths: Tensor):
        super().__init__()
        if not (bandwidths > 0).all():
            raise ValueError(f"bandwidths={bandwidths.tolist()}: all must be above 0")
        self.register_buffer("centres", centres)
        self.register_buffer("bandwidths", bandwidths)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype)[:, None]
        centres, h2, noise = self.centres.to(x.dtype), self.bandwidths.to(x.dtype) ** 2, 1 - t
        variance = t * t * h2 + noise * noise
        apart = x[:, None] - t[:, None] * centres
        mean = (-apart.square() / (2 * variance[:, None])).sum(2).softmax(1) @ centres
        return mean + (t * h2 - noise) / variance * (x - t * mean)
