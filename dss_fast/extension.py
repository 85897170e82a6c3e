"""The C++ extension of this torch and this Python, or the reason why there is none and what to do about it.

The file's name holds the version of torch that it was built against. Another version may lay out its classes in another
way, and then a library that loads without complaint crashes or computes nonsense later.
"""

import importlib
import os
import re
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["compiled", "load", "missing"]


def load() -> ModuleType:
    """The extension, loaded, which registers the ops' kernels for the CPU.

    Raises:
        ImportError: it is switched off, was never built, belongs to another torch or Python, or does not load.
    """
    if os.environ.get("DSS_FAST_NO_EXTENSION"):
        raise ImportError("DSS_FAST_NO_EXTENSION is set")
    package = Path(__file__).parent
    name = "_C_" + re.sub(r"\W", "_", torch.__version__)
    build = "`pip install --no-build-isolation --no-deps .` in the folder of dss_fast's source"
    try:
        return importlib.import_module(f"dss_fast.{name}")
    except ModuleNotFoundError:
        others = sorted(path.name for path in package.glob("_C*") if path.suffix in (".so", ".pyd"))
        if others:
            raise ImportError(
                f"{others[-1]} was built for another torch or Python than torch {torch.__version__} here; "
                f"{build} builds it for this one"
            ) from None
        raise ImportError(f"its C++ extension was not built; with a C++ compiler, {build} builds it") from None
    except ImportError as error:
        raise ImportError(f"its C++ extension does not load ({error}); {build} builds it again") from error


compiled: ModuleType | None = None  # the loaded extension
missing = ""  # the reason why there is none
try:
    compiled = load()
except ImportError as error:
    missing = str(error)
