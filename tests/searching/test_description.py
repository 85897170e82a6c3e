"""The look at a description: wrong ones are doubted and the right one named, right ones are left in peace."""

import json
import warnings
from dataclasses import replace

import pytest

import dss_fast.searching
from benchmarks import zoo
from dss_fast import Target, search
from dss_fast.draws import Draws
from dss_fast.searching.description import doubt
from examples import mixture, mnist
from helpers.descriptions import right, wrong

RIGHT, WRONG = right(), wrong()
SHIPPED = {
    "mnist.flow": mnist.flow,
    "mnist.flow at 1.5": mnist.flow_guided,
    "mnist.vp": mnist.vp,
    "mixture": mixture.digits,
    "textures32": lambda: zoo.target("textures32_conv"),
    "faces24": lambda: zoo.target("faces24_dit"),
    "digits8": lambda: zoo.target("digits8_mlp"),
    "moons": lambda: zoo.target("moons_mixture"),
}


@pytest.fixture(autouse=True)
def undoubted(monkeypatch):
    """Here the look is what is tested."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_description_is_doubted_and_the_right_one_named(name):
    target, named = WRONG[name]
    with pytest.warns(UserWarning, match="do not seem to belong together") as caught:
        _, said = doubt(Draws.of(target), whole=False)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "all would be in order" in said and named in said.rpartition("; with ")[2]


@pytest.mark.parametrize("name", [*RIGHT, *SHIPPED])
def test_a_right_description_is_not_doubted(name):
    target = RIGHT[name] if name in RIGHT else SHIPPED[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for whole in (True, False):
            assert doubt(Draws.of(target), whole)[1] == ""


def test_a_search_of_few_evaluations_is_doubted_and_its_report_answers_nothing(tmp_path):
    """Also where the search is resumed, which does not look again."""
    target = WRONG["x0 as velocity"][0]
    with pytest.warns(UserWarning, match="do not seem to belong together.*prediction_type='x0'") as caught:
        result = search(target, 3, budget=300, out=tmp_path, progress=False, report=False)
    assert [w.filename for w in caught if "belong together" in str(w.message)] == [__file__]
    assert result.evaluations <= 300
    search(target, 3, budget=300, out=tmp_path, progress=False, resume=True)
    config = json.loads((tmp_path / "config.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert "prediction_type='x0'" in config["doubt"]
    assert "No answer" in text and "Yes" not in text and "do not seem to belong together" in text


def test_a_right_description_costs_46_evaluations_on_top_of_a_small_budget():
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return RIGHT["flow"].model(x, t)

    target = Target(counted, RIGHT["flow"].shape, key="counted")
    doubt(Draws.of(target), whole=False)
    assert sum(calls) == 46
    calls.clear()
    doubt(Draws.of(target))
    assert sum(calls) == 82 == dss_fast.searching.look_evaluations(replace(target, shape=(64,)))
