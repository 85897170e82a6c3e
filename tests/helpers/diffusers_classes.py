"""The scheduler classes of the installed diffusers, and the configs that they write."""

import functools
import inspect

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from dss_fast.integrations.diffusers import DSSScheduler


def every_class():
    """Their names."""
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name) if "Scheduler" in name else None
        if inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin:
            yield name


def settings(kind):
    """What a class takes, by name."""
    return {k: p for k, p in inspect.signature(kind.__init__).parameters.items() if k not in ("self", "kwargs")}


def config_of(kind, **told):
    """The config of a scheduler as a loaded pipeline has it, of one that is not made: some classes take .2 s."""
    defaults = {key: parameter.default for key, parameter in settings(kind).items()}
    unset = [key for key in defaults if key not in told]
    return {**defaults, **told, "_use_default_values": unset, "_class_name": kind.__name__}


def stood_in_for():
    """The names of the classes whose configs DSSScheduler takes."""
    for name in every_class():
        kind = getattr(diffusers, name)
        if any(p.default is p.empty for p in settings(kind).values()):
            continue
        try:
            DSSScheduler.from_config(config_of(kind, **unclipped(kind)))
        except ValueError:
            continue
        yield name


def unclipped(kind):
    """The setting under which a class' step is linear, where it has that setting."""
    return {"clip_sample": False} if "clip_sample" in settings(kind) else {}


@functools.cache
def made(name):
    """A scheduler of a class; one for all who only read it."""
    kind = getattr(diffusers, name)
    return kind(**unclipped(kind))
