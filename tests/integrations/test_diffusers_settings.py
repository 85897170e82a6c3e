"""Each setting of each scheduler class of diffusers, read off the signatures: our step is stock's, or a word names it.

A setting that a new release adds is met here by itself: its values come from its annotation, its default and the class'
own source, and what changes the stock's latents without a word of ours fails.
"""

import inspect
import re
import typing
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from dss_fast.integrations.diffusers import DSSScheduler  # noqa: E402
from dss_fast.integrations.diffusers.config import adopt  # noqa: E402
from dss_fast.integrations.diffusers.grids import stock_class  # noqa: E402
from helpers.diffusers_classes import config_of, every_class, settings  # noqa: E402
from helpers.diffusers_runs import network, noise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = 5  # which divides the training steps: DDIM's own steps then are those between its times
SAME = 5e-5  # stock DEIS of flows loses 4e-5 in float32
# What a signature does not tell: lists and objects, and numbers that must be of a size.
VALUES = {
    "trained_betas": [torch.linspace(1e-4, 0.015, 1000).tolist()],
    "disable_corrector": [[0]],
    "tau_func": [lambda t: 0.0],
    "solver_p": [diffusers.DPMSolverMultistepScheduler()],
    "scale_factors": [[0.5, 1.0]],
    "beta_start": [0.001],
    "beta_end": [0.015],
    "steps_offset": [1],
    "num_train_timesteps": [500],
    "lambda_min_clipped": [-3.0],
    "sigma_min": [0.1],
    "sigma_max": [10.0],
    "shift_terminal": [0.1],
    "snr_shift_scale": [2.0],
    "rescale_betas_zero_snr": [True],
}
WORDS = {  # of releases whose signatures do not list them
    "algorithm_type": ["dpmsolver++", "sde-dpmsolver++"],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "solver_type": ["midpoint", "heun"],
    "time_shift_type": ["exponential", "linear"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "upscale_mode": ["nearest"],
    "variance_type": ["learned", "learned_range"],
}
# The method that stands in for a class, by its order; "euler" for the others.
OWN = {
    "DPMSolverMultistepScheduler": ("euler", "dpmpp_2m", "dpmpp_3m"),
    "UniPCMultistepScheduler": ("unip1", "unip2", "unip3"),
    "DEISMultistepScheduler": ("euler", "deis", "deis3"),
}
EULERS = ("DDIMScheduler", "CogVideoXDDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
REFUSED = "neither a flow|one path|strict=False takes"


def literals(annotation):
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [value for part in typing.get_args(annotation) for value in literals(part)]


def spelled(key):
    """The words of a setting that any class' signature lists."""
    kinds = [getattr(diffusers, name) for name in every_class()]
    return [v for kind in kinds if key in settings(kind) for v in literals(settings(kind)[key].annotation)]


def values(kind, key, parameter):
    """The values of a setting other than its default."""
    default = parameter.default
    if key in VALUES:
        return VALUES[key]
    found = literals(parameter.annotation)
    if isinstance(default, bool):
        found = [not default]
    elif not found and isinstance(default, int | float):
        found = [default + 1 if isinstance(default, int) else default * 1.5 + 0.1]
    elif not found and isinstance(default, str):
        source = inspect.getsource(kind)
        found = re.findall(rf'{key} == "([^"]+)"', source)
        found += [
            v for group in re.findall(rf"{key} in [\[(]([^\])]+)", source) for v in re.findall(r'"([^"]+)"', group)
        ]
        found = found or spelled(key)
    found = list(dict.fromkeys(found or spelled(key) or WORDS.get(key, [])))
    assert found, f"{kind.__name__} has a setting {key}={default!r} whose values are unknown here: name some in VALUES"
    return [value for value in found if value != default]


def base(kind):
    """Settings under which a class is linear and deterministic, and a predictor alone."""
    told = {"clip_sample": False, "disable_corrector": list(range(STEPS))}
    return {key: value for key, value in told.items() if key in settings(kind)}


def latents(scheduler, options):
    torch.manual_seed(0)
    scheduler.set_timesteps(STEPS, **options)
    x, net = noise() * scheduler.init_noise_sigma, network()
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def method_of(name, config):
    if config.get("solver_order") in (1, 2, 3) and name in OWN:
        return OWN[name][config["solver_order"] - 1]
    return OWN[name][1] if name in OWN else "euler"


def judged(name, key, value):
    """None where stock has no such setting, or the settings are equal or named; else what is wrong."""
    kind = getattr(diffusers, name)
    told = {**base(kind), key: value}
    if "use_flow_sigmas" in settings(kind) and (key == "use_flow_sigmas" or str(value) == "flow_prediction"):
        told |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    config = config_of(kind, **told)
    method = method_of(name, config)
    options = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            ours = latents(DSSScheduler.from_config(config, solver=method), options)
        except ValueError as error:
            return None if key in str(error) or re.search(REFUSED, str(error)) else f"refused without a name: {error}"
    named = any(key in str(warning.message) for warning in said)
    stock = getattr(diffusers, stock_class(method, adopt(config)))
    if (
        method == "euler" and stock.__name__ not in EULERS
    ):  # it walks the grid of a multistep class, and steps by itself
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            unclipped = {k: v for k, v in base(stock).items() if k != key}
            theirs = latents(stock.from_config(config, **unclipped), options)
        except (ValueError, NotImplementedError, AttributeError, TypeError, IndexError, RuntimeError):
            return None
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if error <= SAME or named or not theirs.isfinite().all():
        return None
    return f"{method} is {error:.2g} off {stock.__name__}'s latents and says nothing"


@pytest.mark.parametrize("name", list(every_class()))
def test_no_setting_is_dropped_in_silence(name):
    kind = getattr(diffusers, name)
    needed = [k for k, p in settings(kind).items() if p.default is p.empty]
    if needed:
        pytest.skip(f"{name} needs {needed}, and describes no flow or VP model")
    try:
        DSSScheduler.from_config(config_of(kind, **base(kind)), solver="euler")
    except ValueError as error:
        assert name in str(error) and re.search(REFUSED, str(error))
        return
    wrong = {}
    for key, parameter in settings(kind).items():
        for value in values(kind, key, parameter):
            found = judged(name, key, value)
            if found:
                wrong[f"{key}={str(value)[:40]}"] = found
    assert not wrong, "\n".join(f"{setting}: {what}" for setting, what in wrong.items())
