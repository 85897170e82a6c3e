"""How far samples are from where a fine solver takes the same noise: one by one, and as a distribution."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .target import Target

CRITERIA = ("rmse", "median", "features")
SWITCH = 0.5  # a sample further off than this part of the median distance between references counts as switched
RESAMPLED = 2_000  # times, for the interval of a ratio
CHUNK = 64  # samples that features and classify see at a time
SPLITS, WIDE = 16, 4096  # halvings of the noises to average a distance over; with more than WIDE features only one


def squares(x: Tensor, reference: Tensor) -> Tensor:
    """(B,) float64 on the CPU: the mean of (x - reference)^2 over the elements of each sample, or of its features."""
    return (x.double() - reference.double()).square().flatten(1).mean(1).cpu()


def criterion(select: str, errors: Tensor, features: Tensor | None = None) -> float:
    """What a choice between solvers makes small:

        rmse: sqrt(mean_b errors_b)    median: sqrt(median_b errors_b)    features: sqrt(mean_b features_b)

    errors, features: (B,) :func:`squares` of the samples and of their features, each to the reference from the same
    noise; infinite where a solver diverged to NaN or Inf. Paired, so that two solvers differ by what they do and not by
    the noise they got. Raises ValueError for another name, and for "features" without any.
    """
    if select not in CRITERIA:
        raise ValueError(f"select={select!r}: choose {', '.join(map(repr, CRITERIA))}")
    if select == "features":
        if features is None:
            raise ValueError("select='features' needs a target with features: Target(..., features=function)")
        errors = features
    return math.sqrt(float(errors.median() if select == "median" else errors.mean()))


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two sets of features (n, F), in float64; NaN below 2 rows.

    With A'A = C1 and B'B = C2, tr (C1 C2)^(1/2) is the sum of the singular values of A B', so that more features
    than samples cost no more than samples squared.
    """
    if len(first) < 2 or len(second) < 2:
        return math.nan
    means, roots = zip(*(_moments(part) for part in (first, second)), strict=True)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    traces = sum(root.square().sum() for root in roots)
    return float(((means[0] - means[1]).square().sum() + traces - 2 * cross).clamp_min(0))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a root R of the covariance R'R with at most n or F rows, (F,) and (min(n, F), F) float64."""
    features = features.cpu().double()
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R


def energy_distance(first: Tensor, second: Tensor, *, same_noise: bool = False) -> float:
    """2 E d(a, b) - E d(a, a') - E d(b, b'), d Euclidean, of two sets of features (n, F); NaN below 2 rows.

    Over pairs of different rows, and, with ``same_noise``, where row i of both comes from one noise, of different
    noises: without bias, so about zero, and as often below, for two sets from one distribution. In float64. Szekely
    and Rizzo, 2013.
    """
    if len(first) < 2 or len(second) < 2:
        return math.nan
    first, second = first.cpu().double(), second.cpu().double()
    between = torch.cdist(first, second)
    mixed = _off_diagonal(between) if same_noise else between.mean()
    return float(2 * mixed - _off_diagonal(torch.cdist(first, first)) - _off_diagonal(torch.cdist(second, second)))


def _off_diagonal(pairs: Tensor) -> Tensor:
    """The mean over pairs of different rows; the diagonal is zeroed."""
    return pairs.fill_diagonal_(0).sum() / (len(pairs) * (len(pairs) - 1))


def three_digits(value: float) -> str:
    """A number with three significant digits: 0.0123, 1.20, 123, 1.23e-05."""
    return f"{value:#.3g}".removesuffix(".")


