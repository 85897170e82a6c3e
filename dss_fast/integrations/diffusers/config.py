"""What the config of a diffusers scheduler says: flow or VP, its schedule, and the grid its stock scheduler walks.

The stock schedulers are asked for their own grids, so that every spacing they know (Karras, exponential, trailing,
dynamic shift, a terminal shift) comes out to the bit and follows the installed version.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ...methods import handmade
from ...names import Name, is_file, published
from ...schedule import FLOOR, VP, DiscreteVP, Flow, Grid, Schedule
from ...solver import Solver
from .unasked import even

Config = Mapping[str, Any]

PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v_prediction",
    "flow_prediction": "velocity",
}

# A method walks the grid of this scheduler, by the first part of its name; the rest DPMSolverMultistepScheduler's.
MULTISTEP = {
    "dpmpp": "DPMSolverMultistepScheduler",
    "unip": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}
# In place of these schedulers "euler" is EulerDiscreteScheduler; in place of the others it is DDIM.
SIGMA_SPACE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
STOCK = (
    *MULTISTEP.values(),
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "CogVideoXDDIMScheduler",
)
# These have a shift or betas as others do, and yet do not step one state along one path.
OTHER = {
    "FlowMapEulerDiscreteScheduler": "its network jumps between two times that it is told",
    "HeliosDMDScheduler": "it changes the resolution between its stages",
    "HeliosScheduler": "it changes the resolution between its stages",
    "MiniMaxH3Scheduler": "its times are 1 - sigma and its network points to the data",
    "PiflowScheduler": "its network returns a policy for several steps",
}
STILL = 1e-9  # a grid must fall: a last step that does not move in the stock scheduler falls by this part


def adopt(config: Config) -> dict[str, Any]:
    """The config of a stock scheduler made explicit: the defaults of its own class filled in and its family named.

    ``stock_class`` remembers the class and ``stock_defaults`` the keys it left at their defaults: on a change of class
    diffusers gives those back to the new class's own default, and so does :func:`stock_scheduler`.

    Raises ValueError for a config that does not say which of two classes it is of, where they are no one path.
    """
    stock = _class_of(config)
    config = dict(config)
    unset = set(config.pop("_use_default_values", None) or ())
    if stock is not None:
        for key, parameter in keywords(stock).items():
            if parameter.default is not inspect.Parameter.empty and key not in config:
                config[key] = parameter.default
                unset.add(key)
    config.update(stock_class=None if stock is None else stock.__name__, stock_defaults=sorted(unset))
    config.setdefault("family", family_of(config))
    return config


def _class_of(config: Config) -> Any:
    """The scheduler class that wrote a config: by its name, or, in a live scheduler's, which has none, by its keys.

    A live config begins with the settings of its own class in their order; those of an earlier class follow.
    """
    name = str(config.get("stock_class") or config.get("_class_name") or "")
    if name:
        if not hasattr(diffusers, name):
            warnings.warn(
                f"{name} is no scheduler of the installed diffusers: its settings are read as those of another class "
                "with the same names, whose signs and times may differ",
                stacklevel=4,
            )
        return getattr(diffusers, name, None)
    keys = tuple(key for key in config if not key.startswith("_"))
    fitting = [names for own, names in _by_keys() if own == keys[: len(own)]]
    names = fitting[0] if fitting else []
    if not names:  # a dict that lost its order
        names = next((names for own, names in _by_keys() if set(own) == set(keys)), [])
    others = [name for name in names if name in OTHER]
    if others and len(others) < len(names) and isinstance(config, FrozenDict):
        raise ValueError(
            f"a live config of {', '.join(keys)} is that of {' or of '.join(names)} ({OTHER[others[0]]}), and does not "
            "say of which: give the scheduler itself, as in DSSScheduler.from_config(pipe.scheduler, solver=...)"
        )
    names = [name for name in names if name not in others] or names
    return getattr(diffusers, names[0]) if names else None


@cache
def _by_keys() -> list[tuple[tuple[str, ...], list[str]]]:
    """The scheduler classes of diffusers by the settings they take, longest first."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in (*SIGMA_SPACE, *STOCK, *sorted(dir(diffusers))):
        kind = getattr(diffusers, name) if "Scheduler" in name else None
        if inspect.isclass(kind) and issubclass(kind, SchedulerMixin):
            names = found.setdefault(tuple(keywords(kind)), [])
            names += [name] if name not in names else []
    return sorted(((keys, names) for keys, names in found.items() if keys), key=lambda entry: -len(entry[0]))


