"""``python -m dss_fast search PIPELINE --prompts prompts.txt``: from a pipeline's folder or hub id to its own solvers.

The plan is printed before anything is searched; then come the solvers, a picture of the pipeline with its own scheduler
and with them, and the lines of Python that use them.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ...files import check_writable
from ...plots import plot_samples
from ...searching import GaussNewton, Lion, SearchResult, search
from .pipeline import from_pipeline
from .scheduler import DSSScheduler

SLOW = 28  # beside N steps the picture shows so many of the pipeline's own scheduler
SHOWN = 4  # the picture shows so many prompts


def search_pipeline(
    source: str,
    prompts: str | os.PathLike[str],
    steps: Sequence[int],
    out: str | os.PathLike[str],
    *,
    method: GaussNewton | Lion,
    call: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
    budget: int | str | None = None,
    seed: int = 0,
    resume: bool = False,
) -> SearchResult:
    """Loads a pipeline, says what the search will cost, searches, and shows what it found.

    source: a folder or a hub id for ``DiffusionPipeline.from_pretrained``. prompts: a file with one prompt a line, or a
    class number for pipelines by class. call: ``name=value`` arguments of the pipeline's call. dtype: of its weights.

    Writes the run folder of ``search`` with ``pipeline-N.png``. Raises ValueError for what does not fit, OSError for
    what cannot be read.
    """
    lines = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{prompts} holds no prompts; write one a line, a few dozen of the kind you will use")
    check_writable(out)
    options = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
    pipe = diffusers.DiffusionPipeline.from_pretrained(source, **options)
    pipe.set_progress_bar_config(disable=True)
    if device is not None:
        pipe.to(device)
    arguments = call_arguments(pipe, call)
    rows = rows_of(pipe, lines)
    first = int(os.environ.get("RANK", "0")) == 0
    target = replace(from_pipeline(pipe, rows, **arguments), name=Path(source).name)
    if first:
        scale = target.guidance_scale
        print(f"{type(pipe).__name__}: {len(lines)} prompts, latents {target.shape}, guidance {scale}", flush=True)
    result = search(target, steps, method=method, budget=budget, seed=seed, out=out, resume=resume)
    if first:
        print(result)
        own = pipe.scheduler
        for n, solver in result.solvers.items():
            pipe.scheduler = own
            columns = {f"own, {count} steps": images(pipe, rows, arguments, count, seed) for count in (SLOW, n)}
            pipe.scheduler = DSSScheduler.from_config(own.config, solver=solver)
            columns[f"searched, {n} steps"] = images(pipe, rows, arguments, n, seed)
            print(f"picture in {plot_samples(columns, Path(out) / f'pipeline-{n}.png', count=SHOWN)}")
        pipe.scheduler = own
        files = [f"{Path(out) / f'solver-{n}.json'}" for n in result.solvers]
        print(
            "\nTo use it:\n"
            "from dss_fast.integrations.diffusers import DSSScheduler\n"
            f"pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver={files!r})\n"
            f"pipe({', '.join(['prompt', *(f'{k}={v!r}' for k, v in arguments.items())])}, "
            f"num_inference_steps={next(iter(result.solvers))})"
        )
    return result


def call_arguments(pipe: Any, call: Sequence[str]) -> dict[str, Any]:
    """The arguments that ``name=value`` texts mean. Raises ValueError for a name that the pipeline's call lacks."""
    accepted, arguments = inspect.signature(pipe.__call__).parameters, {}
    for text in call:
        name, equals, value = text.partition("=")
        if not equals or name not in accepted:
            raise ValueError(f"--call {text!r}: write name=value, name one of {', '.join(accepted)}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def rows_of(pipe: Any, lines: Sequence[str]) -> dict[str, list[Any]]:
    """The file's lines as rows of the pipeline's call."""
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" in accepted:
        return {"prompt": list(lines)}
    if "class_labels" in accepted:
        if not all(line.isdigit() for line in lines):
            raise ValueError(f"{type(pipe).__name__} takes class numbers; write one a line")
        return {"class_labels": [int(line) for line in lines]}
    raise ValueError(f"{type(pipe).__name__} takes neither prompts nor class labels; build a target with from_pipeline")


def images(pipe: Any, rows: Mapping[str, list[Any]], arguments: Mapping[str, Any], steps: int, seed: int) -> Tensor:
    """(B, 3, H, W) in [0, 1], of the first prompts: a pipeline's pictures, or the first frames of its videos."""
    chosen = {key: value[:SHOWN] for key, value in rows.items()}
    generator = torch.Generator().manual_seed(seed)
    options = {**arguments, **chosen, "num_inference_steps": steps, "generator": generator, "output_type": "np"}
    result = pipe(**options)
    pictures = torch.as_tensor(result.images if hasattr(result, "images") else result.frames)
    pictures = pictures[:, 0] if pictures.ndim == 5 else pictures
    return pictures.movedim(-1, 1).float().cpu().clamp(0, 1)
