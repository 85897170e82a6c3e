"""Mutants of every file the package reads again, and what may come of one: what it says, or an error by name.

Of a checkpoint nothing but what was written is read; a solver's file is data that people may edit, so that what is read
is what the file says; of a log the lines that can be read.

python -m scripts.mutants --count 200000 [--seed 0]      # minutes; prints a line per kind of file, exits 1 on a failure
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib import import_module
from pathlib import Path

import torch

from dss_fast import VP, DiscreteVP, Flow, GaussNewton, Solver, Target, handmade, search
from dss_fast.searching import runs as running
from dss_fast.searching.folder import RunFolder, flatten

KINDS = ("solver", "edited", "checkpoint", "log")
SLOW = 5.0  # seconds of CPU time for one file: a hang
ODD = [
    None, True, False, 0, -1, 1, 2, 5.0, 1e308, -1e-320, 10**400, 2**53 + 1, "", "flow", "x" * 5000, [], {}, [[]],
    [1, 2], {"kind": "flow"}, {"kind": "vp"}, [0.0, 1.0], "NaN", float("nan"), float("inf"), "\ud800", [[[[]]]], 1e9,
]  # fmt: skip


def model(x, t):
    return torch.tanh(2 * x) * (1 - t[:, None]) - 0.7 * x


def mangled(data: bytes, generator: random.Random) -> bytes:
    """Bytes flipped, cut, put in, doubled or exchanged, a few times."""
    data = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        at, length = generator.randrange(len(data) + 1), generator.randint(1, 40)
        kind = generator.randrange(6)
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = generator.randbytes(length)
        elif kind == 4:
            data[at:at] = data[max(0, at - length) : at]
        else:
            data = data[:at] if generator.random() < 0.2 else data[:at] + data[at:][::-1][:length] + data[at + length :]
    return bytes(data)


def edited(data: dict, generator: random.Random) -> str:
    """A solver's JSON with values exchanged, left out, added or given twice, as someone who edits it might."""
    data = json.loads(json.dumps(data))
    odd = lambda: copy.deepcopy(generator.choice(ODD))  # noqa: E731
    for _ in range(generator.choice((1, 1, 2))):
        place, key = data, None
        for _ in range(generator.randint(1, 4)):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            parent, key = place, generator.choice(keys)
            place = place[key]
            if not isinstance(place, dict | list):
                break
        if key is None:
            continue
        kind = generator.randrange(4)
        if kind == 0:
            parent[key] = odd()
        elif kind == 1:
            del parent[key]
        elif kind == 2 and isinstance(parent[key], float):
            parent[key] = parent[key] * generator.choice((-1, 2, 1 + 1e-9, 1e300))
        elif isinstance(parent, dict):
            parent[generator.choice(("family", "kind", "coeffs", "z", "free_rows"))] = odd()
        else:
            parent.insert(key, odd())
    text = json.dumps(data)
    if generator.random() < 0.1:
        text = text.replace("{", '{"name": "twice", "name": "again", ', 1)
    if generator.random() < 0.05:
        text = text.replace("{}", generator.choice(("[" * 3000 + "]" * 3000, '{"a":' * 40 + "1" + "}" * 40)), 1)
    return text


