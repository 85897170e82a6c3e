"""A page of blocks, written once and rendered twice: as Markdown, and as one HTML file that needs no other file.

A sentence may hold `code` between backticks and **strong words** between asterisks. What a user named (a solver, a
model, a path) goes in through :func:`code`, so that neither rendering reads it as markup.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

MARKED = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*")
NUMBER = re.compile(r"[\d\N{MINUS SIGN}-]")
DPI = 140  # of the pictures; a CSS pixel is 1/96 inch
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d8dce1; --code: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #16181b; --line: #3a3f46; --code: #23272c; }
}
body { margin: 0; color: var(--ink); background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; margin: .6rem 0; overflow-wrap: anywhere; }
code, pre { font: .875em/1.5 ui-monospace, monospace; background: var(--code); border-radius: 4px; }
code { padding: .1em .3em; }
pre { padding: .8rem 1rem; overflow-x: auto; }
pre code { padding: 0; font-size: 1em; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
.wide { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th.number, td.number { text-align: right; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; box-sizing: border-box; padding: .5rem; background: #fff; border-radius: 4px; }
@media print {
  :root { font-size: 12px; color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; --code: #f3f4f6; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .wide { overflow: visible; }
}
"""


@dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells below a row of titles, all of one length."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    """Lines as they stand, in a language. summary: the words above them, where they are folded away."""

    text: str
    language: str
    summary: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file, and what it shows in a few words."""

    path: Path
    alt: str


Block = Heading | Text | Table | Code | Picture


def code(text: object) -> str:
    """Words of a user's as `code`, on one line and without backticks of their own."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split()) or ' '}`"


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown, its pictures named beside it."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file: pictures inline, no script, and a policy that forbids to load anything."""
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(title.replace('`', ''))}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{_inline(title)}</h1>",
        *map(_html, blocks),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Table):
        rows = [block.titles, ["---"] * len(block.titles), *block.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
        lines = f"{fence}{block.language}\n{block.text}\n{fence}"
        return (
            f"<details><summary>{escape(block.summary)}</summary>\n\n{lines}\n\n</details>" if block.summary else lines
        )
    if isinstance(block, Picture):
        return f"![{block.alt}]({block.path.name})"
    return block.text


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_inline(block.text)}</h2>"
    if isinstance(block, Table):
        columns = zip(*block.rows, strict=True)
        kinds = [' class="number"' if all(NUMBER.match(c or "0") for c in column) else "" for column in columns]
        head, *rows = (_row(tag, row, kinds) for tag, row in [("th", block.titles), *(("td", r) for r in block.rows)])
        body = "\n".join(rows)
        return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    if isinstance(block, Code):
        lines = f"<pre><code>{escape(block.text)}</code></pre>"
        return f"<details><summary>{escape(block.summary)}</summary>{lines}</details>" if block.summary else lines
    if isinstance(block, Picture):
        content = block.path.read_bytes()
        width = int.from_bytes(content[16:20]) * 96 // DPI  # the header of a PNG file
        data = base64.b64encode(content).decode()
        return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(block.alt)}" width="{width}"></figure>'
    return f"<p>{_inline(block.text)}</p>"


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    """A row of a table; kinds: each column's attributes."""
    pairs = zip(kinds, cells, strict=True)
    return f"<tr>{''.join(f'<{tag}{kind}>{_inline(cell)}</{tag}>' for kind, cell in pairs)}</tr>"


def _inline(text: str) -> str:
    """A sentence's HTML: all of it escaped, what is marked in its tags."""
    parts, at = [], 0
    for found in MARKED.finditer(text):
        tag = "code" if found[1] is not None else "strong"
        parts += [escape(text[at : found.start()]), f"<{tag}>{escape(found[1] or found[2])}</{tag}>"]
        at = found.end()
    return "".join([*parts, escape(text[at:])])
