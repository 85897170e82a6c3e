"""A search as long work: kill -9 at any moment, Ctrl-C, bad folders, resume, log and report."""

import json
import os
import random
import re
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from dss_fast import Flow, GaussNewton, Lion, Solver, Target, search
from dss_fast.files import read_tensors, write_tensors
from dss_fast.searching import runs as running
from dss_fast.searching.budget import Ledger
from dss_fast.searching.folder import RunFolder, flatten, unflatten
from dss_fast.searching.job import prepare
from dss_fast.searching.result import Event
from dss_fast.searching.runs import run
from helpers import processes

F64 = torch.float64


def model(x, t):
    """A smooth velocity with a bend."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(2 * x) * (1 - t) + 0.5 * torch.sin(3 * t) - 0.7 * x


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return self.scale * model(x, t)


LION = Lion(samples=160, batch_size=16, unique_samples=80, check_samples=16, check_every=2, teacher_steps=20)
METHODS = {
    "lion": LION,
    "gauss_newton": GaussNewton(samples=64, batch_size=16, held_out_samples=16),
}


def find(out=None, resume=False, function=model, method="lion", key="bend", **options):
    target = Target(function, (3,), dtype=F64, key=key)
    options = {"progress": False, "report": False, **options}
    return search(target, [3, 4], out=out, resume=resume, method=METHODS[method], **options)


@pytest.fixture(autouse=True)
def checkpoint_after_every_event(monkeypatch):
    monkeypatch.setattr(running, "CHECKPOINT_SECONDS", 0.0)


def killed_at(moment, out, every=0.0, method="lion"):
    """Runs the search and sends itself SIGKILL at the n-th write, sync or rename."""
    running.CHECKPOINT_SECONDS = every
    import_module("dss_fast.searching").doubt = lambda *what: (0, "")
    left = [moment]

    def lethal(original, *arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    os.replace, os.fsync = partial(lethal, os.replace), partial(lethal, os.fsync)
    note = RunFolder.note
    RunFolder.note = lambda self, event: lethal(note, self, event)
    find(out, resume=True, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_moment_it_resumes_to_the_same_bits(tmp_path, method):
    expected = find(method=method)
    generator = random.Random(0)
    for trial in range(2):
        out, kills = tmp_path / str(trial), 0
        for _ in range(3):
            arguments = (generator.randint(1, 50), out, generator.choice([0.0, 0.0, 1e9]), method)
            worker = processes.start(killed_at, *arguments)
            worker.join(120)
            assert worker.exitcode in (0, -signal.SIGKILL)
            kills += worker.exitcode != 0
            if worker.exitcode == 0:
                break
        result = find(out, resume=True, method=method)
        assert kills
        assert result.solvers == expected.solvers and result.evaluations == expected.evaluations
        assert result.curve("loss", 4) == expected.curve("loss", 4)
        assert result.curve("held_out", 3) == expected.curve("held_out", 3)
        for n in (3, 4):
            assert Solver.load(out / f"solver-{n}.json") == expected.solvers[n]
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert len(lines) == len(expected.history) == len(result.history)


def test_a_finished_search_resumes_without_a_model_call(tmp_path):
    first = find(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    again = find(tmp_path, resume=True, function=lambda x, t: 1 / 0)
    assert again.solvers == first.solvers and len(again.history) == len(first.history)
    assert before["solver-3.json"] == (tmp_path / "solver-3.json").read_bytes()
    more = find(tmp_path, resume=True, budget=10**9)  # nothing left to do, whatever the budget
    assert more.solvers == first.solvers
    with pytest.raises(FileExistsError, match="resume=True"):
        find(tmp_path)
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        find(tmp_path, resume=True, seed=1)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        find(tmp_path, resume=True)


def test_another_model_is_not_resumed(tmp_path):
    """Nor other conditions or noise of the same one: what was found would not be for them, finished or not."""
    for name, budget in (("begun", 3_000), ("finished", None)):
        find(tmp_path / name, key=None, budget=budget)
        with pytest.raises(ValueError, match=r"cannot be resumed: .* of other outputs; .*random.*key="):
            find(tmp_path / name, resume=True, key=None, function=lambda x, t: model(x, t) + 0.01)
    module = Scaled()
    find(tmp_path / "module", key=None, function=module)
    with torch.no_grad():
        module.scale += 0.01
    with pytest.raises(ValueError, match="cannot be resumed: .* of other outputs, weights; [^;]*$"):
        find(tmp_path / "module", resume=True, key=None, function=module)


@pytest.mark.parametrize("key", ["bend", None])
@pytest.mark.parametrize("part", ["cond", "noise", "uncond", "scale"])
def test_another_use_of_the_same_model_is_not_resumed(tmp_path, part, key):
    def shifted(x, t, y):
        return model(x, t) + y[:, None]

    def labels(low):
        return lambda n, generator: {"y": low + torch.rand(n, generator=generator, dtype=F64)}

    first = Target(shifted, (3,), cond=labels(0), uncond={"y": 0.0}, guidance_scale=1.5, dtype=F64, key=key)
    another = {
        "cond": {"cond": labels(1)},
        "noise": {"noise": lambda n, generator: 2 * torch.randn(n, 3, generator=generator, dtype=F64)},
        "uncond": {"uncond": {"y": 0.5}},
        "scale": {"guidance_scale": 2.0},
    }[part]
    options = dict(method=LION, out=tmp_path, progress=False, report=False)
    search(first, 3, **options)
    name = {"cond": "conditions", "uncond": "conditions", "scale": "guidance_scale"}.get(part, part)
    with pytest.raises(ValueError, match=f"cannot be resumed: .* of other {name}"):
        search(replace(first, **another), 3, resume=True, **options)


class Labelled(torch.nn.Module):
    """With a table of labels that the probed samples do not read, and what changes as it is called."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("labels", torch.arange(12.0).reshape(4, 3))
        self.calls, self.last = torch.zeros((), dtype=torch.long), None  # a search refuses buffers that change

    def forward(self, x, t):
        self.calls += 1
        self.last = x.detach()
        return self.scale * model(x, t)


