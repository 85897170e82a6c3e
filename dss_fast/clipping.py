"""A model whose clean prediction stays within the range of the data.

Clipping is not linear, so no table does it. What does is the model: clipped, it is another field, which ``sample``,
``search`` and ``compare`` then step, imitate and measure alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import modules_of, output_of
from .schedule import Schedule, inverse
from .target import Model


class Clipped(nn.Module):
    """The model with its implied x0 clipped, in the model's own terms:

        x0 = r x + s m          m' = (clamp(x0, -bound, bound) - r x) / s

    so that every solver on ``m'`` uses the clipped x0, as DPM-Solver++ with thresholding at 1 and DDIM with
    ``use_clipped_model_output`` do (diffusers). For a table of alphas that ends near 0, where an error of epsilon is
    one of x0 times 1 / alpha (20,000 for a cosine table of 1,000), and for data that have a range, as pixels in
    [-1, 1] have; latents have none.

        target = Target(Clipped(net, schedule), (3, 32, 32), schedule)

    model: called as model(x (B, *S), t (B,), **cond), in the schedule's units and prediction. schedule: the model's.
    bound: of the data's absolute values. Returns floats of x's shape, float32 at least, because half precision does not
    hold an m' whose x0 is within the range.

    With guidance each branch is clipped, and not what they give together. Raises ValueError for a bound not above 0.
    """

    def __init__(self, model: Model, schedule: Schedule, bound: float = 1.0) -> None:
        super().__init__()
        if not 0 < bound < float("inf"):
            raise ValueError(f"bound={bound!r}: give the largest absolute value that data have, as 1.0 for pixels")
        self.model, self.schedule, self.bound = model, schedule, bound
        if not isinstance(model, nn.Module):
            self.held = nn.ModuleList(modules_of(model))  # which a search freezes

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """m' (B, *S) for x (B, *S) at t (B,), differentiable in both."""
        output = output_of(self.model(x, t, **cond))
        shape = (-1, *[1] * (x.ndim - 1))
        u = self._u(t)
        of_x, of_y = self.schedule.x0(u)
        p, q = self.schedule.prediction(u)
        r, s = ((of_x + of_y * p).reshape(shape), (of_y * q).reshape(shape))
        wide = torch.promote_types(x.dtype, torch.float32)
        # A sample in float32 with factors in float64 would be float64 throughout, at twice the memory.
        r, s, x, output = r.to(wide), s.to(wide), x.to(wide), output.to(wide)
        x0 = r * x + s * output
        inside = (x0.abs() <= self.bound) | (s == 0)
        clipped = (x0.clamp(-self.bound, self.bound) - r * x) / torch.where(s == 0, 1, s)
        return torch.where(inside, output, clipped)  # to the bit the model's own where nothing is clipped

    def _u(self, t: Tensor) -> Tensor:
        """u (B,) float64 of the model's times, where time stands still the first; differentiable."""
        ends = self.schedule.time(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device))
        sign = 1.0 if bool(ends[1] > ends[0]) else -1.0
        wanted = t.double()
        with torch.no_grad():
            u = inverse(lambda u: sign * self.schedule.time(u), sign * wanted)
        if not t.requires_grad:
            return u
        with torch.enable_grad():  # one step of Newton, whose derivative is the inverse function's
            leaf = u.clone().requires_grad_()
            slope = torch.autograd.grad(self.schedule.time(leaf).sum(), leaf)[0]
        step = (wanted - wanted.detach()) / torch.where(slope == 0, 1, slope)
        return u + torch.where(slope == 0, 0, step)
