"""What a row of results says about the machine it was measured on."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def conditions() -> dict:
    """Device, versions, commit and date."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor()
    return {
        "device": DEVICE.type, "device_name": name, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "triton": version("triton"), "cuda": torch.version.cuda or "",
        "python": platform.python_version(), "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def commit() -> str:
    """The short hash of what is measured: COMMIT of the environment where it is set, as on a machine without the
    repository; else what git says, empty where it says nothing."""
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def version(package: str) -> str:
    """Of an optional package, empty without it."""
    try:
        return __import__(package).__version__
    except ImportError:
        return ""


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
