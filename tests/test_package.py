"""What a build puts into the sdist and the wheel: all that is needed, nothing of the tests, with no torch in reach."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dss_fast

pytestmark = pytest.mark.xdist_group("package")
ROOT = Path(__file__).parent.parent
FILES = "setup.py pyproject.toml MANIFEST.in README.md CHANGELOG.md LICENSE".split()
BUILD = "import sys; from setuptools.build_meta import build_{0} as build; build(sys.argv[1])"


def build(what, source, out):
    """Builds as pip's isolated build does, where torch cannot be imported; gives the file and what was said."""
    (out / "torch.py").write_text("raise ImportError('no torch in this environment')\n")
    command = [sys.executable, "-c", BUILD.format(what), str(out)]
    done = subprocess.run(command, cwd=source, env={"PYTHONPATH": str(out)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.tar.gz" if what == "sdist" else "*.whl")
    return file, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a checkout, and the wheel of that sdist."""
    pytest.importorskip("setuptools", minversion="64", reason="the build tool, in requirements.txt")
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("out")
    for name in FILES:
        if not (ROOT / name).exists():
            pytest.skip(f"no {name}: these are not the tests of a checkout")
        shutil.copy(ROOT / name, checkout)
    for name in ("csrc", "dss_fast", "tests", "examples"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    sdist, _ = build("sdist", checkout, out)
    with tarfile.open(sdist) as packed:
        packed.extractall(out, filter="data")
        inside = sorted(name.partition("/")[2] for name in packed.getnames() if packed.getmember(name).isfile())
    wheel, said = build("wheel", out / sdist.name.removesuffix(".tar.gz"), out)
    return inside, zipfile.ZipFile(wheel), wheel.name, said


def test_the_sdist_holds_what_the_build_needs_and_no_tests(built):
    inside = set(built[0])
    assert inside >= set(FILES) | {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dss_fast").rglob("*.py")}
    assert inside >= sources and len(sources) > 40
    assert not [name for name in inside if name.startswith(("tests", "examples")) or name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_the_package_with_its_tables_and_types_alone(built):
    names = set(built[1].namelist())
    package = {name for name in names if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dss_fast").rglob("*")
        if path.suffix in (".py", ".json", ".jinja", ".safetensors") or path.name == "py.typed"
    }
    assert package == wanted and "dss_fast/py.typed" in package and "dss_fast/solvers/sit-xl-2-256.json" in package


def test_without_torch_the_build_says_how_to_add_the_extension_and_runs_everywhere(built):
    _, _, name, said = built
    assert name == f"dss_fast-{dss_fast.__version__}-py3-none-any.whl"
    assert "no torch in this environment" in said and "pip install --no-build-isolation --no-deps ." in said


@pytest.mark.parametrize("why", ["no torch in this environment", "nowhere.h"])
def test_a_build_that_must_have_the_extension_fails_without_it(tmp_path, monkeypatch, why):
    """As make's must, where there is a compiler: quietly without, every test of the C++ code would be skipped."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "dss_fast").mkdir()
    (tmp_path / "dss_fast" / "__init__.py").write_text("")
    (tmp_path / "dss_fast" / "version.py").write_text('__version__ = "1"\n')  # which pyproject.toml asks
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "step.cpp").write_text('#include "nowhere.h"\n')
    if why.startswith("no torch"):
        (tmp_path / "torch.py").write_text(f"raise ImportError({why!r})\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    elif shutil.which("c++") is None:
        pytest.skip("no compiler")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    monkeypatch.delenv("DSS_FAST_NO_EXTENSION", raising=False)
    for required, code in (("", 0), ("1", 1)):
        monkeypatch.setenv("DSS_FAST_REQUIRE_EXTENSION", required)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and why in done.stdout + done.stderr, done.stderr
    assert "DSS_FAST_NO_EXTENSION=1" in done.stderr


def test_one_version_everywhere_and_extras_that_do_not_move_torch(built):
    (name,) = [name for name in built[1].namelist() if name.endswith(".dist-info/METADATA")]
    about = Parser().parsestr(built[1].read(name).decode())
    assert about["Version"] == dss_fast.__version__ and about["Requires-Python"] == ">=3.11"
    assert about["License"] == "Apache-2.0" and any(name.endswith("/LICENSE") for name in built[1].namelist())
    assert f"\n## {dss_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {dss_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    needed = about.get_all("Requires-Dist")
    assert [line for line in needed if "extra ==" not in line] == [
        "torch>=2.11", "numpy", "safetensors>=0.5", "tqdm>=4.60", "lion-pytorch>=0.2"
    ]  # fmt: skip
    assert not [line for line in needed if line.startswith("torch") and "extra ==" in line]
    (everything,) = [line for line in needed if 'extra == "all"' in line]
    assert set(re.search(r"\[(.*)\]", everything)[1].split(",")) == {"plots", "triton", "diffusers"}


def test_an_editable_install_is_a_path(built, tmp_path):
    """setuptools' finder stands behind the path, where the clone's own folder `dss_fast` is an empty namespace."""
    source = tmp_path / "clone" / "dss_fast"
    source.mkdir(parents=True)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    (source / "dss_fast").mkdir()
    shutil.copy(ROOT / "dss_fast" / "version.py", source / "dss_fast")
    (source / "dss_fast" / "__init__.py").write_text("")
    (tmp_path / "out").mkdir()
    wheel, _ = build("editable", source, tmp_path / "out")
    with zipfile.ZipFile(wheel) as found:
        (path,) = (name for name in found.namelist() if name.endswith(".pth"))
        assert found.read(path).decode().strip() == str(source)
        assert not [name for name in found.namelist() if name.endswith(".py")]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_says_which_python_it_needs_and_leaves_nothing(tmp_path):
    old = tmp_path / "python3.9"
    told = 'import sys; sys.version_info = (3, 9, 2, "final", 0); exec(sys.argv[1])'
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{told}' \"$2\"\n")
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode
        and "needs Python 3.11 or newer, and this is 3.9" in done.stderr
        and not (tmp_path / "venv").exists()
    )
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    old.rename(tmp_path / "venv" / "bin" / "python")  # one that an older Makefile has made
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "this is 3.9: remove" in done.stderr