def family_of(config: Config) -> str:
    """``"flow"`` or ``"vp"``. Raises ValueError for a config that is neither, such as EDM's."""
    name = str(config.get("_class_name") or config.get("stock_class"))
    if name in OTHER:
        raise ValueError(f"{name}: {OTHER[name]}; DSSScheduler steps a state along one path, by one prediction")
    if config.get("family"):
        return str(config["family"])
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    if config.get("timestep_type", "discrete") != "continuous":  # Stable Video Diffusion's network takes log sigma
        if "beta_schedule" in config or config.get("trained_betas") is not None:
            return "vp"
        if "shift" in config or str(config.get("_class_name")).startswith("FlowMatch"):
            return "flow"
    whose = config.get("_class_name") or config.get("stock_class") or ", ".join(map(str, config))
    raise ValueError(
        f"this scheduler config ({whose}) describes neither a flow (shift, flow_prediction) nor a VP model at discrete "
        "times (beta_schedule); DSSScheduler knows only these two"
    )


def prediction_of(config: Config) -> str:
    """The prediction type in this package's words."""
    kind = config.get("prediction_type")
    if kind is None:
        return "velocity" if family_of(config) == "flow" else "epsilon"
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind!r}: DSSScheduler knows {', '.join(PREDICTIONS)}")
    return PREDICTIONS[kind]


def stock_scheduler(name: str, config: Config) -> Any:
    """The scheduler of diffusers that its own ``from_config`` makes of the pipeline's config, as far as grids go."""
    stock = getattr(diffusers, name)
    takes = keywords(stock).keys() - {"algorithm_type", "solver_type"}  # other classes refuse DEIS'
    fallen = () if name == config.get("stock_class") else config.get("stock_defaults") or ()
    given = {key: value for key, value in config.items() if key in takes and value is not None and key not in fallen}
    try:
        return stock(**given)
    except NotImplementedError as error:  # the class lacks the betas or the spacing
        spaced = {key: given[key] for key in ("beta_schedule", "timestep_spacing") if key in given}
        told = ", ".join(f"{key}={value!r}" for key, value in spaced.items())
        raise ValueError(f"{name} cannot take the pipeline's config ({told}): {error}") from None


def keywords(stock: Any) -> dict[str, inspect.Parameter]:
    """What a scheduler's class takes."""
    return {key: value for key, value in inspect.signature(stock.__init__).parameters.items() if key != "self"}


def _knows(name: str, key: str) -> bool:
    return key in keywords(getattr(diffusers, name, object))


def settings() -> set[str]:
    """The keywords that the schedulers in ``STOCK``, which are asked for grids, take."""
    return {key for name in STOCK for key in keywords(getattr(diffusers, name))}


def every_setting() -> set[str]:
    """The keywords that any scheduler of diffusers takes, and what its pipelines write beside them."""
    return {key for keys, _ in _by_keys() for key in keys} | {"sigma_data"}


def training_scheduler(config: Config) -> Any:
    """A scheduler of diffusers with the noise that a VP model was trained on, ``betas`` and ``alphas_cumprod``."""
    own = str(config.get("stock_class"))
    if own.startswith("KDPM2"):  # whose betas are Euler's, and which takes .2 s to make
        return stock_scheduler("EulerDiscreteScheduler", {**config, "stock_defaults": ()})
    if _knows(own, "beta_schedule") and config.get("trained_betas") is None:
        return stock_scheduler(own, config)
    config = {**config, "stock_defaults": ()}  # the noise is the model's, whichever class runs it
    if config.get("snr_shift_scale") is not None:
        return stock_scheduler("CogVideoXDDIMScheduler", config)
    return stock_scheduler("DDIMScheduler", config)


