"""vLLM-Omni: its native pipelines load a folder whose scheduler is a DSSScheduler.

They name a scheduler class in their code and load it from the folder, whatever class the folder names; FlowMatchEuler
then runs, and one line in a log says that settings were ignored. The package advertises :func:`register` in the
entry-point group ``vllm_omni.general_plugins``, whose functions run in every process, also several times.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .diffusers import DSSScheduler


def register() -> None:
    """From now on a stock class that is loaded from a folder of ours gives the scheduler that the folder names.

    Pipelines that build their scheduler without the folder (Wan 2.2's) are not reached.
    """
    loading = SchedulerMixin.__dict__["from_pretrained"].__func__
    if hasattr(loading, "stock"):
        return

    @wraps(loading)
    def from_pretrained(cls: Any, folder: Any = None, subfolder: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(cls, DSSScheduler):
            asked = {key: value for key, value in kwargs.items() if not key.startswith("return_")}  # the config alone
            named = cls.load_config(folder, subfolder=subfolder, **asked).get("_class_name")
            cls = DSSScheduler if named == DSSScheduler.__name__ else cls
        return loading(cls, folder, subfolder, *args, **kwargs)

    from_pretrained.stock = loading  # type: ignore[attr-defined]
    SchedulerMixin.from_pretrained = classmethod(from_pretrained)
