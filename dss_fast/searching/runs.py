"""A search as long work: events, log, checkpoint, progress, and a folder that survives any end.

A method is a generator: ``method(problem, steps, state=None, **settings)`` yields one dict after each unit
of work, which :func:`drive` logs, shows and saves. Its keys:

    solvers     {N: Solver}, the best so far
    state       everything the method needs to go on bit for bit: nested dicts and lists of tensors,
                numbers and strings (tuples come back as lists); None: not yet worth saving
    done, total units of work, for the progress bar; unit: their name in the plural,
                ``COUNTED`` when left out
    complete    whether the method has nothing left to do, whatever the budget
    stage       a word
    loss        {N: number}, training error; held_out: {N: number}, error on noise never trained on
    others      logged as they are when JSON can hold them

A method asks ``ledger.affords(cost)`` before it spends and returns when the budget says no.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..draws import Draws
from ..files import check_writable, read_json, read_tensors, sweep, write_json, write_tensors, write_text
from ..progress import bar as progress_bar
from ..solver import Solver
from .ledger import Ledger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "dss_fast.run/4"
COUNTED = "evaluations"  # what a method's ``done`` counts when it does not say
CHECKPOINT_SECONDS = 1.0  # a checkpoint is tens of kilobytes and two syncs, about 5 ms


@dataclass
class SearchResult:
    """What a search found.

    solvers: by number of steps. history: one dict per event, ``evaluations``, ``loss`` and ``held_out``
    (by N) among its keys. evaluations: of the model, as counted by :class:`Ledger`. interrupted: ended by
    Ctrl-C. out: the run folder.
    """

    solvers: dict[int, Solver]
    history: list[dict[str, Any]] = field(repr=False)
    evaluations: int = 0
    interrupted: bool = False
    out: Path | None = None

    @classmethod
    def of(cls, checkpoint: dict[str, Any], folder: RunFolder | None) -> SearchResult:
        """What a finished search found, from its checkpoint and, where the run folder is, its log."""
        history, out = (folder.history, folder.path) if folder else ([], None)
        return cls(checkpoint["solvers"], history, checkpoint["evaluations"], out=out)

    @property
    def solver(self) -> Solver:
        """The solver, when one number of steps was searched."""
        if len(self.solvers) != 1:
            raise ValueError(f"{len(self.solvers)} solvers were searched; choose: solvers[{list(self.solvers)}]")
        return next(iter(self.solvers.values()))

    def __str__(self) -> str:
        lines = []
        for n, solver in self.solvers.items():
            _, errors = self.curve("held_out", n)
            gain = f": held-out RMSE {min(errors):.4g}, {errors[0]:.4g} at the start" if errors else ""
            lines.append(f"{solver.name}{gain}")
        where = f", in {self.out}" if self.out else ""
        where += "; report.html there says what was gained" if self.out and (self.out / "report.html").exists() else ""
        return "\n".join([*lines, f"{self.evaluations:,} model evaluations{where}"])

    def curve(self, key: str, num_steps: int) -> tuple[list[int], list[float]]:
        """Evaluations and values of ``"loss"`` or ``"held_out"`` over the search, for one number of steps."""
        pairs = [(e["evaluations"], (e.get(key) or {}).get(num_steps)) for e in self.history]
        found = [(at, value) for at, value in pairs if value is not None]
        return [at for at, _ in found], [value for _, value in found]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws loss curve, coefficients and timesteps of every solver into a picture file."""
        from ..plots import plot_overview

        loss, held_out = ({n: self.curve(key, n) for n in self.solvers} for key in ("loss", "held_out"))
        plot_overview(self.solvers, loss, held_out, path)