@pytest.mark.parametrize("change", ["labels", "order", "scale", "none"])
@pytest.mark.parametrize("held", ["module", "closure"])
def test_another_table_inside_a_keyed_model_is_not_resumed(tmp_path, change, held):
    """And one that counts its calls, or keeps its last state, is, in this process as in another."""
    module = Labelled()
    function = module if held == "module" else lambda x, t: module(x, t)
    find(tmp_path, function=function, budget=3_000)
    if change == "none":
        assert find(tmp_path, function=function, budget=3_500, resume=True).solvers
        module.load_state_dict(Labelled().state_dict())
        module.last = None
        assert find(tmp_path, function=function, budget=4_000, resume=True).solvers
        return
    with torch.no_grad():
        if change == "scale":
            module.scale += 1e-3
        else:
            module.labels.copy_(module.labels.flip(0) if change == "order" else module.labels + 1)
    with pytest.raises(ValueError, match="cannot be resumed: .* of other weights; use"):
        find(tmp_path, function=function, budget=3_500, resume=True)


def test_another_tensor_in_a_closure_is_not_resumed(tmp_path):
    def reading(table):
        return lambda x, t: model(x, t) + 0 * table[0]

    for scale in (1.0, 1.0, 2.0):
        with pytest.raises(ValueError, match="other weights") if scale == 2 else nullcontext():
            find(tmp_path, function=reading(scale * torch.arange(3.0)), budget=3_000, resume=True)


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal; a job started with nohup or & is born deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_the_best_and_the_search_goes_on_later(tmp_path, capsys, interruptible):
    expected = find()
    calls = []

    def interrupted(x, t):
        calls.append(len(x))
        if len(calls) == 120:
            signal.raise_signal(signal.SIGINT)
        return model(x, t)

    result = find(tmp_path, function=interrupted)
    assert result.interrupted and 0 < len(result.history) < len(expected.history)
    assert "best solver so far kept" in capsys.readouterr().out
    for n in (3, 4):
        assert Solver.load(tmp_path / f"solver-{n}.json") == result.solvers[n]
    final = find(tmp_path, resume=True)
    assert final.solvers == expected.solvers and not final.interrupted
    calls.clear()
    assert find(function=interrupted).interrupted  # no folder: returned all the same


