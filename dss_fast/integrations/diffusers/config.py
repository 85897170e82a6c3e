"""What the config of a diffusers scheduler says: flow or VP, the model's schedule, where a learned table runs on it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...schedule import FLOOR, VP, DiscreteVP, Flow, Grid, Schedule
from ...solver import Solver
from .kinds import OTHER, Config, class_of, keywords, knows, stock_scheduler

PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v_prediction",
    "flow_prediction": "velocity",
}


def adopt(config: Config) -> dict[str, Any]:
    """The config of a stock scheduler made explicit: the defaults of its own class filled in and its family named.

    ``stock_class`` remembers the class and ``stock_defaults`` the keys it left at their defaults: on a change of class
    diffusers gives those back to the new class's own default, and so does :func:`stock_scheduler`.

    Raises ValueError for a config that does not say which of two classes it is of, where they are no one path.
    """
    stock = class_of(config)
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


def training_scheduler(config: Config) -> Any:
    """A scheduler of diffusers with the noise that a VP model was trained on, ``betas`` and ``alphas_cumprod``."""
    own = str(config.get("stock_class"))
    if own.startswith("KDPM2"):  # whose betas are Euler's, and which takes .2 s to make
        return stock_scheduler("EulerDiscreteScheduler", {**config, "stock_defaults": ()})
    if knows(own, "beta_schedule") and config.get("trained_betas") is None:
        return stock_scheduler(own, config)
    config = {**config, "stock_defaults": ()}  # the noise is the model's, whichever class runs it
    if config.get("snr_shift_scale") is not None:
        return stock_scheduler("CogVideoXDDIMScheduler", config)
    return stock_scheduler("DDIMScheduler", config)


def alphas_cumprod(config: Config) -> Tensor:
    """(T,) float64: alpha^2 of the training steps of a VP model."""
    table: Tensor = training_scheduler(config).alphas_cumprod
    return table.double()


def mu_of(config: Config, mu: float | None) -> float | None:
    """The mu of a run under ``use_dynamic_shifting``: what the pipeline passes, or else the config's own."""
    return config.get("mu") if mu is None else mu


def model_schedule(config: Config, mu: float | None = None) -> Schedule:
    """The schedule a search on a pipeline with this config should use.

    A flow keeps the pipeline's shift, e^mu where it depends on the resolution. The linear betas of DDPM and DiT are
    the continuous VP of the paper, so that published tables and searched ones share one schedule.
    """
    kind, steps, mu = prediction_of(config), config.get("num_train_timesteps", 1000), mu_of(config, mu)
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
    said, mu = config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift"), mu_of(config, mu)
    if not isinstance(schedule, Flow) or (mu is None if config.get("use_dynamic_shifting") else said is None):
        return solver, schedule
    wanted = model_schedule(config, mu)
    if not isinstance(wanted, Flow) or wanted.shift == schedule.shift:
        return solver, schedule
    there = replace(schedule, shift=wanted.shift)
    return solver.moved(wanted.shift / schedule.shift, there), there


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
