"""A page says the same in Markdown and in HTML, and neither reads a user's words as markup."""

import base64
import re
from html.parser import HTMLParser

from dss_fast.page import Code, Heading, Picture, Table, Text, code, html, markdown

HOSTILE = "<script>alert('1')</script> **a**|b`c`\nd & \"e\" ](http://example.org)"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text of each."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.texts.append((tag, []))
            self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, parts in self.open:
            parts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, tag):
        return ["".join(parts) for name, parts in self.texts if name == tag]


def blocks(tmp_path):
    (tmp_path / "p.png").write_bytes(PIXEL)
    return [
        Heading("Section"),
        Text(f"**Yes**, of {code(HOSTILE)} & <b>."),
        Table(["name", "value", "at"], [[code(HOSTILE), "-0.5", ""], [code("b"), "1.25", "3"]]),
        Code(f"x = 1 < 2  # ``` {HOSTILE}", "python"),
        Code("{}", "json", "all & more"),
        Picture(tmp_path / "p.png", 'of "p" <i>'),
    ]


def test_html_is_escaped_and_whole(tmp_path):
    page = Page(html(f"Of {code(HOSTILE)}", blocks(tmp_path)))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "a", "link", "iframe", "b", "i", "object", "base"}
    (image,) = page.all("img")
    assert image["alt"] == 'of "p" <i>'
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PIXEL
    said = " ".join(HOSTILE.replace("`", "'").split())
    assert page.words("code").count(said) == 3  # title, sentence, cell
    assert f"x = 1 < 2  # ``` {HOSTILE}" in page.words("code")
    assert page.words("strong") == ["Yes"] and page.words("summary") == ["all & more"]
    assert [cell.get("class") for cell in page.all("td")] == [None, "number", "number"] * 2


def test_markdown_keeps_cells_and_fences(tmp_path):
    text = markdown("Title", blocks(tmp_path))
    header, rule, first, second = (line for line in text.splitlines() if line.startswith("|"))
    cells = re.split(r"(?<!\\)\|", first)
    assert len(cells) == len(re.split(r"\|", header)) == len(rule.split("|")) == len(second.split("|"))
    assert re.search(r"^(`{4,})python\n.*\n(?:.*\n)*?\1$", text, re.M)  # longer than what the code holds
    assert '![of "p" <i>](p.png)' in text and "## Section" in text and "<summary>all &amp; more</summary>" in text
