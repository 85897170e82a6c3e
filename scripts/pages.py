"""What the site of docs/ needs beyond its pages: two pages that stand elsewhere, and docstrings as Markdown.

`mkdocs.yml` names this file twice, as a hook and as an extension of the reader of docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}
# A paragraph of a docstring that tells arguments: "name, other: text" at its margin, more text indented below.
ARGUMENT = re.compile(r"((?:\*{0,2}\w+, )*\*{0,2}\w+): (.+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand outside docs/."""
    for source, name in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links between docs/ and the pages outside it to where the site has them."""
    for source, name in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    if page.file.src_uri in ELSEWHERE.values():
        markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)
    return markdown


class Plain(Extension):
    """Docstrings as they stand in the source, plain text with names and equations, as Markdown."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)


def markdown_of(text: str) -> str:
    """Paragraphs of arguments as lists, references as code; equations, which are indented, stay."""
    text = re.sub(r":(?:func|class|meth):`~?([^`]+)`", r"`\1`", text)
    title, *parts = re.split(r"\n\s*\n", text.replace("``", "`"))
    return "\n\n".join([title, *map(_paragraph, parts)])


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if not ARGUMENT.match(lines[0]):
        return text
    found = []
    for line in lines:
        told = ARGUMENT.match(line)
        names = ", ".join(f"`{name}`" for name in told[1].split(", ")) if told else ""
        found.append(f"- {names}: {told[2]}" if told else f"    {line.strip()}")
    return "\n".join(found)
