"""This folder's tables from the rows under results/: the newest row of every cell.

python benchmarks/tables.py                     # prints them
python benchmarks/tables.py --write benchmarks/README.md   # replaces what stands between each table's two marks
"""

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "step.csv"
DEFAULT = "noise+start"  # the space of a search that is not told another
TITLES = {
    "forward": "The last of N steps, microseconds",
    "gradient": "The last of N steps, forward and backward, microseconds",
    "pull": "What the adjoints of N steps send back to the first, microseconds",
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


def recipe():
    """The paper's recipe and the best hand-made solvers on MNIST, from results/recipe.csv."""
    lines = ["| model | N | solver | RMSE | 95 % interval | Frechet | label accuracy |", "| --- " * 7 + "|"]
    rows = read("recipe.csv")
    for model, n in sorted({(r["model"], int(r["num_steps"])) for r in rows}):
        cell = sorted(
            (r for r in rows if (r["model"], int(r["num_steps"])) == (model, n)), key=lambda r: float(r["rmse"])
        )
        mine = next(r for r in cell if r["method"] == "lion")
        for r in [mine, *[r for r in cell if r is not mine][:3]]:
            name = "**searched, the paper's recipe**" if r is mine else r["solver"]
            rmse, low, high = (f"{float(r[k]):.4f}" for k in ("rmse", "rmse_low", "rmse_high"))
            rest = f"{float(r['frechet']):.3f} | {100 * float(r['accuracy']):.0f} %"
            lines.append(f"| {model} | {n} | {name} | {rmse} | {low} to {high} | {rest} |")
    first = rows[0]
    hand = len({(r["method"], r["solver"].partition("@")[2]) for r in rows if r["searched"] == "False"})
    about = (
        f"`python -m benchmarks.recipe`, {first['samples']} fresh noises, {first['date']}. The recipe spent about "
        f"{int(first['evaluations']):,} model evaluations on N = 5 and 10 together; {hand} pairs of hand-made method "
        "and spacing were run, the best three are shown. RMSE per element to a fine reference."
    )
    return about + "\n\n" + "\n".join(lines)


def unroll():
    """Time and memory of gradients through a rollout, from results/unroll.csv."""
    rows = {(r["op"], r["direction"], int(r["order"]), r["backend"]): r for r in read("unroll.csv")}
    ways = list(dict.fromkeys(backend for *_, backend in rows))
    lines = ["| model, gradient, N | " + " | ".join(ways) + " |", "| --- " * (len(ways) + 1) + "|"]
    for op, direction, n in dict.fromkeys(key[:3] for key in rows):
        cells = [rows.get((op, direction, n, way)) for way in ways]
        text = [f"{float(r['median_ms']):,.0f} ms, {float(r['peak_mb']):.0f} MB" if r else "" for r in cells]
        lines.append(f"| {op.removeprefix('unroll ')}, {direction}, {n} | " + " | ".join(text) + " |")
    last = next(reversed(rows.values()))
    about = (
        f"{last['device']}; torch {last['torch']}; commit {last['commit']}, {last['date']}. Medians and peak memory."
    )
    return about + "\n\n" + "\n".join(lines)


def search():
    """The search beside hand-made solvers and the paper's recipe, from results/search.jsonl."""
    hand, recipe, found = {}, {}, {}
    for line in (RESULTS.parent / "search.jsonl").read_text().splitlines():
        row = json.loads(line)
        cell = row["model"], row["num_steps"]
        if row["kind"] == "search":
            found.setdefault((row["space"], row["budget"], *cell), {})[row["seed"]] = row
        else:
            {"handmade": hand, "lion": recipe}[row["kind"]][cell] = row
    budgets = sorted({b for space, b, *_ in found if space == DEFAULT and b}) + [None]
    head = [
        "model",
        "N",
        "best hand-made",
        "the paper's recipe",
        *(f"{b:,} evaluations" if b else "default" for b in budgets),
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for cell in sorted({tuple(cell) for space, _, *cell in found if space == DEFAULT}):
        best = hand[cell]
        solver = best["solver"].replace(f"/{cell[1]}", "")
        text = [f"{best['rmse']:.4f} ({solver})", f"{recipe[cell]['rmse']:.4f}" if cell in recipe else ""]
        text += [_ratios(found.get((DEFAULT, b, *cell)), best) for b in budgets]
        lines.append(f"| {cell[0]} | {cell[1]} | " + " | ".join(text) + " |")
    about = (
        "RMSE on noise that no search draws and nothing was chosen by. For each budget: the searched RMSE over the "
        "best hand-made one (of 91 names: Heun and UniPC's corrector came later), the mean over seeds, in brackets the "
        "worst and how many there were, then the same of the median sample. Evaluations: forward 1, backward 2, "
        "everything counted; the default spends 1,000 (100 + 3 N), the recipe 50,000 (100 + 3 N). On the mixture about "
        "20 of 8,192 samples, which end at another digit, carry "
        "the mean square from N = 8 on."
    )
    return about + "\n\n" + "\n".join(lines) + "\n\n" + spaces(found)


def spaces(found):
    """What each freedom brings over the paper's space, at each budget."""
    names = ("plain", "noise", DEFAULT, "noise+times")
    lines = ["| model | N | evaluations | " + " | ".join(names) + " |", "| --- " * (3 + len(names)) + "|"]
    cells = {(model, n, budget) for space, budget, model, n in found if space == "plain"}
    for model, n, budget in sorted(cells, key=lambda c: (*c[:2], c[2] or float("inf"))):
        groups = [list(found.get((name, budget, model, n), {}).values()) for name in names]
        text = [f"{statistics.mean(r['rmse'] for r in rows):.4f} ({len(rows)})" if rows else "" for rows in groups]
        lines.append(f"| {model} | {n} | {f'{budget:,}' if budget else 'default'} | {' | '.join(text)} |")
    return "RMSE by what a search may move, the mean over seeds, in brackets how many.\n\n" + "\n".join(lines)


def _ratios(rows, best):
    if not rows:
        return ""
    parts = []
    for key in ("rmse", "median"):
        values = [row[key] / best[key] for row in rows.values()]
        worst = f" ({max(values):.2f}, {len(values)})" if len(values) > 1 and key == "rmse" else ""
        parts.append(f"{statistics.mean(values):.2f}{worst}")
    return "; ".join(parts)


def few():
    """Three to seven searched calls against hand-made ones, from results/few.jsonl."""
    sys.path.insert(0, str(RESULTS.parents[2]))
    from benchmarks import few_steps

    commands = "`python -m benchmarks.few_steps run`, `run --models flow vp flow16 --steps 6 7`"
    return "\n\n".join([commands, few_steps.show(), few_steps.show_fewest()])


def read(name):
    with (RESULTS.parent / name).open(newline="") as file:
        return list(csv.DictReader(file))


SECTIONS = {
    "step.csv": lambda: render(newest()),
    "recipe.csv": recipe,
    "unroll.csv": unroll,
    "search.jsonl": search,
    "few.jsonl": few,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the text between the marks in FILE")
    arguments = parser.parse_args()
    found = {f.partition(".")[0]: make() for f, make in SECTIONS.items() if (RESULTS.parent / f).exists()}
    if arguments.write is None:
        return print("\n\n".join(found.values()))
    document = arguments.write.read_text()
    for name, text in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in document or end not in document:
            raise SystemExit(f"{arguments.write} lacks the marks {begin} and {end}")
        before, after = document.split(begin)[0], document.split(end)[1]
        document = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    arguments.write.write_text(document)


if __name__ == "__main__":
    main()
