"""Without a GPU the interpreter tests the Triton kernels; it must be chosen before anything imports Triton."""

import os

# A cached graph of another version of the ops would be run as it was.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dss_fast.unroll import BACKENDS, _extension  # noqa: E402


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each engine of an unrolled rollout."""
    if request.param == "cpp" and isinstance(_extension(), Exception):
        pytest.skip(f"no extension: {_extension()}")
    return request.param