class RunFolder:
    """config.json, log.jsonl, checkpoint.safetensors, solver-N.json, report.html, report.md and its pictures.

    Each but the report is checked against a hash of all its bytes: config, checkpoint and solvers say their own, the
    checkpoint that of the log. A solver is written again from the checkpoint, what else does not fit is refused.

    Raises OSError when the folder cannot be written or another search runs in it, FileExistsError when it holds a
    search that is not to be resumed, ValueError when the one to resume had other settings or is damaged; all before any
    work.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any], resume: bool):
        self.path = Path(path)
        check_writable(self.path)
        self._lock = _locked(self.path)
        self._log: Any = None
        try:
            self._open(config, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, config: dict[str, Any], resume: bool) -> None:
        self.config = json.loads(json.dumps(config, allow_nan=False))
        self._logged = hashlib.blake2b(digest_size=16)
        self._saved: dict[int, Solver] = {}
        self.checkpoint: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None
        self._history: list[bytes] = []
        known = self.path / "config.json"
        if known.exists():
            if not resume:
                raise FileExistsError(f"{self.path} holds a search; pass resume=True or choose another folder")
            self._before = read_json(known, sealed=True)
            self._check({"outputs"})
            self.checkpoint = self._load()
            self._history = self._read_log()
            sweep(self.path)
            if self.checkpoint and self.checkpoint["finished"]:
                self._mend_solvers()

    def begin(self, config: dict[str, Any]) -> None:
        """Before the first event: the config in full. Raises ValueError when the model returns other outputs now."""
        self.config = json.loads(json.dumps(config, allow_nan=False))
        self._check()
        sweep(self.path)
        write_json(self.path / "config.json", self.config, sealed=True)

    def _check(self, unknown: Iterable[str] = ()) -> None:
        found, mine = self._before, self.config
        if found is None:
            return
        free = {"budget", "versions", "date", "processes", *unknown}
        for key in sorted((found.keys() | mine.keys()) - free):
            if found.get(key) != mine.get(key):
                raise ValueError(
                    f"{self.path} cannot be resumed: {key} was {found.get(key)!r}, now {mine.get(key)!r}; "
                    "use the same settings or another folder"
                )

    def _load(self) -> dict[str, Any] | None:
        path = self.path / "checkpoint.safetensors"
        if not path.exists():
            return None
        tensors, metadata = read_tensors(path)
        saved = json.loads(metadata["checkpoint"])
        if saved["format"] != FORMAT:
            raise ValueError(f"{path}: its format is {saved['format']}, not {FORMAT}; use another folder")
        saved["state"] = unflatten(saved["state"], tensors)
        saved["solvers"] = {int(n): Solver.from_dict(data) for n, data in saved["solvers"].items()}
        return saved

    def _read_log(self) -> list[bytes]:
        """The lines before the checkpoint, whose hash it holds."""
        if self.checkpoint is None:
            return []
        path = self.path / "log.jsonl"
        if not path.exists():
            warnings.warn(f"{path}: missing; the search goes on without the events before", stacklevel=6)
            return []
        lines = path.read_bytes().splitlines(keepends=True)[: self.checkpoint["events"]]
        if hashlib.blake2b(b"".join(lines), digest_size=16).hexdigest() != self.checkpoint["log"]:
            raise ValueError(f"{path}: damaged before the checkpoint; restore it, or delete it to go on without")
        return lines

    @property
    def history(self) -> list[dict[str, Any]]:
        """The events before the checkpoint."""
        return [_whole_keys(json.loads(line)) for line in self._history]

    def open_log(self) -> None:
        """Opens the log to go on after the checkpoint."""
        write_text(self.path / "log.jsonl", b"".join(self._history).decode())
        self._logged.update(b"".join(self._history))
        self._log = open(self.path / "log.jsonl", "ab")

    def log(self, event: dict[str, Any]) -> str:
        """Appends an event to log.jsonl; returns the hash of all its lines."""
        line = json.dumps(event).encode() + b"\n"
        self._log.write(line)
        self._log.flush()
        self._logged.update(line)
        return self._logged.hexdigest()

    def save(self, event: dict[str, Any], budget: int | None, finished: bool = False) -> None:
        """Writes the checkpoint: where to go on after ``event``."""
        os.fsync(self._log.fileno())
        tensors: dict[str, Tensor] = {}
        data = {
            "format": FORMAT,
            "events": event["events"],
            "log": event["log"],
            "finished": finished,
            "complete": bool(event.get("complete")),
            "budget": budget,
            "evaluations": event["evaluations"],
            "counted": event["counted"],
            "state": flatten(event.get("state"), tensors),
            "solvers": {str(n): solver.to_dict() for n, solver in event["solvers"].items()},
        }
        tensors = tensors or {"_": torch.zeros(1)}
        write_tensors(self.path / "checkpoint.safetensors", tensors, {"checkpoint": json.dumps(data)})

    def save_solvers(self, solvers: dict[int, Solver]) -> None:
        """Writes the solvers that changed, each to solver-N.json."""
        for n, solver in solvers.items():
            if self._saved.get(n) is not solver:
                solver.save(self.path / f"solver-{n}.json")
                self._saved[n] = solver

    def _mend_solvers(self) -> None:
        """Writes again what solver-N.json of a finished search is missing or is not what the checkpoint says."""
        assert self.checkpoint is not None
        for n, solver in self.checkpoint["solvers"].items():
            path = self.path / f"solver-{n}.json"
            try:
                whole = read_json(path, sealed=True) == json.loads(json.dumps(solver.to_dict()))
                reason = "not the one this search found"
            except (OSError, ValueError) as error:
                whole, reason = False, str(error)
            if not whole:
                warnings.warn(f"{path}: {reason}; written again from the checkpoint", stacklevel=4)
                solver.save(path)

    def forget(self) -> None:
        """Removes what opening it wrote: a search that was refused leaves the folder free for the next."""
        for name in ("config.json", "log.jsonl"):
            (self.path / name).unlink(missing_ok=True)

    def close_log(self) -> None:
        """Closes the log; the folder stays this search's."""
        if self._log is not None:
            self._log.close()

    def close(self) -> None:
        """Leaves the folder to others."""
        self.close_log()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(folder: Path) -> int | None:
    """A lock on a folder, which goes with the process that holds it; None where the system has none."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BlockingIOError(
            f"{folder}: another search is running in it; wait for its end, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Counts Ctrl-C, which raises KeyboardInterrupt as ever: raised inside a destructor, Python drops it."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield seen
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def drive(
    events: Iterable[dict[str, Any]],
    ledger: Ledger,
    *,
    draws: Draws | None = None,
    folder: RunFolder | None = None,
    checkpoint: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Runs a method's events to their end, the budget's or Ctrl-C, and keeps the best solvers whatever happens.

    folder: rank 0's. checkpoint: where the events go on, on every rank.

    Whatever else the method raises comes through with what was kept as a note and as ``error.result``.
    """
    rank = 0 if draws is None else draws.rank
    history = folder.history if folder else []
    if folder:
        folder.open_log()
    result = SearchResult({}, history, out=folder.path if folder else None)
    if checkpoint:
        result.solvers, result.evaluations = checkpoint["solvers"], checkpoint["evaluations"]
        ledger.restore(checkpoint["evaluations"], checkpoint["counted"])
    # The delay spares a search that fails at once its bar.
    bar = progress_bar(progress and rank == 0, unit=f" {COUNTED}", dynamic_ncols=True, smoothing=0.1, delay=0.1)
    shown: dict[str, str] = {}
    resumable: dict[str, Any] | None = None
    saved_at, unsaved = time.monotonic(), False

    def keep(finished: bool = False) -> None:
        if folder and resumable is not None:
            folder.save(resumable, ledger.budget, finished)
        if folder:
            folder.save_solvers(result.solvers)

    try:
        with bar, _interrupts() as interrupts:
            for event in events:
                event = {**event, "evaluations": ledger.evaluations, "events": len(history) + 1}
                event["counted"] = sorted(ledger.counted)
                event["solvers"] = _signed(event["solvers"], event, provenance, result.solvers)
                result.solvers, result.evaluations, unsaved = event["solvers"], ledger.evaluations, True
                line = _loggable(event)
                if folder:
                    event["log"] = folder.log(line)
                history.append(_whole_keys(line))
                # This comes after the log's line: Ctrl-C in between leaves a line too many, which resuming cuts off.
                resumable = event if event.get("state") is not None else resumable
                _show(bar, event, shown)
                if time.monotonic() - saved_at > CHECKPOINT_SECONDS or len(history) == 1:
                    keep()
                    saved_at, unsaved = time.monotonic(), False
                if interrupts:
                    raise KeyboardInterrupt
        keep(finished=True)
    except KeyboardInterrupt:
        if not result.solvers:
            raise
        result.interrupted = True
        if unsaved:
            keep()
        if rank == 0:
            where = f", saved in {folder.path}" if folder else ""
            where += "; resume=True continues" if folder and (resumable or checkpoint) else ""
            print(f"interrupted after {result.evaluations} evaluations: best solver so far kept{where}")
    except Exception as error:
        if result.solvers:
            with suppress(OSError):  # the disk may be what failed
                keep()
            kept = ", ".join(s.name for s in result.solvers.values())
            error.add_note(f"the best so far ({kept}) is in error.result" + (f" and {folder.path}" if folder else ""))
            error.result = result  # type: ignore[attr-defined]
        elif folder and not history:
            folder.forget()
        raise
    finally:
        if folder:
            with suppress(OSError):
                folder.close_log()
    return result


