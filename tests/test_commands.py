"""The commands that the pages name start: settings that are gone made one fail at its import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["scripts.kill", "scripts.soak", "benchmarks.transfer", "benchmarks.caching"])
def test_a_command_starts(command):
    done = subprocess.run([sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
