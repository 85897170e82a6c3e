"""Runs that begin part-way in, as in img2img and inpainting: the history is shorter than the rows."""

from __future__ import annotations

from torch import Tensor


def starting_at(weights: Tensor, first: int) -> Tensor:
    """The weights (R, N, 4 + K) of a run whose history begins at step ``first``.

        w_i,first <- sum_{j<=first} w_ij        w_ij <- 0 for j < first

    What rows give to the predictions before it goes to y_first: the prediction is taken as constant until then, so rows
    keep their sums and the first step is Euler's (DDIM's for VP).
    """
    weights = weights.clone()
    early = slice(4, 4 + first)
    weights[:, first:, 4 + first] += weights[:, first:, early].sum(2)
    weights[:, :, early] = 0
    return weights
