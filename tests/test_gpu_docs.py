"""docs/gpu.md says what the code and the results say now, and calls a prediction one."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
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


def test_every_figure_is_read_from_its_rows(roofline, tmp_path):
    """The lowest of the cells that count, the newest of the others; a cut line and a CPU's rows are left out."""
    about = {"device": "cuda", "device_name": "a card", "torch": "2", "triton": "3", "commit": "", "date": ""}
    rows = []
    for op in ("forward", "list", "backward", "pull", "gradient"):
        for shape, size in (("1x16x128x128", 13e6), ("1x16x21x90x160", 250e6), ("4x16x21x90x160", 1e9)):
            for way, micros, share in (
                ("ours", 100.0, 0.5 if size < 64e6 else 1 - 20e6 / size),
                ("compiled", 150.0, 0.6),
            ):
                rows.append({"stage": "bandwidth", "op": op, "way": way, "shape": shape, "types": "bf16", "bytes": size,
                             "us": micros, "of_copy": share, **about})  # fmt: skip
    loops = [figure for figure in ("graph step, outputs at hand", "graph step, one-kernel model", "eager step, host",
                                   "graph sample call outside the graph, host")]  # fmt: skip
    rows += [{"stage": "loop", "figure": name, "us": 2.5, **about} for name in loops]
    for figure in ("sample, eager", "sample, one graph", "gradient, checkpointing", "gradient, all kept"):
        rows.append({"stage": "real", "figure": figure, "seconds": 1.2345, "bytes": 3.21e9, **about})
    planned = {"num_steps": 10, "budget": 3000, "batch_size": 12, "bytes": 19e9, "free": 1e9, "minutes": 7.0}
    rows.append({"stage": "real", "figure": "plan", **planned, **about})
    rows.append({"stage": "unroll", "model": "net", "planned_bytes": 99, "counted_bytes": 100, **about})
    rows.append({"stage": "search", "num_steps": 5, "seconds": 7.0, "evaluations": 1000, "held_out": 0.05, **about})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    ended = {"stage": "ended", "name": "kernels", "how": "rc=1", "seconds": 9.04, "limit": 100}
    first = json.dumps({**rows[0], "of_copy": 0.01}) + "\n"  # of a call before this one
    text = first + text + json.dumps(ended) + "\n" + json.dumps({**rows[0], "device": "cpu", "of_copy": 0.02})
    (tmp_path / "rows.jsonl").write_text(text + '\n{"st')
    (tmp_path / "kernels.log").write_text("...\n= 1 failed, 30 passed in 3.21s =\nbye\n")
    (tmp_path / "counters.log").write_text(
        '==PROF== ready\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","_step","dram__bytes_read.sum","Mbyte","113.4"\n"0","_step","other","","1"\n'
        '"1","_step","dram__bytes_read.sum","Mbyte","130.6"\n'
    )
    module = sys.modules["gpu_table"]
    table = module.render(tmp_path / "rows.jsonl", tmp_path)
    names = [name for name, _, _ in module.FIGURES]
    figures = [line for line in table.splitlines() if line.startswith(tuple(names))]
    assert len(figures) == len(names) and not any(line.endswith(" -") for line in figures), table
    assert "92 % (1x16x21x90x160 bf16, the lowest of 2)" in table and "50 % (1x16x128x128" in table
    assert "1.50x (" in table and "2.50 us" in table and "0.990 (net)" in table and "7.0 s, 1,000 eval" in table
    assert "1.23 s, 3.2 GB" in table and "batches of 12, 19 GB, more than is free, 7 min" in table
    assert "kernels      rc=1          9.0    100  1 failed, 30 passed" in table
    assert "counters of the forward, bf16: read from memory 113.4 Mbyte\n" in table
    assert "counters of the forward, mixed: read from memory 130.6 Mbyte\n" in table


def test_predictions_and_measurements_are_told_apart(roofline, tmp_path):
    """Rows of a CPU count for nothing; those of a GPU stand in bold beside the prediction."""
    row = {
        "stage": "bandwidth", "op": "forward", "way": "ours", "shape": "1x16x128x128", "types": "fp32", "us": 7.31,
        "bytes": 13631488, "of_copy": 0.87, "device": "cpu", "device_name": "some GPU", "torch": "2", "triton": "3",
        "commit": "abc", "date": "2026-01-01",
    }  # fmt: skip
    rows = tmp_path / "gpu.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    before = roofline.render(rows)
    assert "Nothing here has been measured" in before and "7.3" not in before and "**7" not in before
    assert "H100 SXM (3.35 TB/s) and an H200 (4.80 TB/s)" in before
    each = "| forward, 1x16x128x128, cold cache | 90 % of the copy | *79 %*, *75 %* |  |"  # one for each card
    assert each in before and "14: *7.0*, *5.7* |" in before and before.count("`list`") == 0
    with rows.open("a") as file:
        file.write(json.dumps({**row, "device": "cuda"}) + '\n{"cut o')
    text = roofline.render(rows)
    assert "some GPU" in text and ": **7.3, 87 %** |" in text and "Nothing here" not in text
    assert "| forward, 1x16x128x128, cold cache | 90 % of the copy |  | 87 %" in text
    assert "Nothing is predicted for it" in text and not re.search(r"[|:] \*\d", text)
    assert 13.6e6 / (0.9 * 3.35e12) + 2.5e-6 == pytest.approx(roofline.predicted(13.6e6))


def test_predictions_are_for_the_card_that_was_measured(roofline, tmp_path):
    """The newest row's, and rows of another card stay out of its table."""
    row = {
        "stage": "bandwidth", "op": "forward", "way": "ours", "shape": "1x16x128x128", "types": "fp32", "us": 7.31,
        "bytes": 13631488, "of_copy": 0.87, "device": "cuda", "torch": "2", "triton": "3", "commit": "abc",
        "date": "2026-01-01",
    }  # fmt: skip
    rows, texts = tmp_path / "gpu.jsonl", {}
    for name, micros in (("NVIDIA H200", 5.5), ("NVIDIA H100 80GB HBM3", 7.31)):
        with rows.open("a") as file:
            file.write(json.dumps({**row, "device_name": name, "us": micros}) + "\n")
        texts[name] = roofline.render(rows)
    one, other = texts.values()
    size = roofline.BYTES["forward"](16 * 128 * 128, 4, 4)
    for text, speed, name in ((one, 4.8e12, "H200"), (other, 3.35e12, "H100")):
        micros = roofline.micros(size / (0.9 * speed) + 2.5e-6)
        assert f"14: *{micros}*: **{'5.5' if name == 'H200' else '7.3'}" in text and f"{speed / 1e12:.2f} TB/s" in text
    assert "**5.5" in one and "**5.5" not in other and "H200" not in other


def test_rows_name_the_commit_that_the_environment_gives(roofline, monkeypatch):
    """Where there is no .git, as in an archive."""
    machine = sys.modules["machine"]
    monkeypatch.setenv("COMMIT", "1a2b3c4")
    assert machine.commit() == "1a2b3c4"
    monkeypatch.delenv("COMMIT")
    assert machine.commit() != "1a2b3c4"
