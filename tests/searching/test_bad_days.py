"""Full disks, Ctrl-C at bad moments, two searches at once, processes that fail: what is done is kept and said."""

import errno
import gc
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from dss_fast import Flow, GaussNewton, Lion, Solver, Target, compare, search
from dss_fast.files import write_tensors
from dss_fast.searching import folder
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
    write = folder.write_tensors

    def fills(*arguments, **options):
        calls.append(1)
        return full() if len(calls) > 3 else write(*arguments, **options)

    monkeypatch.setattr(folder, "write_tensors", fills)
    with pytest.raises(OSError, match="No space left") as caught:
        find(tmp_path)
    assert caught.value.result.solver.num_steps == 3 and "error.result" in caught.value.__notes__[-1]
    monkeypatch.setattr(folder, "write_tensors", write)
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
    assert "resume=True (--resume) continues" in capsys.readouterr().out
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
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")
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


def another_model(rank, out, part):
    """A search of two processes of which the second has another model, other conditions or another schedule."""
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")
    other = rank == 1
    scale = 1.5 if other and part == "weights" else 1.0

    def labels(n, generator):
        return {"y": torch.rand(n, 1, generator=generator, dtype=F64) + (other and part == "conditions")}

    def scaled(x, t, y):
        return scale * model(x, t) + 0.1 * y

    schedule = Flow(shift=3.0) if other and part == "schedule" else Flow()
    target = Target(scaled, (3,), schedule, cond=labels, dtype=F64, key="bend" if part == "conditions" else None)
    search(target, 3, method=TWO, out=out, progress=False, report=False)


@pytest.mark.parametrize("part", ["weights", "conditions", "schedule"])
def test_processes_that_do_not_search_for_the_same_are_refused(tmp_path, part):
    """Their sums would be a table for neither; all say which process differs in what, before the teacher is paid."""
    assert processes.group(another_model, tmp_path / "run", part, stderr=tmp_path) == [1, 1]
    word = {"weights": "outputs", "conditions": "conditions, outputs", "schedule": "schedule"}[part]
    for rank in range(2):
        assert f"process 1 searches for another {word}" in (tmp_path / str(rank)).read_text()
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def with_a_port(rank, out, port):
    import_module("dss_fast.searching.processes").ANSWER_SECONDS = 0.5
    os.environ["MASTER_PORT"] = str(port)
    find(out, method=TWO)


def test_a_port_that_another_program_has_stops_all_processes_with_words(tmp_path):
    """The second one's connection is taken and never answered, which PyTorch waits half an hour for."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert processes.group(with_a_port, tmp_path / "run", port, stderr=tmp_path) == [1, 1]
    for rank in range(2):
        assert f"MASTER_PORT={port} of 127.0.0.1 is taken by another program" in (tmp_path / str(rank)).read_text()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_search_in_any_mode_of_autograd(mode):
    expected = find(method=TWO).solver
    with mode():
        assert find(method=TWO).solver == expected
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Closed:
    """A stderr whose reader is gone."""

    closed, encoding = False, "utf-8"

    def write(self, text=""):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = write

    def isatty(self):
        return False


@pytest.mark.parametrize("stderr", [None, Closed(), "closed"])
def test_a_stderr_that_is_gone_costs_the_bar_alone(monkeypatch, tmp_path, stderr):
    if stderr == "closed":
        stderr = open(tmp_path / "stderr", "w")
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    found = find(progress=True).solver
    assert len(compare(Target(model, (3,), dtype=F64), [found, "ab2/3"], samples=8).rows) >= 2
    monkeypatch.undo()
    assert found == find().solver


def test_features_that_are_nan_choose_no_table():
    target = Target(model, (3,), dtype=F64, key="bend", features=lambda x: x / 0 * 0)
    with pytest.raises(ValueError, match="function features returned NaN or Inf"):
        search(target, 3, method=replace(TWO, select="features"), progress=False)


def only_one_has_a_folder(rank, out):
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")
    find(out if rank == 0 else None, method=TWO)


def test_a_folder_for_the_first_process_alone_leaves_none_waiting(tmp_path):
    assert processes.group(only_one_has_a_folder, tmp_path / "run") == [0, 0]
    assert Solver.load(tmp_path / "run" / "solver-3.json").num_steps == 3


def mixed_budgets(rank, out):
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")
    find(out, method=TWO, budget=9_000 if rank == 0 else "20s")


def test_processes_of_different_budgets_are_refused_and_none_waits(tmp_path):
    assert processes.group(mixed_budgets, tmp_path / "run", stderr=tmp_path) == [1, 1]
    assert "searches for another budget" in (tmp_path / "0").read_text()


def test_a_users_function_may_return_one_buffer_again_and_again():
    """Noise, conditions and features are copied when they come, so that later ones change nothing that is kept."""
    buffer, seen = torch.empty(64, 3, dtype=F64), torch.empty(64, 3, dtype=F64)

    def drawn(n, generator, into=None):
        noise = torch.randn(n, 3, generator=generator, dtype=F64)
        return noise if into is None else into[:n].copy_(noise)

    def features(x, into=None):
        found = x.flatten(1).tanh()
        return found if into is None else into[: len(x)].copy_(found)

    method = replace(TWO, select="features", samples=48)
    plain = Target(model, (3,), noise=drawn, features=features, dtype=F64, key="bend")
    shared = replace(plain, noise=partial(drawn, into=buffer), features=partial(features, into=seen))
    mine, theirs = (search(t, 3, method=method, progress=False).solver for t in (plain, shared))
    assert mine == theirs
    rows = [compare(t, [mine], samples=32, batch_size=8, progress=False).rows for t in (plain, shared)]
    assert [row.rmse for row in rows[0]] == [row.rmse for row in rows[1]]
