"""scripts/gpu.py without a GPU: the plan fits a quarter of an hour, every stage runs, what it leaves is whole."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dss_fast.step import backends

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu.py"
STAGES = "build warm-fp32 kernels sanitizers bandwidth loop counters real unroll search".split()
FILES = {"rows.jsonl", "summary.txt", "logs.tar.gz", "cache.tar.gz"}


@pytest.fixture(scope="module")
def gpu():
    from scripts import gpu

    return gpu


def run(out, *arguments, python=sys.executable, path="", seconds=1500):
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(python), "PATH": f"{path}:{os.environ['PATH']}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, SCRIPT, "--cache", out / "cache.tar.gz", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


def rows_of(out, stage):
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def ended(out):
    return {row["name"]: row["how"] for row in rows_of(out, "ended")}


def logs(out):
    with tarfile.open(out / "logs.tar.gz") as packed:
        names = [name for name in packed.getnames() if name.endswith(".log")]
        return {Path(name).stem: packed.extractfile(name).read().decode() for name in names}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One with a GPU, whose tools and Python say what they were asked to do; a sanitizer finds something."""
    answers = {
        "python3": 'case "$*" in *real_use*) trap "" TERM; sleep 60;; esac; echo "$*"',
        "ncu": 'echo "$*"',
        "compute-sanitizer": 'echo "$*"; [ "$2" != racecheck ]',
    }
    for name, line in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.fast
