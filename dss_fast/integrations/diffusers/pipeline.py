"""from_pipeline: a diffusers pipeline as a search target.

The pipeline is run for a few steps under a scheduler that takes notes: what its network was called with, and what it
made of the outputs. From the notes follow the model, its conditions and the guidance; nothing here knows any pipeline
by name. What was found is then checked against what the pipeline did, so that an arrangement this module does not
understand (guidance that is not linear, image latents beside the noisy ones) is refused and not searched wrongly.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...target import Target
from .config import adopt, model_schedule
from .kinds import check_task, config_of
from .recording import Notes, Step, evaluating, record, tensor_of
from .request import call_of, is_modular, request_of, scales_of
from .unasked import unasked

TIMES = ("timestep", "timesteps", "t")
PICTURES = ("image", "images", "video")
PART_WAY = (
    "Img2Img",
    "Inpaint",
    "Image2Image",
    "VideoToVideo",
    "ControlNet",
    "Control",
    "InstructPix2Pix",
    "Upscale",
    "Edit",
)


def from_pipeline(
    pipe: Any,
    prompts: str | Sequence[str] | Mapping[str, Any] | None = None,
    *,
    batch_size: int = 4,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> Target:
    """The network of a pipeline as ``search``, ``sample`` and ``compare`` take it.

        target = from_pipeline(pipe, prompts, guidance_scale=3.5, height=1024, width=1024)
        solver = search(target, num_steps=8).solver

    pipe: a text-to-image or text-to-video pipeline of diffusers, one by class or an unconditional one, with a
        transformer or a UNet; or a modular pipeline of such blocks, whose guider is read as it is set.
    prompts: n prompts, of which each search sample draws one; or arguments of the pipeline's call with n rows
        each, tensors or lists (``{"prompt_embeds": ..., "pooled_prompt_embeds": ...}``, ``{"class_labels": [...]}``);
        an entry with one row serves all. None: of an unconditional pipeline (DDPM, DDIM), which has none.
    batch_size: prompts encoded at a time; each costs one network call.
    arguments: everything else the pipeline's call takes: guidance_scale, true_cfg_scale, negative_prompt, height, ...
        num_inference_steps: how many steps are watched, 8 by default; give the run's own where something begins late.

    Returns a Target with model, a module called as model(x, t, **cond) on the pipeline's own latents (packed, 5-D or
    doubled as they are); shape; schedule, under the pipeline's shift (e^mu of this resolution where it is dynamic);
    cond, which draws rows; uncond and guidance_scale, whether the pipeline doubles its batch, halves it as DiT does,
    or calls twice; request, what was asked for; and decode for image latents of a KL autoencoder. Freezes the
    network's parameters, and changes nothing else of the pipeline, which other threads may use meanwhile; a call that
    raises changes nothing at all.

    Raises ValueError when the network's calls or its guidance are not understood, saying what was seen.
    """
    rows = _rows(pipe, prompts)
    _check_kind(pipe, {**rows, **arguments})
    count = len(next(iter(rows.values()))) if rows else 1
    first = [_take(rows, [0]), _take(rows, [0, 1 % count])]
    one, two = (record(pipe, chunk, None, generator, arguments) for chunk in first)
    layout = _Layout.read(one, two, _scales(pipe, arguments), _switches(pipe))

    chunks = [list(range(k, min(k + batch_size, count))) for k in range(0, count, batch_size)]
    steps = (record(pipe, _take(rows, chosen), 1, generator, arguments).steps[0] for chosen in chunks)
    conditions, null = layout.joined(steps, [len(chosen) for chosen in chunks])
    model = PipelineModel(one.module, layout)
    _check(two, layout, model)
    shape = tuple(one.steps[0].sample.shape[1:])
    target = Target(
        model,
        shape,
        model_schedule(adopt(config_of(pipe.scheduler)), one.mu),
        cond=_Prompts(conditions),
        uncond=null if layout.guided else None,
        guidance_scale=layout.scale,
        decode=_decoder(pipe, shape, arguments),
        request=request_of(pipe, arguments, shape, count if rows else 0, _passed(pipe, one, arguments)),
    )
    model.requires_grad_(False)  # last: a call that raises changes nothing
    return target


class PipelineModel(nn.Module):
    """A pipeline's network as a solver calls it: (x (B, *S), t (B,) in the scheduler's units, **cond) -> (B, *S).

    What the pipeline passes unchanged (image ids, guidance embeddings of one row, flags) is kept here, its tensors as
    buffers, so that they go where the module goes.
    """

    def __init__(self, network: nn.Module, layout: _Layout) -> None:
        super().__init__()
        self.network = network
        self._layout = layout
        self._fixed = [key for key, value in layout.fixed.items() if isinstance(value, Tensor)]
        for i, key in enumerate(self._fixed):
            self.register_buffer(f"fixed_{i}", layout.fixed[key])

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The network's output (B, *S) in the schedule's sign, for x (B, *S) at t (B,)."""
        layout = self._layout
        tensors = {key: getattr(self, f"fixed_{i}") for i, key in enumerate(self._fixed)}
        arguments = layout.arguments({**tensors, **cond}, len(x))
        arguments[layout.x_key] = layout.as_given(layout.x_key, x.to(layout.dtype).reshape(len(x), *layout.x_shape))
        t = (layout.time_scale * t + layout.time_shift).to(layout.time_dtype)
        arguments[layout.t_key] = t.reshape(-1, *[1] * (layout.time_ndim - 1))
        output = tensor_of(self.network(**arguments))
        return layout.sign * layout.mean(output, x.shape[1:])


