"""A small class-conditional diffusion transformer (DiT) for 28x28 digits, read as a flow or as a VP
model, a convolutional U-Net for 16x16 digits, and a classifier."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NULL_CLASS = 10
BETA_MIN, BETA_SPAN = 0.1, 19.9


def vp_alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = exp(-1/2 int_0^t beta), sigma = sqrt(1 - alpha^2), beta(t) = 0.1 + 19.9 t.

    t in [1e-3, 1], any shape and float dtype; both results have it too.
    """
    integral = BETA_MIN * t + 0.5 * BETA_SPAN * t * t
    return torch.exp(-0.5 * integral), torch.sqrt(-torch.expm1(-integral))


def sincos_positions(side: int, width: int) -> Tensor:
    """(side * side, width): sin and cos of the row, then of the column, a quarter each."""
    frequencies = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, width)


class Block(nn.Module):
    """h + gate * attention(modulate(h)), then h + gate * mlp(modulate(h)); gates start at 0.

    h (B, tokens, width), condition (B, width): adaLN-zero of Peebles and Xie, arXiv 2212.09748.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, mlp_ratio * width)
        self.down = nn.Linear(mlp_ratio * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        batch, tokens, width = h.shape
        modulation = self.modulation(condition)[:, None].chunk(6, dim=2)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        z = F.layer_norm(h, (width,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(z).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        z = F.scaled_dot_product_attention(q, k, v)
        h = h + gate1 * self.proj(z.transpose(1, 2).reshape(batch, tokens, width))
        z = F.layer_norm(h, (width,)) * (1 + scale2) + shift2
        return h + gate2 * self.down(F.gelu(self.up(z), approximate="tanh"))


class DiT(nn.Module):
    """velocity x0 - eps of x_t = t x0 + (1 - t) eps: the network both models share.

    x (B, 1, 28, 28) of the module's dtype; t (B,) floating, in [0, 1]; y (B,) int64, 0..9, or 10
    for "no class". Returns the shape and dtype of x. Smooth in x and t; float64 after `.double()`.
    """

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 3, patch: int = 4, mlp_ratio: int = 3):
        super().__init__()
        self.patch, self.side = patch, 28 // patch
        self.embed = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(sincos_positions(self.side, width))
        # up to 32 half-turns over [0, 1]: faster ones would let the network wiggle in t
        frequencies = math.pi * 2.0 ** torch.linspace(-1, 5, 16)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(NULL_CLASS + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch * patch)
        nn.init.normal_(self.classes.weight, std=0.02)
        for layer in (self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def start(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks read: the patches (B, tokens, width) and the condition (B, width)."""
        batch, side, patch = x.shape[0], self.side, self.patch
        patches = x.reshape(batch, side, patch, side, patch).transpose(2, 3)
        h = self.embed(patches.reshape(batch, side * side, patch * patch)) + self.positions
        angles = t.to(x.dtype)[:, None] * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.classes(y)
        return h, F.silu(condition)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        side, patch = self.side, self.patch
        h, condition = self.start(x, t, y)
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.final_modulation(condition)[:, None].chunk(2, dim=2)
        h = self.final(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)
        return h.reshape(len(x), side, side, patch, patch).transpose(2, 3).reshape(x.shape)


class ConvBlock(nn.Module):
    """skip(h) + conv(silu(modulate(norm(conv(silu(norm(h))))))), the last convolution starting at 0.

    h (B, inside, H, W), condition (B, width) -> (B, outside, H, W).
    """

    def __init__(self, inside: int, outside: int, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, inside)
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * outside)
        self.last = nn.Conv2d(outside, outside, 3, padding=1)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        z = self.first(F.silu(self.norm(h)))
        z = F.group_norm(z, 8) * (1 + scale) + shift
        return self.skip(h) + self.last(F.silu(z))


class UNet(nn.Module):
    """velocity x0 - eps of x_t = t x0 + (1 - t) eps for 16x16 digits, by convolutions alone.

    x (B, 1, 16, 16) of the module's dtype; t and y as for `DiT`. Returns the shape and dtype of x. Smooth in x and t.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96), width: int = 96):
        super().__init__()
        frequencies = math.pi * 2.0 ** torch.linspace(-1, 5, 16)  # as in `DiT`
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(NULL_CLASS + 1, width)
        self.embed = nn.Conv2d(1, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ConvBlock(a, b, width) for a, b in zip((widths[0], *widths), widths, strict=False))
        self.middle = ConvBlock(widths[-1], widths[-1], width)
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.up = nn.ModuleList(ConvBlock(a + b, a, width) for a, b in reversed(pairs))
        self.norm = nn.GroupNorm(8, widths[0])
        self.final = nn.Conv2d(widths[0], 1, 3, padding=1)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t.to(x.dtype)[:, None] * self.frequencies
        condition = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.classes(y))
        h, kept = self.embed(x), []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if k else h, condition)
            kept.append(h)
        h = self.middle(h, condition)
        for block, before in zip(self.up, reversed(kept[:-1]), strict=True):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0), before], dim=1), condition)
        return self.final(F.silu(self.norm(h)))


class VPModel(nn.Module):
    """epsilon of x = alpha x0 + sigma eps, from a `DiT` asked at the flow time of equal SNR.

    With s = alpha / (alpha + sigma), x / (alpha + sigma) is the flow state s x0 + (1 - s) eps, and
    so eps = state - s * velocity: the network has an O(1) target at every noise level.
    x (B, 1, 28, 28), t (B,) 1000 times the VP time, in [1, 1000], y as for `DiT`.
    """

    def __init__(self, dit: DiT):
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(t / 1000)
        s = (alpha / (alpha + sigma)).to(x.dtype)
        state = x / (alpha + sigma).to(x.dtype)[:, None, None, None]
        return state - s[:, None, None, None] * self.dit(state, s, y)


class Classifier(nn.Module):
    """Logits (B, 10) of digits (B, 1, 28, 28) in [-1, 1]; `features` are the 64 numbers below."""

    def __init__(self):
        super().__init__()
        layers = ((1, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, padding=1, bias=False) for a, b, stride in layers)
        self.norms = nn.ModuleList(nn.GroupNorm(4, conv.out_channels) for conv in self.convs)
        self.hidden = nn.Linear(96, 64)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x)))
        return F.gelu(self.hidden(x.mean(dim=(2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))


class SmallClassifier(nn.Module):
    """A `Classifier` of 28x28 digits for those of 16x16, which it is shown at twice their size without their margin."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def features(self, x: Tensor) -> Tensor:
        return self.classifier.features(self.enlarged(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.enlarged(x))

    @staticmethod
    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bicubic")[..., 2:-2, 2:-2]
