"""Everything that needs a GPU in one call of 400 seconds, and a table with the goal beside each figure.

    python3 scripts/gpu.py                            # needs torch with CUDA, triton, pytest, pybind11, ninja
    python3 scripts/gpu.py --only kernels bandwidth   # a second call after a fix: 180 seconds
    python3 scripts/gpu.py --dry-run                  # every stage on the CPU at tiny sizes, and the plan checked

Four files in ${OUT:-out/gpu}: rows.jsonl, one line a figure, appended as soon as it is known; summary.txt, the table;
logs.tar.gz; cache.tar.gz, what was compiled, which the next machine uses when it lies in out/gpu or --cache names it:
one of your own, since it is run.
Copy rows.jsonl to benchmarks/results/gpu.jsonl to publish. Rows name the commit; where there is no .git,
COMMIT=$(git rev-parse --short HEAD), taken where there is one, says it.

Stages of one group run together, the groups one after the other. Each stage has a limit; one that fails stops no other.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_table import METRICS, TYPES, render  # noqa: E402

FILES = "rows.jsonl", "summary.txt", "logs.tar.gz", "cache.tar.gz"
MOST_FILES, MOST_SECONDS, MOST_AGAIN, MOST_BYTES = 4, 400, 180, 16 << 20
GRACE = 5  # seconds between asking a stage to end and ending it
AROUND = 15  # seconds before the first stage, for packing, and to end what runs over its limit
PATIENCE = 9  # times the limits in a dry run: a busy CPU must not look like a failing stage


@dataclass(frozen=True)
class Stage:
    """A command with a limit in seconds. of: the name that --only takes, where several stages share one."""

    name: str
    limit: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    of: str = ""

    @property
    def chosen_by(self) -> str:
        return self.of or self.name


def tool(name: str) -> str | None:
    """A tool of CUDA's, which need not be in the PATH."""
    return shutil.which(name) or next(map(str, Path("/usr/local").glob(f"cuda*/bin/{name}")), None)


