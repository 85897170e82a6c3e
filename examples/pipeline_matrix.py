"""Pipelines of diffusers x what DSSScheduler and from_pipeline do in them, as a table for docs/integrations.md.

python -m examples.pipeline_matrix                       # all, ten minutes; with sentencepiece (Kolors) and torchsde
python -m examples.pipeline_matrix flux sdxl             # some
python -m examples.pipeline_matrix --write docs/integrations.md

Every cell compares final latents, the largest difference over the largest value, on random networks of a few kilobytes.
`euler` stands beside FlowMatchEuler, DDIM or EulerDiscrete, whichever is the model's, or UniPC of order 1, and
`dpmpp_2m` beside DPMSolverMultistep, both as their own from_config makes them of the pipeline's config. Many flow
pipelines pass sigmas, which stock DPM++ refuses: it is given a set_timesteps that takes and ignores them, and the signs
of Mochi and LTXCondition.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from dss_fast import GaussNewton, handmade, sample, search
from dss_fast.integrations.diffusers import DSSScheduler, from_pipeline
from dss_fast.integrations.diffusers.config import adopt, alphas_cumprod, model_schedule
from dss_fast.integrations.diffusers.grids import stock_class

from .tiny_pipelines import ALL, build

STEPS = 5
BOUND = 1e-5
BEGIN, END = "<!-- pipelines -->", "<!-- end of pipelines -->"
COLUMNS = ("euler = stock", "dpmpp_2m = stock", "learned table", "from_pipeline", "search", "save and load")
SMALL = GaussNewton(samples=8, batch_size=4, held_out_samples=4, teacher_evaluations=16, rounds=1)


class PlainDPM(diffusers.DPMSolverMultistepScheduler):
    """Stock DPM++ that takes the times and signs of flow pipelines, and keeps to its own grid."""

    upwards = False

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        given = next((v for v in (sigmas, timesteps) if v is not None), ())
        super().set_timesteps(num_inference_steps or len(given), device)
        if self.upwards:
            self.own, self.timesteps = self.timesteps, 1000 - self.timesteps

    def scale_noise(self, sample, timestep, noise):
        return self.add_noise(sample, noise, timestep)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True, per_token_timesteps=None):
        if self.upwards:
            timestep = 1000 - timestep
        if self.upwards or per_token_timesteps is not None:
            model_output = -model_output
        if self.upwards:
            self.timesteps, shown = self.own, self.timesteps
        result = super().step(model_output, timestep, sample, generator, return_dict=return_dict)
        if self.upwards:
            self.timesteps = shown
        return result


def run(pipe: Any, arguments: dict[str, Any], scheduler: Any = None, **options: Any) -> Tensor:
    """The final latents, or the images of a pipeline that gives no latents."""
    if scheduler is not None:
        pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    result = pipe(**{**arguments, **options}, num_inference_steps=STEPS, generator=generator)[0]
    return torch.as_tensor(result).float()


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        raise AssertionError(f"{tuple(ours.shape)} beside {tuple(theirs.shape)}, or not finite")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def stock_euler(config: Any) -> Any:
    """On the grid of a multistep class (SANA-Video's, SkyReels') that class at order 1, which is Euler's step."""
    kind = getattr(diffusers, stock_class("euler", adopt(config)))
    alone = {"solver_order": 1, "disable_corrector": list(range(STEPS))} if "Multistep" in kind.__name__ else {}
    return kind.from_config({**config, "variance_type": "fixed_small"}, **alone)  # DDIM takes no variances of a network


def dpm_settings(config: Any) -> dict[str, Any]:
    """What a user tells stock DPM++ to run a flow, or the noise that it cannot read off CogVideoX's config."""
    if adopt(config)["family"] == "flow":
        told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config.get("shift") or 1.0}
        return {**told, "use_dynamic_shifting": False, "use_beta_sigmas": False}
    return {}


def stock_dpm(config: Any) -> Any:
    told = dpm_settings(config)
    if config.get("snr_shift_scale") is not None:
        alpha_bar = alphas_cumprod(adopt(config))
        told["trained_betas"] = (1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])).tolist()
    made = PlainDPM.from_config(config, **told)
    made.upwards = bool(config.get("invert_sigmas"))
    return made


