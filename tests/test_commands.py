"""The commands that the pages name start: settings that are gone made one fail at its import."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from helpers import processes

ROOT = Path(__file__).parents[1]
COMMANDS = ["scripts.kill", "scripts.mutants", "scripts.soak", "benchmarks.transfer", "benchmarks.caching"]


def ask_for_help(command, said):
    """As ``python -m command --help`` in the project's folder does."""
    os.chdir(ROOT)
    sys.path[:] = [str(ROOT), *(path for path in sys.path if not Path(path).is_relative_to(ROOT / "tests"))]
    sys.argv = [command, "--help"]
    sys.stdout = sys.stderr = open(said, "w", encoding="utf-8")
    runpy.run_module(command, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_starts(command, tmp_path):
    process = processes.start(ask_for_help, command, tmp_path / "said")
    process.join(60)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert process.exitcode == 0 and "usage:" in said, said
