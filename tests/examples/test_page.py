"""What the scripts behind docs/real.md share: a table, and its place in a page."""

import pytest

from examples.page import put, table

MARKS = "<!-- a -->", "<!-- end of a -->"


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\n\nold\n\n<!-- end of a -->\nafter\n<!-- b -->\nkept\n<!-- end of b -->\n")
    put(lambda: "new", page, MARKS)
    assert page.read_text() == (
        "before\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nafter\n<!-- b -->\nkept\n<!-- end of b -->\n"
    )


def test_what_another_has_written_to_the_page_meanwhile_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- a --><!-- end of a -->")

    def measure():
        page.write_text("theirs\n" + page.read_text())
        return "new"

    put(measure, page, MARKS)
    assert page.read_text() == "theirs\n<!-- a -->\n\nnew\n\n<!-- end of a -->"


@pytest.mark.parametrize("text", ["", "<!-- a -->", "<!-- end of a --><!-- a -->", 2 * "<!-- a --><!-- end of a -->"])
def test_a_page_without_the_marks_is_refused_before_anything_is_measured(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="<!-- a --> and <!-- end of a --> must stand in it once each"):
        put(lambda: pytest.fail("measured"), page, MARKS)
    assert page.read_text() == text


def test_each_row_of_a_table_is_printed_as_it_comes(capsys):
    def rows():
        yield ["one", "1"]
        assert "| one | 1 |" in capsys.readouterr().out
        yield ["two", "2"]

    assert table(("name", "number"), rows()) == ["| name | number |", "| --- | --- |", "| one | 1 |", "| two | 2 |"]
