"""docs/gpu.md says what the code and the results say now, and calls a prediction one."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("roofline", ROOT / "benchmarks" / "roofline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("bandwidth", "gpu_table", "machine", "step_ways"):
        sys.modules.pop(name, None)


def test_the_page_is_not_stale(roofline):
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert roofline.written(page, roofline.render()) == page, "run: python benchmarks/roofline.py --write docs/gpu.md"


def test_predictions_and_measurements_are_told_apart(roofline, tmp_path):
    """Rows of a CPU count for nothing; those of a GPU stand in bold beside the prediction."""
    row = {
        "stage": "bandwidth", "op": "forward", "way": "ours", "shape": "1x16x128x128", "types": "fp32", "us": 7.31,
        "bytes": 13631488, "of_copy": 0.87, "device": "cpu", "device_name": "some GPU", "torch": "2", "triton": "3",
        "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip
    rows = tmp_path / "gpu.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    assert "Nothing here has been measured" in roofline.render(rows) and "7.3" not in roofline.render(rows)
    with rows.open("a") as file:
        file.write(json.dumps({**row, "device": "cuda"}) + '\n{"cut o')
    text = roofline.render(rows)
    assert "some GPU" in text and "**7.3** | **87 %**" in text and "Nothing here" not in text
    assert "| forward, 1x16x128x128, cold cache | 90 % of the copy | 87 %" in text
    assert 13.6e6 / (0.9 * 3.35e12) + 2.5e-6 == pytest.approx(roofline.predicted(13.6e6))
