"""Sixty pipelines of diffusers with random weights of a few kilobytes, for the examples and the tests, offline.

    pipe, arguments = build("flux")
    pipe(**arguments, num_inference_steps=8)

Text encoders and tokenizers are left out and embeddings passed in their place, so that nothing is downloaded.
"""

from __future__ import annotations

import warnings

import diffusers
import torch

from . import flow, newer, vp
from .kin import KIN
from .parts import Built

FLOW = ("sd3", "flux", "wan", "qwen", "sana")
VP = ("dit", "sd", "sdxl", "pixart")
NAMES = VP + FLOW  # of one pass over the usual kinds
MORE_FLOW = (
    "lumina2", "auraflow", "ltx", "ltx_condition", "hunyuan_video", "z_image", "chroma", "mochi", "cogview4",
    "flux_img2img", "flux_inpaint",
)  # fmt: skip
MORE_VP = (
    "hunyuan_dit", "kolors", "kandinsky22", "animatediff", "cogvideox", "stable_audio", "controlnet",
    "sd_img2img", "sd_inpaint", "sdxl_img2img", "sdxl_inpaint",
)  # fmt: skip
NEWER = (
    "flux2", "flux2_klein", "bria", "easyanimate", "skyreels", "skyreels_df", "ovis", "prx", "krea2",
    "lumina", "hunyuan_image", "sana_video", "allegro", "latte", "cogview3plus", "kandinsky3",
    "if_stage1", "pixart_alpha", "sd_pag", "sdxl_pag", "sana_pag", "sd3_img2img", "z_image_inpaint", "qwen_img2img",
    "qwen_inpaint", "chroma_img2img", "z_image_img2img", "pixart_pag", "wan_v2v",
)  # fmt: skip
ALL = NAMES + MORE_FLOW + MORE_VP + NEWER


def build(name: str, dtype: torch.dtype = torch.float32, batch: int = 1, seed: int = 0) -> Built:
    """(pipeline, keyword arguments of a call giving latents), on the CPU and silent."""
    if name not in ALL:
        raise ValueError(f"no tiny pipeline is called {name!r}; there are {', '.join(ALL)}")
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = newer if name in NEWER else flow if name in FLOW + MORE_FLOW else vp
        make = KIN[name] if name in KIN else getattr(module, name)
        pipe, arguments = make(batch, lambda *shape: torch.randn(shape).to(dtype))
    torch.set_rng_state(state)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # `to` warns of modules better kept in float32
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(dtype).eval().requires_grad_(False)
    diffusers.utils.logging.set_verbosity(verbosity)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"output_type": "latent", **arguments}
