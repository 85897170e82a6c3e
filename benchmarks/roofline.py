"""The tables of docs/gpu.md: what each kernel must move, how long that should take, and how long it took.

    python benchmarks/roofline.py                       # prints them
    python benchmarks/roofline.py --write docs/gpu.md   # replaces what stands between the page's marks

Predicted: a start and the bytes at the speed of a copy, see ``predicted``. Measured: the newest rows of a GPU in
results/gpu.jsonl, which scripts/gpu.py makes; empty where there are none.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from bandwidth import BYTES, DTYPES, SHAPES
from gpu_table import FIGURES, FLUX, LARGE, Rows, cells, load

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
BEGIN, END = "<!-- roofline -->", "<!-- end of roofline -->"
# Bytes a second by NVIDIA's datasheets, by a part of CUDA's name for the card.
PEAKS = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12}
CARDS = {"H100 80GB HBM3": "H100 SXM", "H200": "H200"}
# Microseconds of the host: a step in front of a driver that does nothing (bench_host.py) and what a GPU's adds; the
# Python around a replay (graph_loop.py) and three operations.
HOST = {"step": 7.7 + 2.5, "sample": 28 + 3 * 6}
COPY = 0.9  # of which a large copy is assumed to reach
SAME = "list", "gradient"  # bytes of another, or of two others: they have rows when they are measured
START = {"ours": 2.5e-6, "copy": 1.5e-6}  # seconds from one launch of a graph to the first byte of the next, assumed
# Of a forward of FLUX.1 at 1024 x 1024: 2 for each of 57 blocks' 12 x 3072^2 weights and each of 4096 and 512 tokens,
# and 57 attentions of 4 x 4608^2 x 3072.
FLUX_OPERATIONS = 57 * (2 * 12 * 3072**2 * 4608 + 4 * 4608**2 * 3072)
MATRICES = 0.6 * 989e12  # operations a second in bf16: of the datasheet's, which is the same for both cards


def predicted(size: float, way: str = "ours", peak: float = PEAKS["H100 80GB HBM3"]) -> float:
    """Seconds of a kernel that moves ``size`` bytes, each once: a start, then the speed of a copy."""
    return START[way] + size / (COPY * peak)


def moved(op: str, shape: tuple[int, ...], types: str) -> int:
    """Bytes of a call."""
    return BYTES[op](math.prod(shape), *(dtype.itemsize for dtype in DTYPES[types]))


def micros(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2f}"


def cell(rows: Rows, op: str, shape: tuple[int, ...], types: str, peaks: list[float]) -> str:
    """Megabytes, then microseconds: predicted for each card, and measured, with the share of a copy's speed."""
    size, name = moved(op, shape, types), "x".join(map(str, shape))
    found = cells(rows, stage="bandwidth", op=op, way="ours", shape=name, types=types)
    texts = [megabytes(size), ", ".join(f"*{micros(predicted(size, peak=peak))}*" for peak in peaks)]
    if found:
        texts.append(f"**{micros(found[-1]['us'] / 1e6)}, {100 * found[-1]['of_copy']:.0f} %**")
    return ": ".join(text for text in texts if text)


def table(rows: Rows, peaks: list[float]) -> str:
    lines = [f"| | state | {' | '.join(DTYPES)} |", "| --- " * (2 + len(DTYPES)) + "|"]
    for op in BYTES:
        if op in SAME and not cells(rows, stage="bandwidth", op=op):
            continue
        for shape in SHAPES:
            line = [f"`{op}`" if shape is SHAPES[0] else "", "×".join(map(str, shape))]
            line += [cell(rows, op, shape, types, peaks) for types in DTYPES]
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


Prediction = Callable[[float], str]  # from a card's bytes a second


