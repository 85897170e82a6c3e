"""A pipeline's folder with a table as its scheduler, for servers that load folders: SGLang's diffusers backend.

    python -m examples.diffusers_folder FLUX.1-dev mine-8.json flux-mine
    sglang serve --backend diffusers --model-path flux-mine

Nothing is copied but the two files that change: the rest are links to the original folder. Without arguments a tiny
random pipeline is made, given a published table and loaded as a server would.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import diffusers
import torch

from dss_fast.integrations.diffusers import DSSScheduler

from .tiny_pipelines import build


def with_table(source: Path, solver: str, target: Path) -> Path:
    """``target``, a pipeline like ``source`` whose scheduler runs ``solver`` (a name, a file or a folder of them)."""
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    config = json.loads((source / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = DSSScheduler.from_config(config, solver=solver)  # refused here, if it does not fit the pipeline
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in ("model_index.json", "scheduler"):
            (target / path.name).symlink_to(path.resolve())
    scheduler.save_pretrained(target / "scheduler")
    index["scheduler"] = [DSSScheduler.__module__, DSSScheduler.__name__]
    (target / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return target


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given:
        source, solver, target = given
        print(f"wrote {with_table(Path(source), solver, Path(target))}")
        return
    with tempfile.TemporaryDirectory() as folder:
        pipe, call = build("flux")
        pipe.save_pretrained(Path(folder) / "own")
        target = with_table(Path(folder) / "own", "sit-xl-2-256", Path(folder) / "table")
        absent = {key: None for key, part in pipe.components.items() if part is None}
        served = diffusers.DiffusionPipeline.from_pretrained(target, **absent)  # as a server does
        latents = served(**call, num_inference_steps=8, generator=torch.Generator().manual_seed(0))[0]
        print(f"{type(served).__name__} with {served.scheduler.solver.name}: {tuple(latents.shape)}")


if __name__ == "__main__":
    main()
