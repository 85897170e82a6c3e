"""Settings of diffusers' schedulers that a table does not apply, whatever release they are of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers

from .config import Config, keywords
from .grids import stock_class

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
