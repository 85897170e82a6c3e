"""The site builds in strict mode: every link and anchor, every name of the API page, no page left out."""

import os
import subprocess
import sys

import pytest

from helpers.pages import ROOT

pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="mkdocs-material and mkdocstrings-python build the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_there(site):
    assert {p.stem for p in ROOT.glob("docs/*.md")} | {"benchmarks", "contributing"} <= {
        p.stem for p in site.glob("*.html")
    }


def test_the_api_page_holds_docstrings(site):
    """As lists and code: an argument's line and the equation of ``sample``."""
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in ("dss_fast.sample", "dss_fast.search", "dss_fast.compare.compare", "dss_fast.Target",
                 "dss_fast.step.multistep_step", "dss_fast.table.StepTable", "dss_fast.serving.Batch"):  # fmt: skip
        assert f'id="{name}"' in page, name
    assert "<code>guidance_scale</code>: a number" in page
    assert ":class:" not in page and ":meth:" not in page


def test_a_page_fetches_nothing(site):
    """Scripts, styles and pictures come with the site."""
    for path in site.glob("*.html"):
        page = path.read_text(encoding="utf-8")
        for tag in ('<script src="http', '<img src="http', "fonts.googleapis", '<link rel="stylesheet" href="http'):
            assert tag not in page, (path.name, tag)
