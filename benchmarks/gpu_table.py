"""What a run of scripts/gpu.sh found, goal beside figure: how each stage ended, then the figures.

python benchmarks/gpu_table.py FOLDER        # that holds rows.jsonl, stages.tsv and logs/
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LARGE = 64e6
FLUX = "1x16x128x128"
Rows = list[dict[str, Any]]


def load(path: Path) -> Rows:
    """The rows of a file of JSON lines; a line that was cut off is left out."""
    rows: Rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def cells(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def of_copy(op: str, keep: Callable[[dict], bool]) -> Callable[[Rows], str]:
    """The lowest share of the copy's speed over some cells, and where it is."""

    def text(rows: Rows) -> str:
        found = [row for row in cells(rows, stage="bandwidth", op=op, way="ours") if keep(row)]
        low = min(found, key=lambda row: row["of_copy"], default=None)
        where = low and f"{low['shape']} {low['types']}, the lowest of {len(found)}"
        return f"{100 * low['of_copy']:.0f} % ({where})" if low else ""

    return text


def against_compiled(ops: Iterable[str]) -> Callable[[Rows], str]:
    """The lowest ratio of torch.compile's time to ours."""

    def text(rows: Rows) -> str:
        found = []
        for row in cells(rows, stage="bandwidth", way="compiled"):
            same = {key: row[key] for key in ("op", "shape", "types")}
            found += [(row["us"] / ours["us"], row) for ours in cells(rows, way="ours", **same) if row["op"] in ops]
        if not found:
            return ""
        ratio, row = min(found, key=lambda pair: pair[0])
        return f"{ratio:.2f}x ({row['op']} {row['shape']} {row['types']}, the lowest of {len(found)})"

    return text


def loop(figure: str) -> Callable[[Rows], str]:
    return lambda rows: "".join(f"{row['us']:.2f} us" for row in cells(rows, stage="loop", figure=figure)[-1:])


def planned(rows: Rows) -> str:
    found = [row for row in cells(rows, stage="unroll") if row["counted_bytes"]]
    return ", ".join(f"{row['planned_bytes'] / row['counted_bytes']:.3f} ({row['model']})" for row in found)


def searched(rows: Rows) -> str:
    found = cells(rows, stage="search")
    each = ", ".join(f"N = {row['num_steps']}: {row['held_out']:.4f}" for row in found if row["held_out"])
    return f"{found[-1]['seconds']:.1f} s, {found[-1]['evaluations']:,} evaluations; {each}" if found else ""


FIGURES: list[tuple[str, str, Callable[[Rows], str]]] = [
    ("forward, 64 MB and above", "90 % of the copy", of_copy("forward", lambda row: row["bytes"] >= LARGE)),
    ("list form, 64 MB and above", "90 % of the copy", of_copy("list", lambda row: row["bytes"] >= LARGE)),
    ("backward, 64 MB and above", "85 % of the copy", of_copy("backward", lambda row: row["bytes"] >= LARGE)),
    ("pull, 64 MB and above", "90 % of the copy", of_copy("pull", lambda row: row["bytes"] >= LARGE)),
    (f"forward, {FLUX}, cold cache", "90 % of the copy", of_copy("forward", lambda row: row["shape"] == FLUX)),
    ("torch.compile / ours", "1.0x", against_compiled(("forward", "list", "backward", "pull"))),
    ("torch.compile / ours, gradient of a step", "1.2x", against_compiled(("gradient",))),
    ("graph of a loop, a step, outputs at hand", "3.0 us", loop("graph step, outputs at hand")),
    ("graph of a loop, a step, one-kernel model", "4.0 us", loop("graph step, one-kernel model")),
    ("eager step, host", "15 us", loop("eager step, host")),
    ("sample(cuda_graph=True) outside the graph", "60 us", loop("graph sample call outside the graph, host")),
    ("unroll: bytes planned / bytes counted", "1", planned),
    ("search, MNIST flow", "", searched),
]

METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes_read.sum": "read from memory",
    "dram__bytes_write.sum": "written to memory",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of peak bandwidth",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
}


def counters(log: Path) -> str:
    """The hardware counters of the profiler's comma-separated log."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return ""
    found = [row for row in csv.DictReader(lines[first:]) if row.get("Metric Name") in METRICS]
    return ", ".join(f"{METRICS[r['Metric Name']]} {r['Metric Value']} {r['Metric Unit']}".strip() for r in found)


def tests(log: Path) -> str:
    """pytest's or the sanitizer's last word, or the last line there is."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    telling = [line for line in lines if re.search(r"\d+ (passed|failed|error)|ERROR SUMMARY", line)]
    return (telling or [line for line in lines if line.strip()] or [""])[-1].strip("= ")[:100]


def render(folder: Path) -> str:
    """Both tables."""
    rows = cells(load(folder / "rows.jsonl"), device="cuda")  # a dry run's say nothing about a GPU
    lines = ["stage           ended    seconds  last word"]
    stages = folder / "stages.tsv"
    for line in stages.read_text().splitlines() if stages.exists() else []:
        name, ended, seconds = line.split("\t")
        if name.startswith("warm-") and ended == "ok":
            continue
        lines.append(f"{name:15} {ended:8} {seconds:>7}  {tests(folder / 'logs' / f'{name}.log')}")
    for types in ("fp32", "mixed", "bf16"):
        text = counters(folder / "logs" / f"counters-{types}.log")
        lines += [f"counters of the forward, {types}: {text}"] if text else []
    device = next((f"{row['device_name']}, torch {row['torch']}, triton {row['triton']}" for row in rows), "no GPU")
    lines += ["", f"{'figure':45} {'goal':18} measured on {device}"]
    lines += [f"{name:45} {goal:18} {measured(rows) or '-'}" for name, goal, measured in FIGURES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render(Path(sys.argv[1])))
