"""Damage on the disk: no changed bit of a checkpoint is read, and what else is damaged is written again or left."""

import json
import os
import random
import shutil
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file

from dss_fast import Flow, GaussNewton, Lion, Solver, Target, search
from dss_fast.files import read_tensors, write_json, write_tensors
from dss_fast.searching import runs as running

F64 = torch.float64
METHODS = {
    "lion": Lion(samples=96, batch_size=16, unique_samples=48, check_samples=16, check_every=2, teacher_steps=20),
    "gauss_newton": GaussNewton(samples=32, batch_size=16, held_out_samples=16),
}


def model(x, t):
    return torch.tanh(2 * x) * (1 - t[:, None]) + 0.5 * torch.sin(3 * t[:, None]) - 0.7 * x


def find(out=None, method="gauss_newton", function=model, resume=True, **options):
    target = Target(function, (3,), dtype=F64, key="bend")
    options = {"progress": False, "report": False, **options}
    return search(target, 3, out=out, resume=resume, method=METHODS[method], **options)


def stopped(out, method, calls, after="checkpoint.safetensors"):
    """A search whose model fails so many calls after the first checkpoint, or another file."""
    left = [calls]

    def failing(x, t):
        left[0] -= (out / after).exists()
        if left[0] < 0:
            raise RuntimeError("stop")
        return model(x, t)

    with pytest.raises(RuntimeError, match="stop"):
        find(out, method, failing)
    return out


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """A search that stopped half way, and what it should end with."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(running, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(
        import_module("dss_fast.searching"), "doubt", lambda *what: (0, "")
    )  # this is set up before the fixture that does so
    expected = find(method=request.param)
    out = stopped(tmp_path_factory.mktemp(request.param) / "run", request.param, 40 if request.param == "lion" else 5)
    assert (out / "checkpoint.safetensors").exists()
    yield request.param, out, expected
    monkeypatch.undo()


@pytest.fixture(scope="module")
def begun(run, tmp_path_factory):
    """The same, stopped when there was a solver file."""
    method, _, expected = run
    return method, stopped(tmp_path_factory.mktemp("begun") / "run", method, 1, "solver-3.json"), expected


def flipped(path, generator):
    data = bytearray(path.read_bytes())
    at = generator.randrange(len(data))
    data[at] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def test_one_bit_of_a_checkpoint_is_refused_by_name(run, tmp_path):
    method, folder, expected = run
    generator, out = random.Random(method), shutil.copytree(folder, tmp_path / "run")
    path = out / "checkpoint.safetensors"
    before = path.read_bytes()
    for _ in range(40):
        flipped(path, generator)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors") as caught:
            find(out, method, function=lambda x, t: 1 / 0)
        assert len(str(caught.value)) < 500
        path.write_bytes(before)
    assert find(out, method).solvers == expected.solvers


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_what_people_read_may_be_damaged(run, tmp_path, name):
    """The checkpoint holds what a resumed search needs."""
    method, folder, expected = run
    out = shutil.copytree(folder, tmp_path / "run")
    (out / name).write_bytes(b"\xff{" + (out / name).read_bytes()[3:])
    said = (
        pytest.warns(UserWarning, match=r"log\.jsonl: 1 of \d+ events are missing") if name[0] == "l" else nullcontext()
    )
    with said:
        assert find(out, method).solvers == expected.solvers


@pytest.mark.parametrize("damage", ["missing", "truncated", "another"])
def test_a_finished_solver_file_is_mended_and_an_edited_one_left(tmp_path, damage):
    expected, path = find(tmp_path, resume=False).solver, tmp_path / "solver-3.json"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[:-20])
    else:
        Solver((0.0, 1.0), ((1.0,),), Flow()).save(path)
    edited = damage == "another"
    with pytest.warns(
        UserWarning, match=r"solver-3\.json.*" + ("not what this search wrote" if edited else "written again")
    ):
        assert find(tmp_path).solver == expected
    assert (path.read_bytes() == whole) is not edited


def test_a_log_that_is_gone_is_said_and_the_search_goes_on(run, tmp_path):
    method, folder, expected = run
    out = shutil.copytree(folder, tmp_path / "run")
    (out / "log.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"log\.jsonl: \d+ of \d+ events are missing"):
        assert find(out, method).solvers == expected.solvers


def test_a_folder_of_an_older_release_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"method": "two_stage"}')
    with pytest.raises(ValueError, match=r"cannot be resumed: dtype was None"):
        find(tmp_path)
    write_tensors(tmp_path / "checkpoint.safetensors", {}, {"checkpoint": '{"format": "dss_fast.run/4"}'})
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: its format is 'dss_fast.run/4'"):
        find(tmp_path)


def test_a_solver_file_may_be_edited_and_checks_itself(tmp_path):
    path = tmp_path / "mine.json"
    Solver((0.0, 0.5, 1.0), ((1.0, 0.0), (0.25, 0.75)), Flow(), name="mine").save(path)
    path.write_text(path.read_text().replace("0.25, 0.75", "0.5, 0.5"))
    assert Solver.load(path).coeffs[1] == (0.5, 0.5)
    path.write_text(path.read_text().replace("0.5, 0.5", "0.5, 0.6"))
    with pytest.raises(ValueError, match=r"mine\.json: coeffs\[1\]: must sum to 1"):
        Solver.load(path)


def test_a_file_that_an_older_release_sealed_is_read(tmp_path):
    path = tmp_path / "mine.json"
    solver = Solver((0.0, 0.5, 1.0), ((1.0, 0.0), (0.25, 0.75)), Flow(), name="mine")
    write_json(path, {"checksum": 32 * "0", **solver.to_dict()})
    assert Solver.load(path) == solver


def test_a_checkpoint_that_asks_for_more_than_was_paid_for_is_refused(run, tmp_path):
    """Its digest fits, as that of a file somebody wrote for a purpose may."""
    method, folder, _ = run
    if method == "lion":
        pytest.skip("the settings say how many samples it takes")
    out = shutil.copytree(folder, tmp_path / "run")
    tensors, metadata = read_tensors(out / "checkpoint.safetensors")
    saved = json.loads(metadata["checkpoint"])
    saved["state"]["sizes"][0] = 10**12
    write_tensors(out / "checkpoint.safetensors", tensors, {"checkpoint": json.dumps(saved)})
    with pytest.raises(ValueError, match="asks for 1,000,000,000,000 samples"):
        find(out, method)


@pytest.mark.parametrize("kind", ["pipe", "folder", "other"])
def test_what_is_no_checkpoint_is_refused_by_name_and_nothing_waits_for_it(run, tmp_path, kind):
    method, folder, _ = run
    out = shutil.copytree(folder, tmp_path / "run")
    path = out / "checkpoint.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        save_file({"weight": torch.ones(2)}, path)
    with pytest.raises((ValueError, OSError), match=r"checkpoint\.safetensors"):
        find(out, method)


@pytest.mark.parametrize("name", ["solver", "config"])
def test_a_pipe_for_json_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / f"{name}.json")
    with pytest.raises((ValueError, OSError), match=f"{name}.json"):
        Solver.load(tmp_path / "solver.json") if name == "solver" else find(tmp_path)


@pytest.mark.parametrize("what", ["edited", "noted", "linked", "of a friend", "as it was", "gone"])
def test_a_solver_file_that_the_search_did_not_write_stays_when_it_goes_on(begun, tmp_path, what):
    method, folder, expected = begun
    out = shutil.copytree(folder, tmp_path / "run")
    path, other = out / "solver-3.json", tmp_path / "mine.json"
    if what == "edited":
        data = json.loads(path.read_text())
        write_json(path, {**data, "name": "mine"})
    elif what == "noted":
        path.write_text(path.read_text().replace("{", "{ ", 1))
    elif what == "linked":
        shutil.copy(path, other)
        path.unlink()
        path.symlink_to(other)
    elif what == "of a friend":
        path.write_text("to do: ask")
    elif what == "gone":
        path.unlink()
    ours = what in ("as it was", "gone")
    mine = b"" if what == "gone" else path.read_bytes()
    with nullcontext() if ours else pytest.warns(UserWarning, match="not what this search wrote, and left as it is"):
        result = find(out, method)
    assert result.solvers == expected.solvers
    if ours:
        assert Solver.load(path) == expected.solver
        return
    assert path.read_bytes() == mine and path.is_symlink() == (what == "linked")
    path.unlink()
    find(out, method)
    assert Solver.load(path) == expected.solver


def test_a_solver_file_that_is_edited_while_the_search_runs_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "CHECKPOINT_SECONDS", 0.0)
    path, seen = tmp_path / "solver-3.json", []

    def edited(x, t):
        if path.exists() and not seen:
            path.write_text("mine")
            seen.append(path)
        return model(x, t)

    with pytest.warns(UserWarning, match="left as it is"):
        find(tmp_path, function=edited, resume=False)
    assert path.read_text() == "mine" and seen


def test_a_folder_in_the_place_of_a_solver_file_is_refused_at_once(begun, tmp_path):
    method, folder, _ = begun
    out = shutil.copytree(folder, tmp_path / "run")
    (out / "solver-3.json").unlink()
    (out / "solver-3.json").mkdir()
    with pytest.raises(FileExistsError, match=r"solver-3\.json, which is no file"):
        find(out, method, function=lambda x, t: 1 / 0)
