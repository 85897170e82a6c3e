"""The schedulers of diffusers by what they are: those that a table stands in for, those of other tasks, the unknown."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin

Config = Mapping[str, Any]

# A method walks the grid of this scheduler, by the first part of its name; the rest DPMSolverMultistepScheduler's.
MULTISTEP = {
    "dpmpp": "DPMSolverMultistepScheduler",
    "unip": "UniPCMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
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
    *dict.fromkeys(MULTISTEP.values()),
    "EulerDiscreteScheduler",
    "DDIMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "CogVideoXDDIMScheduler",
)
# These sample a model in other ways than one of the above, which may stand in for them.
ORDINARY = (
    *SIGMA_SPACE,
    *STOCK,
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UnCLIPScheduler",
)
_JUMPS = (
    "its network is a consistency model's, distilled to jump to the data from any time, with fresh noise between the "
    "jumps; it is no derivative that a solver could follow from step to step"
)
_BACKWARDS = "it runs from data to noise, and a solver here from noise to data"
# Their configs are those of a VP model or a flow, and yet a run is another task. Only strict=False takes them.
ANOTHER_TASK = {
    "DDIMInverseScheduler": _BACKWARDS,
    "DPMSolverMultistepInverseScheduler": _BACKWARDS,
    "FlowMatchLCMScheduler": _JUMPS,
    "LCMScheduler": _JUMPS,
    "RePaintScheduler": "its steps put a given image back in and jump back in time",
    "TCDScheduler": _JUMPS,
}
# These have a shift or betas as others do, and yet do not step one state along one path.
OTHER = {
    "FlowMapEulerDiscreteScheduler": "its network jumps between two times that it is told",
    "HeliosDMDScheduler": "it changes the resolution between its stages",
    "HeliosScheduler": "it changes the resolution between its stages",
    "MiniMaxH3Scheduler": "its times are 1 - sigma and its network points to the data",
    "PiflowScheduler": "its network returns a policy for several steps",
}
# What their configs say is neither a flow nor a VP model at discrete times, and is refused as that.
REFUSED = (
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "CMStochasticIterativeScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler",
    "DiscreteDDIMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EntropyBoundScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "LTXEulerAncestralRFScheduler",
    "RFD4ProteinaScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "VQDiffusionScheduler",
)


def class_of(config: Config) -> Any:
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
        return _told_of(name)
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
    return _told_of(names[0]) if names else None


def _told_of(name: str) -> Any:
    """A class of diffusers by its name, None where there is none; one that is new since this was written is told of."""
    kind = getattr(diffusers, name, None)
    if kind is not None and name not in (*ORDINARY, *ANOTHER_TASK, *OTHER, *REFUSED):
        warnings.warn(
            f"{name} is unknown to this version of dss_fast: its settings are read as those of other classes with the "
            "same names, and its network may answer another question than theirs; compare a run with its own",
            stacklevel=5,
        )
    return kind


def check_task(config: Config) -> None:
    """Raises ValueError for the config of a class whose networks or runs are not a solver's (``ANOTHER_TASK``)."""
    name = str(config.get("stock_class"))
    if name in ANOTHER_TASK:
        raise ValueError(
            f"{name}: {ANOTHER_TASK[name]}. For an ordinary network give the config of a scheduler that samples it, "
            "such as DDIMScheduler.from_config(...).config; strict=False takes the config as it is"
        )


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config with the name of its class, which a live one's does not hold; ours is as it is.

    A class that is derived from one of diffusers counts as that one, with a warning.
    """
    if "solver" in scheduler.config:
        return dict(scheduler.config)
    own, *bases = [kind.__name__ for kind in type(scheduler).__mro__]
    name = next((name for name in (own, *bases) if name.endswith("Scheduler") and hasattr(diffusers, name)), own)
    if name != own:
        warnings.warn(
            f"{own} is no scheduler of the installed diffusers: its settings are read as those of {name}, from which "
            "it is derived; what its own steps do otherwise is not",
            stacklevel=4,
        )
    return {**scheduler.config, "_class_name": name}


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


def knows(name: str, key: str) -> bool:
    """Whether a scheduler of diffusers, by its name, takes a keyword."""
    return key in keywords(getattr(diffusers, name, object))


def settings() -> set[str]:
    """The keywords that the schedulers in ``STOCK``, which are asked for grids, take."""
    return {key for name in STOCK for key in keywords(getattr(diffusers, name))}


def every_setting() -> set[str]:
    """The keywords that any scheduler of diffusers takes, and what its pipelines write beside them."""
    return {key for keys, _ in _by_keys() for key in keys} | {"sigma_data"}
