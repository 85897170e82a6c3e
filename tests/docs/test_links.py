"""Every relative link and anchor in the README, CONTRIBUTING, benchmarks/README.md and docs/ leads somewhere."""

import re

import pytest

from helpers.pages import PAGES, ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def prose(text):
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?m)^ {4}.*$", "", text)


def anchors(text):
    """The names that headings get: small letters, digits, - and _; a dash for each space."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page, root=ROOT):
    """(link, why) for each relative link that leads nowhere."""
    text = page.read_text(encoding="utf-8")
    for match in LINK.finditer(re.sub(r"`([^`]*)`", "x", prose(text))):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield link, "no such file"
        elif not target.is_relative_to(root):
            yield link, "outside of the project"
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield link, f"no such heading; there are {sorted(anchors(target.read_text(encoding='utf-8')))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    assert list(broken(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_test_that_a_page_names_is_there(page):
    for name in re.findall(r"[\w/]*test_\w+\.py", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_every_page_is_linked_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n\n[a](#a-b-c) [b](none.md) [c](#none) [d](https://a.b/c)\n\n```\n[e](none)\n```\n")
    assert [link for link, _ in broken(page, tmp_path)] == ["none.md", "#none"]
