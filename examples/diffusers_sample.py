"""A learned solver in a pipeline of diffusers: one line changes the scheduler.

python -m examples.diffusers_sample                 # tiny random networks, offline
python -m examples.diffusers_sample --pipeline flux --solver sit-xl-2-256 --steps 8
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from dss_fast.integrations.diffusers import DSSScheduler

from .tiny_pipelines import FLOW, NAMES, build


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", choices=NAMES, default="dit")
    parser.add_argument("--solver", help="a published family, a hand-made method or a JSON file")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)

    # With weights: pipe = DiffusionPipeline.from_pretrained("facebook/DiT-XL-2-256", torch_dtype=torch.float16)
    #               call = {"class_labels": [207, 360]}
    # or:           pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    #               call = {"prompt": "a cat that holds a sign", "guidance_scale": 3.5}
    pipe, call = build(options.pipeline)

    published = "sit-xl-2-256" if options.pipeline in FLOW else "dit-xl-2-256"
    if options.pipeline in ("sd", "sdxl"):
        published = "dpmpp_2m"  # the published VP tables belong to linear betas; DSSScheduler refuses them here
    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=options.solver or published)

    def preview(pipe: Any, i: int, t: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        x0 = pipe.scheduler.predict_x0(kwargs["latents"])
        print(f"step {i + 1} at t = {float(t):6.1f}: x0 within [{x0.min():.2f}, {x0.max():.2f}]")
        return kwargs

    if "callback_on_step_end" in pipe.__call__.__code__.co_varnames and options.pipeline not in ("pixart", "dit"):
        call = {**call, "callback_on_step_end": preview}
    generator = torch.Generator().manual_seed(0)
    result = pipe(**call, num_inference_steps=options.steps, generator=generator)
    images = torch.as_tensor(result.images if hasattr(result, "images") else result.frames)
    print(f"{type(pipe).__name__} with {pipe.scheduler.solver.name}: {tuple(images.shape)}")
    return images


if __name__ == "__main__":
    main()
