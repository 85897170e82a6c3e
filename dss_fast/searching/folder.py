"""The folder of a search, which survives any end of it: config, log, checkpoint and solvers."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..files import check_writable, json_text, read_json, read_tensors, write_json, write_tensors, write_text
from ..report import names_of
from ..solver import Solver
from .budget import Ledger
from .processes import differing, from_first
from .result import Event

FORMAT = "dss_fast.run/6"
EDITED = "not what this search wrote, and left as it is; delete it and resume to get the table that was found"
# What may differ when a search is resumed.
FREE = {"name", "request", "budget", "versions", "date", "processes", "doubt"}


class RunFolder:
    """config.json, log.jsonl, checkpoint.safetensors, solver-N.json, and later the report and its pictures.

    The checkpoint holds all that a resumed search needs, checked by its digest; the rest is for people to read. Nothing
    is written before the first event, and a solver when one is found.

    Raises OSError when the folder cannot be written or another search runs in it, FileExistsError when it holds a
    search that is not to be resumed or files of these names, ValueError when the one to resume had other settings or is
    damaged; all before any work.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any], resume: bool) -> None:
        self.path = Path(path)
        self.checkpoint: dict[str, Any] | None = None
        self.history: list[Event] = []
        self._known: dict[str, Any] | None = None
        self._lines: list[bytes] = []
        self._log: BinaryIO | None = None
        self._saved: dict[int, Solver] = {}
        self._written: dict[str, list[str]] = {}  # name of a solver file -> digests of what this search has there
        self._left: set[str] = set()  # those that hold something else, which stays
        self._config: dict[str, Any] = {}
        check_writable(self.path)
        self._lock = FileLock(self.path / ".dss_fast.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"{self.path}: another search is running in it; wait for its end, or choose another folder"
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
        try:
            self._open(config, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, asked: Mapping[str, Any], resume: bool) -> None:
        mine = ("config.json", "log.jsonl", "checkpoint.safetensors", *map(_file_of, asked["num_steps"]))
        reports = names_of(asked["num_steps"])
        found = [name for name in (*mine, *reports) if os.path.lexists(self.path / name)]
        known, ours = None, {"config.json", "checkpoint.safetensors"} <= set(found)
        if "config.json" in found and not ours:
            known = read_json(self.path / "config.json")
            ours = isinstance(known, dict) and "method" in known
        if found and not (resume and ours):
            hint = "go on with it by resume=True (--resume) or choose" if ours else "choose"
            raise FileExistsError(f"{self.path} holds {', '.join(found[:3])}; {hint} another folder")
        if not found:
            return
        if "checkpoint.safetensors" in found:
            self.checkpoint = self._read_checkpoint()
            self._known = self.checkpoint["config"]
            self._written = self.checkpoint["files"]
            self._read_log(self.checkpoint["events"])
        else:
            self._known = known
        own = mine[:2] if self.checkpoint is None else (*mine, *reports) if self.checkpoint["finished"] else mine
        for name in found:
            if not os.path.isfile(self.path / name):
                raise FileExistsError(f"{self.path} holds {name}, which is no file; move it, or choose another folder")
        if others := [name for name in found if name not in own]:
            raise FileExistsError(f"{self.path} holds {others[0]}, which this search has not written; move it")
        self.check(asked, unknown={"targets"})

    def check(self, config: Mapping[str, Any], unknown: Iterable[str] = ()) -> None:
        """Takes the config of the search to come. Raises ValueError where the one in the folder had another."""
        self._config = dict(config)
        known = self._known or self._config
        apart = [name for name in differing(known, self._config) if name not in FREE and name not in unknown]
        was, now = (len(c.get("targets") or ()) for c in (known, self._config))
        if "targets" in apart and was != now:
            raise ValueError(
                f"{self.path} cannot be resumed: it is a search for {was} targets, and {now} are given; use the same "
                "ones or another folder"
            )
        for name in apart:
            if name in known or name in self._config:
                raise ValueError(
                    f"{self.path} cannot be resumed: {name} was {known.get(name)!r}, now {self._config.get(name)!r}; "
                    "use the same settings or another folder"
                )
        if apart:
            random = "outputs" in apart and "weights" not in apart
            raise ValueError(
                f"{self.path} cannot be resumed: it is a search for a target of other {', '.join(apart)}; use the same "
                "one or another folder"
                + "; a model whose outputs are random is known again by a key: search(Target(..., key='name'), ...)"
                * random
            )

    def note(self, event: Event) -> None:
        """Appends an event to the log, which the first one opens."""
        if self._log is None:
            write_json(self.path / "config.json", self._config)
            write_text(self.path / "log.jsonl", b"".join(self._lines).decode())
            self._log = open(self.path / "log.jsonl", "ab")
        self._log.write(json.dumps(event.to_dict()).encode() + b"\n")
        self._log.flush()

    def save(self, event: Event, events: int, ledger: Ledger, finished: bool, solvers: Mapping[int, Solver]) -> None:
        """Writes the checkpoint: where to go on after ``event``, the last of so many ``events``, and the digests of the
        ``solvers`` that are written next, so that a search killed between the two knows them as its own."""
        if self._log is not None:
            os.fsync(self._log.fileno())
        for n, solver in solvers.items():
            known = self._written.setdefault(_file_of(n), [])
            known += [digest] if (digest := _digest_of(solver)) not in known else []
        tensors: dict[str, Tensor] = {"_": torch.zeros(1)}
        data = {
            "format": FORMAT,
            "config": self._config,
            "events": events,
            "finished": finished,
            "complete": event.complete,
            "budget": ledger.budget,
            "evaluations": event.evaluations,
            "counted": sorted(ledger.counted),
            "state": flatten(event.state, tensors),
            "solvers": flatten(event.solvers, tensors),
            "starts": flatten(event.starts, tensors),
            "files": self._written,
        }
        write_tensors(self.path / "checkpoint.safetensors", tensors, {"checkpoint": json.dumps(data)})

    def save_solvers(self, solvers: Mapping[int, Solver]) -> None:
        """Writes the solvers that changed, each to solver-N.json, but where that is no longer what was written."""
        for n, solver in solvers.items():
            path = self.path / _file_of(n)
            if self._saved.get(n) is not solver and not self._is_edited(path):
                solver.save(path)
                self._saved[n], self._written[path.name] = solver, [_digest_of(solver)]

    def _is_edited(self, path: Path) -> bool:
        """Whether a solver file is somebody's work, which is said once."""
        if path.name in self._left:
            return True
        if not os.path.lexists(path):
            return False
        if path.is_file() and not path.is_symlink() and _digest(path.read_bytes()) in self._written.get(path.name, ()):
            return False
        self._left.add(path.name)
        warnings.warn(f"{path}: {EDITED}", stacklevel=5)
        return True

    def drop_candidates(self, solvers: Mapping[int, Solver]) -> None:
        """Takes away the files that this search wrote for numbers of steps it has not chosen in the end."""
        for n in self._config["num_steps"]:
            if n not in solvers and "calls" in self._config:
                (self.path / f"solver-{n}.json").unlink(missing_ok=True)

    def mend_solvers(self, solvers: Mapping[int, Solver]) -> None:
        """Writes the solver files of a finished search that are missing or damaged; one that was edited stays."""
        for n, solver in solvers.items():
            path = self.path / _file_of(n)
            try:
                same, reason = Solver.load(path) == solver, ""
            except (OSError, ValueError) as error:
                same, reason = False, str(error)
            if reason:
                warnings.warn(f"{reason}; written again from the checkpoint", stacklevel=4)
                solver.save(path)
            elif not same:
                warnings.warn(f"{path}: {EDITED}", stacklevel=4)

    def has_report(self) -> bool:
        """Whether there is any file of a report; it may be the user's, or edited, and is not written again."""
        return any(os.path.lexists(self.path / name) for name in names_of(self._config["num_steps"]))

    def close(self) -> None:
        """Leaves the folder to others."""
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
        self._lock.release()

    def _read_checkpoint(self) -> dict[str, Any]:
        path = self.path / "checkpoint.safetensors"
        tensors, metadata = read_tensors(path)
        saved = json.loads(metadata.get("checkpoint", "{}"))
        if saved.get("format") != FORMAT:
            raise ValueError(f"{path}: its format is {saved.get('format')!r}, not {FORMAT!r}; use another folder")
        return {**saved, **{key: unflatten(saved[key], tensors) for key in ("state", "solvers", "starts")}}

    def _read_log(self, events: int) -> None:
        """The lines before the checkpoint; a search goes on without those that are missing or cannot be read."""
        path = self.path / "log.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)[:events] if path.is_file() else []
        for line in lines:
            with suppress(ValueError, TypeError, AttributeError):
                self.history.append(Event.from_dict(json.loads(line)))
                self._lines.append(line)
        if len(self.history) < events:
            missing = events - len(self.history)
            warnings.warn(f"{path}: {missing} of {events} events are missing or damaged; going on", stacklevel=6)


def _file_of(n: int) -> str:
    return f"solver-{n}.json"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _digest_of(solver: Solver) -> str:
    """Of the file that :meth:`Solver.save` writes."""
    return _digest(f"{json_text(solver.to_dict())}\n".encode())


@contextmanager
def opened(
    out: str | os.PathLike[str] | None, config: Mapping[str, Any], resume: bool
) -> Iterator[tuple[RunFolder | None, dict[str, Any] | None]]:
    """The first process's run folder, None elsewhere and without ``out``; and the checkpoint for every process."""
    mine: list[RunFolder] = []

    def checkpoint() -> dict[str, Any] | None:
        if out is None:
            return None
        mine.append(RunFolder(out, config, resume))
        return mine[0].checkpoint

    found = from_first(checkpoint)  # what the first process was given counts: none may wait alone
    try:
        yield (mine[0] if mine else None), found
    finally:
        for folder in mine:
            folder.close()


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


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
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
