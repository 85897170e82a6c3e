"""Rows of figures: the JSON lines under results/ that benchmarks append to and tables are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, oldest first; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, **row: Any) -> dict[str, Any]:
    """Adds a row and prints it, but for tables in it; returns it."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    print({k: v for k, v in row.items() if not isinstance(v, dict)}, flush=True)
    return row


def written(text: str, path: Path | None, mark: str) -> None:
    """Prints a table, or puts it between its marks in a file. Raises SystemExit where the file lacks them."""
    if path is None:
        return print(text)
    before, begin, rest = path.read_text().partition(f"<!-- {mark} -->")
    _, end, after = rest.partition(f"<!-- end of {mark} -->")
    if not end:
        raise SystemExit(f"{path} lacks the marks <!-- {mark} --> and <!-- end of {mark} -->")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
