"""Target: what is sampled, searched and compared, in one description."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .files import shortened
from .modes import on_host
from .schedule import Schedule, check_schedule

Model = Callable[..., Any]


@dataclass(frozen=True, eq=False, repr=False)
class Target:
    """A model with all that is said about it once: ``sample``, ``search`` and ``compare`` take it.

        target = Target(model, (4, 32, 32), cond=draw_labels, uncond={"y": 1000}, guidance_scale=1.375)

    model: called as model(x, t, **cond) -> (B, *S), or an object with ``sample``, or a tuple that begins with it.
        x: (B, *S); t: (B,), in the schedule's units.
    shape: of one sample, without the batch. ``sample`` needs it only when it draws the noise itself.
    schedule: the model's. None: the solver's own in ``sample``, the paper's flow, ``Flow()``, elsewhere.
    cond: the model's keyword arguments, or ``draw(n, generator) -> dict`` of them for n samples (generator: a CPU
        ``torch.Generator``). uncond: what replaces them in the unconditional branch of guidance.
    guidance_scale: a number, or, for a search, a pair (low, high) from which each sample draws its own. At 1 the
        unconditional branch is not run.
    guided_channels: guide only the first channels, as DiT does with 3 of 4. None: all.
    noise: ``noise(n, generator) -> (n, *shape)``, the source of the flow; by default standard normal.
    decode: samples -> images in [0, 1], for pictures. features: samples -> (B, F), for a Frechet distance.
    classify: samples -> logits (B, L), labels: cond -> (B,): the share of samples read as what was asked.
    checkpointing: ``checkpointing(on)`` switches the model's recomputation of activations on and off, for a search that
        does not fit otherwise. None: the networks' own in diffusers and transformers.
    device: where samples live. None: the model's, or, for a callable without parameters, the noise's, or the CPU.
    dtype: of the states that are drawn here.
    key: names the model in run folders, instead of a hash of what it returns for a few samples.
    name: of the model; solvers searched for it are called ``name/N``.
    request: what the target was made of, JSON data; solvers searched on it carry it in their provenance.

    Raises ValueError naming what does not fit.
    """

    model: Model
    shape: tuple[int, ...] | None = None
    schedule: Schedule | None = None
    cond: Callable[[int, torch.Generator], Mapping[str, Any]] | Mapping[str, Any] | None = None
    uncond: Mapping[str, Any] | None = None
    guidance_scale: float | tuple[float, float] = 1.0
    guided_channels: int | None = None
    noise: Callable[[int, torch.Generator], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    features: Callable[[Tensor], Tensor] | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    labels: Callable[[Mapping[str, Any]], Tensor] | None = None
    checkpointing: Callable[[bool], object] | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    key: str | None = None
    name: str = "searched"
    request: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        set_ = partial(object.__setattr__, self)
        if not callable(self.model):
            raise ValueError(f"model={type(self.model).__name__}: give a callable, model(x, t, **cond) -> like x")
        if self.shape is not None:
            shape = tuple(self.shape) if isinstance(self.shape, Iterable) else ()
            if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
                raise ValueError(f"shape={self.shape!r}: give the sizes of one sample, as in (3, 32, 32)")
            set_("shape", shape)
        if self.schedule is not None:
            check_schedule(self.schedule)
        if self.noise is not None and not callable(self.noise):
            raise ValueError(f"noise={type(self.noise).__name__}: give a function noise(n, generator) -> (n, *shape)")
        if self.checkpointing is not None and not callable(self.checkpointing):
            raise ValueError(f"checkpointing={self.checkpointing!r}: give a function that takes True and False")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype={self.dtype}: must be floating point")
        if isinstance(self.guidance_scale, tuple | list):
            scale = tuple(map(float, self.guidance_scale))
            if len(scale) != 2 or not -math.inf < scale[0] <= scale[1] < math.inf:
                raise ValueError(f"guidance_scale={self.guidance_scale!r}: give a finite number, or low and high")
            set_("guidance_scale", scale)
        elif not isinstance(self.guidance_scale, int | float) or not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale!r}: give a number, or low and high")
        if self.guidance_scale != 1 and self.uncond is None:
            raise ValueError(f"guidance_scale={self.guidance_scale!r} needs uncond, the unconditional arguments")
        channels = self.guided_channels
        if channels is not None and (channels < 1 or (self.shape is not None and channels > self.shape[0])):
            raise ValueError(f"guided_channels={channels!r}: give a number from 1 to the channels of {self.shape}")

    def __repr__(self) -> str:
        """The fields that say something, each in a few words."""
        said = [f"{type(self.model).__name__ if isinstance(self.model, nn.Module) else _name_of(self.model)}"]
        for one in fields(self)[1:]:
            value = getattr(self, one.name)
            if value is not None and value != one.default:
                plain = isinstance(value, str | int | float | tuple | torch.dtype | torch.device)
                text = repr(value) if plain or one.name == "schedule" else _name_of(value)
                said.append(f"{one.name}={shortened(text, 80)}")
        return f"Target({', '.join(said)})"

    @classmethod
    def of(cls, target: Target | Model, **given: Any) -> Target:
        """The Target itself, or one around a bare callable, with the given fields that are not None put in.

        Raises ValueError for a field that a Target does not have.
        """
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"{name}={given[name]!r}: a Target has no such field; it has {', '.join(known)}")
        given = {name: value for name, value in given.items() if value is not None}
        if not isinstance(target, Target):
            return cls(target, **given)
        return replace(target, **given) if given else target

    def to(self, device: torch.device | str) -> Target:
        """The same with its modules on a device; as ``nn.Module.to``, it moves the modules themselves."""
        for part in (self.model, self.decode, self.features, self.classify):
            module = part if isinstance(part, nn.Module) else getattr(part, "__self__", None)
            if isinstance(module, nn.Module):
                module.to(device)
        return replace(self, device=device)

    @property
    def guided(self) -> bool:
        """Whether a call runs the unconditional branch too."""
        return self.uncond is not None and self.guidance_scale != 1

    @property
    def home(self) -> torch.device | None:
        """Where samples live: ``device``, or where the model runs: of one that is offloaded its hooks say so, else
        its parameters; None when nothing says."""
        if self.device is not None:
            return torch.device(self.device)
        if not isinstance(self.model, nn.Module):
            return None
        if (running := _execution_device(self.model)) is not None:
            return running
        tensor: Tensor | None = next(self.model.parameters(), None)
        tensor = next(self.model.buffers(), None) if tensor is None else tensor
        return None if tensor is None or tensor.is_meta else tensor.device

    @on_host()  # where the generator is
    def draw(self, count: int, generator: torch.Generator, rank: int = 0, world: int = 1) -> Samples:
        """``count`` samples to run, drawn on the CPU, the same anywhere; this process's rows of them.

        Raises ValueError without a shape, and when the noise drawn has another.
        """
        if self.shape is None:
            raise ValueError("the shape of one sample is not known: give it, as in Target(model, (4, 32, 32))")
        if self.noise is None:
            noise = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64)
        else:
            noise = self.noise(count, generator)
            if not isinstance(noise, Tensor) or not noise.is_floating_point():
                got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
                raise ValueError(f"noise({count}, generator) returned {got}; give a tensor of floats")
            if tuple(noise.shape) != (count, *self.shape):
                raise ValueError(f"noise({count}, generator) returned {tuple(noise.shape)}, not {(count, *self.shape)}")
            if not noise.is_meta and not bool(noise.isfinite().all()):
                raise ValueError(f"noise({count}, generator) returned NaN or Inf")
        cond = self.cond(count, generator) if callable(self.cond) else dict(self.cond or {})
        scale = None
        if isinstance(self.guidance_scale, tuple):
            low, high = self.guidance_scale
            scale = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        mine, device = slice(rank, None, world), self.home or torch.device("cpu")

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # A copy, because the user's function may return one buffer again and again.
            return (value[mine] if value.ndim and len(value) == count else value).to(device, copy=True)

        cond = {key: place(value) for key, value in cond.items()}
        return Samples(self, place(noise.to(self.dtype)), cond, None if scale is None else place(scale), count)


def _name_of(value: Any) -> str:
    """A function's name, a mapping's keys, a type."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, value))}}}"
    return getattr(value, "__name__", type(value).__name__)


