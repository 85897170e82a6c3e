"""A solver is data: N + 1 timesteps, a lower triangle of coefficients and the schedule they belong to.

    x_{i+1} = a_i * x_i + b_i * sum_{j<=i} coeffs[i][j] * y_j        (a, b from the schedule)

Tables come from a search, from a JSON file, from the published ones shipped with the package (``names.py``), or from
the hand-made methods (``methods.py``).
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from . import hub
from . import schedule as schedules
from .files import read_json, shortened, write_json
from .schedule import LARGEST_SHIFT, DiscreteVP, Flow, Schedule, check_schedule, default_schedule, path_difference
from .tensors import SolverTensors
from .x0form import X0Form

FORMAT = "dss_fast.solver"
VERSION = 2
ROW_SUM_TOLERANCE = 1e-6
ROUNDING = 1e-9  # of a row's sum, in what float64 makes of a moved plain table


@dataclass(frozen=True, repr=False)
class Solver:
    """A linear multistep solver on the unit interval, u = 0 noise and u = 1 data.

    timesteps: N + 1 numbers rising strictly from 0 to 1, in visiting order.
    coeffs: N rows of N numbers, zero above the diagonal; row i weighs the predictions y_0..y_i and
        sums to 1 unless ``free_rows``.
    schedule: the path (alpha, sigma over u) that the coefficients belong to, and the interface of the model it was
        made for. ``family`` is read off it.
    name, source, provenance: where it comes from; not part of its value.
    noise_coeffs: N weights on the initial noise, scaled by b_i like the rest. None: none.
    network_timesteps: N points u to call the network at. None: the solver's own.
    guided_steps: the steps that call the unconditional branch too, rising from 0. None: all, where there is guidance.
    guidance_coeffs: N rows of N numbers, with guided_steps: the weights on the differences of the two branches at these
        steps, where ``coeffs`` then weigh the conditional predictions; zero elsewhere. Rows sum to 1.

    Raises ValueError naming the field, its value and what is allowed. Solvers compare and hash by
    value. Parametrisation: arXiv 2505.21114, section 4.
    """

    timesteps: tuple[float, ...]
    coeffs: tuple[tuple[float, ...], ...]
    schedule: Schedule
    name: str = field(default="", compare=False)
    source: str = field(default="", compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    noise_coeffs: tuple[float, ...] | None = None
    network_timesteps: tuple[float, ...] | None = None
    free_rows: bool = False
    guided_steps: tuple[int, ...] | None = None
    guidance_coeffs: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        set_ = partial(object.__setattr__, self)
        set_("timesteps", _numbers("timesteps", self.timesteps))
        set_("coeffs", tuple(_numbers(f"coeffs[{i}]", row) for i, row in enumerate(_rows(self.coeffs))))
        for key in ("noise_coeffs", "network_timesteps"):
            if getattr(self, key) is not None:
                set_(key, _numbers(key, getattr(self, key)))
        if self.guided_steps is not None:
            set_("guided_steps", tuple(self.guided_steps))
        if self.guidance_coeffs is not None:
            rows = _rows(self.guidance_coeffs, "guidance_coeffs")
            set_("guidance_coeffs", tuple(_numbers(f"guidance_coeffs[{i}]", row) for i, row in enumerate(rows)))
        for key in ("name", "source"):
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"{key}: must be a string, got {getattr(self, key)!r}")
        check_schedule(self.schedule)
        if not isinstance(self.free_rows, bool):
            raise ValueError(f"free_rows={self.free_rows!r}: must be true or false")
        if not isinstance(self.provenance, Mapping):
            raise ValueError(f"provenance: must be a mapping, got {self.provenance!r}")
        self._check_times()
        self._check_triangle("coeffs", self.coeffs)
        if self.noise_coeffs is not None and len(self.noise_coeffs) != self.num_steps:
            raise ValueError(f"noise_coeffs: need {self.num_steps} numbers, got {len(self.noise_coeffs)}")
        self._check_guidance()
        values: tuple[Any, ...] = (self.timesteps, self.coeffs, self.schedule)
        values += (self.noise_coeffs, self.network_timesteps, self.free_rows)
        values += (self.guided_steps, self.guidance_coeffs) if self.guided_steps is not None else ()
        set_("_hash", hash(values))  # computed once: every call of ``sample`` looks its table up by solver

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]  # set in __post_init__

    def __repr__(self) -> str:
        """What it is, without its numbers, which ``to_dict`` has."""
        more = [name for name in ("noise_coeffs", "network_timesteps", "free_rows") if getattr(self, name)]
        parts = [f"{self.name or 'unnamed'!r}", f"{self.num_steps} steps", shortened(repr(self.schedule)), *more]
        return f"<Solver {', '.join(parts)}>"

    def _check_times(self) -> None:
        u, n = self.timesteps, self.num_steps
        if n < 1:
            raise ValueError(f"timesteps: need at least 2 (one step), got {len(u)}")
        if u[0] != 0 or u[-1] != 1:
            raise ValueError(f"timesteps: must run from 0 (noise) to 1 (data), got {u[0]!r} to {u[-1]!r}")
        for i, (now, later) in enumerate(pairwise(u)):
            if not now < later:
                raise ValueError(f"timesteps: must rise strictly, got {now!r} then {later!r} at step {i}")
        times = self.network_timesteps
        if times is not None and (len(times) != n or not all(0 <= t <= 1 for t in times)):
            raise ValueError(f"network_timesteps: need {n} numbers in [0, 1], got {times!r}")

    def _check_triangle(self, key: str, rows: tuple[tuple[float, ...], ...]) -> None:
        n = self.num_steps
        if len(rows) != n:
            raise ValueError(f"{key}: need {n} rows for {n + 1} timesteps, got {len(rows)}")
        for i, row in enumerate(rows):
            if len(row) != n:
                raise ValueError(f"{key}[{i}]: need {n} numbers, got {len(row)}")
            for j in range(i + 1, n):
                if row[j] != 0:
                    raise ValueError(
                        f"{key}[{i}][{j}]={row[j]!r}: step {i} cannot use prediction {j}, which comes later"
                    )
            if not self.free_rows and abs(math.fsum(row) - 1) > ROW_SUM_TOLERANCE * max(1.0, *map(abs, row)):
                raise ValueError(
                    f"{key}[{i}]: must sum to 1 (set free_rows for tables that need not), got {math.fsum(row)!r}"
                )

    def _check_guidance(self) -> None:
        steps, rows, n = self.guided_steps, self.guidance_coeffs, self.num_steps
        if steps is None and rows is None:
            return
        if steps is None or rows is None:
            missing = "guided_steps" if steps is None else "guidance_coeffs"
            raise ValueError(f"{missing}: guided_steps and guidance_coeffs belong together, give both or neither")
        whole = all(type(i) is int for i in steps)
        if not whole or list(steps) != sorted({0, *steps}) or not 0 <= steps[-1] < n:
            raise ValueError(f"guided_steps={steps!r}: give whole numbers rising from 0, which must be one, to {n - 1}")
        self._check_triangle("guidance_coeffs", rows)
        for i, row in enumerate(rows):
            for j in set(range(n)) - set(steps):
                if row[j] != 0:
                    raise ValueError(f"guidance_coeffs[{i}][{j}]={row[j]!r}: step {j} has no difference to weigh")

    @property
    def family(self) -> str:
        """``"flow"``, whose predictions are velocities, or ``"vp"``, whose predictions are x0."""
        return self.schedule.family

    @property
    def num_steps(self) -> int:
        """N, the number of network evaluations per sample without guidance."""
        return len(self.timesteps) - 1

    @property
    def guided_calls(self) -> int:
        """The number of network evaluations per sample with guidance: 2 N, or fewer where ``guided_steps`` says so."""
        return self.num_steps + (self.num_steps if self.guided_steps is None else len(self.guided_steps))

    @property
    def timedeltas(self) -> tuple[float, ...]:
        """The N differences of ``timesteps``."""
        return tuple(b - a for a, b in pairwise(self.timesteps))

    def tensors(self) -> SolverTensors:
        """Its numbers as float64 tensors."""

        def tensor(value: Any) -> Tensor | None:
            return None if value is None else torch.tensor(value, dtype=torch.float64)

        return SolverTensors(
            torch.tensor(self.timesteps, dtype=torch.float64),
            torch.tensor(self.coeffs, dtype=torch.float64),
            tensor(self.noise_coeffs),
            tensor(self.network_timesteps),
            self.guided_steps,
            tensor(self.guidance_coeffs),
        )

    def on(self, schedule: Schedule | None, *, strict: bool = True) -> Schedule:
        """The schedule to run on for a model with this one (None: the solver's own).

        Another interface of the same path is fine. Raises ValueError for the other family, and for another path,
        naming the first alpha or sigma at the solver's timesteps that differs; ``strict=False`` allows the path.
        """
        if schedule is None or schedule is self.schedule:
            return self.schedule
        check_schedule(schedule)
        if schedule.family != self.family:
            raise ValueError(
                f"{self.label} is for {self.family} models, the schedule is {schedule.family}; "
                f"choose a {schedule.family} solver or the right schedule"
            )
        if strict:
            u = torch.tensor(self.timesteps, dtype=torch.float64)
            parts = path_difference(self.schedule, schedule, u)
            if parts is not None:
                raise ValueError(
                    f"{self.label} belongs to another noise schedule: {parts}. Its own is {self.schedule!r}; give "
                    "that one, search a solver for this model, or pass strict=False to run it all the same"
                )
        return schedule

    def moved(self, k: float, schedule: Schedule | None = None) -> Solver:
        """The same solver for a model whose data are k times as large: it gives k times the samples.

            noise levels sigma'/alpha' = k sigma/alpha,  the states' weights on noise and x0 predictions as they are

        So does a model of k times the resolution, to first order, and the shift of SD3 and FLUX is this k. Exact on
        flows, but for the second order in the told time's noise where the first call is told one of its own: of
        samples with variances to 3, 2e-5 at ``general/8`` and 4e-4 at ``general/3``, k = 1.7. On VP as far as the path
        reaches. Plain tables stay plain; others get rows that need not sum to 1 (``free_rows``).

        schedule: of that model; its own by default. One of the other family too, whose models are the same in other
        coordinates; there the first call is told its state's time. Raises ValueError for a k that cannot be.
        """
        if isinstance(k, bool) or not isinstance(k, int | float) or not 1 / LARGEST_SHIFT <= k <= LARGEST_SHIFT:
            raise ValueError(f"k={k!r}: give a number from {1 / LARGEST_SHIFT:g} to {LARGEST_SHIFT:g}, 1 for no change")
        schedule = self.schedule if schedule is None else schedule
        check_schedule(schedule)
        if k == 1 and schedule == self.schedule:
            return self
        form = X0Form.of(self.schedule, self.tensors()).moved(k)
        found = (form if schedule.family == self.family else form.told_its_own()).tensors(schedule)
        if not bool((found.timesteps.diff() > 0).all()):
            raise ValueError(
                f"{self.label} for data {k:g} times as large: some of its noise levels lie beyond those of "
                f"{schedule!r}, which has room for fewer steps; choose a smaller k, or a table of fewer steps"
            )
        short = found.coeffs.sum(1) - 1
        # A velocity's constant difference is none of the clean prediction.
        free = bool((short.abs() > ROUNDING).any()) or found.guidance_coeffs is not None
        found = found if free else replace(found, coeffs=found.coeffs - torch.diag(short))
        base, at, before = self.name.partition("@shift")
        factor = k * float(before) if at and re.fullmatch(r"[0-9.]+", before) else k
        name = f"{base}@shift{factor:g}" if base and k != 1 else self.name
        provenance = {**self.provenance, "moved": k * self.provenance.get("moved", 1.0)}
        about: dict[str, Any] = {"name": name, "source": self.source, "provenance": provenance, "free_rows": free}
        return Solver(schedule=schedule, **about, **found.fields())

    def following(self, schedule: Schedule | None) -> Solver:
        """The table for a model with this schedule (None: its own): itself on its own path, moved along where the two
        are flows of different shifts, by the ratio of the shifts. Raises ValueError as :meth:`on` for anything else."""
        if isinstance(schedule, Flow) and isinstance(self.schedule, Flow) and schedule.shift != self.schedule.shift:
            return self.moved(schedule.shift / self.schedule.shift, schedule)
        self.on(schedule)
        return self

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"solver {self.name or '(unnamed)'}"

    @classmethod
    def from_timedeltas(
        cls, timedeltas: Sequence[float], lower: Sequence[Sequence[float]], schedule: Schedule, **fields: Any
    ) -> Solver:
        """From N increments (normalised to sum to 1) and the strict lower triangle, row i holding i numbers.

        The diagonal is one minus the rest of its row, as in the paper.
        """
        deltas = _numbers("timedeltas", timedeltas)
        if not deltas or min(deltas) <= 0:
            raise ValueError(f"timedeltas: need at least one number and all above 0, got {deltas!r}")
        total = math.fsum(deltas)
        steps = [0.0, *(s / total for s in accumulate(deltas[:-1])), 1.0]
        rows = [(*row, 1 - math.fsum(row)) for row in _triangle("lower", _rows(lower), 0)]
        return cls(tuple(steps), tuple((*row, *[0.0] * (len(deltas) - len(row))) for row in rows), schedule, **fields)

    def to_dict(self) -> dict[str, Any]:
        """The solver as JSON data; :meth:`from_dict` gives an equal one back, bit for bit."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "source": self.source,
            "schedule": self.schedule.to_dict(),
            "num_steps": self.num_steps,
            "timesteps": list(self.timesteps),
            "coeffs": [list(row[: i + 1]) for i, row in enumerate(self.coeffs)],
        }
        if self.noise_coeffs is not None:
            data["noise_coeffs"] = list(self.noise_coeffs)
        if self.network_timesteps is not None:
            data["network_timesteps"] = list(self.network_timesteps)
        if self.free_rows:
            data["free_rows"] = True
        if self.guided_steps is not None and self.guidance_coeffs is not None:
            data["guided_steps"] = list(self.guided_steps)
            data["guidance_coeffs"] = [list(row[: i + 1]) for i, row in enumerate(self.guidance_coeffs)]
        data["provenance"] = dict(self.provenance)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], schedule: Schedule | None = None) -> Solver:
        """The solver in a mapping written by :meth:`to_dict`. Raises ValueError naming the field at fault.

        schedule: for files of version 1 whose own is a table of alphas_cumprod, which they only name.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a solver must be a JSON object, got {type(data).__name__}")
        if data.get("format") != FORMAT:
            raise ValueError(f"format={data.get('format')!r}: not a solver; expected {FORMAT!r}")
        data = {key: value for key, value in data.items() if key != "checksum"}  # release 0.2 wrote one
        version = data.get("version")
        if type(version) is not int or version not in (1, VERSION):
            raise ValueError(f"version={version!r}: this release reads versions 1 and {VERSION}")
        required = {"format", "version", "num_steps", "timesteps", "coeffs", "family" if version == 1 else "schedule"}
        optional = {"name", "source", "provenance", "noise_coeffs", "network_timesteps", "free_rows"}
        optional |= {"guided_steps", "guidance_coeffs"}
        for key in sorted(required - data.keys()):
            raise ValueError(f"{key}: missing")
        for key in sorted(data.keys() - required - optional):
            raise ValueError(f"{key}: unknown field; known are {', '.join(sorted(required | optional))}")
        if schedule is None:
            schedule = _first_version(data) if version == 1 else schedules.from_dict(data["schedule"])
        n, ragged = data["num_steps"], _rows(data["coeffs"])
        if type(n) is not int or n != len(ragged):
            raise ValueError(f"num_steps={n!r}: but coeffs has {len(ragged)} rows, and it must be a whole number")
        fields = {key: data[key] for key in optional & data.keys()}
        if "guidance_coeffs" in fields:
            fields["guidance_coeffs"] = _square("guidance_coeffs", fields["guidance_coeffs"], n)
        if not isinstance(fields.get("guided_steps", []), list):
            raise ValueError(f"guided_steps={fields['guided_steps']!r}: must be a list of whole numbers")
        return cls(data["timesteps"], _square("coeffs", ragged, n), schedule, **fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the solver as JSON: a temporary file beside ``path``, synced, then renamed over it."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], schedule: Schedule | None = None) -> Solver:
        """Reads a file written by :meth:`save`, or by hand. Raises ValueError naming the file and the field at fault.

        path: or ``"hf://owner/repo/file.json"``, on the Hugging Face hub, which needs huggingface_hub; with
            ``owner/repo@revision`` at one revision. schedule: see :meth:`from_dict`.
        """
        data = read_json(hub.fetched(path) if hub.is_address(path) else path)
        try:
            return cls.from_dict(data, schedule)
        except ValueError as error:
            raise ValueError(f"{path}: {shortened(error)}") from error


def _first_version(data: Mapping[str, Any]) -> Schedule:
    """The schedule of a file of version 1, which named it in its provenance and left defaults out."""
    family = data["family"]
    if family not in ("flow", "vp"):
        raise ValueError(f"family={family!r}: choose 'flow' or 'vp'")
    provenance = data.get("provenance")
    named = provenance.get("schedule") if isinstance(provenance, Mapping) else None
    if named is None:
        return default_schedule(family)
    if isinstance(named, Mapping) and named.get("kind") == "discrete_vp":
        num, ends = named.get("num"), named.get("ends")
        if named.get("name") in ("linear", "scaled_linear", "cosine") and type(num) is int and 1 < num <= 100_000:
            options = {key: named[key] for key in ("final", "prediction_type") if key in named}
            found: DiscreteVP = getattr(DiscreteVP, named["name"])(num, **options)
            table = found.alphas_cumprod
            # Pipelines made their tables in float32, which is 1e-4 off at the noisy end.
            pairs = zip(_numbers("provenance.schedule.ends", ends), (table[0], table[-1]), strict=True)
            if all(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs):
                return found
    elif isinstance(named, Mapping) and named.get("kind") in ("flow", "vp"):
        return schedules.from_dict(named)
    raise ValueError(
        "provenance.schedule: a file of version 1 only names this schedule; give it, as in Solver.load(path, "
        "schedule=DiscreteVP(alphas_cumprod)), and save the solver again"
    )


def _triangle(key: str, rows: Sequence[Any], first: int) -> list[tuple[float, ...]]:
    """Rows of ``first``, ``first`` + 1, ... numbers, checked."""
    found = [_numbers(f"{key}[{i}]", row) for i, row in enumerate(rows)]
    for i, row in enumerate(found):
        if len(row) != first + i:
            raise ValueError(f"{key}[{i}]: need {first + i} numbers, got {len(row)}")
    return found


def _square(key: str, ragged: Any, size: int) -> tuple[tuple[float, ...], ...]:
    """Rows of 1, 2, ... numbers, checked and filled up with zeros."""
    return tuple((*row, *[0.0] * (size - len(row))) for row in _triangle(key, _rows(ragged, key), 1))


def _rows(value: Any, key: str = "coeffs") -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError(f"{key}: must be a list of rows, got {type(value).__name__}")
    return tuple(value)


def _numbers(key: str, values: Any) -> tuple[float, ...]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise ValueError(f"{key}: must be a list of numbers, got {type(values).__name__}")
    result = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}[{i}]: must be a number, got {value!r}")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(
                f"{key}[{i}]: must be finite, got {value if isinstance(value, float) else 'more'}; look at what it was "
                "computed from: two equal times, a division by zero, a search that diverged"
            )
        if float(value) != value:
            raise ValueError(f"{key}[{i}]: {value!r} has no float64 of its own; the nearest is {float(value)!r}")
        result.append(float(value))
    return tuple(result)
