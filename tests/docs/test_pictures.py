"""The pictures of docs/ come from their command, are all used, and stay small."""

import re

import pytest

from helpers.pages import ROOT

PICTURES = ROOT / "docs" / "pictures"
PAGES = sorted(ROOT.glob("docs/*.md"))


def test_every_picture_is_used_and_made_by_the_command():
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from scripts import pictures

    used = {name for page in PAGES for name in re.findall(r"\(pictures/(\w+)\.png\)", page.read_text(encoding="utf-8"))}
    there = {path.stem for path in PICTURES.iterdir()}
    assert used == there == set(pictures.PICTURES)
    assert all(path.stat().st_size < 120_000 for path in PICTURES.iterdir())


@pytest.mark.parametrize("name", ["schedules", "tables", "ladder"])
def test_the_command_draws_them(name, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from scripts import pictures

    options = {"budget": 6_000} if name == "ladder" else {}
    pictures.PICTURES[name](tmp_path / "drawn.png", **options)
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