def _execution_device(model: nn.Module) -> torch.device | None:
    """Where a module runs whose weights wait elsewhere: by accelerate's hooks (``enable_model_cpu_offload``,
    ``enable_sequential_cpu_offload``) or diffusers' (group offloading); None without such hooks."""
    for part in model.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
        registry = getattr(part, "_diffusers_hook", None)
        grouped = None if registry is None else registry.get_hook("group_offloading")
        if (device := getattr(getattr(grouped, "group", None), "onload_device", None)) is not None:
            return torch.device(device)
    return None


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a target to run: this process's rows of a batch that all processes share.

    noise: (B, *S). cond: the model's keyword arguments. scale: (B,) the guidance scale of each sample, None when all
    share the target's. size: rows over all processes.
    """

    target: Target
    noise: Tensor
    cond: dict[str, Any]
    scale: Tensor | None
    size: int

    def __len__(self) -> int:
        return len(self.noise)

    def rows(self, part: slice) -> Samples:
        """Some of these rows, as a batch of their own."""

        def own(value: Any) -> Any:
            return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == len(self) else value

        noise, cond = self.noise[part], {key: own(value) for key, value in self.cond.items()}
        return replace(self, noise=noise, cond=cond, scale=own(self.scale), size=len(noise))

    @property
    def schedule(self) -> Schedule:
        """The target's, which whoever draws batches has settled."""
        assert self.target.schedule is not None
        return self.target.schedule

    @property
    def guidance(self) -> float | Tensor:
        """The guidance scale as a step table takes it: a number, or (B, 1)."""
        if self.scale is not None:
            return self.scale[:, None]
        assert not isinstance(self.target.guidance_scale, tuple)
        return self.target.guidance_scale

    def denoiser(self, check_finite: bool | None = True) -> Denoiser:
        """The model with these conditions: (x, t) -> output, checked for NaN and Inf as :class:`Denoiser` says."""
        target = self.target
        return Denoiser(
            target.model,
            self.cond,
            target.uncond if target.guided else None,
            guided_channels=target.guided_channels,
            check_finite=check_finite,
        )

    def predictor(self, check_finite: bool | None = True) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, u) -> y = p x + q m, what a history stores, guided, in x's dtype. x: (B, *S); u: () float64."""
        denoise, schedule, scale = self.denoiser(check_finite), self.schedule, self.guidance
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, *[1] * (self.noise.ndim - 1)).to(self.noise.dtype)

        def predict(x: Tensor, u: Tensor) -> Tensor:
            u = u.detach().reshape(1).cpu()
            real = torch.promote_types(x.dtype, torch.float32)
            time = schedule.time(u).to(x.device, real, non_blocking=True)  # the host goes on without waiting
            output = denoise(x, time.expand(len(x))).to(x.dtype)
            if self.target.guided:
                uncond, cond = output.chunk(2)
                output = uncond + scale * (cond - uncond)
            p, q = schedule.prediction(u)
            return float(q) * output if float(p) == 0 else float(p) * x + float(q) * output

        return predict
