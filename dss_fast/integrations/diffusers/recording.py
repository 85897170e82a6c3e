"""Running a pipeline of diffusers with a scheduler and hooks that take notes of what its network was asked and said."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .kinds import config_of
from .request import call_of, is_modular
from .scheduler import DSSScheduler

ASKED = 8  # the steps that a recorded run is asked for: some guiders begin or end at a part of them
LOGGER = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
_alone = threading.RLock()  # pipelines share networks, and offloading moves these


@dataclass
class Call:
    """One call of the network: its arguments by name, and what it returned."""

    module: nn.Module
    arguments: dict[str, Any]
    output: Tensor


@dataclass
class Step:
    """One step of the scheduler: the calls before it, and what the pipeline gave it."""

    calls: list[Call]
    t: float
    sample: Tensor
    output: Tensor


@dataclass
class Notes:
    """One run: its steps, the number of prompts, the resolution's shift, and the times that the pipeline passed."""

    prompts: int
    wanted: int
    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    mu: float | None = None
    passed: dict[str, list[float]] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        """The network that the first step called first."""
        return self.steps[0].calls[0].module


class Enough(Exception):
    """Breaks a run off when all that was wanted is written down."""


class NoteTaker(DSSScheduler):
    """An Euler scheduler that writes down each step, times and outputs in the schedule's own convention."""

    _notes: Notes
    _copied = False
    _stands_for: type | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Pipelines that pass mu to FlowMatchEuler alone ask isinstance, and are watched as they run with it."""
        return self._stands_for or NoteTaker

    def __deepcopy__(self, memo: dict[int, Any]) -> NoteTaker:
        twin = copy.copy(self)
        twin.__dict__ = {
            key: value if key == "_notes" else copy.deepcopy(value, memo) for key, value in vars(self).items()
        }
        twin._copied = True
        return twin

    @wraps(DSSScheduler.set_timesteps)  # pipelines read its signature
    def set_timesteps(self, *arguments: Any, **options: Any) -> None:  # type: ignore[override]
        super().set_timesteps(*arguments, **options)
        self._notes.mu = options.get("mu")
        given = {key: options.get(key) for key in ("sigmas", "timesteps")}
        self._notes.passed = {key: [float(v) for v in values] for key, values in given.items() if values is not None}

    @wraps(DSSScheduler.step)
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        if self._copied:
            raise ValueError(
                "the pipeline steps with copies of its scheduler, for states of their own (sound beside the images, or "
                "each frame at its own time): what its network sees is no one state, and a search knows but one"
            )
        calls, self._notes.calls = self._notes.calls, []
        t = float(self.timesteps[self._locate(timestep)])
        mean = model_output[:, : sample.shape[1]]  # without the variances that DeepFloyd's pipelines hand on
        output = self._towards_noise(mean.clone(), options.get("per_token_timesteps"))
        if self._upwards:
            t = self.config["num_train_timesteps"] - t
        self._notes.steps.append(Step(calls, t, sample.clone(), output))
        if len(self._notes.steps) == self._notes.wanted:
            raise Enough
        return super().step(model_output, timestep, sample, *rest, **options)


def record(
    pipe: Any,
    chunk: Mapping[str, Any],
    steps: int | None,
    generator: torch.Generator | None,
    arguments: Mapping[str, Any],
) -> Notes:
    """The first steps of a run of a pipeline, written down. A twin runs them: nothing is set in the pipeline itself,
    which other threads may use, and nothing has to be put back when a run breaks off.

    steps: of those that the pipeline is asked for, ``ASKED`` unless the arguments say num_inference_steps, as some
        grids (a terminal shift, a line and a parabola) need two or three; None: all of them.
    """
    asked = int(arguments.get("num_inference_steps") or ASKED)
    first = next(iter(chunk.values()))
    notes = Notes(first if isinstance(first, int) else len(first), steps or asked)  # a number: of an unconditional one
    taker = NoteTaker.from_config(config_of(pipe.scheduler), solver="euler", clip_sample=False)
    taker._notes = notes
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        taker._stands_for = FlowMatchEulerDiscreteScheduler
    if "num_images_per_prompt" in arguments or "num_videos_per_prompt" in arguments:
        raise ValueError("leave out num_images_per_prompt: every search sample draws its own prompt and noise")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    options = {"output_type": "latent", "num_inference_steps": asked, "generator": generator, **arguments}
    accepted = call_of(pipe)
    own = _twin(pipe)
    own.scheduler = taker
    own.set_progress_bar_config(disable=True)
    with _alone, ExitStack() as stack:
        LOGGER.addFilter(_unless_enough)
        stack.callback(LOGGER.removeFilter, _unless_enough)
        if hasattr(pipe, "maybe_free_model_hooks"):  # which a modular one leaves to its manager of components
            stack.callback(pipe.maybe_free_model_hooks)
        networks = [m for name, m in pipe.components.items() if name.startswith(("transformer", "unet")) and m]
        stack.enter_context(evaluating(networks))
        for network in networks:
            network = getattr(network, "_orig_mod", network)
            stack.callback(network.register_forward_hook(_noting(notes), with_kwargs=True).remove)
        try:
            own(**{k: v for k, v in options.items() if k in accepted or k in arguments}, **chunk)
        except Enough:
            return notes
    raise ValueError(f"the pipeline took {len(notes.steps)} steps where {asked} were asked for")


@contextmanager
def evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """In eval mode for a while: a DiT built by hand is in train mode, where it drops labels at random."""
    training = [part for network in networks for part in network.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _twin(pipe: Any) -> Any:
    """A pipeline of the same components, whose own attributes can be set while others run ``pipe``."""
    twin = copy.copy(pipe)
    for name, value in vars(pipe).items():
        if isinstance(value, MethodType) and value.__self__ is pipe:  # a method that the user has put in place
            vars(twin)[name] = MethodType(value.__func__, twin)
    if is_modular(pipe):  # whose progress bar is its blocks', and whose guider counts the steps
        twin._blocks = pipe.blocks
        _quiet(twin._blocks)
        if getattr(pipe, "guider", None) is not None:
            twin.guider = copy.deepcopy(pipe.guider)
    return twin


def _quiet(blocks: Any) -> None:
    """No bars, of blocks inside blocks either."""
    for block in (blocks.sub_blocks or {}).values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _quiet(block)


def _unless_enough(said: logging.LogRecord) -> bool:
    """Blocks log what ends them as an error, and that a recorded run ends is none."""
    return not isinstance(sys.exception(), Enough)


def _noting(notes: Notes) -> Callable[..., None]:
    thread = threading.get_ident()

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # another run of the same network
            return
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        notes.calls.append(Call(module, dict(arguments), tensor_of(output).clone()))

    return hook


def tensor_of(output: Any) -> Tensor:
    """The tensor a network of diffusers returned: alone, in a tuple, in an output object, or a list with one a row."""
    output = getattr(output, "sample", output)
    output = output[0] if isinstance(output, tuple) else output
    return torch.stack(output) if isinstance(output, list) else output
