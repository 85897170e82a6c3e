"""diffusers: a scheduler for its pipelines, and a pipeline as a Target."""

from .pipeline import from_pipeline
from .request import check_request
from .scheduler import DSSScheduler, SchedulerMixin

__all__ = [
    "DSSScheduler",
    "SchedulerMixin",  # a saved pipeline's scheduler is looked for where this name is
    "check_request",
    "from_pipeline",
]
