"""Full disks, Ctrl-C at bad moments, two searches at once, processes that fail: what is done is kept and said."""

import errno
import gc
import os
import signal
import threading
import time
from importlib import import_module

import pytest
import torch

from dss_fast import GaussNewton, Lion, Solver, Target, search
from dss_fast.files import write_tensors
from dss_fast.searching import runs as running
from helpers import processes

F64 = torch.float64
LION = Lion(samples=96, batch_size=16, unique_samples=48, check_samples=16, check_every=2, teacher_steps=10)
TWO = GaussNewton(samples=32, batch_size=16, held_out_samples=16)


def model(x, t):
    return torch.tanh(2 * x) * (1 - t[:, None]) + 0.5 * torch.sin(3 * t[:, None]) - 0.7 * x


def find(out=None, method=LION, function=model, **options):
    options = {"progress": False, "report": False, **options}
    return search(Target(function, (3,), dtype=F64, key="bend"), 3, out=out, method=method, **options)


@pytest.fixture(autouse=True)
def checkpoint_after_every_event(monkeypatch):
    monkeypatch.setattr(running, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_safetensors_raises_for_a_full_disk_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="a.safetensors"):
        write_tensors(tmp_path / "gone" / "a.safetensors", {"x": torch.ones(2)}, {})
    with pytest.raises(OSError, match="full"):
        write_tensors("/dev/full/a.safetensors", {"x": torch.ones(2)}, {})


def test_a_disk_that_fills_up_ends_the_search_with_its_best(monkeypatch, tmp_path):
    calls = []
    write = running.write_tensors

    def fills(*arguments, **options):
        calls.append(1)
        return full() if len(calls) > 3 else write(*arguments, **options)

    monkeypatch.setattr(running, "write_tensors", fills)
    with pytest.raises(OSError, match="No space left") as caught:
        find(tmp_path)
    assert caught.value.result.solver.num_steps == 3 and "error.result" in caught.value.__notes__[-1]
    monkeypatch.setattr(running, "write_tensors", write)
    assert find(tmp_path, resume=True).solver == find().solver  # when there is space again


def test_ctrl_c_during_the_report_keeps_the_result(monkeypatch, tmp_path, capsys, interruptible):
    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(import_module("dss_fast.searching"), "write_report", interrupted)
    result = find(tmp_path, report=True)
    assert result.solver == find().solver and "without its report" in capsys.readouterr().out
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert find(tmp_path, report=True, resume=True).solver == result.solver
    assert (tmp_path / "report.md").exists()


class Swallows:
    """Gone while Ctrl-C is handled: what a destructor raises, Python drops."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_still_ends_the_search(tmp_path, capsys, interruptible):
    calls = []

    def interrupted(x, t):
        calls.append(1)
        if len(calls) == 60:
            _ = Swallows()
            del _
            gc.collect()
        return model(x, t)

    result = find(tmp_path, function=interrupted)
    assert result.interrupted and len(calls) < 200
    assert "resume=True continues" in capsys.readouterr().out
    assert find(tmp_path, resume=True).solver == find().solver


def test_continuing_is_only_promised_where_there_is_something_to_continue(tmp_path, capsys, interruptible):
    calls = []

    def interrupted(x, t):
        calls.append(1)
        if len(calls) == 20:  # in the teacher: nothing worth saving yet
            signal.raise_signal(signal.SIGINT)
        return model(x, t)

    with pytest.raises(KeyboardInterrupt):  # nothing is found, so nothing is returned
        find(tmp_path, method=TWO, function=interrupted)
    assert "continues" not in capsys.readouterr().out and not (tmp_path / "checkpoint.safetensors").exists()
    assert find(tmp_path, method=TWO, resume=True).solver == find(method=TWO).solver


def test_one_search_a_folder(tmp_path):
    started, go = threading.Event(), threading.Event()

    def waits(x, t):
        started.set()
        assert go.wait(60)
        return model(x, t)

    thread = threading.Thread(target=lambda: find(tmp_path, function=waits))
    thread.start()
    assert started.wait(60)
    for resume in (False, True):
        with pytest.raises(OSError, match="another search is running in it"):
            find(tmp_path, resume=resume)
    go.set()
    thread.join(60)
    assert find(tmp_path, resume=True).solver == find().solver


def rank_of_two(rank, out, how):
    """A search of which the second process has a bad day at its fiftieth model call."""
    running.CHECKPOINT_SECONDS = 0.0
    import_module("dss_fast.searching").doubt = lambda draws: 0
    calls = []

    def unwell(x, t):
        calls.append(1)
        if rank == 1 and len(calls) == 50:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises":
                raise RuntimeError("the second process is unwell")
            if how == "slow":
                time.sleep(3)
        return model(x, t)

    find(out, function=unwell, resume=True)


@pytest.mark.parametrize("how", ["killed", "raises", "slow"])
def test_two_processes_of_which_one_fails(tmp_path, how):
    """All are out soon and with the cause, where they could wait half an hour, and one process goes on; a slow one is
    waited for."""
    codes = processes.group(rank_of_two, tmp_path / "run", how, stderr=tmp_path)
    error = (tmp_path / "0").read_text()
    if how == "slow":
        assert codes == [0, 0], error
    else:
        assert codes == [1, -signal.SIGKILL if how == "killed" else 1]
        assert "Connection" in error, error
        assert how != "raises" or "first to fail was process 1: RuntimeError: the second" in error, error
    alone, whole = find(tmp_path / "run", resume=True).solver, find().solver  # sums over processes round otherwise
    assert alone.timesteps == pytest.approx(whole.timesteps, abs=1e-6)
    assert Solver.load(tmp_path / "run" / "solver-3.json") == alone