@pytest.mark.parametrize("name", ["file/run", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    calls = []
    with pytest.raises(OSError, match="file|nowhere"):
        find(tmp_path / name, function=lambda x, t: calls.append(1), key=None)
    assert not calls


def test_what_fails_later_leaves_the_solver_and_says_so(tmp_path):
    calls = []

    def breaks(x, t):
        calls.append(len(x))
        return model(x, t) * (float("nan") if len(calls) > 120 else 1)

    with pytest.raises(FloatingPointError) as caught:
        find(tmp_path, function=breaks)
    assert caught.value.result.solvers[3] == Solver.load(tmp_path / "solver-3.json")
    assert str(tmp_path) in caught.value.__notes__[-1]
    assert find(tmp_path, resume=True).solvers == find().solvers  # the model mended


def test_report_log_and_provenance(tmp_path):
    pytest.importorskip("matplotlib")
    target = Target(model, (1, 4, 4), decode=lambda x: x.sigmoid(), name="bend", dtype=F64, key="bend")
    result = search(target, 3, out=tmp_path, method=replace(LION, samples=48, unique_samples=None), progress=False)
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").stat().st_size > 10_000
    for name in ("overview.png", "stages.png", "samples-3.png", "solver-3.json"):
        assert name in text and (tmp_path / name).stat().st_size > 300
    assert f"{result.evaluations:,} model evaluations" in text
    config = json.loads((tmp_path / "config.json").read_text())
    solver = Solver.load(tmp_path / "solver-3.json")
    assert solver.name == "bend/3" and solver == result.solver
    for key in ("method", "seed", "schedule", "targets", "settings", "versions", "date"):
        assert solver.provenance[key] == config[key]
    assert solver.provenance["held_out"] == min(result.curve("held_out", 3)[1])
    assert 0 < solver.provenance["evaluations"] <= result.evaluations
    result.plot(tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="choose"):
        _ = find().solver


@pytest.fixture
def terminal(monkeypatch):
    """Or a notebook: elsewhere there are no bars."""
    monkeypatch.setattr("dss_fast.progress.NOTEBOOK", True)


def test_the_bar_shows_loss_evaluations_and_time_left(capsys, terminal):
    find(progress=True)
    shown = capsys.readouterr().err
    assert "loss N=3" in shown and "held-out RMSE N=3" in shown and "evaluations" in shown
    assert "10/10" in shown and "<" in shown


@pytest.mark.parametrize("method, unit", [("lion", "batches"), ("gauss_newton", "evaluations")])
def test_the_bar_says_what_it_counts(capsys, terminal, method, unit):
    """Evaluations passed for steps."""
    find(progress=True, method=method)
    shown = capsys.readouterr().err
    assert re.search(rf"\d {unit}/s", shown) and "step/s" not in shown


def test_any_generator_of_events_is_a_method(tmp_path):
    """What another method has to do: yield its solvers and all it needs to go on."""
    euler = Solver((0.0, 0.5, 1.0), ((1.0, 0.0), (0.0, 1.0)), Flow())

    def method(ledger, state=None):
        state = state or {"at": 0, "parts": [], "solver": euler}
        for at in range(state["at"], 6):
            ledger.spend(10)
            state = {**state, "at": at + 1, "parts": [*state["parts"], torch.tensor([at / 3], dtype=F64)]}
            lower = [[], [0.1 * float(state["parts"][-1])]]
            solver = Solver.from_timedeltas((1, 1), lower, Flow())
            yield Event("mine", at + 1, 6, {2: solver}, {2: euler}, state)
            if at == 2 and stop:
                raise KeyboardInterrupt

    stop, config = True, prepare(Target(model, (3,), key="bend"), 2).config()
    for resume in (False, True):
        ledger, folder = Ledger(), RunFolder(tmp_path, config, resume)
        folder.check(config)
        events = method(ledger, folder.checkpoint and folder.checkpoint["state"])
        found = folder.checkpoint
        result = run(events, ledger, config, folder=folder, checkpoint=found, progress=False)
        assert result.interrupted is stop and ("unfinished" in result.solver.source) is stop
        folder.close()
        stop = False
    assert result.evaluations == 60 and [event.stage for event in result.history] == ["mine"] * 6
    assert result.solver.coeffs[1][0] == pytest.approx(0.1 * 5 / 3)
    assert result.solver.name == "searched/2" and result.starts == {2: euler}


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "solver-3.json", "report.md", "checkpoint.safetensors"])
def test_files_of_the_users_are_not_taken_for_a_searchs(tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "teacher").mkdir()
    for other in (".notes.txt.swp", ".keys.json.gpg", "teacher/weights.pt"):
        (tmp_path / other).write_text("mine")
    for resume in (False, True):
        with pytest.raises((OSError, ValueError), match=re.escape(name)):
            find(tmp_path, resume=resume, report=True)
    (tmp_path / name).rename(tmp_path / "mine")
    find(tmp_path)
    for kept in ("mine", ".notes.txt.swp", ".keys.json.gpg", "teacher/weights.pt"):
        assert (tmp_path / kept).read_text() == "mine"