@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.[sp][hy]")), ids=lambda path: path.name)
def test_a_script_names_files_that_exist(script):
    named = re.findall(r"\b(?:scripts|tests|benchmarks|examples|csrc)/[\w/]+\.(?:py|sh|h|cpp)\b", script.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.fast
def test_the_plan_fits_a_lent_quarter_of_an_hour(gpu, machine):
    """By its hard limits, with NVIDIA's tools and without; what is timed runs alone, what has goals before the rest."""
    groups = gpu.stages("python3", Path("rows"))
    assert gpu.planned(groups) <= gpu.MOST_SECONDS and len(gpu.FILES) <= gpu.MOST_FILES
    order = [[stage.name for stage in group] for group in groups]
    assert {"build", "kernels", "memcheck", "racecheck", "synccheck", "initcheck", "warm-bf16"} < set(order[0])
    assert order[1:] == [[name] for name in "graphs bandwidth loop counters real unroll search".split()]
    again = [[stage for stage in group if stage.chosen_by in ("kernels", "graphs")] for group in groups]
    assert gpu.planned(again) <= gpu.MOST_AGAIN
    (bandwidth,) = groups[2]
    assert bandwidth.command[bandwidth.command.index("--types") + 1] == "bf16"


@pytest.mark.fast
def test_the_sanitizers_share_has_every_flag(gpu, machine):
    from scripts.every_kernel import variants

    (share,) = {tuple(s.command[-2:]) for group in gpu.stages("", Path()) for s in group if s.of == "sanitizers"}
    sizes, types, pairs, noises = map(set, zip(*variants()[int(share[0]) :: int(share[1])], strict=True))
    assert (len(sizes), len(types), pairs, noises) == (3, 3, {True, False}, {True, False})


@pytest.mark.fast
def test_urgent_cells_come_first(monkeypatch, tmp_path):
    """The sizes that have goals before the others, and within each the dtypes."""
    from benchmarks import gpu_table

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bandwidth

    assert sorted(bandwidth.URGENT) == list(range(len(bandwidth.SHAPES))) and list(bandwidth.DTYPES)[0] == "bf16"
    first = [bandwidth.SHAPES[k] for k in bandwidth.URGENT]
    assert "x".join(map(str, first[2])) == gpu_table.FLUX
    seen = []
    monkeypatch.setattr(bandwidth, "cell", lambda op, shape, types, rounds: seen.append((shape, op, types)) or [])
    monkeypatch.setattr(sys, "argv", ["bandwidth", str(tmp_path / "rows")])
    bandwidth.main()
    assert seen[:3] == [(first[0], "forward", types) for types in ("bf16", "mixed", "fp32")]
    assert len(seen) == len(set(seen)) == 6 * 5 * 3


def test_a_stage_that_hangs_or_fails_stops_no_other(machine, tmp_path, gpu, monkeypatch):
    """The one that sleeps is ended, though it does not listen; what the others were asked to do is in their logs."""
    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    out.mkdir()
    made = gpu.Run(out, tmp_path / "work", gpu.Cache(tmp_path / "cache"), most=60)
    for group in gpu.stages(str(tmp_path / "python3"), made.rows):
        made.group([replace(stage, limit=2 if stage.name == "real" else 60) for stage in group], dict(os.environ))
    how = ended(out)
    assert how.pop("racecheck") == "rc=1" and how.pop("real") == "limit" and set(how.values()) == {"ok"}
    assert list(how)[-2:] == ["unroll", "search"] and made.failed
    said = logs(out)
    assert "-k regex:_step_kernel" in said["counters"] and "--forward bf16 mixed fp32" in said["counters"]
    assert said["memcheck"].startswith("--tool memcheck") and "build_ext --inplace" in said["build"]
    assert "racecheck    rc=1" in (out / "summary.txt").read_text()


def test_only_and_without_time(tmp_path):
    """A second call adds to the rows; what finds no time says so; names that are none are refused."""
    out = tmp_path / "out"
    done = run(out, "--dry-run", "--only", "loop", "--seconds", "0.1", seconds=120)
    assert ended(out) == {"build": "no time", "loop": "no time"} and done.returncode == 1
    assert {path.name for path in out.iterdir()} == FILES and logs(out)["loop"] == "no time left\n"
    run(out, "--dry-run", "--only", "loop", "--seconds", "0.1", seconds=120)
    assert len(rows_of(out, "ended")) == 4
    done = run(out, "--only", "speed", seconds=120)
    assert "--only speed: no such stage; there are build, warm" in done.stderr


def test_a_run_that_is_ended_leaves_nothing_running_and_whole_files(tmp_path):
    out, marks = tmp_path / "out", tmp_path / "pids"
    (tmp_path / "slow").write_text(f'#!/bin/sh\necho "$$" >>{marks}\necho begun\nsleep 60\n')
    (tmp_path / "slow").chmod(0o755)
    command = [sys.executable, SCRIPT, "--dry-run", "--only", "loop", "--cache", out / "cache.tar.gz"]
    environment = {**os.environ, "OUT": str(out), "PYTHON": str(tmp_path / "slow")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not marks.exists() or not marks.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(marks.read_text()), 0)
            time.sleep(0.05)
    assert logs(out)["build"] == "begun\n" and tarfile.open(out / "cache.tar.gz").getnames()


def test_what_was_compiled_travels(tmp_path, gpu, monkeypatch):
    """The extension comes back where its source is the same, and not where it changed; a file cut off costs nothing."""
    for folder in ("csrc", "dss_fast"):
        (tmp_path / folder).mkdir()
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "csrc" / "step.cpp").write_text("one")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    name = f"_C_{gpu.metadata.version('torch').split('+')[0].replace('.', '_')}_cpu.so"
    built = tmp_path / "dss_fast" / name
    built.write_text("machine code")
    (tmp_path / "dss_fast" / "_C_1_0_0_cpu.so").write_text("of another torch")
    here = gpu.Cache(tmp_path / "here")
    here.triton.mkdir(parents=True)
    (here.triton / "key").mkdir()
    (here.triton / "key" / "kernel.cubin").write_text("kernel")
    (here.triton / "key" / "kernel.ttir").write_text("a stage of its compilation")
    paths = {
        "child_paths": {f"kernel.{kind}": str(here.triton / "key" / f"kernel.{kind}") for kind in ("cubin", "ttir")}
    }
    (here.triton / "key" / "__grp__kernel.json").write_text(json.dumps(paths))
    here.keep()
    gpu.pack(tmp_path / "cache.tar.gz", here.folder)
    built.unlink()
    there = gpu.Cache(tmp_path / "there")
    assert not there.restore()
    there.unpack(tmp_path / "cache.tar.gz")
    found = json.loads((there.triton / "key" / "__grp__kernel.json").read_text())["child_paths"]
    assert found == {"kernel.cubin": str(there.triton / "key" / "kernel.cubin")}
    assert Path(found["kernel.cubin"]).read_text() == "kernel" and not (there.triton / "key" / "kernel.ttir").exists()
    assert there.restore() and built.read_text() == "machine code"
    assert [path.name for path in there.extension.iterdir()] == [name]
    (tmp_path / "csrc" / "step.cpp").write_text("two")
    assert not gpu.Cache(tmp_path / "there").restore()
    whole = (tmp_path / "cache.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    gpu.Cache(tmp_path / "third").unpack(tmp_path / "cut.tar.gz")


def test_files_and_seconds_are_counted(tmp_path, gpu, capsys):
    for name in gpu.FILES:
        (tmp_path / name).write_text("x")
    assert gpu.fits(tmp_path, 400) and not gpu.fits(tmp_path, 401)
    (tmp_path / "one more").write_text("x")
    assert not gpu.fits(tmp_path, 400) and "5 files of 4" in capsys.readouterr().out


def test_real_use_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    """By the network in examples, as on a machine without diffusers; on small cards it is skipped in words."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_use

    for tiny in (["--tiny"], []):
        monkeypatch.setattr(sys, "argv", ["real_use", str(tmp_path / "rows.jsonl"), *tiny])
        real_use.main()
    found = {row["figure"]: row for row in rows_of(tmp_path, "real")}
    assert {"sample, eager", "gradient, checkpointing", "gradient, all kept", "plan"} <= set(found)
    assert found["plan"]["network"] == "examples/flux.py" and found["plan"]["batch_size"] > 0
    assert torch.cuda.is_available() or "skipped: 0 GB of a GPU's memory are free" in capsys.readouterr().out


@pytest.mark.slow
def test_every_stage_runs_and_everything_is_packed(tmp_path):
    pytest.importorskip("triton")
    if "cpp" not in backends(torch.device("cpu")):
        pytest.skip("the extension is not built")
    out = tmp_path / "out"
    done = run(out, "--dry-run")
    assert ended(out) == dict.fromkeys(STAGES, "ok") and done.returncode == 0, (done.stdout, logs(out))
    assert set(logs(out)) == set(STAGES) and {path.name for path in out.iterdir()} == FILES
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"bandwidth", "loop", "real", "unroll", "search", "ended"}
    assert {(row["op"], row["way"]) for row in rows if row["stage"] == "bandwidth"} == {
        (op, way) for op in ("forward", "gradient") for way in ("ours", "compiled", "copy", "memcpy")
    }
    assert "60 us" in done.stdout and "90 % of the copy" in done.stdout and "4 files of 4" in done.stdout
