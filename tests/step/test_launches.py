"""Triton's real compiler and launcher in front of a libcuda that does nothing: launches, compilations, arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import cuda_stub

pytestmark = pytest.mark.xdist_group("launches")  # one process compiles
ROOT = Path(__file__).parents[2]
OTHER = os.environ.get("DSS_FAST_TRITON_PYTHON")  # see test_sass.py


@pytest.fixture(scope="module", params=["installed", "other"])
def found(request, tmp_path_factory):
    if request.param == "installed":
        pytest.importorskip("triton")
    elif OTHER is None:
        pytest.skip("DSS_FAST_TRITON_PYTHON names no Python with another version of Triton")
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub stands in for libcuda.so.1, which is Linux's")
    if cuda_stub.COMPILER is None:
        pytest.skip("no C compiler to build the stub with: neither CC is set nor gcc or clang installed")
    folder = tmp_path_factory.mktemp("stub")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "DSS_FAST_NO_EXTENSION": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # torch leaves a GPU alone
    python = sys.executable if request.param == "installed" else OTHER
    command = [python, "-m", "helpers.launches", folder]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", ["step", "update", "backward", "pull"])
def test_one_launch_a_call_and_one_compilation_a_variant(found, op):
    """Whatever the step, the alignment of its index, the initial noise: only dtypes and flags are compiled for."""
    counted = found["ops"][op]
    assert counted["launches"] == counted["calls"] > 50
    assert counted["compiled"] == counted["variants"]


@pytest.mark.parametrize("op", ["step", "update", "backward", "pull"])
def test_the_driver_gets_the_same_arguments_from_both_launches(found, op):
    given = found["marshalling"][op]
    first, *later = given["parameters"]
    assert all(other == first for other in later) and not given["missing"]
    assert given["grids"] == [[6, 1, 1]] * 4
    assert given["kept"] == [1, 1, 1, 0]  # the last is by a version of Triton whose launcher nobody has tried
    assert given.get("wanted", first) == first


def test_a_pointer_too_many_or_too_few_is_refused(found):
    """Triton 3.9 launches with either, and says nothing."""
    words = "a kernel of 6 tensors is launched with"
    assert found["miscounted"] == {"said": [f"{words} 5", f"{words} 7"], "launches": 0}


def test_a_step_of_sample_is_four_frames_from_its_launch(found):
    seen = found["frames"]["seen"]
    assert len(seen) == 4 and max(map(len, seen)) <= 4, seen
    assert found["frames"]["launches"] == 1
