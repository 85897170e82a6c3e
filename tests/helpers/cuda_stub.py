"""Triton's CUDA driver on a libcuda of our own: kernels compile, load and go through the real launcher, and do nothing.

Call `activate()` in a process of its own, before anything is launched and without TRITON_INTERPRET.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_stub.c")
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def build(folder):
    """libcuda.so.1 in `folder`; the name inside is what makes later dlopens of a libcuda find this one."""
    library = Path(folder) / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *flags, "-o", library, SOURCE], check=True)
    return library


def activate(folder):
    """The stub's functions for tests, once Triton's active driver is on it."""
    library = build(folder)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = stub.stub_parameter.restype = ctypes.c_longlong

    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver

    knobs.nvidia.libcuda_path = str(folder)

    class StubDriver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
            self.get_device_capability = lambda device: (9, 0)
            self.get_current_stream = lambda device: 7
            self.get_current_device = lambda: -1  # where tensors on the CPU say they are
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(StubDriver())
    return stub
