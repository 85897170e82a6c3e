"""Recompute: a network's own gradient checkpointing, switched on for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from torch import nn

from ..denoiser import modules_of
from ..target import Target

# The methods that switch it on and off in diffusers and in transformers, whose models say whether it is on.
NAMES = (
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
)


def switches(target: Target) -> list[tuple[Callable[[], object], Callable[[], object]]]:
    """How to switch the checkpointing of a target's networks on and off; none of one that has it on already."""
    checkpointing = target.checkpointing
    if checkpointing is not None:
        return [(lambda: checkpointing(True), lambda: checkpointing(False))]
    found, inside = [], set[nn.Module]()
    for module in modules_of(target.model):
        for part in module.modules():
            for on, off in NAMES if part not in inside else ():
                if callable(getattr(part, on, None)) and callable(getattr(part, off, None)):
                    inside.update(part.modules())  # whose own it switches too
                    if not getattr(part, "is_gradient_checkpointing", False):
                        found.append((getattr(part, on), getattr(part, off)))
                    break
    return found


@contextmanager
def recomputing(targets: Sequence[Target]) -> Iterator[bool]:
    """The checkpointing of the targets' networks on for a while; whether there is any that was not."""
    with ExitStack() as after:
        found = False
        for on, off in [pair for target in targets for pair in switches(target)]:
            with suppress(ValueError):  # of a model that has the method and no support for it
                on()
                after.callback(off)
                found = True
        yield found
