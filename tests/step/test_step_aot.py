"""The machine code of the kernels for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kernels_compile_for_sm_80_and_sm_90_with_wide_accesses_and_no_spills():
    pytest.importorskip("triton")
    if not sys.platform.startswith("linux"):
        pytest.skip("triton ships its assembler for Linux")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, HERE / "step_aot.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {r["arch"] for r in rows} == {"sm_80", "sm_90"} and {r["kernel"] for r in rows} >= {"forward", "backward"}
    for row in rows:
        assert row["spills"] == row["stack"] == row["local"] == 0, row
        assert row["loads_128"] == row["loads_expected"] and row["stores_128"] == row["stores_expected"], row
        if row["kernel"] == "forward":
            # 8 elements a thread: y and x_next begin with a product each, a guided pair with a difference. Every slot
            # is fused in both kernels, in place and with a new history, so that they give the same bits.
            assert (row["products"], row["sums"]) == (16, 8 * ("PAIR" in row["flags"])), row
        # 128 threads a block and 65,536 registers: at 128 each, four blocks still fit a multiprocessor.
        assert row["registers"] <= (256 if "fp64" in row["dtypes"] else 128), row