def _signed(
    solvers: dict[int, Solver],
    event: dict[str, Any],
    provenance: dict[str, Any] | None,
    before: dict[int, Solver],
) -> dict[int, Solver]:
    """The solvers with name, source and provenance; those that did not change stay the same objects."""
    signed = {}
    for n, solver in solvers.items():
        if before.get(n) == solver:
            signed[n] = before[n]
            continue
        known = dict(provenance or {})
        name, method = known.pop("name", "searched"), known.get("method", "?")
        known["evaluations"] = event["evaluations"]
        held_out = (event.get("held_out") or {}).get(n)
        if held_out is not None:
            known["held_out"] = held_out
        known = {**solver.provenance, **json.loads(json.dumps(known))}
        signed[n] = replace(solver, name=f"{name}/{n}", source=f"dss_fast.search, method {method}", provenance=known)
    return signed


def _loggable(event: dict[str, Any]) -> dict[str, Any]:
    """What of an event goes to the log: all that JSON can hold but states and tables."""
    line: dict[str, Any] = {"time": round(time.time(), 3)}
    for key, value in event.items():
        if key in ("state", "solvers", "counted", "events", "unit"):
            continue
        try:
            line[key] = json.loads(json.dumps(value, allow_nan=True))
        except (TypeError, ValueError):
            continue
    return line