def stages(python: str, rows: Path, *, dry: bool = False, built: bool = False) -> list[list[Stage]]:
    """The groups, in order: what is not timed first and together, then what is most worth knowing.

    built: the extension is there. dry: on a CPU, at tiny sizes, without NVIDIA's tools.
    """
    tiny = ["--tiny"] * dry
    types = TYPES[-1:] if dry else TYPES
    profiler, sanitizer = (None, None) if dry else (tool("ncu"), tool("compute-sanitizer"))

    def benchmark(name: str, limit: int, *arguments: str, stage: str = "", of: str = "", **environment: str) -> Stage:
        command = [python, f"benchmarks/{name}.py", str(rows), *arguments, *tiny]
        return Stage(stage or name, limit, command, environment, of)

    def tests(name: str, limit: int, *arguments: str, **environment: str) -> Stage:
        return Stage(name, limit, [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], environment)

    load = [python, "-c", "from dss_fast.step import extension; print(extension.load().__file__, 'was there')"]
    build = load if built or dry else [python, "setup.py", "build_ext", "--inplace"]
    # A share of 5 has every flag: it walks through the variants, whose flags repeat after 4.
    variants = [python, "scripts/every_kernel.py", "--share", "0", "40" if dry else "5"]
    without = {} if dry else {"DSS_FAST_NO_EXTENSION": "1"}  # which is built meanwhile
    # The caching allocator would hide overruns between tensors of one block.
    alone = without | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizers = [Stage("sanitizers", 100, variants, without)]
    if sanitizer:
        sanitizers = [
            Stage(kind, 100, [sanitizer, "--tool", kind, "--error-exitcode", "9", *variants], alone, "sanitizers")
            for kind in ("memcheck", "racecheck", "synccheck", "initcheck")
        ]
    workers = ["-n", "6"] * bool(util.find_spec("xdist"))
    kernels = ["tests/test_device.py"] if dry else [*workers, "tests/step/test_step.py", "tests/step/test_step_cuda.py"]
    forward = [python, "scripts/every_kernel.py", "--forward", *types, *tiny]
    if profiler:
        counted = ["--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "-k", "regex:_step_kernel"]
        forward = [profiler, *counted, *forward]
    few = ["--rounds", "2", "--ops", "forward", "gradient"] * dry
    return [
        [
            Stage("build", 100, build),
            *(
                benchmark("bandwidth", 100, "--warm-up", "--types", t, *few, stage=f"warm-{t}", of="warm", **without)
                for t in types
            ),
            tests("kernels", 100, "-k", "triton or cuda or device", *kernels, **without),
            *sanitizers,
        ],
        [] if dry else [tests("graphs", 50, "tests/test_graph.py", "tests/test_device.py")],  # they fill the memory
        [benchmark("bandwidth", 105, "--types", *types, "--seconds", "90", *few)],
        [benchmark("graph_loop", 15, stage="loop")],
        [Stage("counters", 25, forward)],
        [benchmark("real_use", 45, stage="real")],
        [benchmark("unroll_memory", 20, stage="unroll")],
        [benchmark("search_time", 25, "--budget", "10000", stage="search")],
    ]  # fmt: skip


def planned(groups: list[list[Stage]]) -> int:
    """Seconds of all at most."""
    return AROUND + sum(max((stage.limit for stage in group), default=0) for group in groups)


class Cache:
    """What was compiled: Triton's kernels, inductor's, and the extension under a name that says what it was made of."""

    def __init__(self, folder: Path):
        self.folder, self.triton, self.inductor = folder, folder / "triton", folder / "inductor"
        sources = [ROOT / "setup.py", *sorted((ROOT / "csrc").glob("*"))]
        made_of = repr((metadata.version("torch"), sys.version, platform.machine())).encode()
        digest = hashlib.blake2b(made_of + b"".join(path.read_bytes() for path in sources), digest_size=8)
        self.extension = folder / "extension" / digest.hexdigest()

    def unpack(self, file: Path) -> None:
        """Takes over what another machine compiled."""
        if file.exists():
            try:
                with tarfile.open(file) as packed:
                    packed.extractall(self.folder, filter="data")
            except (tarfile.TarError, OSError, EOFError) as error:  # cut off on the way
                print(f"{file}: {error}; what it lacks is compiled again")
            # Triton's lists of files hold their paths on the machine that made them; it takes none that lacks a file.
            for listed in self.triton.glob("*/__grp__*.json"):
                paths = [listed.parent / name for name in json.loads(listed.read_text())["child_paths"]]
                here = {path.name: str(path) for path in paths if path.exists()}
                listed.write_text(json.dumps({"child_paths": here}))

    def restore(self) -> bool:
        """Whether the extension for this source, torch and Python is there, put where it is imported from."""
        found = list(self.extension.glob("_C_*"))
        for path in found:
            shutil.copy2(path, ROOT / "dss_fast" / path.name)
        return bool(found)

    def keep(self) -> None:
        """Takes the extension as it was built for this torch."""
        self.extension.mkdir(parents=True, exist_ok=True)
        torch = metadata.version("torch").partition("+")[0].replace(".", "_")
        for path in (ROOT / "dss_fast").glob(f"_C_{torch}*"):
            shutil.copy2(path, self.extension / path.name)


def pack(file: Path, folder: Path) -> None:
    """All of a folder in one file, which is whole at any moment. Stages of a compilation are left out: to launch a
    kernel needs its machine code, a third of the bytes."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if member.name.endswith((".source", ".ttir", ".ttgir", ".llir", ".ptx")) else member

    part = file.with_name(f".{file.name}")
    with tarfile.open(part, "w:gz", compresslevel=6) as packed:
        packed.add(folder, arcname=".", filter=kept)
    os.replace(part, file)


class Run:
    """The stages under way, how those before them ended, and the files that say so."""

    def __init__(self, out: Path, work: Path, cache: Cache, most: float, patience: int = 1):
        self.out, self.logs, self.cache, self.patience = out, work / "logs", cache, patience
        self.rows = out / "rows.jsonl"
        self.end, self.begun = time.monotonic() + most, {}
        self.ended: list[tuple[str, str, float, int]] = []  # name, how, seconds, limit
        self.logs.mkdir(parents=True, exist_ok=True)

    def group(self, stages: list[Stage], environment: dict[str, str]) -> None:
        """Runs stages together, each until it ends or its limit."""
        left = self.end - time.monotonic()
        for stage in stages:
            log = self.logs / f"{stage.name}.log"
            if left < 3:
                log.write_text("no time left\n")
                self.close(stage, "no time", 0)
                continue
            with log.open("w") as file:
                process = subprocess.Popen(
                    stage.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, process_group=0,
                    env={**environment, **stage.environment},
                )  # fmt: skip
            self.begun[process] = stage, time.monotonic(), min(stage.limit * self.patience, left)
        while self.begun:
            now = time.monotonic()
            for process, (stage, since, limit) in list(self.begun.items()):
                over = now - since - limit
                if process.poll() is not None:
                    how = "ok" if process.returncode == 0 else f"rc={process.returncode}"
                    if over > 0:
                        how = "limit"
                        self.stop(process, signal.SIGKILL)  # what it started may not have listened
                    self.close(stage, how, now - since)
                    del self.begun[process]
                elif over > 0:
                    self.stop(process, signal.SIGKILL if over > GRACE else signal.SIGTERM)
            time.sleep(0.05)
        self.collect()

    def stop(self, process: subprocess.Popen, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends a stage and what it started."""
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            pass

    def close(self, stage: Stage, how: str, seconds: float) -> None:
        self.ended.append((stage.name, how, seconds, stage.limit))
        print(f"{stage.name:12} {how:8} {seconds:6.1f} s of {stage.limit}", flush=True)
        with self.rows.open("a") as file:
            row = {"stage": "ended", "name": stage.name, "how": how, "seconds": seconds, "limit": stage.limit}
            file.write(json.dumps(row) + "\n")

    def collect(self) -> None:
        """The table and the logs so far."""
        text = render(self.rows, self.logs)
        (self.out / "summary.txt").write_text(text + "\n")
        pack(self.out / "logs.tar.gz", self.logs)

    def interrupted(self, *_: object) -> None:
        """Leaves nothing running, and what there is in its files."""
        for process in self.begun:
            self.stop(process, signal.SIGKILL)
        self.collect()
        pack(self.out / "cache.tar.gz", self.cache.folder)
        os._exit(130)

    @property
    def failed(self) -> bool:
        return any(how != "ok" for _, how, _, _ in self.ended)


def without_a_gpu(work: Path) -> dict[str, str]:
    """The environment of a dry run: kernels are compiled and launched on a libcuda that does nothing, where it can be
    built, and interpreted elsewhere."""
    found = {"CUDA_VISIBLE_DEVICES": "", "DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return found | ({"STUB": str(work / "stub")} if compiler else {"TRITON_INTERPRET": "1"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="the build and these: " + ", ".join(names()))
    parser.add_argument("--dry-run", action="store_true", help="on the CPU")
    parser.add_argument("--seconds", type=float, help=f"for all; {MOST_SECONDS}, with --only {MOST_AGAIN}")
    parser.add_argument("--cache", type=Path, default=ROOT / "out/gpu/cache.tar.gz", help="what was compiled before")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(names()):
        parser.error(f"--only {' '.join(sorted(unknown))}: no such stage; there are {', '.join(names())}")
    most = options.seconds or (MOST_AGAIN if options.only else MOST_SECONDS)
    python = os.environ.get("PYTHON", sys.executable)
    out = Path(os.environ.get("OUT", ROOT / "out/gpu")).absolute()
    dry, work = options.dry_run, out.with_name(out.name + "-work")
    cache = Cache(work / "cache" if dry else ROOT / "out" / "gpu-cache")
    for path in (out, cache.triton, cache.inductor):
        path.mkdir(parents=True, exist_ok=True)
    cache.unpack(options.cache)
    shutil.rmtree(work / "logs", ignore_errors=True)
    if not options.only:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    patience = PATIENCE if dry else 1
    run = Run(out, work, cache, most * patience, patience)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.interrupted)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TRITON_CACHE_DIR": str(cache.triton),
        "TORCHINDUCTOR_CACHE_DIR": str(cache.inductor),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a kernel a graph: starting other processes would take longer
    }
    if dry:
        environment |= without_a_gpu(work)
    else:
        seen = [python, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
        if subprocess.run(seen, env=environment, cwd=ROOT).returncode:
            print("no CUDA device: --dry-run goes without")
            return 1
    groups = stages(python, run.rows, dry=dry, built=not dry and cache.restore())
    chosen = set(options.only or names()) | {"build"}
    for group in groups:
        group = [stage for stage in group if stage.chosen_by in chosen]
        if group:
            run.group(group, environment)
            if group[0].name == "build":
                if ("build", "ok") in [end[:2] for end in run.ended]:
                    cache.keep()
                pack(out / "cache.tar.gz", cache.folder)
    pack(out / "cache.tar.gz", cache.folder)
    if dry:
        print("a dry run on the CPU: nothing here is a measurement of a GPU")
    print((out / "summary.txt").read_text())
    return int(run.failed or not fits(out, planned(stages(python, run.rows))))


def names() -> list[str]:
    """What --only takes."""
    return list(dict.fromkeys(stage.chosen_by for group in stages("", Path()) for stage in group))


def fits(out: Path, seconds: int) -> bool:
    """Whether the plan and what came of it stay below their limits, said."""
    files = [path for path in out.rglob("*") if path.is_file()]
    largest = max((path.stat().st_size for path in files), default=0)
    print(
        f"planned: {seconds} s of {MOST_SECONDS}; {len(files)} files of {MOST_FILES} in {out}, the largest of "
        f"{largest / 1e6:.1f} MB of {MOST_BYTES / 1e6:.1f}"
    )
    return seconds <= MOST_SECONDS and len(files) <= MOST_FILES and largest <= MOST_BYTES


if __name__ == "__main__":
    sys.exit(main())