@pytest.mark.parametrize("method", METHODS)
def test_there_is_a_file_of_a_table_once_one_is_found_and_it_says_how_far_it_came(tmp_path, method):
    seen, save = [], RunFolder.save_solvers

    def watched(self, solvers):
        save(self, solvers)
        files = {path.name: Solver.load(path) for path in self.path.glob("solver-*.json")}
        seen.append({name: solver.source for name, solver in files.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_solvers", watched)
        found = find(tmp_path, method=method)
    assert seen[0] == {} and set(seen[-1]) == {"solver-3.json", "solver-4.json"}
    assert all(source.endswith("unfinished") for sources in seen[:-1] for source in sources.values())
    for n, solver in found.solvers.items():
        assert seen[-1][f"solver-{n}.json"] == solver.source == f"dss_fast.search, method {method}"
        assert solver.provenance["start"] == found.starts[n].name


def test_state_comes_back_as_it_was():
    state = {
        "a": torch.arange(3),
        "b": [1.5, None, {"c": torch.ones(2, dtype=F64), "d": float("inf")}],
        "e": "x",
    }
    tensors = {}
    data = json.loads(json.dumps(flatten(state, tensors)))
    again = unflatten(data, tensors)
    assert torch.equal(again["a"], state["a"]) and torch.equal(again["b"][2]["c"], state["b"][2]["c"])
    assert again["b"][:2] == [1.5, None] and again["b"][2]["d"] == float("inf") and again["e"] == "x"


def test_a_checkpoint_comes_back_where_sums_round_as_before(tmp_path):
    """A tensor in a file begins at any multiple of 8 bytes, and BLAS rounds a product by where its matrices begin."""
    tensors = {name: torch.rand(size, size, dtype=F64) for name, size in (("a", 1), ("b", 7), ("c", 3))}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    again, _ = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert {tensor.data_ptr() % 64 for tensor in again.values()} == {0}


def steep(x):
    return x.flatten(1) ** 3


def flat(x):
    return x.flatten(1).tanh()


@pytest.mark.parametrize("part", ["prompts", "late", "early", "loss", "features", "arrays", "noise"])
def test_what_two_samples_do_not_show_is_seen_too(tmp_path, part):
    """Other rows of a table of conditions, other outputs near the ends, another loss: that is another search."""
    rows = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=F64)

    def target(other):
        table = rows.clone()
        if other and part == "prompts":
            table[2:] += 1

        def conditioned(x, t, y):
            found = model(x, t) + 0.1 * (y if isinstance(y, torch.Tensor) else torch.as_tensor(y["y"]))
            if other and part in ("late", "early"):
                found = found + (t[:, None] > 0.8 if part == "late" else t[:, None] < 0.2)
            return found

        def cond(n, generator):
            drawn = table[torch.randint(50, (n,), generator=generator)]
            return {"y": {"y": drawn[:1].numpy() + (other and part == "arrays")} if part == "arrays" else drawn}

        def noise(n, generator):
            drawn = torch.randn(n, 3, generator=generator, dtype=F64)
            drawn[1:] *= 1.5 if other and part == "noise" else 1.0
            return drawn

        keyed = None if part in ("late", "early") else "bend"
        chosen = steep if other else flat
        return Target(conditioned, (3,), cond=cond, noise=noise, dtype=F64, key=keyed, features=chosen)

    def method(other):
        loss = (steep if other else flat) if part == "loss" else "trajectory"
        select = "features" if part == "features" else "robust"
        return GaussNewton(samples=16, batch_size=16, held_out_samples=8, loss=loss, select=select)

    options = dict(out=tmp_path, progress=False, report=False)
    first = search(target(False), 3, method=method(False), **options)
    assert search(target(False), 3, method=method(False), resume=True, **options).solvers == first.solvers
    name = {"prompts": "conditions", "arrays": "conditions", "late": "outputs", "early": "outputs"}.get(part, part)
    with pytest.raises(ValueError, match=f"cannot be resumed: .* of other {name}"):
        search(target(True), 3, method=method(True), resume=True, **options)


@pytest.mark.parametrize("name", ["config.json", "solver-3.json", "report.md", "overview.png"])
def test_a_link_to_nowhere_is_the_users_too(tmp_path, name):
    os.symlink("/mnt/away/notes", tmp_path / name)
    for resume in (False, True):
        with pytest.raises(OSError, match=re.escape(name)):
            find(tmp_path, resume=resume)
    assert os.readlink(tmp_path / name) == "/mnt/away/notes"


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '{"architectures": ["UNet"]}'])
def test_another_config_is_not_taken_for_a_searchs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=r"holds config\.json; choose another folder"):
            find(tmp_path, resume=resume)
    assert (tmp_path / "config.json").read_text() == text


def test_a_report_that_is_there_is_not_written_again(tmp_path):
    find(tmp_path)
    (tmp_path / "report.md").write_text("mine")
    find(tmp_path, resume=True, report=True)
    assert (tmp_path / "report.md").read_text() == "mine" and not (tmp_path / "report.html").exists()


def test_a_gradient_that_is_nan_is_said():
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    target = Target(lambda x, t: Silent.apply(model(x, t)), (3,), dtype=F64, key="bend")
    with pytest.raises(FloatingPointError, match="the gradient through the model is NaN or Inf"):
        search(target, 3, budget=3_000, progress=False)


def test_a_solver_beside_a_search_that_never_had_one_is_the_users(tmp_path):
    find(tmp_path / "run")
    config = (tmp_path / "run" / "config.json").read_bytes()
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "config.json").write_bytes(config)
    (tmp_path / "dead" / "solver-3.json").write_text("mine")
    with pytest.raises(FileExistsError, match="holds solver-3.json, which this search has not written"):
        find(tmp_path / "dead", resume=True)
    assert (tmp_path / "dead" / "solver-3.json").read_text() == "mine"
