"""A guider for modular pipelines: the unconditional branch at the steps that a solver says, forecast at the others.

    guider = DSSGuidance(solver.to_dict(), guidance_scale=5.0)
    blocks.update_components(guider=guider, scheduler=DSSScheduler.from_config(config, solver=scheduler_solver(solver)))

A scheduler sees one output a step, so the second triangle V of the solver is folded into it. With c the first triangle,
the rows of M = c^-1 V make of the differences d_j what, weighed by c, is the differences weighed by V:

    output_i = m_cond_i + (guidance_scale - 1) sum_{j<=i} M_ij (q_j / q_i) d_j          d = m_cond - m_uncond
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from ...solver import Solver

LARGEST = 1e3  # of M: beyond it the fold loses more digits than a half-precision output has


def scheduler_solver(solver: Solver) -> Solver:
    """The solver as its scheduler runs it beside a :class:`DSSGuidance`, which sees to the second triangle."""
    return replace(solver, guided_steps=None, guidance_coeffs=None)


def folded(solver: Solver) -> Tensor:
    """M = c^-1 V times q_j / q_i, (N, N) float64. Raises ValueError where c cannot be solved for it."""
    numbers, u = solver.tensors(), torch.tensor(solver.timesteps[:-1], dtype=torch.float64)
    coeffs, shares = numbers.coeffs, numbers.guidance_coeffs
    if shares is None:
        raise ValueError(f"{solver.label} calls both branches at all steps: use ClassifierFreeGuidance")
    _, q = solver.schedule.prediction(u)
    rows: Tensor = torch.linalg.solve_triangular(coeffs, shares, upper=False) * (q[None, :] / q[:, None])
    if not float(rows.abs().max()) <= LARGEST:
        raise ValueError(f"{solver.label} hardly weighs the newest prediction of a step, so no guider can stand for it")
    return rows


class DSSGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance at ``solver.guided_steps``; ``num_conditions`` is 1 at the others.

    solver: one with ``guided_steps``, or what its ``to_dict`` returns. Its schedule must have the prediction type of
    the pipeline. guidance_scale: one for the run. Not for a run that starts part-way.

    Raises ValueError for another number of steps than the solver's.
    """

    @register_to_config
    def __init__(self, solver: Mapping[str, Any] | Solver, guidance_scale: float = 7.5, enabled: bool = True) -> None:
        table = solver if isinstance(solver, Solver) else Solver.from_dict(solver)
        super().__init__(guidance_scale=guidance_scale, enabled=enabled)
        self.register_to_config(solver=table.to_dict(), guidance_scale=guidance_scale, enabled=enabled)
        self.solver, self._rows = table, folded(table)
        self._differences: dict[int, Tensor] = {}

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Where the run is, which says how many branches are called."""
        if num_inference_steps != self.solver.num_steps:
            raise ValueError(f"{self.solver.label} has {self.solver.num_steps} steps, the run {num_inference_steps}")
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._differences = {}

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The output that the scheduler takes; the differences that are known are kept until the next run."""
        pred, step = pred_cond, self._step
        if pred_uncond is not None:
            self._differences[step] = pred_cond - pred_uncond
        if self._enabled and not math.isclose(self.guidance_scale, 1.0):
            row = (self.guidance_scale - 1) * self._rows[step]
            missing = [j for j in self.solver.guided_steps or () if j <= step and j not in self._differences]
            if missing:
                raise ValueError(f"the run has left out step {missing[0]}, whose difference step {step} needs")
            pred = pred_cond.to(torch.promote_types(pred_cond.dtype, torch.float32))
            for j, difference in self._differences.items():
                pred = pred + float(row[j]) * difference
            pred = pred.to(pred_cond.dtype)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _is_cfg_enabled(self) -> bool:
        guided = self._step is None or self._step in (self.solver.guided_steps or ())
        return guided and super()._is_cfg_enabled()


class GuidanceOff(PipelineCallback):
    """Turns guidance off after so many steps of a classic pipeline, which then runs one branch alone.

        pipe(..., callback_on_step_end=GuidanceOff(pipe, after=5))

    With a solver that calls both branches at all steps. Tensors of both branches are cut to the conditional one, for
    batches of any size. Raises ValueError for a pipeline that settles its guidance before the first step.
    """

    def __init__(self, pipeline: Any, after: int) -> None:
        super().__init__(cutoff_step_ratio=None, cutoff_step_index=after)
        whole = isinstance(getattr(type(pipeline), "do_classifier_free_guidance", None), property)
        self._names = list(getattr(pipeline, "_callback_tensor_inputs", ()))
        if not whole or "latents" not in self._names:
            raise ValueError(f"{type(pipeline).__name__} settles its guidance once: it cannot be turned off at a step")
        if after < 1:
            raise ValueError(f"after={after!r}: give a number of steps from 1; without guidance set its scale to 1")

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline hands over after each step."""
        return self._names

    def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Any) -> dict[str, Any]:
        """Called by the pipeline."""
        if step_index + 1 != self.config.cutoff_step_index:
            return {}
        pipeline._guidance_scale = 1.0  # where the property reads it from, until the next call of the pipeline
        if pipeline.do_classifier_free_guidance:
            raise ValueError(f"{type(pipeline).__name__} does not take its guidance from _guidance_scale")
        rows = 2 * len(callback_kwargs["latents"])
        tensors = {k: v for k, v in callback_kwargs.items() if isinstance(v, Tensor) and k != "latents"}
        return {name: tensor.chunk(2)[1] for name, tensor in tensors.items() if tensor.ndim and len(tensor) == rows}
