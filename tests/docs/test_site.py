"""The site builds in strict mode: every link and anchor, every name of the API page, no page left out."""

import os
import re
import shutil
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


def test_the_search_needs_no_server(site):
    """Its index and its worker come as scripts; one from elsewhere is asked for nowhere."""
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    for path in set(site.glob("*.html")) - {site / "404.html"}:  # which a server shows at any address
        page = path.read_text(encoding="utf-8")
        assert '<script src="iframe-worker.js"></script>' in page and "unpkg.com" not in page, path.name


def test_the_search_finds_in_pages_opened_as_files(site, tmp_path):
    """As a browser shows the page for an address that carries a query."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    address = f"file://{site / 'index.html'}?q=heun"
    switches = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command = [browser, *switches, "--virtual-time-budget=20000", "--dump-dom", address]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'md-search-result__meta">(\d+) matching documents', shown.stdout)
    assert found and int(found[1]) >= 2, shown.stderr[-500:]
