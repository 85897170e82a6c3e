"""Two ComfyUI nodes that belong together: DSS Sampler gives a SAMPLER, DSS Sigmas the SIGMAS it was searched with.

A custom node folder needs one line in its ``__init__.py``:

    from dss_fast.integrations.comfyui import comfy_entrypoint

Both go into SamplerCustom or SamplerCustomAdvanced, with the same solver and number of steps. Sigmas of another node
stop the run with the reason, unless ``strict`` is off. Importing this module needs no ComfyUI; the nodes are made
when it asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import METHODS
from ..names import Name, families, find_solver
from ..solver import Solver
from .k_diffusion import sample_dss, sigmas_of

CATEGORY = "sampling/custom_sampling"


def solver_names() -> list[str]:
    """What the nodes offer: the published families and the hand-made methods."""
    return [*families(), *METHODS]


def read_solver(solver: str, steps: int, file: str = "") -> Solver | str:
    """The learned table of a node's settings, or the name of a hand-made method. A file goes before the name."""
    if file.strip():
        table = Solver.load(Path(file.strip()).expanduser())
        if table.num_steps != steps:
            raise ValueError(f"{file} holds a solver of {table.num_steps} steps; set steps to {table.num_steps}")
        return table
    return solver if Name.parse(solver).handmade else find_solver(solver, None, steps)


def is_flow(model_sampling: Any) -> bool:
    """Whether ComfyUI treats the model as a flow: its model_sampling derives from CONST (SD3, FLUX, Wan)."""
    return any(kind.__name__ == "CONST" for kind in type(model_sampling).__mro__)


def make_sampler(solver: Solver | str, strict: bool = True) -> Callable[..., Tensor]:
    """The function that ComfyUI's KSAMPLER calls: sample_dss that looks up what kind of model it is given."""

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        family = "flow" if is_flow(model.inner_model.inner_model.model_sampling) else "vp"
        return sample_dss(model, x, sigmas, extra_args, callback, disable, solver=solver, family=family, strict=strict)

    return sample


def make_sigmas(
    model_sampling: Any,
    solver: Solver | str,
    steps: int,
    denoise: float = 1.0,
    simple: Callable[[Any, str, int], Tensor] | None = None,
) -> Tensor:
    """(k + 1,) float32, the sigmas of a solver for a model, k = steps * denoise, the last ones.

    simple: ComfyUI's calculate_sigmas, which serves hand-made methods with its ``simple`` scheduler.

    Raises ValueError when a learned solver's family or noise is not the model's.
    """
    kept = max(1, min(steps, round(steps * denoise)))
    if isinstance(solver, str):
        if simple is None:
            raise ValueError(f"solver {solver!r} takes ComfyUI's own sigmas: give simple, its calculate_sigmas")
        return simple(model_sampling, "simple", int(steps / denoise) if denoise < 1 else steps)[-(steps + 1) :]
    family = "flow" if is_flow(model_sampling) else "vp"
    if solver.family != family:
        raise ValueError(f"{solver.label} is for {solver.family} models, this one is {family}")
    sigmas = sigmas_of(solver)
    top = float(model_sampling.sigma_max)
    if family == "vp" and abs(top / float(sigmas[0]) - 1) > 0.1:
        # DiT's and PixArt's linear betas end at 157, Stable Diffusion's at 14.6: other noise, other coefficients
        raise ValueError(
            f"{solver.label} was searched for noise up to {float(sigmas[0]):.4g}, this model's "
            f"goes to {top:.4g}; take a hand-made method, or search a solver for the model"
        )
    if kept < steps and solver.noise_coeffs is not None:
        warnings.warn("this solver weighs the initial noise and cannot start part-way; denoise is 1", stacklevel=2)
        kept = steps
    return sigmas[-(kept + 1) :].clone().to(torch.float32)


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the extension (V3 API)."""
    import comfy.samplers
    from comfy_api.latest import ComfyExtension, io

    def settings() -> list[Any]:
        return [
            io.Combo.Input("solver", options=solver_names()),
            io.Int.Input("steps", default=8, min=1, max=100),
            io.String.Input("file", default="", tooltip="a solver's JSON file, instead of the name above"),
        ]

    class DSSSampler(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="DSSSampler",
                display_name="DSS Sampler",
                category=CATEGORY,
                inputs=[*settings(), io.Boolean.Input("strict", default=True)],
                outputs=[io.Sampler.Output()],
            )

        @classmethod
        def execute(cls, solver: str, steps: int, file: str = "", strict: bool = True) -> Any:
            sampler = make_sampler(read_solver(solver, steps, file), strict)
            return io.NodeOutput(comfy.samplers.KSAMPLER(sampler))

    class DSSSigmas(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return io.Schema(
                node_id="DSSSigmas",
                display_name="DSS Sigmas",
                category=CATEGORY,
                inputs=[
                    io.Model.Input("model"),
                    *settings(),
                    io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                ],
                outputs=[io.Sigmas.Output()],
            )

        @classmethod
        def execute(cls, model: Any, solver: str, steps: int, file: str = "", denoise: float = 1.0) -> Any:
            table = read_solver(solver, steps, file)
            noise = model.get_model_object("model_sampling")
            simple = comfy.samplers.calculate_sigmas
            return io.NodeOutput(make_sigmas(noise, table, steps, denoise, simple))

    class DSSExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return [DSSSampler, DSSSigmas]

    return DSSExtension()
