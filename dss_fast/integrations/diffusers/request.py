"""What a table was searched for: pipeline, checkpoint, resolution, guidance, prompts. Stored, shown and compared."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ...solver import Solver

SIZES = ("height", "width", "num_frames")
GUIDANCE = 0.05  # a guidance scale may differ from the one searched with by this part


def request_of(
    pipe: Any, arguments: Mapping[str, Any], latents: Sequence[int], prompts: int, passed: Sequence[str] = ()
) -> dict[str, Any]:
    """What ``from_pipeline`` was asked for, as JSON data. passed: the times that the pipeline passes of itself."""
    sizes = {key: arguments[key] for key in SIZES if arguments.get(key) is not None}
    own = {"passes": list(passed)} if passed else {}
    return {**_whose(pipe), **sizes, "latents": list(latents), **scales_of(pipe, arguments), "prompts": prompts, **own}


def passed_beside(solver: Solver, labels: Sequence[str]) -> bool:
    """Whether a table was searched in a pipeline that passes such times of itself, also as a warning: it keeps its
    own there, as it did in the search."""
    request = solver.provenance.get("request") or {}
    beside = set(labels) <= set(request.get("passes") or ())
    if beside:
        warnings.warn(
            f"{solver.label} keeps its own times: {request.get('pipeline')} passes {' and '.join(labels)} of its own "
            "at every call, beside which the table was searched",
            stacklevel=5,
        )
    return beside


def check_request(pipe: Any, solver: Solver, **arguments: Any) -> list[str]:
    """How a call of a pipeline differs from what a table was searched for, also as a warning; empty when it does not.

    arguments: of the pipeline's call; sizes, where given, and guidance scales are compared, these to 5 %. A table
    without a request (a hand-made or published one) differs in nothing.
    """
    request = solver.provenance.get("request") or {}
    found = {**_whose(pipe), **{key: arguments[key] for key in SIZES if arguments.get(key) is not None}}
    differs = [key for key, value in found.items() if key in request and value != request[key]]
    scales = scales_of(pipe, arguments)
    differs += [k for k, v in scales.items() if k in request and abs(v - request[k]) > GUIDANCE * abs(request[k])]
    if differs:
        seen = {**found, **scales}
        _warn(solver, "; ".join(f"{key} {seen[key]!r} instead of {request[key]!r}" for key in differs))
    return differs


def scales_of(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, float]:
    """The guidance scales of a call by name, given or default."""
    own = call_of(pipe)
    guider = getattr(pipe, "guider", None) if is_modular(pipe) else None  # which is a part of its own there
    if (scale := getattr(guider, "guidance_scale", None)) is not None:
        own["guidance_scale"] = scale
    named = {k: v for k, v in {**own, **arguments}.items() if k.endswith(("guidance_scale", "cfg_scale"))}
    return {k: float(v) for k, v in named.items() if isinstance(v, int | float)}


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is one of blocks, diffusers' ModularPipeline."""
    return hasattr(pipe, "blocks") and hasattr(pipe.blocks, "inputs")


def call_of(pipe: Any) -> dict[str, Any]:
    """The arguments that a pipeline's call takes, with their defaults: its blocks' inputs where it is modular."""
    if is_modular(pipe):
        return {one.name: one.default for one in pipe.blocks.inputs if one.name is not None}
    return {name: one.default for name, one in inspect.signature(pipe.__call__).parameters.items()}


def check_latents(solver: Solver, latents: Sequence[int]) -> None:
    """Warns when a run's latents (the shape of one sample) are not those that a table was searched for."""
    own = (solver.provenance.get("request") or {}).get("latents")
    if own is not None and list(own) != list(latents):
        _warn(solver, f"latents of {tuple(latents)} instead of {tuple(own)}")


def _warn(solver: Solver, differs: str) -> None:
    warnings.warn(
        f"{solver.label} runs on a request it was not searched for: {differs}. It may err more than on its own; "
        "compare it with a hand-made solver there, or search again",
        stacklevel=4,
    )


def _whose(pipe: Any) -> dict[str, Any]:
    checkpoint = getattr(pipe, "name_or_path", None) or dict(getattr(pipe, "config", {})).get("_name_or_path")
    return {"pipeline": type(pipe).__name__, **({"checkpoint": str(checkpoint)} if checkpoint else {})}
