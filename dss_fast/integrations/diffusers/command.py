"""``python -m dss_fast search PIPELINE --prompts prompts.txt``: from a pipeline's folder or hub id to its own solvers.

The plan is printed before anything is searched; then come the solvers, a picture of the pipeline with its own scheduler
and with them, and the lines of Python that use them.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ...files import MAX_BYTES
from ...names import printable
from ...plots import plot_samples
from ...searching import SearchResult
from ...target import Target
from .pipeline import from_pipeline
from .request import call_of
from .scheduler import DSSScheduler

SLOW = 28  # steps of the pipeline's own scheduler in the picture, beside the N searched
SHOWN = 4  # prompts in the picture


@dataclass(frozen=True)
class Prompted:
    """A pipeline with prompts: what a command searches on, and shows afterwards.

    rows: the prompts, or class numbers, by the name of the call's argument. call: its other arguments.
    """

    name: str
    pipe: Any
    rows: dict[str, list[Any]]
    call: dict[str, Any]

    @classmethod
    def load(
        cls,
        source: str,
        prompts: str | os.PathLike[str],
        call: Sequence[str] = (),
        dtype: str | None = None,
        device: str | None = None,
    ) -> Prompted:
        """source: a folder or a hub id for ``DiffusionPipeline.from_pretrained``. prompts: a file with one prompt a
        line, or a class number for pipelines by class. call: ``name=value`` arguments of the pipeline's call. dtype:
        of its weights.

        Raises ValueError for what does not fit, OSError for what cannot be read.
        """
        lines = _lines(prompts)
        if not lines:
            raise ValueError(f"{prompts} holds no prompts; write one a line, a few dozen of the kind you will use")
        options = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **options)
        pipe.set_progress_bar_config(disable=True)
        if device is not None:
            pipe.to(device)
        return cls(Path(source).name, pipe, _rows(pipe, lines), _arguments(pipe, call))

    def __str__(self) -> str:
        return f"{type(self.pipe).__name__}: {len(next(iter(self.rows.values())))} prompts"

    def target(self) -> Target:
        """What is searched, see :func:`from_pipeline`."""
        return replace(from_pipeline(self.pipe, self.rows, **self.call), name=self.name)

    def show(self, result: SearchResult, out: Path, seed: int) -> None:
        """Draws ``pipeline-N.png`` into the run folder, and prints how to use what was found."""
        pipe, own = self.pipe, self.pipe.scheduler
        for n, solver in result.solvers.items():
            columns = {f"own, {count} steps": self.images(count, seed) for count in (SLOW, n)}
            pipe.scheduler = DSSScheduler.from_config(own.config, solver=solver)
            try:
                columns[f"searched, {n} steps"] = self.images(n, seed)
            finally:
                pipe.scheduler = own
            print(f"picture in {printable(plot_samples(columns, out / f'pipeline-{n}.png', count=SHOWN))}")
        files = [f"{out / f'solver-{n}.json'}" for n in result.solvers]
        print(
            "\nTo use it:\n"
            "from dss_fast.integrations.diffusers import DSSScheduler\n"
            f"pipe.scheduler = DSSScheduler.from_config(pipe.scheduler.config, solver={files!r})\n"
            f"pipe({', '.join(['prompt', *(f'{k}={v!r}' for k, v in self.call.items())])}, "
            f"num_inference_steps={next(iter(result.solvers))})"
        )

    def images(self, steps: int, seed: int) -> Tensor:
        """(B, 3, H, W) in [0, 1], of the first prompts: a pipeline's pictures, or the first frames of its videos."""
        chosen = {key: value[:SHOWN] for key, value in self.rows.items()}
        generator = torch.Generator().manual_seed(seed)
        options = {**self.call, **chosen, "num_inference_steps": steps, "generator": generator, "output_type": "np"}
        result = self.pipe(**options)
        pictures = torch.as_tensor(result.images if hasattr(result, "images") else result.frames)
        pictures = pictures[:, 0] if pictures.ndim == 5 else pictures
        return pictures.movedim(-1, 1).float().cpu().clamp(0, 1)


def _lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file that are not blank. Raises ValueError naming a file that is none, or too large."""
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe without a writer would wait for ever
        raise ValueError(f"{path}: not a file; write the prompts into one, one a line")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MB; a few dozen prompts are enough")
    try:
        return [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); write one prompt a line") from None


def _arguments(pipe: Any, call: Sequence[str]) -> dict[str, Any]:
    """The arguments that ``name=value`` texts mean. Raises ValueError for a name that the pipeline's call lacks."""
    accepted, arguments = call_of(pipe), {}
    for text in call:
        name, equals, value = text.partition("=")
        if not equals or name not in accepted:
            raise ValueError(f"--call {text!r}: write name=value, name one of {', '.join(accepted)}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def _rows(pipe: Any, lines: Sequence[str]) -> dict[str, list[Any]]:
    """The file's lines as rows of the pipeline's call."""
    accepted = call_of(pipe)
    if "prompt" in accepted:
        return {"prompt": list(lines)}
    if "class_labels" in accepted:
        if not all(line.isdigit() for line in lines):
            raise ValueError(f"{type(pipe).__name__} takes class numbers; write one a line")
        return {"class_labels": [int(line) for line in lines]}
    raise ValueError(f"{type(pipe).__name__} takes neither prompts nor class labels; build a target with from_pipeline")
