"""Builds dss_fast._C, the CPU step and the unroll. Everything else about the package stands in pyproject.toml.

The extension is optional: DSS_FAST_NO_EXTENSION=1, a missing compiler or a missing torch leave a package that runs
in plain PyTorch and says so once.
"""

import os
import sys
from glob import glob

from setuptools import setup


def extension():
    if os.environ.get("DSS_FAST_NO_EXTENSION"):
        return {}
    try:
        from setuptools.errors import CompileError
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"dss_fast: building without the C++ extension, torch cannot be imported: {error}", file=sys.stderr)
        return {}

    class Optional(BuildExtension):
        def build_extensions(self):
            try:  # torch raises RuntimeError for ninja and a missing compiler, which `optional` does not catch
                super().build_extensions()
            except (RuntimeError, OSError, CompileError) as error:
                print(f"dss_fast: installing without the C++ extension: {error}", file=sys.stderr)

    # The OpenMP calls bind to the runtime that torch has loaded: linking a second one would start a second pool.
    flags = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"] + (["-fopenmp"] if sys.platform == "linux" else [])
    module = CppExtension(
        "dss_fast._C",
        sorted(glob("csrc/*.cpp")),
        depends=glob("csrc/*.h"),
        extra_compile_args={"cxx": flags},
        optional=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Optional}}


setup(**extension())
