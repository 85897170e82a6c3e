"""Times that pipelines of diffusers pass when the user gave none: a learned table keeps its own there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

CLOSE = 1e-6
STRAIGHT = 1e-4  # float32 sigmas near 1 leave their logit no more


def unasked(sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, num_train_timesteps: int) -> bool:
    """Whether there are no custom times, or those of a pipeline: :func:`even`, or a spacing that belongs to a model.

    Cosmos3 passes a line from 1 - 1/T to 0, Ideogram4 quantiles of a logit-normal, StableAudio3 even steps of log SNR
    after a first of 1. A hand-made method walks these.
    """
    given = _levels(sigmas, timesteps, num_train_timesteps)
    return even(sigmas, timesteps, num_train_timesteps) or all(
        np.allclose(values, np.linspace(1 - 1 / num_train_timesteps, 0, len(values) + 1)[:-1], atol=CLOSE)
        or (len(values) > 3 and (_is_logit_normal(values) or _is_even_in_log_snr(values)))
        for values in given
    )


def even(sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, num_train_timesteps: int) -> bool:
    """Whether times are absent or spaced evenly before any shift, which hand-made methods take for none.

    Some 50 pipelines pass sigmas of 1 - i/n, CogView4 whole numbers from T to 1 and their sigmas, Bria n of the T
    training sigmas, Mochi (sigmas) and LTXCondition (timesteps) half a line from 1 to 0.975 and then a parabola.
    """
    given = _levels(sigmas, timesteps, num_train_timesteps)
    return all(any(np.allclose(v, g, atol=CLOSE) for g in _grids(len(v), num_train_timesteps)) for v in given)


def are_training_sigmas(sigmas: Sequence[float], num_train_timesteps: int) -> bool:
    """Whether sigmas are n of the T training ones, as Bria's pipeline passes them to classes other than its own."""
    own = _training_sigmas(len(sigmas), num_train_timesteps)
    return bool(np.allclose(np.asarray(sigmas, dtype=np.float64), own, atol=CLOSE))


def _training_sigmas(n: int, steps: int) -> Any:
    return (steps - np.linspace(0, steps - 1, n).astype(np.int64)) / steps


def _levels(sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, steps: int) -> list[Any]:
    levels = ((sigmas, 1), (timesteps, steps))
    return [np.asarray(values, dtype=np.float64) / scale for values, scale in levels if values is not None]


def _grids(n: int, steps: int) -> Iterator[Any]:
    yield 1 - np.arange(n) / n
    yield np.linspace(steps, 1, n).astype(np.int64) / steps
    yield _training_sigmas(n, steps)
    if n > 1:
        line, i = n // 2, np.arange(n)
        rest, rise = n - line, line - 0.025 * n
        bend, slope = rise / (line * rest**2), 0.025 / line - 2 * rise / rest**2
        yield 1 - np.where(i < line, i * 0.025 / line, bend * i**2 + slope * i + bend * line**2)


def _is_logit_normal(sigmas: Any) -> bool:
    """sigma_i = sigmoid(mu + std * z_i), z_i the normal's quantiles; the first is clamped to a log SNR of -18."""
    n = len(sigmas)
    normal = torch.special.ndtri(torch.arange(n - 1, 0, -1, dtype=torch.float64) / n).numpy()
    return abs(sigmas[0] - 1 / (1 + np.exp(-9))) < CLOSE and _straight(normal, sigmas[1:])


def _is_even_in_log_snr(sigmas: Any) -> bool:
    """sigma_i = sigmoid(a - b * i), whatever a and b, and then the first made 1."""
    return bool(sigmas[0] == 1) and _straight(np.arange(1.0, len(sigmas)), sigmas[1:])


def _straight(x: Any, sigmas: Any) -> bool:
    """Whether the logits of falling sigmas lie on a line over x."""
    if not bool(((sigmas > 0) & (sigmas < 1)).all()) or bool((np.diff(sigmas) >= 0).any()):
        return False
    logits = np.log(sigmas / (1 - sigmas))
    return bool(np.abs(logits - np.polyval(np.polyfit(x, logits, 1), x)).max() < STRAIGHT)