class Bench:
    """Whole files of each kind in a folder, and the judgement on a mutant of one."""

    def __init__(self, folder: Path):
        self.run = folder / "run"
        before, running.CHECKPOINT_SECONDS = running.CHECKPOINT_SECONDS, 0.0
        searching = import_module("dss_fast.searching")  # for a field that is no model of data no schedule is plausible
        doubt, searching.doubt = searching.doubt, lambda *what: (0, "")
        left = [5]  # calls after the first checkpoint

        def failing(x, t):
            left[0] -= (self.run / "checkpoint.safetensors").exists()
            if left[0] < 0:
                raise RuntimeError("stop")
            return model(x, t)

        method = GaussNewton(samples=16, batch_size=16, held_out_samples=16)
        try:
            search(Target(failing, (3,), key="m"), 3, method=method, out=self.run, progress=False)
        except RuntimeError:
            pass
        running.CHECKPOINT_SECONDS, searching.doubt = before, doubt
        self.config = json.loads((self.run / "config.json").read_text())
        kept = RunFolder(self.run, self.config, True)
        kept.close()
        self.kept = self.flat(kept)
        self.history = kept.history
        self.solvers = [
            handmade("unip3", 5, VP()),
            handmade("ab2", 3, Flow(convention="diffusers", shift=3.0)),
            handmade("dpmpp_2m", 4, DiscreteVP.linear(num=12)),
            Solver((0.0, 0.3, 1.0), ((0.9, 0.0), (-0.1, 1.3)), Flow(), name="extended", provenance={"seed": 3},
                   noise_coeffs=(0.1, -0.2), network_timesteps=(0.01, 0.35), free_rows=True),
        ]  # fmt: skip
        self.files = []
        for i, solver in enumerate(self.solvers):
            solver.save(folder / f"solver-{i}.json")
            self.files.append((folder / f"solver-{i}.json").read_bytes())
        self.path = folder / "mutant.json"
        self.places = {"checkpoint": self.run / "checkpoint.safetensors", "log": self.run / "log.jsonl"}
        self.whole = {kind: path.read_bytes() for kind, path in self.places.items()}

    @staticmethod
    def flat(folder: RunFolder) -> str:
        tensors: dict = {}
        data = flatten(folder.checkpoint, tensors)
        values = {name: value.tolist() for name, value in tensors.items()}
        return json.dumps([data, values], default=str, sort_keys=True)

    def judge(self, kind: str, generator: random.Random) -> str:
        """``"refused"`` or ``"same"`` for a mutant of that kind; AssertionError for anything else."""
        if kind in ("solver", "edited"):
            return self._solver(kind, generator)
        path, whole = self.places[kind], self.whole[kind]
        mutant = mangled(whole, generator)
        path.write_bytes(mutant)
        try:
            folder = RunFolder(self.run, self.config, True)
            folder.close()
            assert self.flat(folder) == self.kept
            assert kind == "log" or folder.history == self.history
        except ValueError as error:
            assert len(str(error)) < 500 and path.name in str(error), f"{len(str(error))} characters: {error}"
            return "refused"
        finally:
            path.write_bytes(whole)
        return "same"

    def _solver(self, kind: str, generator: random.Random) -> str:
        number = generator.randrange(len(self.solvers))
        solver = self.solvers[number]
        mutant = mangled(self.files[number], generator)
        if kind == "edited":
            mutant = edited(solver.to_dict(), generator).encode()
        self.path.write_bytes(mutant)
        try:
            found = Solver.load(self.path)
        except ValueError as error:
            assert len(str(error)) < 500 and self.path.name in str(error), f"{len(str(error))} characters: {error}"
            return "refused"
        given, says = json.loads(mutant.decode("utf-8-sig")), found.to_dict()
        for key in given.keys() & says.keys():
            assert key == "schedule" or given[key] == says[key], f"{key}: {given[key]!r} became {says[key]!r}"
        for key, value in given["schedule"].items():
            assert says["schedule"][key] == value, f"schedule.{key}: {value!r} became {says['schedule'][key]!r}"
        assert Solver.from_dict(json.loads(json.dumps(says, allow_nan=False))) == found
        return "same"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failures, slowest = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for kind in KINDS:
            outcomes: Counter[str] = Counter()
            for number in range(options.count // len(KINDS) + 1):
                seed, start = f"{options.seed} {kind} {number}", time.process_time()
                try:
                    outcomes[bench.judge(kind, random.Random(seed))] += 1
                except Exception as error:
                    failures += 1
                    outcomes[type(error).__name__] += 1
                    print(f"seed {seed!r}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                slowest = max(slowest, time.process_time() - start)
            print(f"{kind:12s} {sum(outcomes.values()):7d} mutants: {dict(outcomes)}", flush=True)
    print(f"failures: {failures}; slowest {slowest:.2f} s of CPU time")
    return int(failures > 0 or slowest > SLOW)


if __name__ == "__main__":
    sys.exit(main())