def alphas_cumprod(config: Config) -> Tensor:
    """(T,) float64: alpha^2 of the training steps of a VP model."""
    table: Tensor = training_scheduler(config).alphas_cumprod
    return table.double()


def model_schedule(config: Config, mu: float | None = None) -> Schedule:
    """The schedule a search on a pipeline with this config should use.

    A flow keeps the pipeline's shift, e^mu where it depends on the resolution. The linear betas of DDPM and DiT are
    the continuous VP of the paper, so that published tables and searched ones share one schedule.
    """
    kind, steps = prediction_of(config), config.get("num_train_timesteps", 1000)
    if family_of(config) == "flow":
        shift = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
        if config.get("use_dynamic_shifting") and mu is not None:
            shift = mu if config.get("time_shift_type") == "linear" else float(np.exp(mu))
        return Flow(1.0 if shift is None else float(shift), "diffusers", kind, float(steps))
    table = alphas_cumprod(config)
    if _same_noise(VP(), table):
        return VP(prediction_type=kind, time_scale=float(steps))
    return _discrete(table, config)


def table_schedule(solver: Solver, config: Config, strict: bool = True) -> Schedule:
    """The schedule on which a learned table runs in a pipeline with this config.

    A flow table brings its own sigmas, which :func:`followed` moves along with the pipeline's shift. A VP table needs
    the noise it was searched for: with ``strict=False`` it otherwise runs at its own u on the pipeline's. Raises
    ValueError for the other family, and for another noise, naming the first alpha or sigma that differs.
    """
    own, kind, steps = solver.schedule, prediction_of(config), float(config.get("num_train_timesteps", 1000))
    if own.family == family_of(config):
        if isinstance(own, Flow):
            return replace(own, convention="diffusers", prediction_type=kind, time_scale=steps)
        if isinstance(own, Grid) and own.family == "flow":
            times = tuple(steps * sigma for sigma in own.sigmas)
            return replace(own, convention="diffusers", prediction_type=kind, times=times)
        if isinstance(own, VP) and _same_noise(own, alphas_cumprod(config)):
            return replace(own, prediction_type=kind, time_scale=steps)
        if isinstance(own, DiscreteVP):
            return solver.on(_discrete(alphas_cumprod(config), config, own.final), strict=strict)
    return solver.on(model_schedule(config), strict=strict)


def followed(solver: Solver, schedule: Schedule, config: Config, mu: float | None = None) -> tuple[Solver, Schedule]:
    """A learned table and its schedule at the shift that a pipeline has: moved along from the shift of its search.

    mu: of a resolution-dependent shift; without it there, and on a config that says no shift, the table stays.
    """
    said = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")
    if not isinstance(schedule, Flow) or (mu is None if config.get("use_dynamic_shifting") else said is None):
        return solver, schedule
    wanted = model_schedule(config, mu)
    if not isinstance(wanted, Flow) or wanted.shift == schedule.shift:
        return solver, schedule
    there = replace(schedule, shift=wanted.shift)
    return solver.moved(wanted.shift / schedule.shift, there), there


