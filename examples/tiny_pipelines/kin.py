"""Tiny pipelines that are made of the parts of another one: with an image, with a hole in it, with perturbed attention.

``KIN[name](batch, randn)`` makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from . import flow, vp
from .parts import Built, Randn

Make = Callable[[int, Randn], Built]


def _with_image(kind: str, make: Make, side: int, mask: bool, batch: int, randn: Randn) -> Built:
    pipe, arguments = make(batch, randn)
    parts = dict(pipe.components)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    if "text_encoder_2" in parts and "unet" in parts:
        parts["add_watermarker"] = False
    made = getattr(diffusers, f"{kind}{'Inpaint' if mask else 'Img2Img'}Pipeline")(**parts)
    arguments = {
        **arguments,
        "image": torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3)),
        "strength": 0.6,
    }
    if mask:
        hole = torch.zeros(1, 1, side, side)
        hole[..., : side // 2] = 1
        return made, {**arguments, "mask_image": hole, "height": side, "width": side}
    if "transformer" not in parts:
        arguments = {k: v for k, v in arguments.items() if k not in ("height", "width")}
    return made, arguments


def _of_parts(kind: str, make: Make, told: dict[str, Any], batch: int, randn: Randn) -> Built:
    pipe, arguments = make(batch, randn)
    return getattr(diffusers, f"{kind}Pipeline")(**pipe.components, **told), arguments


def _sana_pag(batch: int, randn: Randn) -> Built:
    pipe, arguments = _of_parts("SanaPAG", flow.sana, {"pag_applied_layers": "blocks.0"}, batch, randn)
    return pipe, {**arguments, "pag_scale": 1.0}


def _wan_v2v(batch: int, randn: Randn) -> Built:
    pipe, arguments = flow.wan(batch, randn)
    parts = {k: v for k, v in pipe.components.items() if k != "transformer_2"}
    frames = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(3)).expand(batch, -1, -1, -1, -1)
    del arguments["num_frames"]
    return diffusers.WanVideoToVideoPipeline(**parts), {**arguments, "video": frames, "strength": 0.6}


_PAG = {"pag_applied_layers": "mid"}
KIN: dict[str, Make] = {
    "sd_img2img": partial(_with_image, "StableDiffusion", vp.sd, 16, False),
    "sd_inpaint": partial(_with_image, "StableDiffusion", vp.sd, 16, True),
    "sdxl_img2img": partial(_with_image, "StableDiffusionXL", vp.sdxl, 16, False),
    "sdxl_inpaint": partial(_with_image, "StableDiffusionXL", vp.sdxl, 16, True),
    "flux_img2img": partial(_with_image, "Flux", flow.flux, 16, False),
    "flux_inpaint": partial(_with_image, "Flux", flow.flux, 16, True),
    "sd3_img2img": partial(_with_image, "StableDiffusion3", flow.sd3, 8, False),
    "z_image_img2img": partial(_with_image, "ZImage", flow.z_image, 32, False),
    "z_image_inpaint": partial(_with_image, "ZImage", flow.z_image, 32, True),
    "qwen_img2img": partial(_with_image, "QwenImage", flow.qwen, 16, False),
    "qwen_inpaint": partial(_with_image, "QwenImage", flow.qwen, 16, True),
    "chroma_img2img": partial(_with_image, "Chroma", flow.chroma, 16, False),
    "pixart_alpha": partial(_of_parts, "PixArtAlpha", vp.pixart, {}),
    "pixart_pag": partial(_of_parts, "PixArtSigmaPAG", vp.pixart, {"pag_applied_layers": "blocks.1"}),
    "sd_pag": partial(_of_parts, "StableDiffusionPAG", vp.sd, {"requires_safety_checker": False, **_PAG}),
    "sdxl_pag": partial(_of_parts, "StableDiffusionXLPAG", vp.sdxl, {"add_watermarker": False, **_PAG}),
    "sana_pag": _sana_pag,
    "wan_v2v": _wan_v2v,
}
