"""diffusers: a scheduler for its pipelines, and a pipeline as a Target."""

from .pipeline import from_pipeline
from .scheduler import DSSScheduler, SchedulerMixin

__all__ = ["DSSScheduler", "SchedulerMixin", "from_pipeline"]  # a saved pipeline's scheduler is looked for here
