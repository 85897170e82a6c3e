"""SGLang: its own pipelines, not diffusers', load a folder whose scheduler is a DSSScheduler.

SGLang builds a scheduler by the name in the folder's scheduler_config.json out of a registry of its own. The package
advertises :func:`register` in the entry-point group ``sglang.multimodal_gen.plugins``, which SGLang calls as it starts.
"""

from __future__ import annotations

PATH = "dss_fast.integrations.diffusers:DSSScheduler"


def register() -> None:
    """Tells SGLang's registry where the class is; it imports it when a folder asks for it."""
    from sglang.multimodal_gen.runtime.models.registry import ModelRegistry

    if "DSSScheduler" not in ModelRegistry.registered_models:
        ModelRegistry.register_model("DSSScheduler", PATH)
