"""Builds the C++ extension: the CPU step and the unroll. Of the rest only the license is not in pyproject.toml.

The extension belongs to one version of torch, so it is built against the torch that will load it, or not at all:

    pip install torch 'setuptools>=64'
    pip install --no-build-isolation --no-deps .

pip's isolated build sees no torch. Naming torch in [build-system] would download another one of gigabytes and build for
that; failing would leave those without a compiler, and those who need only the GPU's kernels, with nothing. So the
isolated build makes a wheel of pure Python, which runs everywhere, and the first step on a CPU says how to add the
extension. Without a compiler, and with DSS_FAST_NO_EXTENSION=1, the same. With DSS_FAST_REQUIRE_EXTENSION=1, as
`make` sets it where there is a compiler, a build without the extension fails.
"""

import os
import re
import sys
from glob import glob

from setuptools import setup

COMMAND = "pip install torch 'setuptools>=64' && pip install --no-build-isolation --no-deps ."
REQUIRED = bool(os.environ.get("DSS_FAST_REQUIRE_EXTENSION"))


def without(reason):
    if REQUIRED:
        sys.exit(f"dss_fast: no C++ extension: {reason}. DSS_FAST_NO_EXTENSION=1 goes without it")
    print(f"dss_fast: building without the C++ extension: {reason}", file=sys.stderr)


def extension():
    if os.environ.get("DSS_FAST_NO_EXTENSION"):
        return {}
    try:
        import torch
        from setuptools.errors import BaseError, CCompilerError
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        without(f"torch cannot be imported here ({error}). To build it for the torch you have: {COMMAND}")
        return {}

    class Optional(BuildExtension):
        def build_extensions(self):
            try:  # torch raises RuntimeError for ninja and a missing compiler, which `optional` does not catch
                super().build_extensions()
            except (RuntimeError, OSError, BaseError, CCompilerError) as error:
                without(error)

    # The OpenMP calls bind to the runtime that torch has loaded: linking a second one would start a second pool.
    flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"] + (["-fopenmp"] if sys.platform == "linux" else [])
    module = CppExtension(
        "dss_fast._C_" + re.sub(r"\W", "_", torch.__version__),  # as dss_fast/extension.py looks for it
        sorted(glob("csrc/*.cpp")),
        depends=glob("csrc/*.h"),
        extra_compile_args={"cxx": flags},
        optional=not REQUIRED,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Optional}}


setup(license="Apache-2.0", **extension())