def handmade_table(
    name: Name,
    config: Config,
    num_steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    mu: float | None = None,
) -> Solver:
    """``"dpmpp_2m"`` on the grid of its stock scheduler, or ``"dpmpp_2m@karras"`` on a spacing of ours."""
    if name.spacing:
        if sigmas is not None or timesteps is not None:
            raise ValueError(
                f"solver '{name.name}@{name.spacing}' brings its own spacing; leave out sigmas and timesteps"
            )
        schedule = model_schedule({**config, "shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False})
        return handmade(
            name.name,
            num_steps,
            schedule,
            spacing=name.spacing,
            lower_order_final=config.get("lower_order_final") is not False,
        )
    if config.get("euler_at_final") and config.get("final_sigmas_type") == "sigma_min" and num_steps >= 15:
        warnings.warn(
            "euler_at_final=True is not applied: from 15 steps on the last keeps its order unless sigma ends at 0",
            stacklevel=3,
        )
    kept = config.get("disable_corrector")
    if kept and stock_class(name.name, config) == MULTISTEP["unip"] and not set(range(num_steps)) <= set(kept):
        warnings.warn(
            f"disable_corrector={kept} leaves steps with UniPC's corrector, which is not applied: {name.name} is its "
            "predictor alone",
            stacklevel=3,
        )
    if family_of(config) == "flow":
        grid = _flow_grid(name.name, config, num_steps, sigmas, timesteps, mu)
    else:
        grid = _vp_grid(name.name, config, num_steps, sigmas, timesteps)
    return table_on(name.name, config, grid)


def table_on(method: str, config: Config, grid: Grid) -> Solver:
    """A hand-made method on the points of a grid."""
    told: dict[str, Any] = {
        "timesteps": grid.timesteps,
        "lower_order_final": config.get("lower_order_final") is not False,
    }
    try:
        return handmade(method, None, grid, **told)
    except ValueError:
        if not grid.sigmas[-1] > 0.999 * grid.sigmas[-2] > 0:
            raise
        # A last step that stands still moves nothing, whatever its row, of which floats hold none from order 3 on.
        moving = replace(grid, sigmas=(*grid.sigmas[:-1], grid.sigmas[-2] / 2))
        return replace(handmade(method, None, moving, **told), schedule=grid)


def edited_table(method: str, config: Config, times: Sequence[float], sigmas: Sequence[float] | None) -> Solver:
    """A hand-made method along a program's own times, and its own sigmas (N + 1,) unless these are None.

    Raises ValueError for numbers of them that do not belong together.
    """
    if sigmas is None and family_of(config) == "vp" and lands(method, config):
        return table_on(method, config, _vp_grid(method, config, len(times), None, times))
    if sigmas is None or len(sigmas) != len(times) + 1:
        held = "those of another run" if sigmas is None else f"{len(sigmas)} numbers"
        raise ValueError(
            f"scheduler.sigmas holds {held} and scheduler.timesteps {len(times)}: a run of N steps has N timesteps and "
            "N + 1 sigmas, the last of them where it ends"
        )
    levels, kind = torch.tensor(sigmas, dtype=torch.float64), prediction_of(config)
    if family_of(config) == "vp":
        return table_on(method, config, ratio_grid(levels, times, kind, method, config))
    if config.get("invert_sigmas"):
        levels, times = 1 - levels, [config["num_train_timesteps"] - t for t in times]
    return table_on(method, config, flow_grid(levels, times, kind))


def lands(method: str, config: Config) -> bool:
    """Whether a VP method walks DDIM's grid, of times rather than sigmas."""
    return stock_class(method, config).endswith("DDIMScheduler")


def stock_class(method: str, config: Config) -> str:
    """The scheduler of diffusers whose grid a hand-made method walks on a pipeline with this config."""
    own, kind = str(config.get("stock_class")), method.split("_")[0].rstrip("0123456789")
    if family_of(config) == "flow":
        if not config.get("use_flow_sigmas"):
            return "FlowMatchEulerDiscreteScheduler"
        if kind in ("dpmpp", "unip", "deis"):
            return MULTISTEP[kind]
        return own if _knows(own, "use_flow_sigmas") else MULTISTEP["dpmpp"]
    if kind != "euler":
        return MULTISTEP.get(kind, MULTISTEP["dpmpp"])
    if own in SIGMA_SPACE:
        return "EulerDiscreteScheduler"
    return "DDIMScheduler" if config.get("snr_shift_scale") is None else "CogVideoXDDIMScheduler"


def initial_scale(method: str, config: Config, schedule: Schedule) -> float:
    """What a pipeline multiplies its noise by: 1, or the first sigma where the stock Euler starts at just that."""
    if family_of(config) == "vp" and stock_class(method, config) == "EulerDiscreteScheduler":
        if stock_scheduler("EulerDiscreteScheduler", config).config.timestep_spacing != "leading":
            return float(schedule.alpha_sigma(torch.zeros(1, dtype=torch.float64))[1])
    return 1.0


def _flow_grid(
    method: str,
    config: Config,
    n: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    mu: float | None,
) -> Grid:
    steps, kind, name = config.get("num_train_timesteps", 1000), prediction_of(config), stock_class(method, config)
    if not config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting") and mu is None:
            raise ValueError(
                "use_dynamic_shifting=True needs mu, the log of this resolution's shift, and the pipeline passes none "
                "(Bria's and EasyAnimate's pass it to FlowMatchEulerDiscreteScheduler alone): give from_config "
                "use_dynamic_shifting=False and shift=e^mu (EasyAnimate's mu is 1), or take a learned table"
            )
        given = None if sigmas is None else list(sigmas), None if timesteps is None else list(timesteps)
        stock = stock_scheduler(name, config)
        ends = {key: config[key] for key in ("sigma_min", "sigma_max") if config.get(key) is not None}
        stock.register_to_config(**ends)  # Cosmos' pipelines write these noise levels into a config that had none
        with np.errstate(invalid="ignore"):
            stock.set_timesteps(n, sigmas=given[0], mu=mu, timesteps=given[1])
    else:
        takes = name == MULTISTEP["unip"] and sigmas is not None and timesteps is None  # UniPC alone has sigmas=
        custom = takes or not even(sigmas, timesteps, steps)
        if custom and timesteps is not None:
            levels = [float(t) / steps for t in timesteps] if sigmas is None else list(sigmas)
            return Grid.flow([*levels, 0.0], timesteps, prediction_type=kind)
        name = MULTISTEP["unip"] if custom else name
        stock = stock_scheduler(name, {**config, "prediction_type": "flow_prediction"})
        options: dict[str, Any] = {"mu": mu} if config.get("use_dynamic_shifting") else {}
        if custom:
            options["sigmas"] = np.asarray(sigmas, dtype=np.float64)
        stock.set_timesteps(n, **options)
    levels, times = stock.sigmas.double(), stock.timesteps.double()
    while len(times) > 1 and levels[-2] == levels[-1] == 0:  # the caller's list had a final 0 of its own
        levels, times = levels[:-1], times[:-1]
    if bool(levels.isnan().any()):
        raise ValueError(f"{n} step under shift_terminal={config.get('shift_terminal')} is 0/0; take 2 steps or more")
    if config.get("invert_sigmas") and not config.get("use_flow_sigmas"):  # Mochi's; DSSScheduler turns it round again
        levels, times = 1 - levels, steps - times
    return flow_grid(levels, times.tolist(), kind)


def flow_grid(levels: Tensor, times: Sequence[float], kind: str) -> Grid:
    """A flow's grid on falling sigmas (N + 1,); above 1 they are those of x = x0 + sigma * epsilon, as Cosmos has them,
    whose pipelines hand over (x - x0) / sigma."""
    if float(levels.max()) > 1:
        return Grid((1.0,) * len(levels), tuple(_falling(levels)), tuple(times), "vp", "epsilon")
    return Grid.flow(_falling(levels), times, prediction_type=kind)


def _vp_grid(
    method: str, config: Config, n: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
) -> Grid:
    kind, name = prediction_of(config), stock_class(method, config)
    landing = lands(method, config)
    # A zero terminal SNR has no log. For DDIM next to nothing stands in its place, for the others their own choice.
    table = alphas_cumprod(config).clamp_min(1e-30 if landing else FLOOR).numpy()
    if sigmas is not None:
        if timesteps is not None:
            raise ValueError("give sigmas or timesteps to a VP scheduler, not both")
        # EulerDiscrete's lists end with the level that is reached, be it 0 or not.
        closed = len(sigmas) > 1 and (sigmas[-1] == 0 or name == "EulerDiscreteScheduler")
        ratio = np.append(np.asarray(sigmas, dtype=np.float64), [] if closed else 0.0)
        log_ratio = 0.5 * np.log(1 / table - 1)
        times = np.interp(np.log(ratio[:-1]), log_ratio, np.arange(len(table))).tolist()
        return ratio_grid(ratio, times, kind, method, config)
    stock = stock_scheduler(name, config)
    if config.get("snr_shift_scale") is None:  # one with that setting keeps the model's own noise
        there = stock.alphas_cumprod.double().clamp_min(1e-30).numpy()
        if there.shape != table.shape or np.abs(there - table).max() > 1e-3:
            warnings.warn(
                f"as in diffusers, the betas of {config.get('stock_class')} are its defaults and are not handed to "
                f"{name}, whose own are used; give beta_start, beta_end and beta_schedule to from_config to keep them",
                stacklevel=4,
            )
        table = there
    own = (
        timesteps is not None and name == "EulerDiscreteScheduler"
    )  # which takes a sigma, not log alpha, between times
    if timesteps is None or own:
        stock.set_timesteps(
            **{"timesteps": list(timesteps)} if own and timesteps is not None else {"num_inference_steps": n}
        )
        if not landing and config.get("snr_shift_scale") is None:
            walked = stock.timesteps.tolist()  # under interpolation_type="log_linear" there is a sigma too many
            return ratio_grid(_falling(stock.sigmas.double()[: len(walked) + 1]), walked, kind, method, config)
    times = np.asarray(stock.timesteps.tolist() if timesteps is None else timesteps, dtype=np.float64)
    if landing:
        last = float(stock.final_alpha_cumprod)
        if timesteps is None and len(times) > 1 and np.any(np.diff(times) != -(len(table) // len(times))):
            warnings.warn(
                f"{name} steps {len(table) // len(times)} training steps at a time whatever its own {n} times are, "
                f"and under timestep_spacing={stock.config.get('timestep_spacing')!r} they are further apart; "
                "DSSScheduler steps from time to time",
                stacklevel=4,
            )
    else:
        last = float(table[0]) if stock.config.get("final_sigmas_type") == "sigma_min" else 1.0
    log_alpha = np.append(np.interp(times, np.arange(len(table)), np.log(table)), np.log(last))
    log_alpha[-1] = max(log_alpha[-1], log_alpha[-2] - STILL * np.expm1(log_alpha[-2]))
    return Grid(tuple(np.exp(0.5 * log_alpha)), tuple(np.sqrt(-np.expm1(log_alpha))), tuple(times), "vp", kind)


def check_start(config: Config, schedule: Schedule, label: str) -> None:
    """Raises ValueError for a network that predicts epsilon where the first state is noise alone, and for the table of
    a flow where states are those of noise levels above 1."""
    top = config.get("sigma_max")
    if schedule.family == "flow" and top is not None and top > 1 and not config.get("use_flow_sigmas"):
        raise ValueError(
            f"sigma_max={top}: this pipeline's states are x0 + sigma * epsilon up to there, which {label} is not for; "
            "a hand-made solver such as 'dpmpp_2m' runs"
        )
    if schedule.family == "vp" and schedule.prediction_type == "epsilon" and family_of(config) == "vp":
        first = float(schedule.alpha_sigma(torch.zeros(1, dtype=torch.float64))[0])
        if first**2 <= FLOOR and float(alphas_cumprod(config)[-1]) in (0.0, FLOOR):
            told = config.get("rescale_betas_zero_snr")
            raise ValueError(
                f"rescale_betas_zero_snr={told} with prediction_type='epsilon': the first state is noise alone, of "
                "which epsilon tells nothing about the data; set prediction_type to what the network was trained for "
                "('v_prediction' or 'sample'), or timestep_spacing='leading', which begins below"
            )


def _falling(levels: Tensor) -> list[float]:
    """Sigmas whose last step may stand still, as in stock schedulers, made to fall by less than float32 resolves."""
    values: list[float] = levels.tolist()
    return [*values[:-1], min(values[-1], values[-2] * (1 - STILL))]


def ratio_grid(ratio: Any, times: Sequence[float], kind: str, method: str, config: Config) -> Grid:
    """A VP grid on falling ratios sigma / alpha, (N + 1,). Stock Euler's last state is x0 + sigma * epsilon."""
    ratio = np.asarray(ratio, dtype=np.float64)
    alphas = 1 / np.sqrt(1 + ratio**2)
    if stock_class(method, config) == "EulerDiscreteScheduler":
        alphas[-1] = 1
    return Grid(tuple(alphas), tuple(ratio * alphas), tuple(times), "vp", kind)


def _discrete(table: Tensor, config: Config, final: str | None = None) -> DiscreteVP:
    if final is None:
        kept = config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False
        final = "sigma_min" if kept else "zero"
    name = str(config.get("beta_schedule") if config.get("trained_betas") is None else "trained")
    # A zero terminal SNR is FLOOR at the last step of some classes, and less than that before it.
    return DiscreteVP(tuple(table.clamp_min(FLOOR).tolist()), prediction_of(config), final, name)


def _same_noise(schedule: VP, table: Tensor) -> bool:
    """Whether alphas_cumprod follow a continuous VP: log-SNR within 0.05 over the middle nine tenths.

    DDPM's linear betas stay within 0.015 of the paper's VP there; Stable Diffusion's differ by up to 1.
    """
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    n = t * len(table)
    low = n.floor().long().clamp(0, len(table) - 2)
    log_alpha = 0.5 * torch.lerp(table[low].log(), table[low + 1].log(), n - low)
    discrete = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    alpha, sigma = schedule.alpha_sigma(schedule.t_start - t)
    return bool(((alpha / sigma).log() - discrete).abs().max() < 0.05)


def _is_name(entry: str | os.PathLike[str]) -> bool:
    """Whether a text is a solver's name, which goes before a folder that happens to be called so."""
    try:
        return isinstance(entry, str) and bool(Name.parse(entry))
    except ValueError:
        return False


def read_solvers(solver: Any) -> tuple[dict[int, Solver], list[Name], list[str], list[dict[str, Any]]]:
    """What ``solver`` names: learned tables by N, hand-made methods, the names to write in a config, and the tables to
    embed in it. Raises ValueError naming what exists.
    """
    tables: dict[int, Solver] = {}
    methods, names, embedded = list[Name](), list[str](), list[dict[str, Any]]()
    for entry in solver if isinstance(solver, list | tuple) else [solver]:
        if isinstance(entry, Mapping):
            entry = Solver.from_dict(entry)
        found: list[Solver] = []
        if isinstance(entry, Solver):
            found = [entry]
            embedded.append(entry.to_dict())
        elif not isinstance(entry, str | os.PathLike):
            raise ValueError(f"solver={entry!r}: give a Solver, a name, the path of a JSON file or folder, or a list")
        elif is_file(entry) or (Path(entry).is_dir() and not _is_name(entry)):
            files = sorted(Path(entry).glob("*.json")) if Path(entry).is_dir() else [entry]
            found = [Solver.load(file) for file in files]
            embedded += [table.to_dict() for table in found]
        else:
            name = Name.parse(os.fspath(entry))
            names.append(os.fspath(entry))
            if name.handmade:
                methods.append(name)
            else:
                found = published(name)
        for table in found:
            if table.num_steps in tables:
                raise ValueError(
                    f"two tables for {table.num_steps} steps: {tables[table.num_steps].name or '(unnamed)'} and "
                    f"{table.name or '(unnamed)'}; give one per number of steps"
                )
            tables[table.num_steps] = table
    return tables, methods, names, embedded
