"""scripts/gpu.sh on a machine without a GPU: every stage runs, and what it leaves is whole whenever it is cut off."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dss_fast.step import backends

ROOT = Path(__file__).parent.parent
STAGES = "build tests bandwidth loop counters-fp32 sanitizers unroll search gradients".split()


def dry_run(out, **environment):
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), "--dry-run"]
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_a_script_names_files_that_exist(script):
    named = re.findall(r"\b(?:scripts|tests|benchmarks|examples|csrc)/[\w/]+\.(?:py|sh|h|cpp)\b", script.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def ended(out):
    return dict(line.split("\t")[:2] for line in (out / "stages.tsv").read_text().splitlines())


@pytest.fixture(autouse=True)
def what_the_stages_need():
    import torch

    pytest.importorskip("triton")
    pytest.importorskip("safetensors")
    if "cpp" not in backends(torch.device("cpu")):
        pytest.skip("the extension is not built")


@pytest.mark.slow
def test_every_stage_runs_and_everything_is_packed(tmp_path):
    done = dry_run(tmp_path)
    logs = {path.stem: path.read_text()[-2000:] for path in (tmp_path / "logs").iterdir()}
    assert ended(tmp_path) == dict.fromkeys(STAGES, "ok") and done.returncode == 0, (done.stdout, logs)
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        names = packed.getnames()
        rows = [json.loads(line) for line in packed.extractfile("rows.jsonl")]
        table = packed.extractfile("table.txt").read().decode()
    assert {f"logs/{stage}.log" for stage in STAGES} | {"stages.tsv"} <= set(names)
    assert {row["stage"] for row in rows} == {"bandwidth", "loop", "unroll", "search"}
    assert {(row["op"], row["way"]) for row in rows if row["stage"] == "bandwidth"} == {
        (op, way) for op in ("forward", "gradient") for way in ("ours", "compiled", "copy")
    }
    assert done.stdout.endswith(table) and "60 us" in table and "90 % of the copy" in table


def test_on_a_machine_with_a_gpu_the_stages_come_in_order(tmp_path):
    """The commands only, by a Python and tools that say what they were asked to do."""
    answers = {
        "python3": f'case "$*" in *gpu_table.py*) exec {sys.executable} "$@";; *xdist*) echo "-n 8";; esac; echo "$*"',
        "ncu": 'echo "$*"',
        "compute-sanitizer": 'echo "$*"; [ "$2" != racecheck ]',
        "nvidia-smi": "echo a card",
    }
    for name, line in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    script = ["bash", str(ROOT / "scripts" / "gpu.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    stages = ended(tmp_path / "out")
    timed = "bandwidth loop counters-fp32 counters-mixed counters-bf16 memcheck racecheck synccheck initcheck".split()
    assert [name for name in stages if not name.startswith("warm-")] == [
        "build", "tests", "graphs", *timed, "unroll", "search", "gradients"
    ]  # fmt: skip
    assert {name for name, how in stages.items() if how != "ok"} == {"racecheck"} and done.returncode == 1
    logs = {path.stem: path.read_text() for path in (tmp_path / "out" / "logs").iterdir()}
    assert "-n 8" in logs["tests"] and "build_ext --inplace" in logs["build"] and "--types mixed" in logs["warm-mixed"]
    assert "-k regex:" in logs["counters-bf16"] and logs["racecheck"].startswith("--tool racecheck")
    table = done.stdout.split("last word")[1]
    assert "a card" in done.stdout and "racecheck       rc=1" in table and "warm-" not in table


def test_without_time_it_says_so_and_still_packs(tmp_path):
    done = dry_run(tmp_path, LIMIT="0")
    assert ended(tmp_path) == dict.fromkeys(STAGES, "rc=75") and done.returncode == 1
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        assert "table.txt" in packed.getnames()
        assert packed.extractfile("logs/search.log").read() == b"no time left\n"