def lowest(op: str, keep: Callable[[int, str], bool]) -> Prediction:
    """The lowest share of a copy's speed over some cells."""
    all_sizes = [(moved(op, shape, types), "x".join(map(str, shape))) for shape in SHAPES for types in DTYPES]
    sizes = [size for size, shape in all_sizes if keep(size, shape)]
    return lambda peak: f"{100 * min(predicted(s, 'copy', peak) / predicted(s, peak=peak) for s in sizes):.0f} %"


def step_of_a_loop(kernels: int) -> Prediction:
    """Microseconds of a step of the smallest state, which a model of so many kernels precedes."""
    size = moved("forward", SHAPES[0], "fp32")
    return lambda peak: f"{1e6 * (predicted(size, peak=peak) + kernels * START['copy']):.1f} us"


def flux(calls: int) -> Prediction:
    """Seconds of so many forwards of FLUX's size at the speed that large matrix products are assumed to reach."""
    return lambda peak: f"{calls * FLUX_OPERATIONS / MATRICES:.2g} s"


def large(size: int, shape: str) -> bool:
    return size >= LARGE


PREDICTED: dict[str, Prediction] = {
    "forward, 64 MB and above": lowest("forward", large),
    "list form, 64 MB and above": lowest("list", large),
    "backward, 64 MB and above": lowest("backward", large),
    "pull, 64 MB and above": lowest("pull", large),
    f"forward, {FLUX}, cold cache": lowest("forward", lambda size, shape: shape == FLUX),
    "graph of a loop, a step, outputs at hand": step_of_a_loop(0),
    "graph of a loop, a step, one-kernel model": step_of_a_loop(1),
    "eager step, host": lambda peak: f"{HOST['step']:.0f} us",
    "sample(cuda_graph=True) outside the graph": lambda peak: f"{HOST['sample']:.0f} us",
    "unroll: bytes planned / bytes counted": lambda peak: "1.00",
    "FLUX's size, ten steps, eager": flux(10),
    "FLUX's size, ten steps, one graph": flux(10),
    "FLUX's size, a gradient, checkpointing": flux(3),
    "FLUX's size, a gradient, all kept": flux(2),
    # 57 blocks keep what goes in, 4608 tokens in bfloat16, for each of 12 samples.
    "FLUX's size, the search that is planned": lambda peak: f"batches of 12, {12 * 57 * 4608 * 3072 * 2 / 1e9:.0f} GB",
}


def figures(rows: Rows, peaks: list[float]) -> str:
    """The goals, with what is predicted and what was measured."""
    lines = ["| figure | goal | predicted | measured |", "| --- | --- | --- | --- |"]
    for name, goal, measured in FIGURES:
        texts = dict.fromkeys(f"*{PREDICTED[name](peak)}*" for peak in peaks if name in PREDICTED)
        lines.append(f"| {name} | {goal} | {', '.join(texts)} | {measured(rows)} |")
    return "\n".join(lines)


def render(path: Path = RESULTS) -> str:
    rows, peaks = cells(load(path), device="cuda"), PEAKS
    if rows:
        last = rows[-1]
        card = last["device_name"]
        rows = cells(rows, device_name=card)
        peaks = {name: peak for name, peak in PEAKS.items() if name in card}
        state = f"Measured, in bold: {card}, torch {last['torch']}, triton {last['triton']}, commit {last['commit']}, "
        state += f"{last['date']}. " + (
            f"Predicted for it, in italics: {next(iter(peaks.values())) / 1e12:.2f} TB/s by its datasheet."
            if peaks
            else "Nothing is predicted for it: `PEAKS` in benchmarks/roofline.py does not say how fast its memory is."
        )
    else:
        cards = " and an ".join(f"{CARDS[name]} ({peak / 1e12:.2f} TB/s)" for name, peak in peaks.items())
        state = (
            "**Nothing here has been measured: the results hold no row of a GPU.** Every figure in italics is a "
            f"prediction under the assumptions above, for an {cards}, in this order; one where both are the same."
        )
    return "\n\n".join([state, figures(rows, list(peaks.values())), table(rows, list(peaks.values()))])


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