def _whole_keys(value: Any) -> Any:
    """JSON data with its tables by N keyed by int again; keys are strings only in files."""
    if isinstance(value, dict):
        return {int(key) if key.isdecimal() else key: _whole_keys(item) for key, item in value.items()}
    return [_whole_keys(item) for item in value] if isinstance(value, list) else value


def flatten(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """JSON data in which tensors are replaced by names, and the tensors by name."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone()  # safetensors refuses two names for one storage
        return {"$tensor": path}
    if isinstance(value, dict):
        return {str(key): flatten(item, tensors, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Solver):
        return {"$solver": value.to_dict()}
    return value


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What :func:`flatten` took apart."""
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[value["$tensor"]]
        if value.keys() == {"$solver"}:
            return Solver.from_dict(value["$solver"])
        return {int(key) if key.isdecimal() else key: unflatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    return value


def _show(bar: Any, event: dict[str, Any], shown: dict[str, str]) -> None:
    """Stage, losses and, where the bar counts something else, evaluations beside it; tqdm adds the time left."""
    done, total, unit = event.get("done"), event.get("total"), event.get("unit", COUNTED)
    if done is not None:
        if bar.n == 0 and done > 1:
            bar.initial = done  # a resumed search counts its rate from here
        bar.n, bar.total, bar.unit = done, total, f" {unit}"
    for key, label in (("loss", "loss"), ("held_out", "held-out RMSE")):
        values = {n: v for n, v in (event.get(key) or {}).items() if v is not None and math.isfinite(v)}
        if values:
            shown[label] = f"{label} " + " ".join(f"N={n} {v:.4g}" for n, v in values.items())
    spent = [] if done is not None and unit == COUNTED else [f"{event['evaluations']:,} evaluations"]
    bar.set_postfix_str(", ".join([*shown.values(), *spent]), refresh=False)
    bar.set_description(event.get("stage") or "search", refresh=False)
    bar.update(0)
    if done == total:
        bar.refresh()
