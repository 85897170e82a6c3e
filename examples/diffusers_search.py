"""A solver of your own for a pipeline of diffusers: from_pipeline, search, save, sample.

python -m examples.diffusers_search                 # a tiny random network, offline
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from dss_fast import search
from dss_fast.integrations.diffusers import DSSScheduler, from_pipeline

from .tiny_pipelines import build


def main(arguments: list[str] | None = None, **options_of_search: Any) -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="flux")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/mine.json"))
    options = parser.parse_args(arguments)

    # With weights: pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
    #               pipe.to("cuda")
    #               prompts = Path("prompts.txt").read_text().splitlines()      # a few dozen of the kind you will use
    #               call = {"height": 512, "width": 512, "guidance_scale": 3.5}
    pipe, call = build(options.pipeline, batch=4)
    prompts = {k: call.pop(k) for k in list(call) if "prompt_" in k or k == "class_labels"}
    call.pop("output_type")

    target = from_pipeline(pipe, prompts, **call)
    print(f"latents {target.shape}, {target.schedule}, guidance {target.guidance_scale}")
    result = search(target, num_steps=options.steps, **options_of_search)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result.solver.save(options.out)

    pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver=options.out)
    generator = torch.Generator().manual_seed(0)
    latents = pipe(**prompts, **call, num_inference_steps=options.steps, generator=generator, output_type="latent")
    print(f"wrote {options.out} and sampled {tuple(latents[0].shape)} with it")
    return result


if __name__ == "__main__":
    main()
