"""What a user sets of a search: GaussNewton, the default, and Lion, the paper's recipe. Both are data, checked here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..distance import CRITERIA
from ..schedule import Schedule
from .space import SPACES, Space

Loss = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GaussNewton:
    """Settings of  min over theta  mean_b rho(|r_b|^2),  rho(z) = c log(1 + z / c),  c = 10 medians of z

    space: ``"plain"``, the paper's; ``"noise"``, with weights on the initial noise; ``"noise+start"``, with the time of
        the first call too; ``"noise+times"``, with that of each call, which errs less on this model and more on
        another; see ``Space``.
    loss: what r is: ``"trajectory"``: x_N - teacher(1), and sqrt(w) times the differences of x_1..x_{N-1} where the
        network sees them, w from 3 to 0.1 in the first six rounds. ``"end"``: w = 0. A function:
        feature(x_N) - feature(teacher(1)).
    generality: adds generality * L * sum_i d_i^2 to the loss, d the weights on the noise and L the loss at the start.
        They alone make a table inexact where trajectories are straight, and break it on other models: 0.1 takes the
        error there from 1.05 to .89 of the best hand-made at N = 8, for about the same on its own
        (docs/transfer.md). From about 10 on the search is in the paper's space.
    select: what the choice among accepted tables makes small on held-out samples: ``"robust"``, rho of the end
        point's squares, or a criterion of ``distance``: ``"rmse"``, ``"median"``, ``"features"``.
    samples: of the training set; by default what the budget allows. held_out_samples: a fifth of them, none below 40.
    batch_size: samples run at a time, at most; an eighth of the set, so that early rounds can be small.
    memory: bytes of the device that the search may use beside the model's weights; by default half of what is free.
    teacher_evaluations: model calls of each reference trajectory; by default 24, and at least 2 N. rounds: of
        Gauss-Newton at most; 0 chooses among the tables there are.
    gradients: whether the search goes back through the model. False: it only calls it, as quantised kernels, compiled
        engines and remote models ask for, and moves along the up to 3 N directions in which the errors of the
        library's tables grow fastest, by differences of rollouts: an accepted round costs N (1 + 3 N) evaluations per
        sample, less for budgets below 16 N (1 + 3 N). For N = 3 to 12, with both branches of guidance at all steps.
        None: so, with a warning, where the model's output has no graph.

    A round costs N evaluations per sample for the candidate, which is also its acceptance test, and, once
    accepted, 2 N per backward. All N share the teacher; each starts from the best of the library's, the published and
    the hand-made tables, those on the spacing found for the N before among them; from 40 samples on from up to three
    on different spacings, of which the best goes on after three rounds (below 40 the race costs more than it brings).
    """

    space: str = "noise+start"
    samples: int | None = None
    batch_size: int = 64
    held_out_samples: int | None = None
    teacher_evaluations: int | None = None
    rounds: int = 12
    loss: Loss = "trajectory"
    generality: float = 0.0
    select: str = "robust"
    memory: int | None = None
    gradients: bool | None = None
    name: ClassVar[str] = "gauss_newton"

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space={self.space!r}: choose {', '.join(SPACES)}")
        if isinstance(self.loss, str) and self.loss not in ("end", "trajectory"):
            raise ValueError(f"loss={self.loss!r}: 'end', 'trajectory' or a function of samples")
        if self.select not in ("robust", *CRITERIA):
            raise ValueError(f"select={self.select!r}: choose 'robust', {', '.join(map(repr, CRITERIA))}")
        if self.gradients not in (None, True, False):
            raise ValueError(f"gradients={self.gradients!r}: give True, False, or None for what the model has")
        _check_counts(self, "samples", "batch_size", "memory")
        _check_counts(self, "rounds", "held_out_samples", least=0)
        _check_counts(self, "teacher_evaluations", least=16)
        if not (isinstance(self.generality, int | float) and 0 <= self.generality < math.inf):
            raise ValueError(f"generality={self.generality!r}: give a number from 0")
        if self.generality and self.space == "plain":
            raise ValueError(f"generality={self.generality!r}: space 'plain' has no weights on the noise to charge for")

    def space_of(self, schedule: Schedule, num_steps: int) -> Space:
        """What a search for N steps may move."""
        return Space(self.space, schedule, num_steps)


@dataclass(frozen=True)
class Lion:
    """Settings of Algorithms 1 (flow) and 2 (VP) of the paper. All N share each batch and its teacher trajectory.

    samples, batch_size: trajectories in all, and per step of Lion. unique_samples: repeat so many of them
        (a multiple of batch_size), their trajectories kept. None: each is new.
    lr, betas, weight_decay: of Lion (arXiv 2302.06675).
    huber_weight: of 1000 * Huber(huber_delta) on the last point; 0 leaves the trajectory MSE alone.
    teacher_steps: of Euler; for VP the points of DDIM.
    short_tail: the last two rows use the immediately preceding output only; None: for N = 5 and 6.
    check_every: batches between looks at ``check_samples`` held-out ones, 20 looks by default. The solver
        with the smallest held-out error at the end point is kept. check_samples=0: the last is.
    memory: as in :class:`GaussNewton`.
    """

    samples: int = 50_000
    batch_size: int = 32
    unique_samples: int | None = None
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    huber_weight: float = 1000.0
    huber_delta: float = 1e-3
    teacher_steps: int = 100
    short_tail: bool | None = None
    check_every: int | None = None
    check_samples: int = 128
    memory: int | None = None
    name: ClassVar[str] = "lion"

    def __post_init__(self) -> None:
        _check_counts(self, "samples", "batch_size", "unique_samples", "teacher_steps", "check_every", "memory")
        _check_counts(self, "check_samples", least=0)
        unique = self.unique_samples
        if unique is not None and unique < self.samples and unique % self.batch_size:
            raise ValueError(f"unique_samples={unique!r}: give a multiple of batch_size={self.batch_size}")

    def space_of(self, schedule: Schedule, num_steps: int) -> Space:
        """The paper's space, its tail as ``short_tail`` says."""
        short = num_steps in (5, 6) if self.short_tail is None else self.short_tail
        return Space("plain", schedule, num_steps, short_tail=short)


Method = GaussNewton | Lion
METHODS: dict[str, type[GaussNewton] | type[Lion]] = {kind.name: kind for kind in (GaussNewton, Lion)}


def settings_of(method: str | Method) -> Method:
    """The settings of a method. Raises ValueError listing the methods."""
    if isinstance(method, GaussNewton | Lion):
        return method
    if method not in METHODS:
        raise ValueError(
            f"method={method!r}: choose {' or '.join(map(repr, METHODS))}, or give GaussNewton or Lion settings"
        )
    return METHODS[method]()


def described(settings: Method) -> dict[str, Any]:
    """The settings as JSON data, for the run folder, but for what finds the same table; a function is named by its
    type."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "memory"}
    if values.get("gradients", True) is None:  # as before there was one
        del values["gradients"]
    plain = (str, int, float, bool, list, tuple, type(None))
    return {name: value if isinstance(value, plain) else repr(type(value)) for name, value in values.items()}


def _check_counts(settings: Method, *names: str, least: int = 1) -> None:
    """Raises ValueError for a field that is neither None nor a whole number from ``least``."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r}: give a whole number from {least}")
