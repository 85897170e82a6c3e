"""What the settings of every search method have in common: their checks, and how they print."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch


def check_counts(settings: Any, *names: str, least: int = 1) -> None:
    """Raises ValueError for a field that is neither None nor a whole number from ``least``."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r}: give a whole number from {least}")


def graph_memory(budget: int | float | None, device: torch.device) -> int | float:
    """A method's ``memory_budget`` as ``unroll`` takes it: without one 512 MB, on a GPU half of what is free there."""
    if budget is not None:
        return budget
    return 0.5 if device.type == "cuda" else 1 << 29


def described(settings: Any) -> dict[str, Any]:
    """The settings as JSON data, for the run folder; a function is named by its type."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    plain = str | int | float | bool | list | tuple | None
    return {name: value if isinstance(value, plain) else repr(type(value)) for name, value in values.items()}
