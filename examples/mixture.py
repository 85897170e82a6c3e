"""An exact flow to search solvers for: a mixture of Gaussians centred on scikit-learn's 1797 digits.

`digits` returns a Target, as `examples.mnist.flow` does: `python -m dss_fast search examples.mixture:digits`.
No network, no training error: the velocity is a softmax over the centres, cheap enough for 50,000-sample
runs of the paper's recipe.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dss_fast import Flow, Target

BANDWIDTH = 0.3  # Adams-Bashforth reaches an MSE of 1.2e-3 in 10 calls at this width; below 0.2 no solver does


class Mixture(nn.Module):
    """The marginal velocity of x = t x0 + (1 - t) eps, x0 = mu_k + h xi with k uniform:

        w = softmax_k(-|x - t mu_k|^2 / 2 s^2),  s^2 = t^2 h^2 + (1 - t)^2
        v = mean + (t h^2 - (1 - t)) / s^2 * (x - t mean),  mean = sum_k w_k mu_k

    centres: (K, D) mu. bandwidth: h, above 0 (v has a pole at t = 1 otherwise).
    model(x, t) -> v, x: (B, *S) of D elements, t: (B,) in [0, 1], 0 noise; dtype of x.
    """

    def __init__(self, centres: Tensor, bandwidth: float = BANDWIDTH):
        super().__init__()
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth!r}: must be above 0")
        self.bandwidth = bandwidth
        self.register_buffer("centres", centres)
        self.register_buffer("norms", centres.square().sum(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat, t = x.flatten(1), t.to(x.dtype)[:, None]
        centres = self.centres.to(x.dtype)
        h2, noise = self.bandwidth**2, 1 - t
        variance = t * t * h2 + noise * noise
        scores = flat @ centres.T * (t / variance) - self.norms.to(x.dtype) * (t * t / (2 * variance))
        mean = scores.softmax(1) @ centres
        return (mean + (t * h2 - noise) / variance * (flat - t * mean)).reshape(x.shape)


def centres() -> Tensor:
    """(1797, 64) float32: the 8x8 digits, scaled from [0, 16] to [-1, 1]."""
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1


def decode(x: Tensor) -> Tensor:
    """Samples in [-1, 1] to images in [0, 1], clipped; same shape."""
    return ((x + 1) / 2).clamp(0, 1)


def digits(bandwidth: float = BANDWIDTH) -> Target:
    """1 x 8 x 8, no conditions, the paper's flow."""
    return Target(Mixture(centres(), bandwidth), (1, 8, 8), Flow(), decode=decode)