class Row:
    """One pipeline's cells; each method returns a difference, and raises ValueError where the package refuses."""

    def __init__(self, name: str):
        self.pipe, self.arguments = build(name, batch=1 if name.endswith(("inpaint", "img2img")) else 3)
        # as of a pipeline that was loaded, which names its scheduler's class
        self.config = {**self.pipe.scheduler.config, "_class_name": type(self.pipe.scheduler).__name__}
        self.pipe.scheduler = type(self.pipe.scheduler).from_config(self.config)

    def ours(self, solver: Any, **told: Any) -> DSSScheduler:
        return DSSScheduler.from_config(self.config, solver=solver, **told)

    def table(self, schedule: Any = None) -> Any:
        """A table as a search makes it: of the model's own schedule, and no longer a method."""
        made = handmade("ab2", STEPS, schedule or model_schedule(adopt(self.config)))
        return replace(made, name=f"searched/{STEPS}", source="searched")

    def euler(self) -> float:
        ours = self.ours("euler")
        return difference(
            run(self.pipe, self.arguments, ours), run(self.pipe, self.arguments, stock_euler(self.config))
        )

    def dpmpp(self) -> float:
        stock, ours = stock_dpm(self.config), self.ours("dpmpp_2m", **dpm_settings(self.config))
        return difference(run(self.pipe, self.arguments, ours), run(self.pipe, self.arguments, stock))

    def learned(self) -> float:
        """Twice the same, with whatever times the pipeline passes unasked."""
        scheduler = self.ours(self.table())
        first = run(self.pipe, self.arguments, scheduler)
        return difference(run(self.pipe, self.arguments), first)

    def target(self) -> Any:
        self.pipe.scheduler = type(self.pipe.scheduler).from_config(self.config)
        rows = {
            k: v for k, v in self.arguments.items() if isinstance(v, list | Tensor) and k not in ("image", "mask_image")
        }
        rest = {k: v for k, v in self.arguments.items() if k not in rows and k != "output_type"}
        return from_pipeline(self.pipe, rows, **rest)

    def from_pipeline(self) -> float:
        """``sample`` on the target beside the pipeline itself, the same table and noise."""
        target = self.target()
        table = self.table(target.schedule)
        scheduler, states = self.ours(table), []
        step = scheduler.step

        def noting(output: Tensor, t: Tensor, x: Tensor, *args: Any, **told: Any) -> Any:
            result = step(output, t, x, *args, **told)
            states.extend([x, result[0] if isinstance(result, tuple) else result.prev_sample])
            return result

        scheduler.step = noting
        run(self.pipe, self.arguments, scheduler)
        rows = slice(3)  # DiT steps its batch twice over
        return difference(sample(target, states[0][rows], table, cond=target.cond.conditions), states[-1][rows])

    def search(self) -> float:
        """A small search on the target; its table runs in the pipeline."""
        result = search(self.target(), STEPS, method=SMALL, progress=False)
        self.pipe.scheduler = self.ours(result.solver)
        first = run(self.pipe, self.arguments)
        return difference(run(self.pipe, self.arguments), first)

    def save_and_load(self) -> float:
        before = run(self.pipe, self.arguments, self.ours(self.table()))
        with tempfile.TemporaryDirectory() as folder:
            self.pipe.save_pretrained(folder)
            absent = {key: None for key, value in self.pipe.components.items() if value is None}
            loaded = type(self.pipe).from_pretrained(folder, **absent)
        loaded.set_progress_bar_config(disable=True)
        if "controlnet" in self.pipe.components:
            loaded.vae_scale_factor = self.pipe.vae_scale_factor  # set by hand
        return difference(run(loaded, self.arguments), before)

    def cells(self) -> list[str]:
        return [
            cell(part)
            for part in (self.euler, self.dpmpp, self.learned, self.from_pipeline, self.search, self.save_and_load)
        ]


def cell(part: Callable[[], float]) -> str:
    try:
        off = part()
    except ValueError as error:
        return f"refused: {str(error).split(';')[0].split('. ')[0]}"
    except Exception as error:  # noqa: BLE001  the table says so
        return f"**failed**: {type(error).__name__}: {str(error)[:200]}"
    return f"equal, {off:.0e}" if off <= BOUND else f"**differs**, {off:.1e}"


def table(names: list[str], report: Callable[[str], None] = print) -> str:
    lines = ["| pipeline | " + " | ".join(COLUMNS) + " |", "| --- " * (1 + len(COLUMNS)) + "|"]
    for name in names:
        try:
            row = Row(name)
        except Exception as error:  # noqa: BLE001
            cells = [f"open: {str(error).strip().splitlines()[0]}"] * len(COLUMNS)
            kind = name
        else:
            cells, kind = row.cells(), type(row.pipe).__name__
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        report(lines[-1])
    return numbered(lines)


def numbered(lines: list[str]) -> str:
    """The table with each reason below it, once, and its number in its place: so it fits a page."""
    reasons: list[str] = []
    found = []
    for line in lines:
        kind, *cells = line.strip("| ").split(" | ")
        for k, cell in enumerate(cells):
            word, colon, reason = cell.partition(": ")
            if colon and word in ("refused", "open"):
                reason = reason.removeprefix(kind).strip()
                reasons += [reason] if reason not in reasons else []
                cells[k] = f"{word} ({reasons.index(reason) + 1})"
        found.append(f"| {' | '.join([kind, *cells])} |")
    return "\n".join([*found, "", *(f"{k}. {reason}" for k, reason in enumerate(reasons, 1))]).strip()


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(ALL))
    parser.add_argument("--write", type=Path, help=f"a page with the lines {BEGIN} and {END}")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity(100)
    made = table(options.names or list(ALL))
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return made


if __name__ == "__main__":
    main()
