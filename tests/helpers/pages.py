"""The blocks of code in a page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/*.md")]


def blocks(page, language="python"):
    """The page's fenced blocks of a language, in order, each compiling to tracebacks with the page's own lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * (text[: m.start()].count("\n") + 1) + m[2] for m in found if m[1] == language]


def run(page, names, code):
    """Runs one block of a page in the names that the blocks before it left."""
    exec(compile(code, str(page), "exec"), names)
