"""A search as long work: the loop that logs, shows and saves its events, also when it is interrupted."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ..progress import bar as progress_bar
from ..solver import Solver
from .budget import Ledger
from .folder import RunFolder
from .processes import is_first
from .result import COUNTED, Event, SearchResult

CHECKPOINT_SECONDS = 1.0  # a checkpoint is tens of kilobytes and two syncs, about 5 ms


def run(
    events: Iterable[Event],
    ledger: Ledger,
    config: Mapping[str, Any],
    *,
    folder: RunFolder | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Runs a method's events to their end, the budget's or Ctrl-C, and keeps the best solvers whatever happens.

    folder: the first process's. checkpoint: where the events go on, on every process.

    Whatever else the method raises comes through with what was kept as a note and as ``error.result``.
    """
    result = SearchResult({}, folder.history if folder else [], out=folder.path if folder else None)
    if checkpoint:
        result.solvers, result.starts = dict(checkpoint["solvers"]), dict(checkpoint["starts"])
        result.evaluations = checkpoint["evaluations"]
        ledger.restore(checkpoint["evaluations"], checkpoint["counted"])
    kept = _Kept(folder, ledger)
    # The delay spares a search that fails at once its bar.
    shown = progress and is_first()
    bar = progress_bar(shown, unit=f" {COUNTED}", dynamic_ncols=True, smoothing=0.1, delay=0.1)
    try:
        with bar, _interrupts() as interrupts:
            for told in events:
                event = replace(told, evaluations=ledger.evaluations, time=round(time.time(), 3))
                event = replace(event, solvers=_signed(event, config, result.solvers))
                result.solvers, result.starts = dict(event.solvers), dict(event.starts)
                result.evaluations = ledger.evaluations
                result.history.append(event.told())
                kept.event(event, len(result.history))
                _show(bar, event, result)
                if interrupts:
                    raise KeyboardInterrupt
        result.solvers = {n: replace(s, source=s.source.removesuffix(UNFINISHED)) for n, s in result.solvers.items()}
        kept.now(result.solvers, finished=True)
    except KeyboardInterrupt:
        if not result.solvers:
            raise
        result.interrupted = True
        kept.now(result.solvers)
        if is_first():
            print(f"interrupted after {result.evaluations} evaluations: best solver so far kept{kept.where()}")
    except Exception as error:
        if result.solvers:
            with suppress(OSError):  # the disk may be what failed
                kept.now(result.solvers)
            names = ", ".join(solver.name for solver in result.solvers.values())
            error.add_note(f"the best so far ({names}) is in error.result{kept.where()}")
            error.result = result  # type: ignore[attr-defined]
        raise
    return result


def is_finished(checkpoint: Mapping[str, Any], ledger: Ledger) -> bool:
    """Whether nothing is left to do: the method said so, or a budget that was not raised since stopped it."""
    before, now = checkpoint["budget"], ledger.budget
    raised = before is not None and (now is None or now > before)
    return checkpoint["finished"] and (checkpoint["complete"] or not raised)


def restored(checkpoint: Mapping[str, Any], folder: RunFolder | None) -> SearchResult:
    """What a finished search found."""
    found = SearchResult(dict(checkpoint["solvers"]), [], checkpoint["evaluations"], starts=dict(checkpoint["starts"]))
    if folder is not None:
        found.history, found.out = folder.history, folder.path
        folder.mend_solvers(found.solvers)
    return found


UNFINISHED = ", unfinished"


class _Kept:
    """What of a search is on disk: nothing without a folder, else all but the last second."""

    def __init__(self, folder: RunFolder | None, ledger: Ledger) -> None:
        self.folder, self.ledger = folder, ledger
        self._last: tuple[Event, int] | None = None  # from which a search can be resumed
        self._at = 0.0

    def event(self, event: Event, number: int) -> None:
        """Takes note of an event. Ctrl-C between log and checkpoint leaves a line too many, which resuming cuts off."""
        if self.folder is None:
            return
        self.folder.note(event)
        self._last = (event, number) if event.state is not None else self._last
        if time.monotonic() - self._at > CHECKPOINT_SECONDS:
            self.now(event.solvers)

    def now(self, solvers: Mapping[int, Solver], finished: bool = False) -> None:
        """Writes checkpoint and solvers."""
        if self.folder is None:
            return
        if self._last is not None:
            event, number = self._last
            event = replace(event, solvers=solvers) if finished else event
            self.folder.save(event, number, self.ledger, finished, solvers)
        self.folder.save_solvers(solvers)
        if finished:
            self.folder.drop_candidates(solvers)
        self._at = time.monotonic()

    def where(self) -> str:
        """Where what was kept is, as a clause."""
        if self.folder is None or not (self.folder.path / "checkpoint.safetensors").exists():
            return ""
        return f", saved in {self.folder.path}; resume=True (--resume) continues"


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


def _signed(event: Event, config: Mapping[str, Any], before: Mapping[int, Solver]) -> dict[int, Solver]:
    """The solvers with name, source and provenance; those that did not change stay the same objects."""
    signed = {}
    for n, solver in event.solvers.items():
        if before.get(n) == solver:
            signed[n] = before[n]
            continue
        about = {**config, "start": event.starts[n].name, "evaluations": event.evaluations}
        if n in event.held_out:
            about["held_out"] = event.held_out[n]
        source = f"dss_fast.search, method {config['method']}{UNFINISHED}"
        provenance = {**solver.provenance, **about}
        signed[n] = replace(solver, name=f"{config['name']}/{n}", source=source, provenance=provenance)
    return signed


def _show(bar: Any, event: Event, result: SearchResult) -> None:
    """Stage, losses and, where the bar counts something else, evaluations beside it; tqdm adds the time left."""
    if bar.disable:
        return
    if bar.n == 0 and event.done > 1:
        bar.initial = event.done  # a resumed search counts its rate from here
    bar.n, bar.total, bar.unit = event.done, event.total, f" {event.unit}"
    shown = []
    for key, label in (("loss", "loss"), ("held_out", "held-out RMSE")):
        curves = {n: result.curve(key, n)[1] for n in result.solvers}
        values = {n: curve[-1] for n, curve in curves.items() if curve and math.isfinite(curve[-1])}
        if values:
            shown.append(f"{label} " + " ".join(f"N={n} {v:.4g}" for n, v in values.items()))
    if event.unit != COUNTED:
        shown.append(f"{event.evaluations:,} evaluations")
    bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.set_description(event.stage, refresh=False)
    bar.update(0)
    if event.done == event.total:
        bar.refresh()
