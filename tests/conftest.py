"""Without a GPU the interpreter tests the Triton kernels; it must be chosen before anything imports Triton."""

import gc
import os
import warnings

# One thread for each process, these and their children: results do not depend on the machine, and processes that share
# its cores do not wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A cached graph of another version of the ops would be run as it was.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dss_fast import extension  # noqa: E402


def pytest_collection_finish(session):
    """Modules stay: a collector that walks their million objects again and again took a sixth of all the time."""
    gc.collect()
    gc.freeze()
    grouped = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False) and not all("@" in nodeid for nodeid in grouped):
        warnings.warn("pytest-xdist does not see the groups: requirements-test.txt has versions that fit", stacklevel=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Before each test, whatever the one before it set."""
    torch.set_num_threads(1)


@pytest.fixture(params=("cpp", "reference"))
def backend(request):
    """Each engine of an unrolled rollout."""
    if request.param == "cpp" and extension.compiled is None:
        pytest.skip(f"no extension: {extension.missing}")
    return request.param


def pytest_ignore_collect(collection_path, config):
    """For the fast tests the other modules are not even imported: diffusers alone takes five seconds a process."""
    if config.option.markexpr.startswith("fast") and collection_path.match("test_*.py"):
        return "mark.fast" not in collection_path.read_text(encoding="utf-8") or None
