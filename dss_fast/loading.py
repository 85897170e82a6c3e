"""Loading: the Target that a name on the command line means, ``module:attribute`` or ``file.py:attribute``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .target import Target


def load_target(name: str, device: str | None = None) -> Target:
    """The Target behind ``module:attribute``, moved to a device if one is given.

    Raises ValueError saying which part does not exist or is not a Target.
    """
    target = made(name)
    if isinstance(target, Mapping):
        if "model" not in target:
            raise ValueError(f"model {name!r}: the dict lacks 'model'; see python -m dss_fast --help")
        given = dict(target)
        target = Target.of(given.pop("model"), **given)
    if not isinstance(target, Target):
        raise ValueError(
            f"model {name!r}: is {type(target).__name__}, not a Target; write one around it, as in Target(model, shape)"
        )
    return target if device is None else target.to(device)


def made(name: str) -> Any:
    """The attribute, or what it returns where it is a function."""
    found = _attribute(name)
    if not callable(found) or isinstance(found, nn.Module):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(f"model {name!r}: is called without arguments, and {error}; give a Target") from None
    return found()


def _attribute(name: str) -> Any:
    """What ``module:attribute`` or ``folder/file.py:attribute`` names. Raises ValueError saying what does not exist."""
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise ValueError(f"model {name!r}: write module:attribute, as in examples.mnist:flow")
    if module.endswith(".py") and Path(module).is_file():
        found = _imported(Path(module).resolve())
    else:
        found = _module(name, module, attribute)
    if not hasattr(found, attribute):
        public = ", ".join(k for k, v in vars(found).items() if not k.startswith("_") and callable(v))
        raise ValueError(f"model {name!r}: {module} has no {attribute!r}; it has: {public}")
    return getattr(found, attribute)


def _imported(path: Path) -> ModuleType:
    """The module in a file, which finds those beside it."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found  # where its classes look for their module
    spec.loader.exec_module(found)
    return found


def _module(name: str, module: str, attribute: str) -> ModuleType:
    if "" in module.split(".") or module.endswith(".py") or any(sign in module for sign in "/\\"):
        meant = ".".join(part for part in re.split(r"[./\\]+", module.removesuffix(".py")) if part) or "module"
        raise ValueError(
            f"model {name!r}: {module!r} is no module's name; write it as Python imports it, as in "
            f"{meant}:{attribute}, and it is looked for in {os.getcwd()} and on the path"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"model {name!r}: {error}; it is looked for in {os.getcwd()} and on the path") from error
