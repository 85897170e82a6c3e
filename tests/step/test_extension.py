"""An extension of another torch is never loaded, and each reason why there is none says what to do about it."""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import dss_fast
from dss_fast import extension, step, table, unroll

pytestmark = pytest.mark.fast
COMMAND = "pip install --no-build-isolation --no-deps ."


@pytest.fixture
def package(monkeypatch, tmp_path):
    """The package's folder with no extension in it, beside a torch of another version."""
    monkeypatch.delenv("DSS_FAST_NO_EXTENSION", raising=False)
    monkeypatch.setattr(torch, "__version__", "9.9.1+cpu")
    monkeypatch.setattr(dss_fast, "__path__", [str(tmp_path)])
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    return tmp_path


def test_a_checkout_has_it():
    """Where it could be built: without it the tests of the kernels are skipped, and the others run the reference."""
    source = Path(dss_fast.__file__).parents[1]
    if os.environ.get("DSS_FAST_NO_EXTENSION") or not (source / "csrc").is_dir() or shutil.which("c++") is None:
        pytest.skip("switched off, or nothing to build it from or with")
    assert extension.compiled is not None, "DSS_FAST_NO_EXTENSION=1 runs the tests without it"


@pytest.mark.skipif(extension.compiled is None, reason="there is no extension")
def test_its_rows_have_the_columns_of_a_table():
    assert extension.compiled.columns == [table.A, table.P, table.Q, table.GUIDANCE, table.HISTORY]


def test_never_built(package):
    with pytest.raises(ImportError, match="was not built; with a C\\+\\+ compiler, .*" + re.escape(COMMAND)):
        extension.load()


def test_built_for_another_torch(package):
    """Whatever it would do when loaded: it is not."""
    (package / f"_C_9_8_0_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"anything")
    with pytest.raises(ImportError, match=r"_C_9_8_0_cpu\S* was built for another torch.*9\.9\.1\+cpu") as caught:
        extension.load()
    assert COMMAND in str(caught.value) and "compiler" not in str(caught.value)


def test_it_does_not_load(package):
    (package / f"_C_9_9_1_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    with pytest.raises(ImportError, match="does not load") as caught:
        extension.load()
    assert COMMAND in str(caught.value) and "compiler" not in str(caught.value)


def test_switched_off(package, monkeypatch):
    monkeypatch.setenv("DSS_FAST_NO_EXTENSION", "1")
    with pytest.raises(ImportError, match="^DSS_FAST_NO_EXTENSION is set$"):
        extension.load()


def test_the_reason_is_what_users_read(monkeypatch):
    """In the one warning of a step, and in the refusals of a named backend."""
    monkeypatch.setattr(extension, "compiled", None)
    monkeypatch.setattr(extension, "missing", "it is Sunday; wait")
    with pytest.warns(RuntimeWarning, match="in plain PyTorch, several times slower: it is Sunday; wait"):
        step._on_cpu.__wrapped__()
    with pytest.raises(ValueError, match="it is Sunday"):
        step._module("cpp", torch.device("cpu"))
    with pytest.raises(ValueError, match="backend 'cpp' cannot run here: it is Sunday.*'reference'"):
        unroll._engine("cpp")


WITHOUT_EXTENSION = """
import sys, warnings
import torch
torch.__version__ = "9.9.1+cpu"  # another than the extension was built for, if there is one
from dss_fast import step
assert not [name for name in sys.modules if name.startswith(("triton", "dss_fast.step.triton", "dss_fast._C"))]
assert step.backends(torch.device("cpu")) == ["reference"]
arguments = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 1, 3), torch.ones(1, 1, 5), torch.zeros(1).long()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        x, history = step.multistep_step(*arguments)
assert [str(w.message).split(",")[0] for w in caught if "dss_fast" in str(w.message)] == [
    "dss_fast runs its CPU step in plain PyTorch"], caught
assert torch.equal(history[:, 0], arguments[0] + arguments[1])
try:
    step.multistep_step(*arguments, backend="cpp")
except ValueError as error:
    assert "9.9.1+cpu" in str(error) or "was not built" in str(error)
else:
    raise AssertionError("a named backend that cannot run must not fall back")
"""


def test_with_another_torch_it_runs_and_says_so_once():
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DSS_FAST_NO_EXTENSION")}
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
