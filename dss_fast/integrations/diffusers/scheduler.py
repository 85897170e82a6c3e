"""DSSScheduler: learned and hand-made solvers as a scheduler for the pipelines of diffusers.

pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver="dit-xl-2-256")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from ...names import Name
from ...schedule import Flow, Schedule
from ...solver import Solver
from ...step import multistep_step
from ...table import StepTable
from ..k_diffusion import sigmas_at
from .config import (
    adopt,
    alphas_cumprod,
    check_start,
    family_of,
    followed,
    prediction_of,
    table_schedule,
    training_scheduler,
)
from .grids import edited_table, handmade_table, initial_scale, lands, no_mu, stock_class
from .kinds import ANOTHER_TASK, check_task, config_of, every_setting, settings, stock_scheduler
from .request import check_latents, passed_beside
from .settings import check_shift, told_for_nothing, unapplied
from .tables import read_solvers
from .unasked import even, unasked

__all__ = [
    "DSSScheduler",
    "SchedulerMixin",
]  # a pipeline is only reloaded from a module that names SchedulerMixin


def on_host(value: float | Tensor) -> bool:
    """Whether a value can be read without waiting for a device."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _rounded_to(timestep: float | Tensor, t: float, times: Sequence[float]) -> list[int]:
    """Which times a given one, of value ``t``, may mean by the precision that it has."""
    if isinstance(timestep, Tensor) and timestep.dtype in (torch.float16, torch.bfloat16):
        rounded = torch.tensor(times).to(timestep.dtype).tolist()
        return [i for i, time in enumerate(rounded) if time == t]
    whole = isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
    return [i for i, time in enumerate(times) if (abs(time - t) < 1 if whole else time == t)]


@dataclass
class DSSSchedulerOutput(SchedulerOutput):
    """What a step returns: the next state, and on demand the clean sample that its prediction implies."""

    def _of(self, scheduler: DSSScheduler, i: int, x: Tensor, history: Tensor) -> DSSSchedulerOutput:
        self.__dict__["_step"] = scheduler, i, x, history
        return self

    @property
    def pred_original_sample(self) -> Tensor:
        """x0 of the step's own prediction, (B, *S), for previews; worked out when it is read."""
        scheduler, i, x, history = self.__dict__["_step"]
        x0: Tensor = scheduler._x0(i, x, history[:, i].to(x.dtype))
        return x0


