"""A custom node folder for ComfyUI: link or copy it to ComfyUI/custom_nodes/dss_fast, with dss_fast installed.

Adds the nodes DSS Sampler and DSS Sigmas under sampling/custom_sampling. Give both the same solver and steps and wire
them to SamplerCustomAdvanced. In a KSampler choose dss_<solver> as sampler, and as scheduler too when it is a learned
one. Solvers of your own are offered from ComfyUI's models/dss_fast. `python -m examples.comfyui` shows the pair at work
without ComfyUI.
"""

from dss_fast.integrations.comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
