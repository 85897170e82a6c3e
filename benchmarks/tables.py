"""README's tables from results/step.csv: the newest row of every cell.

python benchmarks/tables.py                     # prints them
python benchmarks/tables.py --write README.md   # replaces what stands between the two marks below
"""

import argparse
import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "step.csv"
BEGIN, END = "<!-- benchmarks/tables.py -->", "<!-- end of benchmarks/tables.py -->"
TITLES = {
    "forward": "The last of N steps, microseconds",
    "gradient": "The last of N steps, forward and backward, microseconds",
    "loop": "A step of a whole loop, microseconds",
    "host": "A step on 256 elements, microseconds: what Python costs",
    "graph": "A step of a loop replayed as one CUDA graph, microseconds",
}


def newest(path=RESULTS):
    """{(device, group): {cell: {way: row}}}; rows further down the file replace earlier ones."""
    tables = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cell = row["shape"], int(row["elements"]), int(row["steps"]), row["state"], row["network"], row["pair"]
            device = row["device_name"] + (f", {row['threads']} threads" if row["device"] == "cpu" else "")
            tables.setdefault((device, row["group"]), {}).setdefault(cell, {})[row["way"]] = row
    return tables


def micros(row):
    value = float(row["median_us"])
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(title, cells):
    ways = list(dict.fromkeys(way for rows in cells.values() for way in rows))
    shared = any(row["copy_fraction"] for rows in cells.values() for row in rows.values())
    head = ["shape", "N", "dtypes", *ways, "ours is faster than released"] + ["ours, of a copy's speed"] * shared
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for (shape, _, steps, state, network, pair), rows in sorted(cells.items(), key=lambda c: (c[0][1:], c[0][0])):
        types = state if state == network else f"{state}, network {network}"
        ours = rows.get("ours", {})
        line = [shape.replace("x", "×"), str(steps), types + (", guided" if pair == "1" else "")]
        line += [micros(rows[way]) if way in rows else "" for way in ways]
        line.append(f"{float(ours['times_released']):.1f}×" if ours.get("times_released") else "")
        if shared:
            line.append(f"{100 * float(ours['copy_fraction']):.0f} %" if ours.get("copy_fraction") else "")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def render(tables):
    parts = []
    for device in dict.fromkeys(device for device, _ in tables):
        groups = [cells for (d, _), cells in tables.items() if d == device]
        rows = [row for cells in groups for ways in cells.values() for row in ways.values()]
        last = max(rows, key=lambda row: row["date"])
        about = f"torch {last['torch']}" + (f", CUDA {last['cuda']}" if last["cuda"] else "")
        parts.append(f"{device}; {about}; commit {last['commit']}, {last['date']}. Medians, the ways taking turns.")
        parts += [table(TITLES[g], tables[device, g]) for g in TITLES if (device, g) in tables]
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    arguments = parser.parse_args()
    text = render(newest())
    if arguments.write is None:
        return print(text)
    document = arguments.write.read_text()
    if BEGIN not in document or END not in document:
        raise SystemExit(f"{arguments.write} lacks the marks {BEGIN} and {END}")
    before, after = document.split(BEGIN)[0], document.split(END)[1]
    arguments.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
