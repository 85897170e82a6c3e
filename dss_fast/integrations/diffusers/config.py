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
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from ...methods import handmade
from ...names import Name, is_file, published
from ...schedule import FLOOR, VP, DiscreteVP, Flow, Grid, Schedule
from ...solver import Solver

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
    "PiflowScheduler": "its network returns a policy for several steps",
}
STILL = 1e-9  # a grid must fall: a last step that does not move in the stock scheduler falls by this part


def adopt(config: Config) -> dict[str, Any]:
    """The config of a stock scheduler made explicit: the defaults of its own class filled in and its family named.

    ``stock_class`` remembers the class and ``stock_defaults`` the keys it left at their defaults: on a change of class
    diffusers gives those back to the new class's own default, and so does :func:`stock_scheduler`.
    """
    config = dict(config)
    unset = set(config.pop("_use_default_values", None) or ())
    stock = _class_of(config)
    if stock is not None:
        for key, parameter in _keywords(stock).items():
            if parameter.default is not inspect.Parameter.empty and key not in config:
                config[key] = parameter.default
                unset.add(key)
    config.update(stock_class=None if stock is None else stock.__name__, stock_defaults=sorted(unset))
    config.setdefault("family", family_of(config))
    return config


def _class_of(config: Config) -> Any:
    """The scheduler class that wrote a config: by its name, or, in a live scheduler's, which has none, by its keys."""
    if config.get("_class_name"):
        return getattr(diffusers, str(config["_class_name"]), None)
    keys = {key for key in config if not key.startswith("_")}
    for name in (*SIGMA_SPACE, *STOCK, "SASolverScheduler", "DPMSolverSinglestepScheduler"):
        if keys == set(_keywords(getattr(diffusers, name))):
            return getattr(diffusers, name)
    return None


def family_of(config: Config) -> str:
    """``"flow"`` or ``"vp"``. Raises ValueError for a config that is neither, such as EDM's."""
    other = OTHER.get(str(config.get("_class_name")))
    if other is not None:
        raise ValueError(
            f"{config['_class_name']}: {other}; DSSScheduler steps a state along one path, by one prediction"
        )
    if config.get("family"):
        return str(config["family"])
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return "flow"
    if config.get("timestep_type", "discrete") != "continuous":  # Stable Video Diffusion's network takes log sigma
        if "beta_schedule" in config or config.get("trained_betas") is not None:
            return "vp"
        if "shift" in config or str(config.get("_class_name")).startswith("FlowMatch"):
            return "flow"
    whose = config.get("_class_name") or ", ".join(map(str, config))
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
    takes = _keywords(stock).keys() - {"algorithm_type", "solver_type"}  # other classes refuse DEIS'
    fallen = () if name == config.get("stock_class") else config.get("stock_defaults") or ()
    given = {key: value for key, value in config.items() if key in takes and value is not None and key not in fallen}
    try:
        return stock(**given)
    except NotImplementedError as error:  # the class lacks the betas or the spacing
        raise ValueError(f"{name} cannot take the pipeline's config: {error}") from None


def _keywords(stock: Any) -> dict[str, inspect.Parameter]:
    """What a scheduler's class takes."""
    return {key: value for key, value in inspect.signature(stock.__init__).parameters.items() if key != "self"}


def _knows(name: str, key: str) -> bool:
    return key in _keywords(getattr(diffusers, name, object))


def settings() -> set[str]:
    """The keywords that the schedulers in ``STOCK``, which are asked for grids, take."""
    return {key for name in STOCK for key in _keywords(getattr(diffusers, name))}


def training_scheduler(config: Config) -> Any:
    """A scheduler of diffusers with the noise that a VP model was trained on, ``betas`` and ``alphas_cumprod``."""
    own = str(config.get("stock_class"))
    if _knows(own, "beta_schedule"):
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
        return Flow(float(shift or 1.0), "diffusers", kind, float(steps))
    table = alphas_cumprod(config)
    if _same_noise(VP(), table):
        return VP(prediction_type=kind, time_scale=float(steps))
    return _discrete(table, config)


