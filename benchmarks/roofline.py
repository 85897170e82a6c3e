"""The tables of docs/gpu.md: what each kernel must move, how long that should take, and how long it took.

    python benchmarks/roofline.py                       # prints them
    python benchmarks/roofline.py --write docs/gpu.md   # replaces what stands between the page's marks

Predicted: a start and the bytes at the speed of a copy, see ``predicted``. Measured: the newest rows of a GPU in
results/gpu.jsonl, which scripts/gpu.sh makes; empty where there are none.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bandwidth import BYTES, DTYPES, SHAPES, STEPS
from gpu_table import cells, load

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
BEGIN, END = "<!-- roofline -->", "<!-- end of roofline -->"
PEAKS = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12}  # bytes a second by NVIDIA's datasheets, by a part of CUDA's name
ASSUMED = "H100 80GB HBM3"  # the card of the predictions where none has been measured: an H100 SXM
COPY = 0.9  # of which a large copy is assumed to reach
START = {"ours": 2.5e-6, "copy": 1.5e-6}  # seconds from one launch of a graph to the first byte of the next, assumed
NAMES = {
    "forward": "The last of N steps, history in one tensor",
    "list": "The last of N steps, history as a list",
    "backward": "Its gradients",
    "pull": "What N adjoints send back to the first step",
    "gradient": "A step and its gradients through autograd",
}


def predicted(size: float, way: str = "ours", peak: float = PEAKS[ASSUMED]) -> float:
    """Seconds of a kernel that moves ``size`` bytes, each once: a start, then the speed of a copy."""
    return START[way] + size / (COPY * peak)


def micros(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2f}"


def table(op: str, rows: list[dict[str, Any]], peak: float | None) -> str:
    head = ["state", *(f"{types}: {what}" for types in DTYPES for what in ("MB", "predicted", "measured", "of a copy"))]
    lines = [f"**{NAMES[op]}** (`{op}`), N = {STEPS}, microseconds", "", "| " + " | ".join(head) + " |"]
    lines.append("| --- " * len(head) + "|")
    for shape in SHAPES:
        name, line = "x".join(map(str, shape)), []
        for types, dtypes in DTYPES.items():
            n = 1
            for size in shape:
                n *= size
            moved = BYTES[op](n, *(dtype.itemsize for dtype in dtypes))
            found = cells(rows, stage="bandwidth", op=op, way="ours", shape=name, types=types)
            line += [megabytes(moved), f"*{micros(predicted(moved, peak=peak))}*" if peak else ""]
            if found:
                line += [f"**{micros(found[-1]['us'] / 1e6)}**", f"**{100 * found[-1]['of_copy']:.0f} %**"]
            elif peak:
                line += ["", f"*{100 * predicted(moved, 'copy', peak) / predicted(moved, peak=peak):.0f} %*"]
            else:
                line += ["", ""]
        lines.append(f"| {name.replace('x', '×')} | " + " | ".join(line) + " |")
    return "\n".join(lines)


def figures(rows: list[dict[str, Any]]) -> str:
    """The goals, with what was measured."""
    from gpu_table import FIGURES

    lines = ["| figure | goal | measured |", "| --- | --- | --- |"]
    lines += [f"| {name} | {goal} | {measured(rows)} |" for name, goal, measured in FIGURES]
    return "\n".join(lines)


def render(path: Path = RESULTS) -> str:
    rows = cells(load(path), device="cuda")
    peak: float | None = PEAKS[ASSUMED]
    if rows:
        last = rows[-1]
        card = last["device_name"]
        rows = cells(rows, device_name=card)
        peak = next((speed for name, speed in PEAKS.items() if name in card), None)
        state = f"Measured, in bold: {card}, torch {last['torch']}, triton {last['triton']}, commit {last['commit']}, "
        state += f"{last['date']}. " + (
            f"Predicted for it, in italics: {peak / 1e12:.2f} TB/s by its datasheet and the assumptions above."
            if peak
            else "Nothing is predicted for it: `PEAKS` in benchmarks/roofline.py does not say how fast its memory is."
        )
    else:
        state = (
            "**Nothing here has been measured: the results hold no row of a GPU.** Every time and every share of a "
            "copy, in italics, is a prediction under the assumptions above."
        )
    return "\n\n".join([state, figures(rows), *(table(op, rows, peak) for op in BYTES)])


def written(document: str, text: str) -> str:
    """The document with the text between its marks."""
    if BEGIN not in document or END not in document:
        raise SystemExit(f"the page lacks the marks {BEGIN} and {END}")
    return f"{document.split(BEGIN)[0]}{BEGIN}\n\n{text}\n\n{END}{document.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    options = parser.parse_args()
    if options.write is None:
        return print(render())
    options.write.write_text(written(options.write.read_text(), render()))


if __name__ == "__main__":
    main()
