"""What the scripts behind docs/real.md share: a table of samplers, and its place between two marks of a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; each is printed as it comes, since a row can take minutes."""
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    return lines


def parser_of(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace what stands between the marks in it")
    return parser


def put(measure: Callable[[], str], page: Path | None, marks: tuple[str, str]) -> None:
    """Print what ``measure`` returns, or put it between the marks of a page. Raises ValueError where these are not."""
    if page is None:
        print(measure())
        return
    parts = page.read_text(encoding="utf-8").split(marks[0])
    if len(parts) != 2 or parts[1].count(marks[1]) != 1:
        raise ValueError(f"{page}: the marks {marks[0]} and {marks[1]} must stand in it once each, in this order")
    text = measure()
    # The page is read again: a measurement takes minutes, in which another one may have written to it.
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    page.write_text(f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{rest.split(marks[1])[1]}", encoding="utf-8")
