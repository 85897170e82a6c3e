"""What a run of scripts/gpu.py found, goal beside figure: how each stage ended, then the figures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LARGE = 64e6
FLUX = "1x16x128x128"
TYPES = "bf16", "mixed", "fp32"  # in the order of their counters
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


def newest(rows: Rows) -> Rows:
    """The last of those that measure the same, as a second call does after a fix."""
    return list({(row["op"], row["shape"], row["types"]): row for row in rows}.values())


def of_copy(op: str, keep: Callable[[dict], bool]) -> Callable[[Rows], str]:
    """The lowest share of the copy's speed over some cells, and where it is."""

    def text(rows: Rows) -> str:
        found = [row for row in newest(cells(rows, stage="bandwidth", op=op, way="ours")) if keep(row)]
        low = min(found, key=lambda row: row["of_copy"], default=None)
        where = low and f"{low['shape']} {low['types']}, the lowest of {len(found)}"
        return f"{100 * low['of_copy']:.0f} % ({where})" if low else ""

    return text


def against_compiled(ops: Iterable[str]) -> Callable[[Rows], str]:
    """The lowest ratio of torch.compile's time to ours."""

    def text(rows: Rows) -> str:
        found = []
        for row in newest(cells(rows, stage="bandwidth", way="compiled")):
            same = {key: row[key] for key in ("op", "shape", "types")}
            ours = cells(rows, way="ours", **same)[-1:] if row["op"] in ops else []
            found += [(row["us"] / one["us"], row) for one in ours]
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


def real(figure: str) -> Callable[[Rows], str]:
    """Seconds, and gigabytes beside the weights where they are known."""

    def text(rows: Rows) -> str:
        found = cells(rows, stage="real", figure=figure)[-1:]
        return "".join(f"{r['seconds']:.3g} s" + (f", {r['bytes'] / 1e9:.1f} GB" if r["bytes"] else "") for r in found)

    return text


def planned_search(rows: Rows) -> str:
    """N, batch, memory and minutes, of the plans that fit the card and of those that do not."""
    each = []
    for row in {row["num_steps"]: row for row in cells(rows, stage="real", figure="plan")}.values():
        fits = "" if row["bytes"] <= (row["free"] or 0) else ", more than is free"
        sizes = f"batches of {row['batch_size']}, {row['bytes'] / 1e9:.0f} GB{fits}"
        each.append(f"N = {row['num_steps']}: {row['budget']:,} evaluations, {sizes}, {row['minutes']:.0f} min")
    return "; ".join(each)


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
    ("FLUX's size, ten steps, eager", "", real("sample, eager")),
    ("FLUX's size, ten steps, one graph", "1.0x eager", real("sample, one graph")),
    ("FLUX's size, a gradient, checkpointing", "", real("gradient, checkpointing")),
    ("FLUX's size, a gradient, all kept", "", real("gradient, all kept")),
    ("FLUX's size, the search that is planned", "fits the card", planned_search),
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


def counters(log: Path) -> list[str]:
    """The hardware counters of the profiler's comma-separated log, a line for each dtype's launch."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, list[str]] = {}
    for row in csv.DictReader(lines[first:]):
        if row.get("Metric Name") in METRICS:
            text = f"{METRICS[row['Metric Name']]} {row['Metric Value']} {row['Metric Unit']}".strip()
            found.setdefault(row["ID"], []).append(text)
    named = zip(TYPES, found.values(), strict=False)  # a call that was cut off has fewer
    return [f"counters of the forward, {types}: {', '.join(texts)}" for types, texts in named]


def last_word(log: Path) -> str:
    """pytest's or the sanitizer's, or the last line there is."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    telling = [line for line in lines if re.search(r"\d+ (passed|failed|error)|ERROR SUMMARY|^skipped", line)]
    return (telling or [line for line in lines if line.strip()] or [""])[-1].strip("= ")[:100]


def render(file: Path, logs: Path) -> str:
    """Both tables, from the rows and the stages' logs."""
    found = load(file)
    rows = cells(found, device="cuda")  # a dry run's say nothing about a GPU
    lines = ["stage        ended     seconds  limit  last word"]
    for row in cells(found, stage="ended"):
        figures = f"{row['name']:12} {row['how']:8} {row['seconds']:8.1f} {row['limit']:6}"
        lines.append(f"{figures}  {last_word(logs / (row['name'] + '.log'))}")
    lines += counters(logs / "counters.log")
    device = next((f"{row['device_name']}, torch {row['torch']}, triton {row['triton']}" for row in rows), "no GPU")
    lines += ["", f"{'figure':45} {'goal':18} measured on {device}"]
    lines += [f"{name:45} {goal:18} {measured(rows) or '-'}" for name, goal, measured in FIGURES]
    return "\n".join(lines)
