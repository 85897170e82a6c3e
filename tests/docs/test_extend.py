"""The diffs of docs/extend.md apply to the package, and the page's Python runs on the copy they made."""

import os
import shutil
import subprocess
import sys

import pytest

from helpers.pages import ROOT, blocks

PAGE = "docs/extend.md"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with every diff of the page applied."""
    if shutil.which("git") is None:
        pytest.skip("git, which applies the diffs, is not installed")
    folder = tmp_path_factory.mktemp("copy")
    for part in ("dss_fast", "examples"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    diff = "".join(block.lstrip("\n") for block in blocks(PAGE, "diff"))
    applied = subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, capture_output=True, text=True)
    assert applied.returncode == 0, f"{applied.stderr}\nthe code under a diff of {PAGE} has changed: make the diff anew"
    return folder


def ran_in(folder, code):
    """What some code prints in an interpreter that finds the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_pages_code_runs_on_the_copy(copy):
    pytest.importorskip("sklearn", reason="the examples' mixture is of scikit-learn's digits")
    pytest.importorskip("tqdm")
    code = "\n".join(block.lstrip("\n") for block in blocks(PAGE))
    said = ran_in(copy, code + "\nimport dss_fast\nprint(dss_fast.__file__)\n")
    assert str(copy) in said  # and not the package beside this test
    assert "leapfrog/10" in said and "searched by edges" in said
    assert "mean 1.0" in said or "mean 0.9" in said
    moved = float(said.split("rounding moved a sample by at most ")[1].split()[0])
    assert 0 < moved < 1e-2  # another way of computing it than the default's, and close


def test_the_copy_passes_the_checks_of_a_method(copy):
    """Its rows sum to one for both families, and halving the step divides the error by about four: order two."""
    code = """
import torch
from dss_fast import VP, Flow, find_solver, sample
for schedule in (Flow(), VP()):
    for row in find_solver("leapfrog/9", schedule).coeffs:
        assert abs(sum(row) - 1) < 1e-9, row
model = lambda x, t: torch.cos(3 * t)[:, None] * x
x = torch.ones(1, 1, dtype=torch.float64)
exact = torch.exp(torch.sin(torch.tensor(3.0, dtype=torch.float64)) / 3)
errors = [float((sample(model, x, f"leapfrog/{n}") - exact).abs()) for n in (40, 80, 160)]
assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5, errors
"""
    ran_in(copy, code)
