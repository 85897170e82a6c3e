"""The folders that tests import are this checkout's, whatever packages of their names are installed beside it.

Some distributions ship a top-level `tests` or `examples` by mistake. A folder without `__init__.py` loses to those even
where it comes first on the path, and nothing here is imported as `tests`.
"""

import ast
import importlib
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).parents[1]
FOLDERS = {"helpers": ROOT / "tests", "examples": ROOT, "benchmarks": ROOT, "scripts": ROOT}


@pytest.fixture
def strangers(tmp_path):
    """A folder of installed packages that fail when they are imported."""
    for name in ("tests", *FOLDERS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the {name} of another project')\n")
    return tmp_path


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_wins_against_an_installed_package_of_its_name(name, strangers):
    assert Path(importlib.import_module(name).__file__).parent == FOLDERS[name] / name
    before, after = [str(FOLDERS[name]), str(strangers)], [str(strangers), str(FOLDERS[name])]
    assert Path(PathFinder.find_spec(name, before).origin).parent == FOLDERS[name] / name
    assert Path(PathFinder.find_spec(name, after).origin).parent == strangers / name  # this test would see one that won


def test_pytest_puts_the_checkout_first(strangers, tmp_path_factory):
    """Started elsewhere, with the strangers first on the path of the interpreter."""
    imports = " ".join(f"import {name};" for name in FOLDERS)
    test = tmp_path_factory.mktemp("elsewhere") / "test_it.py"
    test.write_text(f"def test_it():\n    {imports}\n    assert helpers.__file__.startswith({str(ROOT)!r})\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", test]
    environment = {**os.environ, "PYTHONPATH": str(strangers), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=test.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_imported_as_tests():
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "tests"], path
