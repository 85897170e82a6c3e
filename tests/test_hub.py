"""Tables on the hub: a folder stands in for it, behind the calls that huggingface_hub has."""

import inspect
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dss_fast import Solver, find_solver
from dss_fast.__main__ import main
from dss_fast.hub import fetched, is_address

pytestmark = pytest.mark.fast


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """owner/repo/revision/file in a folder."""
    module = ModuleType("huggingface_hub")
    root = tmp_path / "hub"

    class HfApi:
        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            (root / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)
            (root / repo_id / "private").write_text(str(private))

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message=None):
            to = root / repo_id / "main" / path_in_repo
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path_or_fileobj, to)

    def hf_hub_download(repo_id, filename, *, revision=None):
        found = root / repo_id / (revision or "main") / filename
        if not found.exists():
            raise FileNotFoundError(f"{repo_id} has no {filename}")  # as EntryNotFoundError, an OSError
        return str(found)

    module.HfApi, module.hf_hub_download = HfApi, hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_table_that_was_pushed_is_loaded_by_its_address(hub, tmp_path, capsys):
    mine = find_solver("sit-xl-2-256/5")
    mine.save(tmp_path / "mine.json")
    assert main("push mine.json owner/tables".split()) == 0
    assert "hf://owner/tables/mine.json" in capsys.readouterr().out
    address = "hf://owner/tables/mine.json"
    assert Solver.load(address) == Solver.load(Path(address)) == find_solver(address) == mine
    assert main(["push", "mine.json", "owner/tables", "--name", "small/five.json", "--private"]) == 0
    assert Solver.load("hf://owner/tables/small/five.json") == mine
    assert (hub / "owner/tables/private").read_text() == "True"
    (hub / "owner/tables/v1").mkdir()
    find_solver("ab2/3").save(hub / "owner/tables/v1/mine.json")
    assert Solver.load("hf://owner/tables@v1/mine.json").num_steps == 3
    assert main(["show", address]) == 0 and "sit-xl-2-256/5: 5 steps" in capsys.readouterr().out


def test_what_is_no_table_is_not_pushed(hub, tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    find_solver("ab2/3").save(tmp_path / "mine.json")
    for line, words in {
        "push other.json owner/tables": "not a solver", "push gone.json owner/tables": "gone.json",
        "push mine.json tables": "owner/repo", "push mine.json owner/tables --name five.txt": ".json",
    }.items():  # fmt: skip
        assert main(line.split()) == 2 and words in capsys.readouterr().err
    assert not hub.exists()


@pytest.mark.parametrize("address", ["hf://owner/five.json", "hf://owner/repo/five.txt", "hf://", "hf://a/b/../c"])
def test_other_addresses_are_refused(hub, address):
    assert is_address(address) and not is_address("hf.json")
    with pytest.raises(ValueError, match="hf://owner/repo/file.json"):
        fetched(address)


def test_what_is_not_there_and_no_hub_are_one_line(hub, capsys, monkeypatch):
    assert main(["show", "hf://owner/repo/gone.json"]) == 2 and "has no gone.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["show", "hf://owner/repo/gone.json"]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


def test_the_real_one_has_these_calls(monkeypatch):
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    real = pytest.importorskip("huggingface_hub")
    inspect.signature(real.hf_hub_download).bind(repo_id="a/b", filename="c.json", revision=None)
    inspect.signature(real.HfApi.create_repo).bind(None, repo_id="a/b", private=False, exist_ok=True)
    inspect.signature(real.HfApi.upload_file).bind(
        None, path_or_fileobj="c.json", path_in_repo="c.json", repo_id="a/b", commit_message="c"
    )


def test_a_hub_that_is_out_of_reach_is_said_in_a_line(hub, tmp_path, monkeypatch, capsys):
    """The client's own errors are of no class that Python has, as httpx.ConnectError."""

    def unreachable(self, repo_id, **options):
        raise type("ConnectError", (Exception,), {})("Name or service not known")

    monkeypatch.setattr(sys.modules["huggingface_hub"].HfApi, "create_repo", unreachable)
    find_solver("ab2/3").save(tmp_path / "mine.json")
    assert main("push mine.json owner/tables".split()) == 2
    said = capsys.readouterr().err
    assert "owner/tables: the hub does not answer (ConnectError: Name or service not known)" in said
    assert "Traceback" not in said
