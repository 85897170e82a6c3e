"""Settings of diffusers' schedulers that a table does not apply, whatever release they are of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers

from ...methods import METHODS
from .config import family_of
from .grids import stock_class
from .kinds import Config, keywords

# With these values a scheduler's own step is the linear one of its method here.
LINEAR: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis", "data_prediction"),
    "clip_sample": (False, None),
    "predict_x0": (True,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "stochastic_sampling": (False,),
    "thresholding": (False,),
}
ALWAYS = ("clip_sample", "stochastic_sampling", "thresholding")  # a model may need these whichever method runs it
# The model's and its grid's, which the stock schedulers are asked for.
APPLIED = {
    "beta_end", "beta_schedule", "beta_start", "euler_at_final", "final_sigmas_type", "flow_shift",
    "interpolation_type", "invert_sigmas", "lambda_min_clipped", "lower_order_final", "num_train_timesteps",
    "prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one", "shift", "shift_terminal", "sigma_max",
    "sigma_min", "snr_shift_scale", "steps_offset", "time_shift_type", "timestep_spacing", "timestep_type",
    "trained_betas", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas",
    "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
# Of a class' own method, which goes with the class, as in diffusers; of settings that are off; read by pipelines.
OTHERS = {
    "base_image_seq_len", "base_shift", "clip_sample_range", "corrector_order", "disable_corrector",
    "dynamic_thresholding_ratio", "eta", "max_image_seq_len", "max_shift", "original_inference_steps",
    "predictor_order", "sample_max_value", "scale_factors", "sigma_data", "skip_prk_steps", "solver_order",
    "tau_func", "timestep_scaling", "upscale_mode", "variance_type",
}  # fmt: skip
# Of a grid alone, which a learned table brings itself.
GRID = {
    "euler_at_final", "final_sigmas_type", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "shift_terminal", "steps_offset", "timestep_spacing", "use_beta_sigmas", "use_exponential_sigmas",
    "use_karras_sigmas", "use_lu_lambdas",
}  # fmt: skip
ORDERS = {"corrector_order", "predictor_order", "solver_order"}


def check_shift(config: Config, told: Config) -> None:
    """Raises ValueError for a shift that the caller gives under the name by which this config's grid does not go."""
    counts = "flow_shift" if config.get("use_flow_sigmas") else "shift"
    given = {key: told[key] for key in ("shift", "flow_shift") if told.get(key) is not None}
    if not given or counts in given and family_of(config) == "flow":
        return
    key, value = next(iter(given.items()))
    if family_of(config) != "flow":
        raise ValueError(f"{key}={value!r}: this config is that of a VP model, whose grid has no shift; leave it out")
    raise ValueError(
        f"{key}={value!r}: the grid of this config (use_flow_sigmas={bool(config.get('use_flow_sigmas'))}) goes by "
        f"{counts}; give {counts}={value!r}"
    )


def told_for_nothing(told: Config, methods: Sequence[str]) -> Iterator[str]:
    """What is wrong with settings that the caller of ``from_config`` gave, beside hand-made methods or none."""
    for key, value in told.items():
        if key in GRID and not methods and value not in (None, False):
            yield f"{key}={value!r} not applied: a learned table, or a method on a spacing of its own, brings its times"
        elif key in ORDERS and any(value != METHODS[method][1] for method in methods):
            own = ", ".join(f"{METHODS[method][1]} of {method}" for method in methods)
            yield f"{key}={value!r} not applied: the order is the method's, {own}"


def unapplied(config: Config, methods: Sequence[str]) -> Iterator[str]:
    """``name=value`` of what stock schedulers would do in their steps and a table does not.

    config: of a DSSScheduler. methods: the hand-made ones it runs; the settings of the class that a method stands in
    for count, and a few of any class. A setting that no list here has, of a newer diffusers, counts as well.
    """
    own = getattr(diffusers, str(config.get("stock_class")), None)
    known = {} if own is None else keywords(own)
    walked = {key for name in {stock_class(m, config) for m in methods} for key in keywords(getattr(diffusers, name))}
    for key, value in config.items():
        if key in LINEAR:
            if value not in LINEAR[key] and (key in ALWAYS or key in walked):
                yield f"{key}={value!r}"
        elif key in known and key not in APPLIED | OTHERS:
            default = known[key].default
            if default is inspect.Parameter.empty or str(value) != str(default):
                yield f"{key}={str(value)[:80]}"
