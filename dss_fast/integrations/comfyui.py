"""ComfyUI: two nodes that belong together, DSS Sampler and DSS Sigmas, and their solvers in the KSampler's own lists.

A custom node folder needs one line in its ``__init__.py``:

    from dss_fast.integrations.comfyui import comfy_entrypoint

The nodes go into SamplerCustom or SamplerCustomAdvanced. A learned solver runs on its own sigmas or some of them in a
row (SplitSigmas, KSamplerAdvanced's start and end steps); sigmas of another node stop the run with the reason, unless
``strict`` is off. In a KSampler choose ``dss_<solver>`` as sampler and, for a learned one, as scheduler too. JSON files
in ComfyUI's ``models/dss_fast`` are offered by their names. A solver that calls the unconditional branch at some steps
only reads both branches from the guider, a CFGGuider, and sets its cfg to 1 at the other steps, where ComfyUI then
leaves that branch out. Importing this module needs no ComfyUI; the nodes are made when it asks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import MAX_BYTES
from ..methods import METHODS
from ..names import Name, families, published
from ..schedule import Flow
from ..solver import Solver
from .k_diffusion import place_of, sample_dss, sigmas_of

CATEGORY = "sampling/custom_sampling"
# Names that mean another solver in this host. Its dpmpp_2m extrapolates in -log sigma, also where x = (1 - sigma) x0 +
# sigma eps, and under that name so does ours; its deis integrates over another clock, so ours has another name here.
OURS = {"dpmpp_2m_logsnr": "dpmpp_2m", "deis_logrho": "deis", "deis3_logrho": "deis3"}
HOSTS = ("euler", "dpmpp_2m")
SAME_SHIFT = 1e-3  # of the noise at half the time; ComfyUI's table of sigmas has a thousand entries


def solver_names(folder: Path | None = None) -> list[str]:
    """What the nodes offer: the solvers of a folder, the published families and the hand-made methods."""
    files = sorted(path.stem for path in folder.glob("*.json") if path.is_file()) if folder is not None else []
    methods = [method for method in METHODS if not method.startswith(("deis", "heun"))]
    return list(dict.fromkeys([*files, *families(), *methods, *OURS]))


def read_solver(solver: str, file: str = "", folder: Path | None = None) -> dict[int, Solver] | str:
    """Learned tables by their number of steps, or the name of a hand-made method. A file goes before the name."""
    path = _path(solver, file, folder)
    if path is not None:
        table = Solver.load(path)
        return {table.num_steps: table}
    name = Name.parse(OURS.get(solver, solver))
    return solver if name.handmade else {table.num_steps: table for table in published(name)}


def is_flow(model_sampling: Any) -> bool:
    """Whether ComfyUI treats the model as a flow: its model_sampling derives from CONST (SD3, FLUX, Wan)."""
    return any(kind.__name__ == "CONST" for kind in type(model_sampling).__mro__)


def make_sampler(
    solver: Mapping[int, Solver] | str,
    strict: bool = True,
    steps: int | None = None,
    cfg: Sequence[float] | None = None,
) -> Callable[..., Tensor]:
    """The function that ComfyUI's KSAMPLER calls: sample_dss, with the table that the sigmas belong to.

    steps: of the table that is taken where a part of a run's sigmas fits several, or none.
    cfg: of each step, instead of the guider's; at 1 the unconditional branch is left out.
    """

    def sample(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        family = "flow" if is_flow(model.inner_model.inner_model.model_sampling) else "vp"
        if isinstance(solver, str):
            chosen: Solver | str = OURS.get(solver, solver)
            family = "vp" if solver in HOSTS else family  # the host's own extrapolates in -log sigma
        else:
            tables = [_followed(table, model.inner_model.inner_model.model_sampling) for table in solver.values()]
            fitting = [table for table in tables if place_of(table, sigmas) is not None]
            wanted = len(sigmas) - 1 if steps is None else steps
            chosen = min(fitting or tables, key=lambda table: abs(table.num_steps - wanted))
        given: dict[str, Any] = {"solver": chosen, "family": family, "strict": strict}
        skips = isinstance(chosen, Solver) and chosen.guided_steps is not None
        if cfg is not None or skips:
            scale = cfg_of(model.inner_model) if cfg is None else list(cfg)
            given |= {"branches": Branches(model, extra_args or {}), "guidance_scale": scale}
        return sample_dss(model, x, sigmas, extra_args, callback, disable, **given)

    return sample


def cfg_of(guider: Any) -> float:
    """The scale of a CFGGuider. Raises ValueError for a guider of another kind."""
    cfg = getattr(guider, "cfg", None)
    if not isinstance(cfg, int | float) or not hasattr(guider, "predict_noise"):
        raise ValueError(
            f"{type(guider).__name__} is no CFGGuider: a solver that calls the unconditional branch at some steps "
            "only, and a cfg for each step, need one (the KSampler's, SamplerCustom's or the node of that name)"
        )
    return float(cfg)


class Branches:
    """What a CFGGuider's two branches return, as ``sample_dss`` asks for them.

    model: as a sampler gets it; its ``inner_model`` is the guider. Raises ValueError for what would change the guided
    result and is not seen here: other guidance functions, and a mask of what is to be kept.
    """

    def __init__(self, model: Any, extra_args: Mapping[str, Any]) -> None:
        self.model, self.guider = model, model.inner_model
        cfg_of(self.guider)
        options = extra_args.get("model_options") or {}
        for name in ("sampler_cfg_function", "sampler_post_cfg_function"):
            if options.get(name):
                raise ValueError(
                    f"the model is patched with a {name}, which this sampler would leave out: take the patch away, or "
                    "use a solver that calls both branches at all steps, without a cfg for each"
                )
        if extra_args.get("denoise_mask") is not None:
            raise ValueError(
                "a noise mask needs a solver that calls both branches at all steps, without a cfg for each"
            )

    def __call__(self, x: Tensor, sigma: Tensor, both: bool, **extra_args: Any) -> Tensor:
        seen: list[Tensor] = []

        def look(arguments: Mapping[str, Any]) -> Any:
            seen.extend((arguments["uncond_denoised"], arguments["cond_denoised"]))
            return arguments["denoised"]

        options = {**(extra_args.get("model_options") or {}), "sampler_post_cfg_function": [look]}
        before = self.guider.cfg
        try:
            # At 1 ComfyUI leaves the unconditional branch out; what it does to the result at 2 is not used.
            self.guider.cfg = 2.0 if both else 1.0
            self.model(x, sigma, **{**extra_args, "model_options": options})
        finally:
            self.guider.cfg = before
        return torch.cat(seen) if both else seen[1]


def make_sigmas(
    model_sampling: Any,
    solver: Mapping[int, Solver] | str,
    steps: int,
    denoise: float = 1.0,
    simple: Callable[[Any, str, int], Tensor] | None = None,
) -> Tensor:
    """(steps + 1,) float32, the sigmas of a solver for a model; (0,) at denoise 0.

    denoise: as everywhere in ComfyUI: below 1 the last ``steps`` of int(steps / denoise).
    simple: ComfyUI's calculate_sigmas, which serves hand-made methods with its ``simple`` scheduler.

    Raises ValueError when a learned solver's family or noise is not the model's, or when it has no table of so many
    steps.
    """
    if denoise <= 0:
        return torch.zeros(0)
    total = int(steps / denoise) if denoise < 1 else steps
    if isinstance(solver, str):
        if simple is None:
            raise ValueError(f"solver {solver!r} takes ComfyUI's own sigmas: give simple, its calculate_sigmas")
        return simple(model_sampling, "simple", total)[-(steps + 1) :]
    if total not in solver:
        there = ", ".join(map(str, sorted(solver)))
        raise ValueError(
            f"steps={steps} at denoise={denoise:g} are the last {steps} of {total}, and "
            f"{next(iter(solver.values())).label.split('/')[0]} exists for {there} steps in all; set steps to one of "
            "these times denoise"
        )
    table = solver[total]
    family = "flow" if is_flow(model_sampling) else "vp"
    if table.family != family:
        raise ValueError(f"{table.label} is for {table.family} models, this one is {family}")
    sigmas = sigmas_of(_followed(table, model_sampling))
    top = float(model_sampling.sigma_max)
    if family == "vp" and abs(top / float(sigmas[0]) - 1) > 0.1:
        # DiT's and PixArt's linear betas end at 157, Stable Diffusion's at 14.6; coefficients belong to one of them.
        raise ValueError(
            f"{table.label} was searched for noise up to {float(sigmas[0]):.4g}, this model's "
            f"goes to {top:.4g}; take a hand-made method, or search a solver for the model"
        )
    if steps < total and table.noise_coeffs is not None:
        raise ValueError(f"{table.label} weighs the initial noise and cannot start part-way; set denoise to 1")
    return sigmas[-(steps + 1) :].clone().to(torch.float32)


def numbers(text: str) -> list[float] | None:
    """The numbers in a text, as in ``5,5,1``; None for an empty one. Raises ValueError naming a word that is none."""
    try:
        return [float(word) for word in text.replace(",", " ").split()] or None
    except ValueError:
        raise ValueError(f"cfg={text!r}: write a number for each step, as in 5,5,5,1,1") from None


def _followed(table: Solver, model_sampling: Any) -> Solver:
    """A flow's table moved along with the model's shift; half the time is shift / (1 + shift) of the noise."""
    if table.family != "flow" or not is_flow(model_sampling) or not hasattr(model_sampling, "percent_to_sigma"):
        return table
    half = float(model_sampling.percent_to_sigma(0.5))
    own = getattr(table.schedule, "shift", 1.0)
    return table if abs(half - own / (1 + own)) < SAME_SHIFT else table.following(Flow(half / (1 - half)))


def fingerprint(solver: str, file: str = "", folder: Path | None = None) -> str:
    """The content of the file that a node's settings mean, as a hash; empty when they mean none.

    Raises ValueError for a name that leaves the folder, and for a file too large to be a solver's.
    """
    path = _path(solver, file, folder)
    if path is None or not path.is_file():  # to open a pipe would wait for ever; read_solver refuses it by name
        return ""
    with path.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MB; no solver's file is")
    return hashlib.sha256(content).hexdigest()


def _path(solver: str, file: str, folder: Path | None) -> Path | None:
    """The file that a node's settings mean: the one given, or else that of the solver's name in the folder, if any.

    Raises ValueError for a name that leaves the folder.
    """
    if file.strip():
        return Path(os.path.expanduser(file.strip()))
    if folder is None:
        return None
    path = Path(os.path.normpath(folder / f"{solver}.json"))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"solver={solver!r} is no name of a file in {folder}; give its path as file instead")
    return path if path.is_file() else None


def add_to_ksampler(samplers: Any, functions: Any, folder: Path | None = None) -> list[str]:
    """Puts ``dss_<solver>`` in the KSampler's lists, learned ones as schedulers too, and returns the names.

    samplers, functions: ComfyUI's modules comfy.samplers and comfy.k_diffusion.sampling. A file is read at each run.
    """
    names = []
    for solver in solver_names(folder):
        name = f"dss_{solver}"
        names.append(name)

        def sample(*args: Any, solver: str = solver, **kwargs: Any) -> Tensor:
            return make_sampler(read_solver(solver, folder=folder))(*args, **kwargs)

        def sigmas(model_sampling: Any, steps: int, solver: str = solver) -> Tensor:
            return make_sigmas(model_sampling, read_solver(solver, folder=folder), steps)

        setattr(functions, f"sample_{name}", sample)
        if name not in samplers.KSampler.SAMPLERS:
            samplers.KSampler.SAMPLERS.append(name)
        learned = _path(solver, "", folder) is not None or (solver not in METHODS and solver not in OURS)
        if learned:  # and has sigmas of its own; a file may be called like a method
            samplers.SCHEDULER_HANDLERS[name] = samplers.SchedulerHandler(sigmas)
            for offered in (samplers.SCHEDULER_NAMES, samplers.KSampler.SCHEDULERS):
                if name not in offered:
                    offered.append(name)
    return names


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the extension (V3 API)."""
    import comfy.samplers
    import folder_paths
    from comfy.k_diffusion import sampling
    from comfy_api.latest import ComfyExtension, io

    folder = Path(folder_paths.models_dir) / "dss_fast"
    add_to_ksampler(comfy.samplers, sampling, folder)

    nodes = _nodes(io, comfy.samplers, folder)

    class DSSExtension(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return nodes

    return DSSExtension()


def _nodes(io: Any, samplers: Any, folder: Path) -> list[Any]:
    """The nodes' classes, of ComfyUI's modules comfy_api.latest.io and comfy.samplers."""

    class Node(io.ComfyNode):
        @staticmethod
        def settings() -> list[Any]:
            """Asked for at every look at the schema, so that new files in the folder are offered."""
            tooltip = "dpmpp_2m is ComfyUI's own; on flow models dpmpp_2m_logsnr is the one of diffusers"
            return [
                io.Combo.Input("solver", options=solver_names(folder), tooltip=tooltip),
                io.Int.Input("steps", default=8, min=1, max=100),
                io.String.Input("file", default="", tooltip="a solver's JSON file, instead of the name above"),
            ]

        @classmethod
        def fingerprint_inputs(cls, solver: str, file: str = "", **_: Any) -> str:
            return fingerprint(solver, file, folder)

    class DSSSampler(Node):
        @classmethod
        def define_schema(cls) -> Any:
            about = "of each step, as in 5,5,5,1,1: at 1 one branch is run"
            scales = io.String.Input("cfg", default="", optional=True, tooltip=about)  # prompts of before have none
            return io.Schema(
                node_id="DSSSampler",
                display_name="DSS Sampler",
                category=CATEGORY,
                inputs=[*cls.settings(), io.Boolean.Input("strict", default=True), scales],
                outputs=[io.Sampler.Output()],
            )

        @classmethod
        def execute(cls, solver: str, steps: int, file: str = "", strict: bool = True, cfg: str = "") -> Any:
            made = make_sampler(read_solver(solver, file, folder), strict, steps, numbers(cfg))
            return io.NodeOutput(samplers.KSAMPLER(made))

    class DSSSigmas(Node):
        @classmethod
        def define_schema(cls) -> Any:
            denoise = io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01)
            return io.Schema(
                node_id="DSSSigmas",
                display_name="DSS Sigmas",
                category=CATEGORY,
                inputs=[io.Model.Input("model"), *cls.settings(), denoise],
                outputs=[io.Sigmas.Output()],
            )

        @classmethod
        def execute(cls, model: Any, solver: str, steps: int, file: str = "", denoise: float = 1.0) -> Any:
            tables, noise = read_solver(solver, file, folder), model.get_model_object("model_sampling")
            return io.NodeOutput(make_sigmas(noise, tables, steps, denoise, samplers.calculate_sigmas))

    return [DSSSampler, DSSSigmas]
