"""The transformer of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), with the key names of their checkpoints.

Both are one network: patches, sine positions, time and class embedded and added, blocks modulated by them (adaLN-Zero).
They differ in what the output means and in the time: DiT predicts epsilon at t in [0, 999], SiT velocity x0 - eps at
t in [0, 1], t = 1 data. Both also put out variances, which no deterministic solver uses and `forward` drops.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

XL = {"depth": 28, "width": 1152, "heads": 16, "patch": 2}
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # by width, of the published XL, L, B and S: no weight says it
FREQUENCIES = 256


class Embedding(nn.Module):
    """Sines of the time, then two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        rates = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10000) / half))
        angles = t[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate * self.attn(modulated(x, shift, scale))
        return x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, 2)
        return self.linear(modulated(x, shift, scale))


class Patches(nn.Module):
    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Labels(nn.Module):
    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last row is "no class"

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Transformer(nn.Module):
    """model(x (B, 4, 32, 32), t (B,), y (B,) int64) -> (B, 4, 32, 32): epsilon for DiT, velocity x0 - eps for SiT."""

    def __init__(self, depth=28, width=1152, heads=16, patch=2, size=32, channels=4, classes=1000, variances=True):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = Patches(channels, width, patch)
        self.t_embedder = Embedding(width)
        self.y_embedder = Labels(classes, width)
        self.pos_embed = nn.Parameter(positions(size // patch, width)[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, channels * (2 if variances else 1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows, columns = (side // self.patch for side in x.shape[2:])
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        tokens = self.final_layer(tokens, c)
        tokens = tokens.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (rows, columns))
        image = tokens.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, channels, H, W)
        return image[:, : self.channels]


def positions(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of the column in the first half, of the row in the second."""
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()


def shape_of(weights: Mapping[str, Tensor], heads: int | None = None) -> dict[str, int | bool]:
    """The arguments of :class:`Transformer` that a checkpoint's weights were made with: any size, patch and image.

    Raises ValueError for a width that no published network has, whose number of heads is then to be given.
    """
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    heads = HEADS.get(width, 0) if heads is None else heads
    if not heads:
        raise ValueError(
            f"width {width}: the number of heads is not in the weights; give it, as in load(path, heads=16)"
        )
    return {
        "depth": 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        "width": width,
        "heads": heads,
        "patch": patch,
        "size": math.isqrt(weights["pos_embed"].shape[1]) * patch,
        "channels": channels,
        "classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "variances": len(weights["final_layer.linear.bias"]) == 2 * patch**2 * channels,
    }


def load(path: str | Path, **shape: int | bool) -> Transformer:
    """A network from a checkpoint: ``DiT-XL-2-512x512.pt``, ``SiT-XL-2-256x256.pt``, or one of the training scripts of
    facebookresearch/DiT and willisma/SiT, whose ``ema`` weights are taken.

    shape: arguments of :class:`Transformer`, instead of what the weights say. Never runs code from the file: beside
    tensors only the ``argparse.Namespace`` is read that those scripts put beside the weights.

    Raises ValueError naming the keys when the file holds another architecture, and the conversion when it holds more
    than weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{path} holds more than weights ({reason}). If you trust it, keep the weights alone: "
            f"torch.save(torch.load({str(path)!r}, weights_only=False)['ema'], 'weights.pt')"
        ) from None
    weights = weights.get("ema", weights) if isinstance(weights, Mapping) else weights
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.bias")
    if not isinstance(weights, Mapping) or any(key not in weights for key in needed):
        found = list(weights)[:3] if isinstance(weights, Mapping) else type(weights).__name__
        raise ValueError(f"{path}: not a DiT or SiT; it holds {found} and lacks one of {', '.join(needed)}")
    shape = {**shape_of(weights, shape.get("heads")), **shape}
    with torch.device("meta"):
        network = Transformer(**shape)
    own = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wrong = [key for key in own.keys() ^ weights.keys()]
    wrong += [key for key in own.keys() & weights.keys() if own[key] != tuple(weights[key].shape)]
    if wrong:
        raise ValueError(
            f"{path}: not a DiT or SiT of {shape}; missing, unknown or of another shape: {sorted(wrong)[:3]}"
        )
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)