# ---- reading them


@dataclass
class _Layout:
    """How a pipeline calls its network and what it makes of the outputs."""

    x_key: str
    t_key: str
    dtype: torch.dtype
    time_scale: float
    time_shift: float
    time_dtype: torch.dtype
    calls: int  # a step
    halves: int  # branches in one call: 2 for a doubled batch
    doubled_state: bool  # the pipeline steps both halves of its batch, as DiT's does
    fixed: dict[str, Any]  # arguments that do not depend on the prompt
    repeated: dict[str, Any]  # lists with the same entry for every row
    per_row: dict[str, int]  # how many rows of the argument a prompt has: as many as frames, in AnimateDiff
    lists: tuple[str, ...]  # per row, and given as a list of tensors, as Z-Image does
    x_shape: tuple[int, ...]  # of one row, where it has an axis of length 1 more than the latents
    time_ndim: int
    cond: int = 0
    sign: float = 1.0
    scale: float = 1.0

    @property
    def guided(self) -> bool:
        return self.calls * self.halves == 2

    @classmethod
    def read(cls, one: Notes, two: Notes, scales: Sequence[float] = (), switches: Sequence[str] = ()) -> _Layout:
        step, calls = one.steps[0], one.steps[0].calls
        if len({id(c.module) for s in one.steps for c in s.calls}) != 1:
            raise ValueError("the pipeline runs more than one network; search each on its own, this one cannot")
        if not 1 <= len(calls) <= 2 or any(len(s.calls) != len(calls) for s in one.steps):
            seen = [len(s.calls) for s in one.steps]
            raise ValueError(
                f"the pipeline called its network {seen} times in its {len(seen)} steps; 1 or 2 are understood, the "
                "same at every step (a guider that begins late or ends early is to be switched on throughout)"
            )
        names = list(inspect.signature(calls[0].module.forward).parameters)
        x_key, t_key = names[0], next((n for n in TIMES if n in names), "")
        x, t = _stacked(calls[0].arguments[x_key]), calls[0].arguments.get(t_key)
        if not isinstance(t, Tensor) or not isinstance(x, Tensor) or (t.ndim > 1 and t.numel() != len(x)):
            shape = tuple(t.shape) if isinstance(t, Tensor) else t
            raise ValueError(f"the network's time is {shape}; one number per sample is understood")
        halves, doubled = len(x) // len(step.sample), False
        if len(step.sample) == 2 * one.prompts:
            halves, doubled = 2, True
        bare = [[n for n in size[1:] if n != 1] for size in (x.shape, step.sample.shape)]
        if bare[0] != bare[1] or len(x) != halves * one.prompts:
            raise ValueError(
                f"the network gets {tuple(x.shape)} where the scheduler steps {tuple(step.sample.shape)}: the pipeline "
                "adds something to the latents, which a solver of latents alone cannot"
            )
        _check_constant(one, (x_key, t_key))
        scale, shift = _time_map(one, t_key)
        flat = [[_flatten(c.arguments, (x_key, t_key)) for c in notes.steps[0].calls] for notes in (one, two)]
        fixed, repeated, per_row, lists = {}, {}, {}, [x_key] if isinstance(calls[0].arguments[x_key], list) else []
        for key in flat[0][0]:
            kinds = {_kind(key, a[key], b[key]) for a, b in zip(*flat, strict=True)}
            value = flat[0][0][key]
            if "row" in kinds:
                per_row[key] = max(1, len(value) // halves)
                lists += [key] if isinstance(value, list) else []
            elif "repeat" in kinds:
                repeated[key] = value[:1]
            else:
                fixed[key] = value
        layout = cls(
            x_key, t_key, x.dtype, scale, shift, t.dtype if t.is_floating_point() else torch.float32,
            len(calls), halves, doubled, fixed, repeated, per_row, tuple(lists), tuple(x.shape[1:]), t.ndim,
        )  # fmt: skip
        layout._read_guidance(one, scales, switches)
        return layout

    def branches(self, step: Step, prompts: int) -> list[Tensor]:
        """The network's outputs, one (B, *S) a branch, in the order the pipeline made them."""
        size = step.sample.shape[1:]
        return [half for c in step.calls for half in self.mean(c.output, size).split(prompts)]

    def mean(self, output: Tensor, size: torch.Size) -> Tensor:
        """An output in the latents' shape, without the variances that DiT and PixArt also predict."""
        if output.shape[1] == 2 * size[0] and self.x_shape[0] == size[0]:
            output = output[:, : size[0]]
        return output.reshape(len(output), *size)

    def as_given(self, key: str, value: Tensor) -> Any:
        """A tensor as the pipeline passes it: itself, or a list with one a row."""
        return list(value) if key in self.lists else value

    def _read_guidance(self, notes: Notes, scales: Sequence[float], switches: Sequence[str]) -> None:
        """Least squares of the pipeline's combined output over the branches: sign * (m_u + g (m_c - m_u))."""
        n = notes.prompts
        columns = [
            torch.cat([self.branches(s, n)[k].double().flatten() for s in notes.steps])
            for k in range(self.calls * self.halves)
        ]
        wanted = torch.cat([s.output[:n].double().flatten() for s in notes.steps])
        if len(columns) == 2 and torch.allclose(columns[0], columns[1], rtol=1e-4, atol=1e-6):
            raise ValueError("the network gives the same output in both branches of the guidance: is it initialised?")
        matrix = torch.stack(columns, 1)
        weights = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
        error = (matrix @ weights - wanted).norm() / wanted.norm()
        total = float(weights.sum())
        if error > self.tolerance or abs(abs(total) - 1) > self.tolerance:
            raise ValueError(
                f"the pipeline's output is not a linear guidance of its network's ({error:.1e} off, weights "
                f"{[round(float(w), 4) for w in weights]}): it rescales, renormalises or guides some channels alone. "
                + (f"Switch that off ({', '.join(switches)})" if switches else "Its call has no switch for that")
                + "; a search guides linearly"
            )
        self.sign = 1.0 if total > 0 else -1.0
        if len(columns) == 2:
            # With the branches exchanged m_u + g (m_c - m_u) has the guidance 1 - g, so the larger one is meant.
            self.cond = int(weights[1] / total > weights[0] / total)
            seen = float(weights[self.cond]) / total
            # Rounding blurs what is seen; where one of the call's own numbers fits, it is the exact one.
            known = [*scales, *(s + 1 for s in scales)]  # m_c + s (m_c - m_u) has the guidance 1 + s
            close = [s for s in known if abs(s - seen) <= self.tolerance * abs(seen)]
            if known and not close:
                raise ValueError(
                    f"the pipeline's guidance acts like {seen:.5g} where its call says {scales}: it rescales, "
                    "normalises or changes on the way, so it is not linear. Switch that off"
                )
            self.scale = min(close, key=lambda s: abs(s - seen), default=float(f"{seen:.5g}"))

    @property
    def tolerance(self) -> float:
        return 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05

    def conditions(self, step: Step, prompts: int) -> list[dict[str, Tensor]]:
        """Per branch, the arguments with a row per prompt."""
        branches = []
        for call in step.calls:
            arguments = _flatten(call.arguments, (self.x_key, self.t_key))
            for half in range(self.halves):
                rows = {}
                for key, copies in self.per_row.items():
                    value = _stacked(arguments[key])
                    if not isinstance(value, Tensor):
                        raise ValueError(f"{key} has entries of different shapes; pad the prompts to one length")
                    value = value.unflatten(0, (-1, copies)) if copies > 1 else value
                    rows[key] = value[half * prompts : (half + 1) * prompts] if len(value) > prompts else value
                branches.append(rows)
        return branches

    def joined(self, steps: Iterable[Step], prompts: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The conditions of all prompts, and what replaces them in the unconditional branch, from their first steps."""
        branches = [self.conditions(step, n) for step, n in zip(steps, prompts, strict=True)]
        cond = {key: _join(key, [b[self.cond][key] for b in branches]) for key in branches[0][self.cond]}
        if not self.guided:
            return cond, {}
        other = 1 - self.cond
        null = {key: _common(key, [b[other][key] for b in branches], cond.get(key)) for key in branches[0][other]}
        null = {k: v for k, v in null.items() if k not in cond or not all(torch.equal(row, v[0]) for row in cond[k])}
        if not null:
            raise ValueError("both branches of the pipeline's guidance get the same arguments; nothing to guide with")
        return cond, null

    def arguments(self, cond: Mapping[str, Any], rows: int) -> dict[str, Any]:
        given = {k: self.as_given(k, v.flatten(0, 1) if self.per_row.get(k, 1) > 1 else v) for k, v in cond.items()}
        flat = {**self.fixed, **{k: v * rows for k, v in self.repeated.items()}, **given}
        nested: dict[str, Any] = {}
        for path, value in flat.items():
            *outer, name = path.split(".")
            place = nested
            for key in outer:
                place = place.setdefault(key, {})
            place[name] = value
        return nested


class _Prompts:
    """cond(n, generator): rows of the prompts' conditions, drawn at random with replacement."""

    def __init__(self, conditions: dict[str, Tensor]) -> None:
        self.conditions = conditions

    def __call__(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        count = len(next(iter(self.conditions.values()))) if self.conditions else 1
        device = "cpu" if generator is None else generator.device
        chosen = torch.randint(count, (n,), generator=generator, device=device)
        return {key: value[chosen.to(value.device)] for key, value in self.conditions.items()}


def _check_kind(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for pipelines whose network sees more than latents, time and conditions, naming what, and for
    those whose scheduler says that its network is no derivative (LCM)."""
    kind = type(pipe).__name__
    if getattr(pipe, "scheduler", None) is not None and pipe.scheduler.config.get("strict", True):
        check_task(adopt(config_of(pipe.scheduler)))
    if is_modular(pipe):
        blocks, seen = pipe.blocks, [n for n in arguments if n.split("_")[-1] in PICTURES and "ip_adapter" not in n]
        networks = [name for name in pipe.components if name.startswith(("transformer", "unet"))]
        if "scheduler" not in pipe.components or not networks:
            raise ValueError(
                f"{kind} of {type(blocks).__name__} has no network with a scheduler (it has "
                f"{', '.join(pipe.components) or 'nothing'}): give the pipeline whose blocks denoise"
            )
        if seen:
            raise ValueError(
                f"{seen[0]}: {kind} would start from it or see it at every step, and a search needs the network from "
                "noise alone: leave it out; the table runs with it too"
            )
    controls = [
        n for n, part in pipe.components.items() if n.startswith(("controlnet", "adapter")) and part is not None
    ]
    if controls:
        raise ValueError(
            f"{kind} runs {controls[0]} beside its network at every step, and what that gives depends on the state: it "
            "is not part of a target. Search on the pipeline without it; the table runs in this one too"
        )
    if any(word in kind for word in PART_WAY):
        raise ValueError(
            f"{kind} starts from an image or sees one at every step: a search needs the network from noise alone. "
            "Search on its text-to-image pipeline (AutoPipelineForText2Image.from_pipe); the table runs in this one too"
        )
    scale = arguments.get("pag_scale", call_of(pipe).get("pag_scale"))
    if scale is not None and scale > 0:
        raise ValueError(
            f"pag_scale={scale}: perturbed attention is a third branch, and a search knows "
            f"two: give pag_scale=0, or search on the pipeline without it; the table runs in {kind} too"
        )
    steppers = [name for name, part in pipe.components.items() if hasattr(part, "set_timesteps")]
    if len(steppers) > 1:
        raise ValueError(f"{kind} has {len(steppers)} schedulers ({', '.join(steppers)}); a search knows but one state")
    for key, value in arguments.items():
        if "trunc" in key and isinstance(value, int | float) and value != 1:
            raise ValueError(f"{key}={value}: guidance for a part of the steps only is not linear; leave it at 1")


def _passed(pipe: Any, notes: Notes, arguments: Mapping[str, Any]) -> list[str]:
    """The names of the times that a pipeline passes of itself and that the scheduler does not know as a habit."""
    given = {key: values for key, values in notes.passed.items() if key not in arguments}
    steps = int(pipe.scheduler.config.get("num_train_timesteps") or 1000)
    return [] if unasked(given.get("sigmas"), given.get("timesteps"), steps) else list(given)


def _scales(pipe: Any, arguments: Mapping[str, Any]) -> list[float]:
    """The scales that may be the guidance's; one of a distilled guidance is an input of the network."""
    return [scale for name, scale in scales_of(pipe, arguments).items() if "distilled" not in name]


SWITCHES = {
    "guidance_rescale": 0,
    "true_cfg_scale": 1,
    "cfg_normalization": False,
    "use_cfg_zero_star": False,
    "use_norm": False,
    "adaptive_projected_guidance": False,
}


def _switches(pipe: Any) -> list[str]:
    """What a pipeline's own call can switch off, as ``name=value``."""
    accepted = call_of(pipe)
    return [f"{name}={value}" for name, value in SWITCHES.items() if name in accepted]


def _check_constant(notes: Notes, without: Sequence[str]) -> None:
    """Raises ValueError naming an argument of the network, other than state and time, that changes in a run."""
    for k, call in enumerate(notes.steps[0].calls):
        first = _flatten(call.arguments, without)
        for i, step in enumerate(notes.steps[1:], 1):
            other = _flatten(step.calls[k].arguments, without)
            changed = [key for key in first | other if not _equal(first.get(key), other.get(key))]
            if changed:
                raise ValueError(
                    f"{changed[0]}, an argument of the network beside its state and time, is another at step {i} than "
                    "at step 0: a search keeps it fixed, so this pipeline is no target (a second state, or something "
                    "that begins at a later step?)"
                )


def _equal(one: Any, two: Any) -> bool:
    """Whether two arguments are the same; objects that cannot say are taken for it."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and bool(((one == two) | (one != one)).all())
    if type(one) is not type(two):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    silent = getattr(type(one), "__eq__", None) is getattr(object, "__eq__", None)
    return silent or bool(one == two)


def _stacked(value: Any) -> Any:
    """A list of tensors of one shape as one tensor; the rest as it is."""
    if isinstance(value, list) and value and all(isinstance(v, Tensor) and v.shape == value[0].shape for v in value):
        return torch.stack(value)
    return value


def _time_map(notes: Notes, key: str) -> tuple[float, float]:
    """(scale, shift) with network time = scale * scheduler time + shift, one of those in use."""
    seen = [(s.t, float(s.calls[0].arguments[key].flatten()[0])) for s in notes.steps]
    for scale in (1.0, 1e-3, -1e-3, -1.0):
        for shift in (0.0, 1.0, 1000.0):
            # Half precision rounds times by up to 1 %; rounding to whole numbers moves them by up to 2 training steps.
            if all(abs(scale * t + shift - net) <= 0.01 * abs(net) + 2 * abs(scale) for t, net in seen):
                return scale, shift
    raise ValueError(f"network times {[n for _, n in seen]} do not follow scheduler times {[t for t, _ in seen]}")


def _kind(key: str, one: Any, two: Any) -> str:
    """Whether an argument has a row per prompt: seen by what changes from one prompt to two."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.ndim and len(two) == 2 * len(one) and one.shape[1:] == two.shape[1:]:
            return "row"
        if one.shape == two.shape:
            return "fixed"
        raise ValueError(f"{key} has shape {tuple(one.shape)} for one prompt and {tuple(two.shape)} for two")
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(two) == 2 * len(one) > 0:
        if all(isinstance(entry, Tensor) for entry in two):
            return "row"
        if all(entry == one[0] for entry in two):
            return "repeat"
        raise ValueError(f"{key} differs between prompts and is a list, {two!r}; only tensors can be drawn from")
    return "fixed"


def _flatten(arguments: Mapping[str, Any], without: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in without:
            continue
        if isinstance(value, dict) and value:
            flat |= _flatten(value, prefix=f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check(notes: Notes, layout: _Layout, model: PipelineModel) -> None:
    """The model, called anew, must give what the pipeline gave to its scheduler."""
    n = notes.prompts
    with torch.no_grad(), evaluating([model]):
        for step in notes.steps[1:]:
            x, t = step.sample[:n], torch.full((n,), step.t, device=step.sample.device)
            outputs = [model(x, t, **cond) for cond in layout.conditions(step, n)]
            guided = outputs[layout.cond]
            if layout.guided:
                null = outputs[1 - layout.cond]
                guided = null + layout.scale * (guided - null)
            error = (guided - step.output[:n]).float().norm() / step.output[:n].float().norm()
            if not error <= layout.tolerance * max(1.0, abs(layout.scale)):
                raise ValueError(
                    f"called anew at time {step.t:g} the network differs from the pipeline's own run by {error:.1e}: "
                    "the pipeline does something to its inputs that was not seen"
                )


class PipelineDecoder(nn.Module):
    """latents (B, *S) -> images (B, 3, H, W) in [0, 1], with a pipeline's KL autoencoder of images; of pixels as they
    are where it has none."""

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.vae: Any = getattr(pipe, "vae", None)
        self._factor, self._side = getattr(pipe, "vae_scale_factor", 8), getattr(pipe, "default_sample_size", 128)
        self._size = arguments.get("height"), arguments.get("width")
        self._unpack = getattr(pipe, "_unpack_latents", None)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, *S); packed ones are unpacked first, pixels are images."""
        if self.vae is None:
            return (latents.float() / 2 + 0.5).clamp(0, 1)
        if latents.ndim == 3 and self._unpack is not None:
            latents = self._unpack(latents, *(n or self._side * self._factor for n in self._size), self._factor)
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def _decoder(pipe: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> PipelineDecoder | None:
    """None where the pipeline has no KL autoencoder of images, and more than a network and a scheduler."""
    if set(pipe.components) == {"unet", "scheduler"} and len(shape) == 3 and shape[0] in (1, 3):
        return PipelineDecoder(pipe, arguments)
    known = type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKL"
    return PipelineDecoder(pipe, arguments) if known and (len(shape) == 3 or hasattr(pipe, "_unpack_latents")) else None


# ---- rows


def _rows(pipe: Any, prompts: str | Sequence[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """The rows of the call's arguments, one with all rows first; none of an unconditional pipeline."""
    accepted = call_of(pipe)
    unconditional = "batch_size" in accepted and not any(n.startswith(("prompt", "class_labels")) for n in accepted)
    if prompts is None or (unconditional and isinstance(prompts, Mapping) and not prompts):
        if unconditional:
            return {}
        raise ValueError(f"{type(pipe).__name__} is conditional: give prompts, or rows of its call's arguments")
    if unconditional:
        raise ValueError(f"{type(pipe).__name__} is unconditional: leave prompts out, it draws nothing but noise")
    if isinstance(prompts, str):
        prompts = [prompts]
    rows = dict(prompts) if isinstance(prompts, Mapping) else {"prompt": list(prompts)}
    lengths = {k: len(v) for k, v in rows.items() if isinstance(v, Tensor | list | tuple)}
    count = max(lengths.values(), default=0)
    if not count or set(lengths.values()) - {1, count}:
        raise ValueError(f"prompts: every entry needs as many rows, or one for all; got {lengths or prompts!r}")
    first = next(k for k, n in lengths.items() if n == count)
    return {first: rows.pop(first), **rows}


def _take(rows: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Some prompts' rows; an entry with one row serves all, and what has no rows goes along."""

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor | list | tuple):
            return value
        indices = chosen if len(value) > 1 else [0] * len(chosen)
        return value[indices] if isinstance(value, Tensor) else [value[i] for i in indices]

    return {key: pick(value) for key, value in rows.items()} or {"batch_size": len(chosen)}


def _join(key: str, parts: list[Tensor]) -> Tensor:
    shapes = {tuple(p.shape[1:]) for p in parts}
    if len(shapes) > 1:
        raise ValueError(f"{key} has rows of different shapes, {sorted(shapes)}; pad the prompts to one length")
    return torch.cat(parts)


def _common(key: str, parts: list[Tensor], like: Tensor | None) -> Tensor:
    rows = _join(key, parts)
    if like is not None and rows.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"{key} has rows of {tuple(rows.shape[1:])} without and {tuple(like.shape[1:])} with the prompt; both "
            "run in one batch, so pad the negative prompt to the same length"
        )
    if not all(torch.equal(row, rows[0]) for row in rows):
        raise ValueError(f"the unconditional {key} differs between prompts; give one negative prompt for all")
    return rows[:1]
