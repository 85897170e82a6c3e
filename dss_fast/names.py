"""Names of solvers: the only place that reads ``"sit-xl-2-256/10"``, ``"dpmpp_2m/8@karras"`` or the path of a file.

solver  = name["/" N]["@" spacing]  |  path ending in ".json"  |  "hf://owner/repo/file.json"
name    = a published table, or one of the library  |  a hand-made method
spacing = "uniform", "karras", "lambda", "shift" and a factor; a published table takes a shift alone, and is moved by it
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .methods import METHODS, check_spacing, handmade
from .modes import kept
from .schedule import Schedule, from_dict
from .solver import Solver


@dataclass(frozen=True)
class Name:
    """What a name says. num_steps, spacing: None where it does not say."""

    name: str
    num_steps: int | None = None
    spacing: str | None = None

    @property
    def handmade(self) -> bool:
        """Whether a method makes it, for any N and on any grid; else it is a published table."""
        return self.name in METHODS

    @classmethod
    def parse(cls, text: str) -> Name:
        """Raises ValueError for any other text, listing the names that exist."""
        rest, at, spacing = text.partition("@")
        name, slash, steps = rest.partition("/")
        if name not in METHODS and name not in _published():
            raise ValueError(f"no solver is called {text!r}{_meant(name)}; there are {known()}")
        if slash and not (steps.isascii() and steps.isdigit() and int(steps) > 0):
            raise ValueError(f"solver={text!r}: {steps!r} is no number of steps; write for example '{name}/10'")
        if at:
            if name not in METHODS and not spacing.startswith("shift"):
                raise ValueError(
                    f"solver={text!r}: a published table has its own timesteps; leave out '@{spacing}', or move it to "
                    f"data k times as large by '@shift' and k, as in '{name}/10@shift2'"
                )
            check_spacing(spacing)
        return cls(name, int(steps) if slash else None, spacing if at else None)


def find_solver(
    solver: Solver | str | os.PathLike[str], schedule: Schedule | None = None, num_steps: int | None = None
) -> Solver:
    """A solver from a Solver, a name (see the top of this module) or the path of a JSON file.

    schedule: what hand-made rows are built on; ``Flow()`` by default. num_steps: for names without ``/N``.

    Raises ValueError listing what exists.
    """
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str | os.PathLike):
        raise ValueError(f"solver={solver!r}: give a Solver, a name or the path of a JSON file")
    if is_file(solver):
        return Solver.load(solver)
    name = Name.parse(os.fspath(solver))
    steps = num_steps if name.num_steps is None else name.num_steps
    if name.handmade:
        if steps is None:
            raise ValueError(f"solver={str(solver)!r}: how many steps? Write for example '{name.name}/10'")
        return _handmade(name.name, steps, schedule, spacing=name.spacing or "uniform")
    if steps is None:
        raise ValueError(
            f"solver={str(solver)!r}: of how many steps? There are {', '.join(map(str, published_steps(name.name)))}; "
            f"write for example '{name.name}/{published_steps(name.name)[-1]}'"
        )
    if steps not in published_steps(name.name):
        raise ValueError(f"no published solver is called {name.name}/{steps}; there are {known()}")
    table = _table(name.name, steps)
    return table if name.spacing is None else table.moved(float(name.spacing.removeprefix("shift")))


def is_file(solver: str | os.PathLike[str]) -> bool:
    """Whether a string or path names a file rather than a solver."""
    return os.fspath(solver).endswith(".json")


def solver_names() -> list[str]:
    """The published solvers, ``"sit-xl-2-256/10"`` and so on."""
    return [f"{name}/{n}" for name in _published() for n in published_steps(name)]


def families() -> list[str]:
    """The published tables' names without their steps, ``"sit-xl-2-256"`` and so on."""
    return list(_published())


def library() -> list[str]:
    """Those of them that were searched here for many models at once, to be moved to the one at hand."""
    return [name for name, entry in _published().items() if "library" in entry]


def published_steps(name: str) -> list[int]:
    """The numbers of steps a published table exists for, rising."""
    return [int(n) for n in _published()[name]["steps"]]


def published(name: Name) -> list[Solver]:
    """The tables that a published name means: one, or without ``/N`` all of them; moved where it says a shift."""
    steps = published_steps(name.name) if name.num_steps is None else [name.num_steps]
    moved = "" if name.spacing is None else f"@{name.spacing}"
    return [find_solver(f"{name.name}{moved}", None, n) for n in steps]


def printable(text: object, keep: str = "") -> str:
    """A text as it may be printed: what a terminal would obey or not show (escape sequences, line breaks, letters that
    turn the direction), but for the letters to keep, as Python writes it in a string."""
    shown = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


OTHER_NAMES = {  # of methods that exist here, letters and digits alone
    "unipcmultistep": "unipc, unipc3",
    "unipc2": "unipc",
    "dpmsolver": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m, dpmpp_3m",
    "dpm": "dpmpp_2m",
    "ddim": "euler",
    "plms": "ab4_uniform",
    "pndm": "ab4_uniform",
    "ipndm": "ab4_uniform",
    "lms": "ab4",
    "edm": "heun",
    "dopri5": "rk45, in compare alone",
    "rk45": "'rk45', in compare alone and without /N",
}


def _meant(name: str) -> str:
    """What somebody who wrote this name may have meant, as a clause; "" where nothing is near."""
    written = {re.sub(r"[^a-z0-9]", "", one): one for one in (*METHODS, *_published())}
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))
    meant = OTHER_NAMES.get(plain)
    if meant is None:
        near = [one for one in written if plain and one.startswith(plain)]
        near = near or difflib.get_close_matches(plain, [*written, *OTHER_NAMES], n=2, cutoff=0.75)
        meant = ", ".join(dict.fromkeys(OTHER_NAMES.get(one) or written[one] for one in near))
    return f" (do you mean {meant}?)" if meant else ""


def known() -> str:
    """What exists, for messages."""
    published = [f"{name}/{{{','.join(map(str, published_steps(name)))}}}" for name in _published()]
    return f"{', '.join(published)}; hand-made: {', '.join(f'{m}/N' for m in METHODS)}; or a path ending in .json"


_handmade = kept(64)(handmade)


@lru_cache(None)
def _table(name: str, num_steps: int) -> Solver:
    entry = _published()[name]
    row = entry["steps"][str(num_steps)]
    if name in library():
        return Solver.from_dict(row)
    schedule = from_dict(entry["schedule"])
    return Solver.from_timedeltas(
        row["timedeltas"], row["coeffs"], schedule, name=f"{name}/{num_steps}", source=entry["source"]
    )


@lru_cache(None)
def _published() -> dict[str, Any]:
    files = sorted((Path(__file__).parent / "solvers").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
