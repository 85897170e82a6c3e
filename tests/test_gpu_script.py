"""scripts/gpu.sh on a machine without a GPU: every stage runs, and what it leaves is whole whenever it is cut off."""

import json
import os
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


def ended(out):
    return dict(line.split("\t")[:2] for line in (out / "stages.tsv").read_text().splitlines())


@pytest.fixture(autouse=True)
def what_the_stages_need():
    import torch

    pytest.importorskip("triton")
    pytest.importorskip("safetensors")
    if "cpp" not in backends(torch.device("cpu")):
        pytest.skip("the extension is not built")


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


def test_without_time_it_says_so_and_still_packs(tmp_path):
    done = dry_run(tmp_path, LIMIT="0")
    assert ended(tmp_path) == dict.fromkeys(STAGES, "rc=75") and done.returncode == 1
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        assert "table.txt" in packed.getnames()
        assert packed.extractfile("logs/search.log").read() == b"no time left\n"