def table_schedule(solver: Solver, config: Config, strict: bool = True) -> Schedule:
    """The schedule on which a learned table runs in a pipeline with this config.

    A flow table brings its own sigmas, and the pipeline's shift is not applied on top. A VP table needs the noise it
    was searched for: with ``strict=False`` it otherwise runs at its own u on the pipeline's. Raises ValueError for the
    other family, and for another noise, naming the first alpha or sigma that differs.
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
    last = bool(config.get("lower_order_final", True))
    if name.spacing:
        if sigmas is not None or timesteps is not None:
            raise ValueError(
                f"solver '{name.name}@{name.spacing}' brings its own spacing; leave out sigmas and timesteps"
            )
        schedule = model_schedule({**config, "shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False})
        return handmade(name.name, num_steps, schedule, spacing=name.spacing, lower_order_final=last)
    if config.get("euler_at_final") and config.get("final_sigmas_type") == "sigma_min" and num_steps >= 15:
        warnings.warn(
            "euler_at_final=True is not applied: from 15 steps on the last keeps its order unless sigma ends at 0",
            stacklevel=3,
        )
    if family_of(config) == "flow":
        grid = _flow_grid(name.name, config, num_steps, sigmas, timesteps, mu)
    else:
        grid = _vp_grid(name.name, config, num_steps, sigmas, timesteps)
    return handmade(name.name, None, grid, timesteps=grid.timesteps, lower_order_final=last)


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


def unasked(sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, num_train_timesteps: int) -> bool:
    """Whether there are no custom times, or those that pipelines of diffusers pass when the user gave none.

    Some 50 pass sigmas of 1 - i/n, CogView4 whole numbers from T to 1 and their sigmas, Mochi (sigmas) and
    LTXCondition (timesteps) half a line from 1 to 0.975 and then a parabola.
    """
    levels = ((sigmas, 1), (timesteps, num_train_timesteps))
    given = [np.asarray(values, dtype=np.float64) / scale for values, scale in levels if values is not None]
    if not given:
        return True
    n = len(given[0])
    whole = np.linspace(num_train_timesteps, 1, n).astype(np.int64) / num_train_timesteps
    known = [1 - np.arange(n) / n, whole]
    if n > 1:
        line, i = n // 2, np.arange(n)
        rest, rise = n - line, line - 0.025 * n
        bend, slope = rise / (line * rest**2), 0.025 / line - 2 * rise / rest**2
        known.append(1 - np.where(i < line, i * 0.025 / line, bend * i**2 + slope * i + bend * line**2))
    return all(any(np.allclose(v, grid, atol=1e-6) for grid in known) for v in given)


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
        given = None if sigmas is None else list(sigmas), None if timesteps is None else list(timesteps)
        stock = stock_scheduler(name, config)
        with np.errstate(invalid="ignore"):
            stock.set_timesteps(n, sigmas=given[0], mu=mu, timesteps=given[1])
    else:
        takes = name == MULTISTEP["unip"] and sigmas is not None and timesteps is None  # UniPC alone has sigmas=
        custom = takes or not unasked(sigmas, timesteps, steps)
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
    if bool(levels.isnan().any()):
        raise ValueError(f"{n} step under shift_terminal={config.get('shift_terminal')} is 0/0; take 2 steps or more")
    if config.get("invert_sigmas") and not config.get("use_flow_sigmas"):  # Mochi's; DSSScheduler turns it round again
        levels, times = 1 - levels, steps - times
    return Grid.flow(_falling(levels), times.tolist(), prediction_type=kind)


def _vp_grid(
    method: str, config: Config, n: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None
) -> Grid:
    kind, name = prediction_of(config), stock_class(method, config)
    landing = name in ("DDIMScheduler", "CogVideoXDDIMScheduler")
    # A zero terminal SNR has no log. For DDIM next to nothing stands in its place, for the others their own choice.
    table = alphas_cumprod(config).clamp_min(1e-30 if landing else FLOOR).numpy()
    if sigmas is not None:
        if timesteps is not None:
            raise ValueError("give sigmas or timesteps to a VP scheduler, not both")
        ratio = np.append(np.asarray(sigmas, dtype=np.float64), [] if sigmas[-1] == 0 else 0.0)
        log_ratio = 0.5 * np.log(1 / table - 1)
        return _ratio_grid(ratio, np.interp(np.log(ratio[:-1]), log_ratio, np.arange(len(table))).tolist(), kind)
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
    if timesteps is None:
        stock.set_timesteps(n)
        if not landing and config.get("snr_shift_scale") is None:
            return _ratio_grid(_falling(stock.sigmas.double()), stock.timesteps.tolist(), kind)
    times = np.asarray(stock.timesteps.tolist() if timesteps is None else timesteps, dtype=np.float64)
    if landing:
        last = float(stock.final_alpha_cumprod)
        if timesteps is None and len(times) > 1 and np.any(np.diff(times) != -(len(table) // len(times))):
            warnings.warn(
                f"{name} steps {len(table) // len(times)} training steps at a time whatever its own {n} times are, "
                "and here they are further apart; DSSScheduler steps from time to time",
                stacklevel=4,
            )
    else:
        last = float(table[0]) if stock.config.get("final_sigmas_type") == "sigma_min" else 1.0
    log_alpha = np.append(np.interp(times, np.arange(len(table)), np.log(table)), np.log(last))
    log_alpha[-1] = max(log_alpha[-1], log_alpha[-2] - STILL * np.expm1(log_alpha[-2]))
    return Grid(tuple(np.exp(0.5 * log_alpha)), tuple(np.sqrt(-np.expm1(log_alpha))), tuple(times), "vp", kind)


def _falling(levels: Tensor) -> list[float]:
    """Sigmas whose last step may stand still, as in stock schedulers, made to fall by less than float32 resolves."""
    values: list[float] = levels.tolist()
    return [*values[:-1], min(values[-1], values[-2] * (1 - STILL))]


def _ratio_grid(ratio: Any, times: Sequence[float], kind: str) -> Grid:
    ratio = np.asarray(ratio, dtype=np.float64)
    alphas = 1 / np.sqrt(1 + ratio**2)
    return Grid(tuple(alphas), tuple(ratio * alphas), tuple(times), "vp", kind)


def _discrete(table: Tensor, config: Config, final: str | None = None) -> DiscreteVP:
    if final is None:
        kept = config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False
        final = "sigma_min" if kept else "zero"
    name = str(config.get("beta_schedule") if config.get("trained_betas") is None else "trained")
    return DiscreteVP(tuple(table.tolist()), prediction_of(config), final, name)


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
        elif is_file(entry) or Path(entry).is_dir():
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
