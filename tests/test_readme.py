"""The snippets of README.md that are marked as running do run, as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dss_fast import Solver
from dss_fast.__main__ import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"<!-- runs -->\n```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert SNIPPETS and README.count("<!-- runs -->") == len(SNIPPETS)


def test_the_first_snippet_needs_the_package_alone():
    """What is installed, not the clone: neither its examples nor its weights."""
    names = {line.split()[1].partition(".")[0] for line in SNIPPETS[0].splitlines() if re.match("from|import", line)}
    assert names == {"torch", "dss_fast"} and README.index(SNIPPETS[0]) < README.index("make demo")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs_as_printed(snippet, tmp_path):
    """In a fresh interpreter, in an empty folder, so that neither imports nor files are borrowed."""
    pytest.importorskip("safetensors", reason="the shipped weights are safetensors files")
    if "diffusers" in snippet:
        pytest.importorskip("diffusers")
        pytest.importorskip("transformers")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    saved = re.findall(r"save\(\"(.+?)\"\)", snippet)
    assert saved and all(Solver.load(tmp_path / name).num_steps for name in saved)
    assert "compare(" not in snippet or "searched/5" in run.stdout


def test_every_python_snippet_parses():
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(snippet, "README.md", "exec")


@pytest.mark.parametrize("line", re.findall(r"^python -m dss_fast (.*)$", README, re.MULTILINE))
def test_every_command_line_is_understood(line):
    assert callable(_parser().parse_args(line.split()).run)