@dataclass(frozen=True, eq=False)
class Reference:
    """Where a fine solver takes some noises, as the measure of others that start there.

    target: its ``features`` are compared as distributions, the flattened samples where it has none; its ``classify``
        says which samples switch. samples: (n, *S). asked: (n,) the labels asked for.
    real: (R, F) features of real data to compare distributions with. None: those of the reference itself from other
        noises.
    """

    target: Target
    samples: Tensor
    asked: Tensor | None = None
    real: Tensor | None = None
    features: Tensor = field(init=False, repr=False)
    classes: Tensor | None = field(init=False, repr=False)
    reach: float = field(init=False)
    splits: list[tuple[Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        set_ = partial(object.__setattr__, self)
        set_("features", self._features(self.samples))
        set_("classes", self._classes(self.samples))
        n, count = len(self.samples), SPLITS if self.features.shape[1] <= WIDE else 1
        orders = [torch.randperm(n, generator=torch.Generator().manual_seed(k)) for k in range(count)]
        set_("splits", [(order[: n // 2], order[n // 2 :]) for order in orders])
        flat = self.samples[:CHUNK].flatten(1).double()  # 2,016 pairs settle a median
        apart = torch.pdist(flat) / math.sqrt(flat.shape[1])
        set_("reach", SWITCH * float(apart.median()) if len(apart) else math.inf)

    def measure(self, x: Tensor) -> dict[str, Any]:
        """The figures of samples x (n, *S) from the same noises; None where one cannot be told.

        rmse, rmse_low, rmse_high: sqrt(mean of squares), and its 95 % interval over noises (normal, on the mean of
        the samples' squares). median, p90, worst: of the samples' own root mean squares. switched: the share that is
        classified as something else than the reference, or, without ``classify``, that is further from it than
        ``reach``, half of the median distance (root mean square) between two different reference samples. accuracy:
        the share read as what was asked. frechet, energy: see :meth:`distances`. samples: n.
        """
        found = squares(x, self.samples)
        mean, roots = float(found.mean()), found.sqrt()
        half = 1.96 * float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        classes = self._classes(x)
        switched = roots > self.reach if classes is None or self.classes is None else classes.ne(self.classes)
        return {
            "rmse": math.sqrt(mean),
            "rmse_low": math.sqrt(max(mean - half, 0.0)),
            "rmse_high": math.sqrt(mean + half),
            "median": float(roots.median()),
            "p90": float(roots.quantile(0.9, interpolation="higher")),
            "worst": float(roots.max()),
            "switched": float(switched.double().mean()) if len(found) > 1 or classes is not None else None,
            "accuracy": None
            if classes is None or self.asked is None
            else float(classes.eq(self.asked).double().mean()),
            **self.distances(x),
            "samples": len(found),
        }

    def distances(self, x: Tensor | None = None) -> dict[str, float | None]:
        """frechet and energy of samples x from the same noises; without any the noise floor, of the reference itself.

        frechet: the mean over some halvings of the noises of the distance between x from one half and the reference
        from the other. Its bias is that of the floor, so what counts is by how much it is above. energy: over all pairs
        of different noises, which has no bias. Its floor is the mean size between the halves of the reference.
        """
        features = self.features if x is None else self._features(x)
        if not features.isfinite().all():
            return {"frechet": None, "energy": None}
        if self.real is not None:
            found = [distance(features, self.real) for distance in (frechet_distance, energy_distance)]
        else:
            halves = [(features[i], self.features[j]) for a, b in self.splits for i, j in ((a, b), (b, a))]
            found = [statistics.fmean(frechet_distance(*pair) for pair in halves)]
            if x is None:
                found.append(statistics.fmean(abs(energy_distance(*pair)) for pair in halves[::2]))
            else:
                found.append(energy_distance(features, self.features, same_noise=True))
        frechet, energy = (None if math.isnan(value) else value for value in found)
        return {"frechet": frechet, "energy": energy}

    def worst(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The samples that err most and the reference from the same noise, (count, *S) each, worst first."""
        rows = squares(x, self.samples).argsort(descending=True, stable=True)[:count]
        rows = rows.to(x.device)
        return x[rows], self.samples[rows]

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        """(n, F) on the CPU. The user's function gets copies, because it may work in place."""
        of = self.target.features
        return (x if of is None else torch.cat([of(part.clone()) for part in x.split(CHUNK)])).flatten(1).cpu()

    @torch.no_grad()
    def _classes(self, x: Tensor) -> Tensor | None:
        """(n,) on the CPU."""
        classify = self.target.classify
        if classify is None:
            return None
        logits = torch.cat([classify(part.clone()) for part in x.split(CHUNK)]).cpu()
        unread = logits.isnan().any(-1)  # argmax would take NaN for a class
        if bool(unread.any()):
            text = f"classify returned NaN for {int(unread.sum())} of {len(x)} samples"
            if not hasattr(self, "classes"):
                raise ValueError(text)
            warnings.warn(f"{text}: they count as switched, and as read wrongly", stacklevel=4)
        return logits.argmax(-1).masked_fill(unread, -1)


def ratio_of(mine: Tensor, rivals: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """sqrt(mean mine / min_k mean rivals_k), and its 95 % interval, from resampling the samples of all alike.

    mine: (S,) squares, rivals: (K, S). Each resampling has its own best rival, so that the interval holds how uncertain
    that choice is too; and one sample in S, on average, that nobody has seen: there the table, or else the rivals, err
    like the worst sample that the table and its best rival have. Without them the interval of 32 samples missed the
    ratio of 2,048 in 15 to 40 % of draws, since errors have heavy tails. Infinite for a table that diverges, 1 where
    nobody errs.
    """
    tiny = 1e-300
    ratio = math.sqrt(max(float(mine.mean()), tiny) / max(float(rivals.mean(1).min()), tiny))
    if not math.isfinite(ratio) or not bool(rivals.isfinite().all()):
        return ratio, ratio, ratio
    theirs = rivals[rivals.mean(1).argmin()]
    worst = torch.maximum(mine.max(), theirs.max())
    seen = len(mine)
    if bool((mine < theirs).any()):  # a table that errs less nowhere, as one that is its own rival, stays what it is
        mine = torch.cat([mine, worst[None], mine.mean()[None]])
        rivals = torch.cat([rivals, rivals.mean(1, keepdim=True), worst.expand(len(rivals), 1)], 1)
    picks = torch.randint(len(mine), (RESAMPLED, seen), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLED, len(mine), dtype=torch.float64)
    counts.scatter_add_(1, picks, torch.ones(picks.shape, dtype=torch.float64))
    ratios = ((counts @ mine).clamp_min(tiny) / (counts @ rivals.T).amin(1).clamp_min(tiny)).sqrt()
    ends = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (round(end, 9) for end in ends.tolist())  # two sums of the same numbers differ in their last bits
    return ratio, min(low, ratio), max(high, ratio)
