"""Damage on the disk: every file of a run folder is refused or rebuilt by name when a bit of it has changed."""

import os
import random
import shutil
from importlib import import_module

import pytest
import torch

from dss_fast import Flow, GaussNewton, Lion, Solver, Target, search
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


def stopped(out, method, calls):
    """A search whose model fails so many calls after the first checkpoint; its teacher files stay."""
    left = [calls]

    def failing(x, t):
        left[0] -= (out / "checkpoint.safetensors").exists()
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
        import_module("dss_fast.searching"), "doubt", lambda draws: 0
    )  # this is set up before the fixture that does so
    expected = find(method=request.param)
    out = stopped(tmp_path_factory.mktemp(request.param) / "run", request.param, 40 if request.param == "lion" else 5)
    assert (out / "checkpoint.safetensors").exists() and list(out.glob("teacher/*/*.safetensors"))
    yield request.param, out, expected
    monkeypatch.undo()


def flipped(path, generator):
    data = bytearray(path.read_bytes())
    at = generator.randrange(len(data))
    data[at] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.json", "log.jsonl"])
def test_one_bit_is_refused_by_name(run, tmp_path, name):
    method, folder, expected = run
    generator = random.Random(name + method)
    for trial in range(12):
        out = tmp_path / str(trial)
        shutil.copytree(folder, out)
        before = (out / name).read_bytes()
        flipped(out / name, generator)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
            find(out, method, function=lambda x, t: 1 / 0)
        assert len(str(caught.value)) < 500
        (out / name).write_bytes(before)
    assert find(out, method).solvers == expected.solvers


def test_one_bit_of_a_trajectory_is_rebuilt_by_name(run, tmp_path):
    method, folder, expected = run
    generator = random.Random(method)
    for trial in range(4):
        out = tmp_path / str(trial)
        shutil.copytree(folder, out)
        path = generator.choice(sorted(out.glob("teacher/*/*.safetensors")))
        flipped(path, generator)
        with pytest.warns(UserWarning, match=rf"{path.name}: .*computing it again"):
            assert find(out, method).solvers == expected.solvers


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "another"])
def test_a_finished_solver_file_is_mended(tmp_path, damage):
    expected, path = find(tmp_path, resume=False).solver, tmp_path / "solver-3.json"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[:-20])
    elif damage == "flipped":
        flipped(path, random.Random(0))
    else:
        Solver((0.0, 1.0), ((1.0,),), Flow()).save(path)
    with pytest.warns(UserWarning, match=r"solver-3\.json.*written again"):
        assert find(tmp_path).solver == expected
    assert path.read_bytes() == whole and Solver.load(path) == expected


def test_a_log_that_is_gone_is_said_and_the_search_goes_on(run, tmp_path):
    method, folder, expected = run
    out = shutil.copytree(folder, tmp_path / "run")
    (out / "log.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"log\.jsonl: missing"):
        assert find(out, method).solvers == expected.solvers


def test_a_folder_of_an_older_release_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"method": "gauss_newton"}')
    with pytest.raises(ValueError, match=r"config\.json: carries no checksum"):
        find(tmp_path)


def test_a_solver_edited_by_hand_is_told_what_to_do(tmp_path):
    path = tmp_path / "mine.json"
    Solver((0.0, 0.5, 1.0), ((1.0, 0.0), (0.25, 0.75)), Flow(), name="mine").save(path)
    text = path.read_text().replace("0.25, 0.75", "0.5, 0.5")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json: its checksum .*remove the checksum"):
        Solver.load(path)
    lines = [line for line in text.splitlines() if "checksum" not in line]
    lines[-2] = lines[-2].rstrip(",")
    path.write_text("\n".join(lines))
    assert Solver.load(path).coeffs[1] == (0.5, 0.5)


def test_a_bit_of_a_solver_file_never_passes(tmp_path):
    path = tmp_path / "mine.json"
    Solver((0.0, 0.5, 1.0), ((1.0, 0.0), (0.25, 0.75)), Flow(), name="mine").save(path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=os.path.basename(path)):
            Solver.load(path)
