"""A custom node folder for ComfyUI: link or copy it to ComfyUI/custom_nodes/dss_fast, with dss_fast installed.

Adds the nodes DSS Sampler and DSS Sigmas under sampling/custom_sampling. Give both the same solver and steps and wire
them to SamplerCustomAdvanced. `python -m examples.comfyui` shows the pair at work without ComfyUI.
"""

from dss_fast.integrations.comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