class DSSScheduler(SchedulerMixin, ConfigMixin):
    """Any linear multistep solver, one fused update a step:

        y_i     = p_i * x_i + q_i * m_i
        x_{i+1} = a_i * x_i + sum_{j<=i} w_ij * y_j

    solver: what ``set_timesteps(n)`` chooses the table for n among. A published family (``"sit-xl-2-256"``) or one
        of its tables (``"sit-xl-2-256/8"``); a hand-made method (``"euler"``, ``"dpmpp_2m"``, ``"ab2@karras"``), which
        takes any n, on the grid of the pipeline's stock scheduler or on a spacing of its own; the path of a
        solver's JSON file or a folder of them; a :class:`~dss_fast.Solver`; or a list of these.
    family: ``"flow"`` or ``"vp"``. ``from_config`` reads it off the pipeline; None: that of the learned tables, then
        flow when a shift is given, then VP.
    strict: refuse a table searched for another noise schedule, and the config of a scheduler for another task (LCM,
        TCD, RePaint, inversion). False: run the table on the pipeline's noise, and that config as an ordinary one.
    shift, use_dynamic_shifting, flow_shift, use_flow_sigmas: the pipeline's flow grid. They shape hand-made grids, and
        a learned flow table follows them from the shift that it was searched at, 1 for the published ones
        (``Solver.moved``).
    mu: under ``use_dynamic_shifting``, for pipelines that pass none to this class (Bria's, EasyAnimate's): the log of
        the resolution's shift, or the shift itself where ``time_shift_type`` is "linear". A pipeline's own goes first.
    invert_sigmas: of Mochi, whose times and sigmas rise and whose network returns x0 - epsilon.
    num_train_timesteps, beta_*, trained_betas, rescale_betas_zero_snr, snr_shift_scale, prediction_type: the model's.
    stock_class, stock_defaults: filled in by ``from_config``: the class the config comes from, and what it left unset.
    others: further settings of stock schedulers, which a server that calls the class with a whole config passes here.
    thresholding: refused, unless not strict: clipping x0 is not linear. clip_sample: warned about by ``from_config``.

    A run that starts part-way in, as in img2img and inpainting, has no predictions before its first step k. The
    weights that the rows give to y_0..y_{k-1} go to y_k, as if the prediction had been constant until then, so that
    rows keep their sums and the first step is Euler's (DDIM's). A table that weighs the initial noise takes the noise
    that the first prediction implies.

    State is per instance and set afresh by ``set_timesteps``, and also by a step that does not follow the one before.
    ``step`` takes the position from where ``timestep`` lies in ``timesteps``, or from its value, and waits for the
    device only for a time that lies there, is no such element and whose place nobody has declared.

    Raises ValueError where the solver, its schedule, the number of steps or custom times do not fit, saying why.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1
    ignore_for_config = ["others"]  # not named kwargs: in diffusers such a parameter is of deprecated settings alone

    # These belong to one run: set_timesteps makes the first, the first step the rest.
    num_inference_steps: int | None
    solver: Solver | None
    schedule: Schedule | None
    timesteps: Tensor
    sigmas: Tensor
    _table: StepTable | None
    _name: Name | None  # of the hand-made method; None: a learned table
    _host: tuple[list[float], list[float]]  # timesteps and sigmas as they were read last
    _seen: tuple[Tensor, Tensor]  # and the tensors they were read from
    _begin_index: int | None
    _step_index: int | None
    _next: int | None
    _history: Tensor | None
    _rows: Tensor | None
    _index: tuple[Tensor, ...]
    _started: int
    _noise_slot_empty: bool

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        prediction_type: str | None = None,
        shift: float | None = None,
        use_dynamic_shifting: bool = False,
        flow_shift: float | None = None,
        use_flow_sigmas: bool = False,
        invert_sigmas: bool = False,
        clip_sample: bool = False,
        thresholding: bool = False,
        solver: str | Solver | Mapping[str, Any] | Sequence[Any] = "euler",
        family: str | None = None,
        strict: bool = True,
        stock_class: str | None = None,
        stock_defaults: Sequence[str] | None = None,
        mu: float | None = None,
        **others: Any,
    ) -> None:
        strange = sorted(others.keys() - every_setting())
        if strange:
            raise TypeError(f"{strange[0]}={others[strange[0]]!r}: no scheduler of diffusers has that setting")
        if others:
            self.register_to_config(**others)
        written = self.config.get("_solvers")  # tables beside the names, where a server calls the class with a config
        if written:
            solver = [*([solver] if isinstance(solver, str) else solver), *written]  # type: ignore[misc]
        tables, self._methods, names, embedded = read_solvers(solver)
        if family is None:
            learned = next(iter(tables.values()), None)
            flow = shift is not None or use_flow_sigmas or prediction_type == "flow_prediction"
            family = learned.family if learned else "flow" if flow else "vp"
        if embedded or solver != names:
            # Names stay readable in scheduler_config.json; diffusers never prints keys that start with "_".
            self.register_to_config(solver=names[0] if len(names) == 1 else names, _solvers=embedded)
        self.register_to_config(family=family)
        if stock_defaults:
            # A stock scheduler that is made of this config puts its own defaults there, as diffusers does.
            unset = [*self.config.get("_use_default_values", ()), *stock_defaults]
            self.register_to_config(_use_default_values=unset)
        if thresholding and strict:
            raise ValueError("thresholding=True clips x0 at every step, which no linear solver does; pass strict=False")
        if mu is not None and not use_dynamic_shifting:
            raise ValueError(
                f"mu={mu!r} with use_dynamic_shifting=False, where the shift is shift={shift!r} at every resolution: "
                "give shift=e^mu instead, or use_dynamic_shifting=True"
            )
        if strict:
            check_task(self.config)
        prediction_of(self.config)
        self._tables = tables
        self._settle()

        self.init_noise_sigma = 1.0
        self._upwards = invert_sigmas
        self.num_train_timesteps = num_train_timesteps
        self.num_inference_steps = self.solver = self.schedule = self._table = self._name = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.sigmas = torch.linspace(1, 0, num_train_timesteps + 1)
        if family == "vp" or trained_betas is not None:
            trained = training_scheduler(self.config)
            self.betas, self.alphas_cumprod = trained.betas.float(), trained.alphas_cumprod.float()
            self.alphas, self.one = 1 - self.betas, torch.tensor(1.0)
            self.final_alpha_cumprod = getattr(trained, "final_alpha_cumprod", self.one)
        else:  # before a run the training times, as trainers read them
            trained = stock_scheduler("FlowMatchEulerDiscreteScheduler", self.config)
            self.timesteps, self.sigmas = trained.timesteps, trained.sigmas
            self.sigma_min, self.sigma_max = trained.sigma_min, trained.sigma_max
        self._host, self._seen = (self.timesteps.tolist(), self.sigmas.tolist()), (self.timesteps, self.sigmas)
        self._forget()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model another scheduler's config describes; ``solver=...`` and the rest as arguments.

        config: of a scheduler, or the scheduler itself, whose class is then known. Settings of it that change a stock
        scheduler's step and not a table's are warned about by name.
        """
        given = dict(kwargs)
        if isinstance(config, SchedulerMixin):
            config = config_of(config)
        if isinstance(config, Mapping):
            config = dict(config) if "solver" in config else adopt(config)
            embedded = config.pop("_solvers", None)
            if kwargs.keys() & {"use_flow_sigmas", "prediction_type"}:  # the caller's word on the family goes first
                config["family"] = family_of({**config, "family": None, **kwargs})
            given_back = config.get("stock_defaults") or ()
            unset = config.pop("_use_default_values", None)
            if unset is not None:  # a scheduler that was made of a config of ours wrote this one
                given_back = [key for key in given_back if key in unset]
                config["_use_default_values"] = [key for key in unset if key not in given_back]
            if embedded and "solver" not in kwargs:
                names = config.get("solver", [])
                kwargs["solver"] = [*([names] if isinstance(names, str) else names), *embedded]
            # The stock schedulers' settings shape hand-made grids, and ConfigMixin drops what __init__ does not name.
            told = {key: kwargs.pop(key) for key in settings() - cls._get_init_keys(cls) if key in kwargs}
            if given_back:
                config["stock_defaults"] = [key for key in given_back if key not in kwargs and key not in told]
            config |= told
            check_shift({**config, **kwargs}, {**told, **kwargs})
            unknown = [key for key in kwargs if key not in cls._get_init_keys(cls)]
            if unknown and not return_unused_kwargs:
                raise ValueError(
                    f"{unknown[0]}={kwargs[unknown[0]]!r}: no scheduler of diffusers asked has that setting"
                )
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        scheduler = made[0] if isinstance(made, tuple) else made
        task = ANOTHER_TASK.get(str(scheduler.config.get("stock_class")))
        if task is not None:
            warnings.warn(f"strict=False takes the config of {scheduler.config.stock_class}, and {task}", stacklevel=2)
        walking = [name.name for name in scheduler._methods if not name.spacing]
        for setting in told_for_nothing(given, walking):
            warnings.warn(setting, stacklevel=2)
        dropped = list(unapplied(scheduler.config, walking))
        if dropped:
            warnings.warn(
                f"{', '.join(dropped)} not applied: DSSScheduler's steps are linear and draw no noise, and its methods "
                "are those that diffusers has by default; a model that needs the setting needs its own scheduler",
                stacklevel=2,
            )
        return made

    # ---- what pipelines read

    @property
    def step_index(self) -> int | None:
        """The step to come; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run starts, when the pipeline has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says at which step the run starts, as img2img pipelines do before their first step.

        Raises ValueError for a place outside the run.
        """
        if self._table is not None and not 0 <= begin_index <= len(self.timesteps):
            raise ValueError(f"begin_index={begin_index}: this run has steps 0 to {len(self.timesteps) - 1}")
        self._begin_index = begin_index

    @property
    def shift(self) -> float:
        """The shift of a flow's hand-made grids."""
        return float(self.config.get(self._shift_key) or 1.0)

    @property
    def _shift_key(self) -> str:
        return "flow_shift" if self.config.get("use_flow_sigmas") else "shift"

    def set_shift(self, shift: float) -> None:
        """Another shift for the grids of the runs to come, hand-made or learned. Where it depends on the resolution, of
        runs whose pipeline passes no mu."""
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift!r}: must be above 0, and finite")
        unset = [key for key in self.config.get("stock_defaults") or () if key != self._shift_key]
        told = {self._shift_key: float(shift), "stock_defaults": unset}
        if self.config.get("use_dynamic_shifting"):
            told["mu"] = float(shift) if self.config.get("time_shift_type") == "linear" else math.log(shift)
        self.register_to_config(**told)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: flows and VP models take it unscaled."""
        return sample

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    # ---- a run

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        shift: float | None = None,
    ) -> None:
        """Chooses the table for n steps and forgets the run before.

        sigmas, timesteps: of a hand-made solver, shifted as its stock scheduler shifts them; refused by a learned
            table, whose coefficients belong to its own times. What pipelines pass unasked counts as none.
        mu: the log of a resolution-dependent shift, on a config with ``use_dynamic_shifting``; None: the config's.
        shift: as :meth:`set_shift`.

        Raises ValueError naming the numbers of steps there are tables for.
        """
        if shift is not None:
            self.set_shift(shift)
        sigmas, timesteps = (v.tolist() if isinstance(v, Tensor) else v for v in (sigmas, timesteps))
        given = next((v for v in (sigmas, timesteps) if v is not None), None)
        if given is not None:
            count = len(given)
            if sigmas is not None and count > 1 and sigmas[-1] == 0 and num_inference_steps == count - 1:
                count -= 1  # a list that says where the last step ends
            if num_inference_steps is not None and num_inference_steps != count:
                raise ValueError(f"num_inference_steps={num_inference_steps}, but {len(given)} custom times are given")
            num_inference_steps = len(given)
        if num_inference_steps is None:
            raise ValueError("give num_inference_steps, or custom sigmas or timesteps for hand-made solvers")
        if isinstance(num_inference_steps, bool | str) or num_inference_steps != int(num_inference_steps):
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: give a whole number")
        n = int(num_inference_steps)
        if n < 1:
            raise ValueError(f"{n} steps: give at least 1")
        last = self.config["num_train_timesteps"]
        strange = [t for t in (() if timesteps is None else timesteps) if not 0 <= t <= last]
        if strange:
            raise ValueError(f"timesteps hold {strange[0]:g}: the model's times go from 0 to {last}")
        self._settle()
        self._check_mu(mu, n)
        if sigmas is not None and family_of(self.config) == "vp" and even(sigmas, None, last):
            raise ValueError(
                "sigmas that go in a line from 1 are a flow pipeline's, and this scheduler is of a VP model: make it "
                "of the pipeline's own, DSSScheduler.from_config(pipe.scheduler, solver=...)"
            )
        name = None
        if n in self._learned:
            solver, schedule = followed(*self._learned[n], self.config, mu)
            scale = 1.0
            if solver.guided_steps is not None:
                raise ValueError(
                    f"{solver.label} calls the unconditional branch at {len(solver.guided_steps)} of its {n} steps and "
                    "forecasts it at the others, which a scheduler does not see: in a modular pipeline give the "
                    "scheduler guider.scheduler_solver(solver) and the pipeline guider.DSSGuidance; others need a "
                    "solver that calls both branches at all steps"
                )
        else:
            name = self._method(n)
            solver = handmade_table(name, self.config, n, sigmas=sigmas, timesteps=timesteps, mu=mu)
            schedule, n = solver.schedule, solver.num_steps
            scale = 1.0 if name.spacing else initial_scale(name.name, self.config, schedule)
        check_start(self.config, schedule, solver.label)
        table = StepTable.of(solver, schedule, dtype=torch.float64, strict=False)  # the schedule has been settled
        visible = sigmas_at(schedule, torch.tensor(solver.timesteps, dtype=torch.float64))
        if self._upwards:
            table = replace(table, times=self.config["num_train_timesteps"] - table.times)
            visible = 1 - visible
        if name is None:
            self._check_custom(solver, visible[:-1], table.times, sigmas, timesteps)

        self.num_inference_steps, self.solver, self.schedule, self._table = n, solver, schedule, table
        self._name = name
        self.init_noise_sigma = scale
        times = table.times.to(torch.float32)
        self.timesteps = times.to(device)
        self.sigmas = visible.to(torch.float32)  # on the CPU: Wan, Cosmos and LTX2 read one a step
        self._host, self._seen = (times.tolist(), self.sigmas.tolist()), (self.timesteps, self.sigmas)
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        per_token_timesteps: Tensor | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        prev_timestep: float | Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x_{i+1} from the network's output at x_i, after the pipeline's own guidance.

        model_output: (B, *S), or (B, 2C, ...) when the network also predicts variances, which are dropped.
        timestep: an element of ``timesteps``, or its value. One that lies on a device and is no such element is read
            back, unless ``set_begin_index`` has said that the steps come in their order. sample: (B, *S). generator:
            ignored, the step is deterministic.
        per_token_timesteps: (B, L) or (B, 1) of a (B, L, C) sample, as LTXCondition passes them: tokens of another time
            than this step's, such as a given frame's, keep their value. model_output is then x0 - epsilon, as there.
        eta, use_clipped_model_output: of DDIM's step, which pipelines pass; nothing but 0, and not True, as a table
            adds no noise and clips nothing.
        prev_timestep: of UnCLIP's step, whose pipelines pass the time of the next step; no other is taken.

        Returns (x_next,), or an object with ``prev_sample`` and ``pred_original_sample``; in the sample's dtype, sums
        in float32.
        """
        if self._table is None:
            raise ValueError("call set_timesteps before step")
        if eta or use_clipped_model_output:
            told = f"eta={eta!r}" if eta else f"use_clipped_model_output={use_clipped_model_output!r}"
            raise ValueError(f"{told}: a table's step is deterministic and linear, it adds no noise and clips nothing")
        if not torch.compiler.is_compiling() and self._edited():
            self._take_edits()
        i = self._locate(timestep)
        if prev_timestep is not None and self._element(prev_timestep, self.index_for_timestep) != i + 1:
            raise ValueError(f"prev_timestep={prev_timestep}: step {i} goes to the next of scheduler.timesteps")
        if i != self._next or self._history is None or self._others(sample):
            self._begin(i, sample)
        if model_output.shape != sample.shape:
            model_output = self._mean(model_output, sample)
        model_output = self._towards_noise(model_output, per_token_timesteps)
        if self._noise_slot_empty:
            self._imply_noise(i, model_output, sample)
        assert self._history is not None and self._rows is not None
        before = sample
        sample, self._history = multistep_step(sample, model_output, self._history, self._rows, self._index[i])
        if per_token_timesteps is not None:
            sample = torch.where(self._stepped(i, per_token_timesteps, before), sample, before)
        self._step_index = self._next = i + 1
        if not return_dict:
            return (sample,)
        return DSSSchedulerOutput(sample)._of(self, i, before, self._history)

    def predict_x0(self, sample: Tensor) -> Tensor:
        """The clean sample that the last prediction implies, for previews in ``callback_on_step_end``.

        sample: (B, *S), what ``step`` returned. Flow: x + sigma * y, with y the newest velocity; VP: the newest x0.
        """
        if self._history is None or self._next is None:
            raise ValueError("predict_x0 needs a step to have been taken")
        return self._x0(self._next, sample, self._history[:, self._next - 1].to(sample.dtype))

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The step of a time in ``timesteps``; of those that it may mean the next to come, else the nearest.

        timestep: a number, or a tensor of equal ones. A whole number may be a time cut off or rounded, and one of half
        precision means whatever is rounded to it, which on dense grids are several. Raises ValueError for a time
        further than one training step from all, and for times that differ.
        """
        times = self._host[0] if schedule_timesteps is None else schedule_timesteps.tolist()
        values = set(timestep.flatten().tolist()) if isinstance(timestep, Tensor) else {float(timestep)}
        if len(values) != 1:
            raise ValueError(f"timesteps {sorted(values)} in one step: all samples of a step have one time")
        t = float(values.pop())
        away = [abs(time - t) for time in times]
        meant = _rounded_to(timestep, t, times)
        if self._next in meant:
            return int(self._next)
        nearest = min(range(len(times)), key=away.__getitem__)
        if nearest not in meant and not away[nearest] <= 1:
            known = ", ".join(f"{value:g}" for value in times[:20])
            raise ValueError(f"timestep {t:g} is none of this run's: {known}; pass the elements of scheduler.timesteps")
        return nearest

    # ---- noise for img2img, inpainting and training

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t * x0 + sigma_t * noise. timesteps: (B,), of this run or, before one, any training time."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise` in the argument order of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a network learns: alpha_t * noise - sigma_t * sample of a VP model, noise - sample of a flow."""
        if family_of(self.config) == "flow":
            return noise - sample
        alpha, sigma = self._levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        points = self._points(timesteps)
        if points is None:
            alpha, sigma = self._training_levels(timesteps.flatten().cpu().double())
        else:
            assert self.solver is not None and self.schedule is not None
            u = torch.tensor([self.solver.timesteps[i] for i in points], dtype=torch.float64)
            alpha, sigma = self.schedule.alpha_sigma(u)
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (v.to(like.dtype).to(like.device, non_blocking=True).reshape(shape) for v in (alpha, sigma))
        return alpha, sigma

    def _points(self, timesteps: Tensor) -> list[int] | None:
        """Which points of this run are meant; None: training times."""
        if self._table is None:
            return None
        # Pipelines that set the index ask for the start, or, once under way, for the level just reached.
        reached = self._begin_index if self._step_index is None else self._step_index
        if self._begin_index is not None and reached is not None and timesteps.numel() == 1 and not on_host(timesteps):
            return [reached]
        meant = [_rounded_to(t, float(t), self._host[0]) for t in timesteps.flatten().cpu()]
        if all(meant):
            return [self._next if self._next in places else places[0] for places in meant]
        return None if self._begin_index is None or reached is None or len(timesteps.unique()) > 1 else [reached]

    def _training_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        last = self.config["num_train_timesteps"]
        if not bool(((t >= 0) & (t <= last)).all()):
            raise ValueError(f"timesteps {t.tolist()[:8]}: the model's times go from 0 to {last}")
        if family_of(self.config) == "flow":
            sigma = t / self.config["num_train_timesteps"]
            return 1 - sigma, sigma
        table = alphas_cumprod(self.config)
        alpha_bar = table[t.round().long().clamp(0, len(table) - 1)]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    # ---- inside a run

    def _forget(self) -> None:
        self._history = self._rows = self._next = self._step_index = self._begin_index = None
        self._index, self._started = (), 0
        self._noise_slot_empty = False

    def _settle(self) -> None:
        """Each learned table with its schedule on this config, which a program may change (register_to_config)."""
        if getattr(self, "_settled", None) is not self.config:
            strict = self.config["strict"]
            self._learned = {
                n: (table, table_schedule(table, self.config, strict)) for n, table in self._tables.items()
            }
            self._settled = self.config

    def _method(self, n: int) -> Name:
        for name in self._methods:
            if name.num_steps in (None, n):
                return name
        known = sorted(self._learned) + sorted(name.num_steps for name in self._methods if name.num_steps)
        raise ValueError(
            f"no table for {n} steps; this scheduler has tables for {', '.join(map(str, known))}. Choose one of those, "
            "or add a hand-made solver for the rest, as in solver=['sit-xl-2-256', 'dpmpp_2m']"
        )

    def _check_mu(self, mu: float | None, n: int) -> None:
        """Warns of a mu that was told for nothing, and of a learned table that follows no shift for want of one."""
        own = self.config.get("mu")
        if not self.config.get("use_dynamic_shifting"):
            return
        if mu is not None and own is not None and abs(mu - own) > 1e-6:
            warnings.warn(
                f"mu={mu:.6g}, which this pipeline passes, goes before the mu={own:.6g} of this scheduler", stacklevel=3
            )
        table, schedule = self._learned.get(n, (None, None))
        if table is None or "request" in table.provenance or not isinstance(schedule, Flow):
            return
        if mu is None and own is None:
            warnings.warn(
                f"use_dynamic_shifting=True, and no mu: {table.label} stays at shift {schedule.shift:g}, whatever this "
                f"resolution's is. {no_mu(self.config)}",
                stacklevel=3,
            )

    def _check_custom(
        self,
        solver: Solver,
        own_sigmas: Tensor,
        own_times: Tensor,
        sigmas: Sequence[float] | None,
        timesteps: Sequence[float] | None,
    ) -> None:
        if unasked(sigmas, timesteps, self.config["num_train_timesteps"]):
            return
        for label, given, own in (("sigmas", sigmas, own_sigmas), ("timesteps", timesteps, own_times)):
            if given is None:
                continue
            asked = torch.as_tensor(given, dtype=torch.float64)
            if asked.shape != own.shape or not torch.allclose(asked, own, rtol=1e-4, atol=1e-6):
                if passed_beside(
                    solver, [key for key, v in (("sigmas", sigmas), ("timesteps", timesteps)) if v is not None]
                ):
                    return
                raise ValueError(
                    f"{solver.label} cannot run on custom {label}: its coefficients were searched "
                    f"together with its own, {[round(v, 4) for v in own.tolist()]}; leave them out, or take a "
                    "hand-made solver such as 'dpmpp_2m'"
                )

    def _locate(self, timestep: float | Tensor) -> int:
        """The step a time belongs to, without asking the device for its value where that can be."""
        own = self.timesteps
        if self._step_index is not None and self._step_index != self._next:  # a program has put its own there
            if not 0 <= self._step_index < len(own):
                raise ValueError(f"scheduler._step_index = {self._step_index}: this run has steps 0 to {len(own) - 1}")
            return int(self._step_index)
        counted = self._begin_index if self._next is None else self._next if self._next < len(own) else None
        if torch.compiler.is_compiling():
            return self.index_for_timestep(timestep) if counted is None else counted
        declared = self._begin_index is not None and counted is not None  # the steps are said to come in their order

        def place(timestep: float | Tensor) -> int:
            if declared and not on_host(timestep):
                return int(counted)  # type: ignore[arg-type]
            try:
                return self.index_for_timestep(timestep)
            except ValueError:
                if not declared:
                    raise
                return int(counted)  # type: ignore[arg-type]

        return self._element(timestep, place)

    def _element(self, timestep: float | Tensor, otherwise: Callable[[float | Tensor], int]) -> int:
        """Which element of ``timesteps`` a time is: a view, whose address says so."""
        own = self.timesteps
        if isinstance(timestep, Tensor) and timestep.dtype == own.dtype and timestep.device == own.device:
            i, odd = divmod(timestep.data_ptr() - own.data_ptr(), own.element_size())
            if not odd and 0 <= i < len(own):
                return i
        return otherwise(timestep)

    def _edited(self) -> bool:
        """Whether a program has put times or sigmas of its own in place, or edited one. Waits for no device."""
        return any(
            now is not seen or (now.device.type == "cpu" and now.tolist() != host)
            for now, seen, host in zip((self.timesteps, self.sigmas), self._seen, self._host, strict=True)
        )

    def _take_edits(self) -> None:
        """Steps along the program's own ``timesteps`` and ``sigmas`` from here on, as stock schedulers do.

        Raises ValueError for a learned table, whose coefficients belong to its own, and for lists that do not fit.
        """
        times, sigmas = self.timesteps.tolist(), self.sigmas.tolist()
        new_times, new_sigmas = (a != b for a, b in zip((times, sigmas), self._host, strict=True))
        if new_times or new_sigmas:
            self._run_along(times, sigmas, new_times, new_sigmas)
        self._host, self._seen = (times, sigmas), (self.timesteps, self.sigmas)

    def _run_along(self, times: list[float], sigmas: list[float], new_times: bool, new_sigmas: bool) -> None:
        assert self.schedule is not None and self.solver is not None and self._table is not None
        if self._name is None:
            raise ValueError(
                f"scheduler.{'timesteps' if new_times else 'sigmas'} has been assigned or edited, and "
                f"{self.solver.label} cannot run there: its coefficients were searched together with its own; leave "
                "them, or take a hand-made solver such as 'dpmpp_2m'"
            )
        name, n = self._name.name, self._table.num_steps
        if new_sigmas or len(times) != n or (self.schedule.family == "vp" and lands(name, self.config)):
            at, before = self._next or 0, self._host[1]
            scaled = self.schedule.family == "vp" and stock_class(name, self.config) == "EulerDiscreteScheduler"
            if scaled and sigmas[at : at + 1] != before[at : at + 1]:
                raise ValueError(
                    f"scheduler.sigmas[{at}] was {before[at]:g} and the state is that of it: give sigmas to "
                    "set_timesteps, whose init_noise_sigma then is theirs"
                )
            self.solver = edited_table(name, self.config, times, sigmas if new_sigmas else None)
            self.schedule = self.solver.schedule
            self._table = StepTable.of(self.solver, dtype=torch.float64, strict=False)
        self._table = replace(self._table, times=torch.tensor(times, dtype=torch.float64))
        self.num_inference_steps = len(times)
        if len(times) != n:
            self._history = self._next = None
        elif self._history is not None and self._rows is not None:
            self._rows = self._table_from(self._started).to(self._rows.device, self._rows.dtype).weights

    def _table_from(self, i: int) -> StepTable:
        assert self._table is not None
        return self._table.starting_at(i) if i else self._table

    def _begin(self, i: int, sample: Tensor) -> None:
        assert self._table is not None and self.schedule is not None and self.solver is not None
        check_latents(self.solver, sample.shape[1:])
        if self._next is not None and i != self._next and (i > 0 or self._next == 1) and self._looks_back():
            warnings.warn(
                f"step {i} after step {self._next - 1}: the predictions before are forgotten. Where several "
                "images take turns, give each a scheduler of its own (copy.deepcopy); steps that are repeated, skipped "
                "or taken back are right with 'euler' alone",
                stacklevel=3,
            )
        self._started = i
        table = self._table_from(i).to(sample.device, sample.dtype)
        self._rows = table.weights
        self._index = torch.arange(table.num_steps, device=sample.device).split(1)
        # A velocity is stored as the network gave it; an x0 is computed, and half precision would round it.
        exact = self.schedule.family == "flow" or sample.dtype == torch.float64
        self._history = table.new_history(sample, None if exact else torch.float32)
        self._noise_slot_empty = table.weighs_noise and i > 0

    def _others(self, sample: Tensor) -> bool:
        """Whether the sample is of other images than the history, which a table that does not look back allows."""
        assert self._history is not None
        return (
            sample.shape[1:] != self._history.shape[2:] or len(sample) != len(self._history)
        ) and not self._looks_back()

    def _looks_back(self) -> bool:
        """Whether a row weighs an earlier prediction."""
        assert self._table is not None
        return bool(torch.tril(self._table.history[0, :, : self._table.num_steps], -1).any())

    def _towards_noise(self, output: Tensor, per_token_timesteps: Tensor | None) -> Tensor:
        """The output in the sign of the schedule's convention; Mochi and callers with per-token times give x0 - eps."""
        return -output if self._upwards or per_token_timesteps is not None else output

    def _stepped(self, i: int, times: Tensor, sample: Tensor) -> Tensor:
        """Which tokens (B, L, 1) take this step. Reads the times back from the device.

        A time may be a sigma's whole number of training steps.

        Raises ValueError for a token under way at another noise, whose predictions no table's history fits, and for
        times that are not the sigmas', between which the stock scheduler steps.
        """
        assert self._table is not None and self.schedule is not None
        now = float(self._table.times[i])
        if (
            sample.ndim != 3
            or times.ndim != 2
            or abs(now / self.config["num_train_timesteps"] - float(self.sigmas[i])) > 1.5e-3
        ):
            raise ValueError(
                f"per_token_timesteps {tuple(times.shape)} for a sample {tuple(sample.shape)} at time {now:g}, sigma "
                f"{float(self.sigmas[i]):g}: needed are (B, L) for (B, L, C), and a grid whose times are its sigmas "
                "(shift=1, or no custom timesteps)"
            )
        here = (times - now).abs() <= 1e-3 * max(now, 1.0)
        if bool((~here & (times > 0)).any()):
            raise ValueError(
                "per_token_timesteps holds tokens under way at another noise than this step's: conditions of a "
                "strength below 1 need the stock scheduler; give them strength 1"
            )
        return here[..., None]

    def _mean(self, output: Tensor, sample: Tensor) -> Tensor:
        assert self._history is not None
        if self._history.shape[0] != len(sample) or self._history.shape[2:] != sample.shape[1:]:
            raise ValueError(
                f"the sample changed to {tuple(sample.shape)} in the middle of a run of {tuple(self._history.shape)}"
            )
        if output.shape[0] == len(sample) and output.shape[1] == 2 * sample.shape[1]:
            return output[:, : sample.shape[1]]
        raise ValueError(f"model_output has shape {tuple(output.shape)}, the sample {tuple(sample.shape)}")

    def _imply_noise(self, i: int, output: Tensor, sample: Tensor) -> None:
        assert self._history is not None and self.schedule is not None
        p, q = self._at(i, self.schedule.prediction)
        alpha, sigma = self._at(i, self.schedule.alpha_sigma)
        x = sample.float()
        self._history[:, -1] = (x - alpha * self._x0(i, x, p * x + q * output.float())) / sigma
        self._noise_slot_empty = False

    def _x0(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        assert self.schedule is not None
        r, s = self._at(i, self.schedule.x0)
        return r * x + s * y

    def _at(self, i: int, scalars: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Two of the schedule's scalars at point i; worked out on the host."""
        assert self.solver is not None
        one, two = scalars(torch.tensor(self.solver.timesteps[i], dtype=torch.float64))
        return float(one), float(two)
