"""The page of pipelines: a handful of its rows made anew, and its rows those of the command."""

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from examples import pipeline_matrix  # noqa: E402
from examples.tiny_pipelines import ALL, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def rows():
    page = PAGE.read_text(encoding="utf-8")
    lines = page.split(pipeline_matrix.BEGIN)[1].split(pipeline_matrix.END)[0].strip().splitlines()
    lines = [line for line in lines if line.startswith("|")]
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}


def test_the_page_has_the_commands_rows_and_no_failure():
    page = rows()
    assert len(page) == len(ALL) >= 60
    names = {kind.removesuffix("Pipeline") for kind in page}
    for name in ALL[::4]:
        if name not in ("kolors", "stable_audio"):  # which need sentencepiece and torchsde
            assert type(build(name)[0]).__name__.removesuffix("Pipeline") in names
    for kind, cells in page.items():
        assert len(cells) == len(pipeline_matrix.COLUMNS)
        for cell in cells:
            assert re.fullmatch(r"equal, \d+e[-+]\d+|refused \(\d+\)", cell), (kind, cell)


# Times of each token, a VP model; a list of samples, and frames, which test_diffusers_targets.py has in each run.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("z_image", "animatediff")]


@pytest.mark.parametrize("name", ["ltx_condition", "sd", *SLOW])
def test_rows_are_made_anew(name):
    row = pipeline_matrix.Row(name)
    page = rows()[type(row.pipe).__name__]
    for made, written in zip(row.cells(), page, strict=True):
        assert made.startswith("equal") and written.startswith("equal"), (made, written)


@pytest.mark.parametrize("name, cause", [("controlnet", "runs controlnet"), ("flux_img2img", "starts from an image")])
def test_what_is_no_target_says_why(name, cause):
    row = pipeline_matrix.Row(name)
    with pytest.raises(ValueError, match=cause):
        row.target()


def test_reasons_stand_once_below_the_table():
    lines = ["| pipeline | a | b |", "| --- | --- | --- |", "| P | equal, 1e-07 | refused: P is new |"]
    made = pipeline_matrix.numbered([*lines, "| Q | open: no such file | refused: Q is new |"])
    assert made.splitlines()[2:] == [
        "| P | equal, 1e-07 | refused (1) |", "| Q | open (2) | refused (1) |", "", "1. is new", "2. no such file"
    ]  # fmt: skip


def test_a_cell_tells_a_difference_from_a_failure():
    def refuse():
        raise ValueError("this. that")

    assert pipeline_matrix.cell(lambda: 1e-3).startswith("**differs**")
    assert pipeline_matrix.cell(lambda: float("nan")).startswith("**differs**")
    assert pipeline_matrix.cell(lambda: [][0]).startswith("**failed**: IndexError")
    assert pipeline_matrix.cell(refuse) == "refused: this"
