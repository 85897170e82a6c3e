"""Without a GPU the interpreter tests the Triton kernels; it must be chosen before anything imports Triton."""

import os

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
