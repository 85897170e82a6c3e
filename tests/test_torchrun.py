"""Under torchrun: each process takes its GPU before it builds a model there, and two processes search as one does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dss_fast import GaussNewton, Solver, Target, search
from dss_fast.__main__ import main
from dss_fast.searching.processes import take_local_device
from examples import imagenet256
from helpers import processes

ROOT = Path(__file__).parent.parent
MODEL = """
import torch
from dss_fast import Flow, Target

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t):
        return torch.tanh(self.scale * x + t[:, None]) - 0.3 * x

def target():
    return Target(Net().requires_grad_(False), (6,), Flow())
"""

SEARCHES = """
import faulthandler, os, toy
from importlib import import_module
from dss_fast import search
from dss_fast import GaussNewton

import_module("dss_fast.searching").doubt = lambda *what: (0, "")  # the field is no model of data

faulthandler.dump_traceback_later(100, exit=True)  # a process that hangs ends, and fails the test
rank, tables = int(os.environ["RANK"]), []
for unwell in (None, 1, 0, None):
    calls = []

    def model(x, t, net=toy.Net().requires_grad_(False)):
        calls.append(1)
        if rank == unwell and len(calls) == 100:
            raise RuntimeError("unwell")
        return net(x, t)

    method = GaussNewton(samples=16, batch_size=8, held_out_samples=8)
    try:
        run = search(model, 3, shape=(6,), method=method, budget=2500, progress=False, out=f"run{len(tables)}")
        tables.append(run.solver.coeffs)  # while the first process writes a report, the other is here already
    except RuntimeError as error:
        assert rank == unwell or f"first to fail was process {unwell}: RuntimeError: unwell" in error.__notes__[-1]
        tables.append(None)
assert tables == [tables[0], None, None, tables[0]] and tables[0], tables
"""


class Built(Exception):
    pass


@pytest.fixture
def order(monkeypatch):
    """What happens, first to last, on a machine whose GPU of local rank 1 is taken."""
    order = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(f"device {device}"))
    return order


def build(order):
    def build(*arguments, **options):
        order.append("model")
        raise Built

    return build


def test_the_command_line_takes_the_device_first(order, monkeypatch):
    monkeypatch.setattr("dss_fast.__main__.load_target", build(order))
    with pytest.raises(Built):
        main(["search", "some:target"])
    assert order == ["device 1", "model"]


def test_the_imagenet_example_takes_the_device_first(order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(imagenet256, "load", build(order))
    with pytest.raises(Built):
        imagenet256.main(["search", "--model", "sit", "--checkpoint", "x.pt", "--out", "x.json"])
    assert order == ["device 1", "model"]


def test_more_processes_than_gpus_are_no_error_before_a_model_asks_for_one(order, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    take_local_device()
    assert order == []


def torchrun(folder, *arguments):
    """Two processes beside toy.py, which end well."""
    (folder / "toy.py").write_text(MODEL)
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(shared, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def searches(rank, folder):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / "searches.py"))


@pytest.mark.parametrize("store", ["of the launcher", "of the first process"])
def test_a_script_may_search_again_also_after_an_error(tmp_path, store):
    """Each search has a group of its own, and finds no address and no error that an earlier one left in the store."""
    (tmp_path / "searches.py").write_text(SEARCHES)
    if store == "of the launcher":
        torchrun(tmp_path, "searches.py")
    else:
        (tmp_path / "toy.py").write_text(MODEL)
        codes = processes.group(searches, tmp_path, stderr=tmp_path)
        assert codes == [0, 0], "".join((tmp_path / name).read_text() for name in "01")


def test_two_processes_write_what_one_does(tmp_path, monkeypatch):
    """The backend is PyTorch's choice: gloo for a model on the CPU."""
    search = ["dss_fast", "search", "toy:target", "--steps", "3", "--budget", "6000", "--samples", "32", "-o"]
    torchrun(tmp_path, "-m", *search, "two")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([*search[1:], "one"]) == 0
    one, two = (Solver.load(tmp_path / name / "solver-3.json") for name in ("one", "two"))
    for field in ("timesteps", "coeffs"):
        a, b = (torch.tensor([v for row in value for v in (row if isinstance(row, tuple) else (row,))])
                for value in (getattr(one, field), getattr(two, field)))  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def in_a_group_of_its_own(rank, shared, out):
    """As a script under tensor parallelism, whose processes have met and share a model, or with a group given."""
    torch.distributed.init_process_group("gloo")
    seen = []

    def model(x, t):
        seen.append(x[:1].clone())
        return torch.tanh(0.7 * x + t[:, None]) - 0.3 * x

    method = GaussNewton(samples=8, batch_size=8, held_out_samples=0, teacher_evaluations=16, rounds=1)
    group = torch.distributed.group.WORLD if shared else None
    options = dict(method=method, budget=3_000, initial="ab2", progress=False, group=group)
    found = search(Target(model, (6,), key="net"), 3, **options)
    torch.save([found.solver.timesteps, found.evaluations, torch.cat(seen)], out / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shared", [False, True])
def test_the_processes_of_a_group_that_is_there_share_samples_only_when_it_is_given(shared, tmp_path):
    assert processes.group(in_a_group_of_its_own, shared, tmp_path) == [0, 0]
    (one, spent, seen), (other, too, theirs) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other and spent == too
    alike = seen.shape == theirs.shape and bool((seen == theirs).all())
    assert alike != shared
