"""Tables: what the ``solver`` of a scheduler names, learned tables by their numbers of steps and hand-made methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...names import Name, is_file, published
from ...solver import Solver


def _is_name(entry: str | os.PathLike[str]) -> bool:
    """Whether a text is a solver's name, which goes before a folder that happens to be called so."""
    try:
        return isinstance(entry, str) and bool(Name.parse(entry))
    except ValueError:
        return False


def read_solvers(solver: Any) -> tuple[dict[int, Solver], list[Name], list[str], list[dict[str, Any]]]:
    """What ``solver`` names: learned tables by N, hand-made methods, the names to write in a config, and the tables to
    embed in it. Raises ValueError naming what exists.
    """
    tables: dict[int, Solver] = {}
    methods, names, embedded = list[Name](), list[str](), list[dict[str, Any]]()
    for entry in solver if isinstance(solver, list | tuple) else [solver]:
        if isinstance(entry, Mapping):
            entry = Solver.from_dict(entry)
        found: list[Solver] = []
        if isinstance(entry, Solver):
            found = [entry]
            embedded.append(entry.to_dict())
        elif not isinstance(entry, str | os.PathLike):
            raise ValueError(f"solver={entry!r}: give a Solver, a name, the path of a JSON file or folder, or a list")
        elif is_file(entry) or (Path(entry).is_dir() and not _is_name(entry)):
            files = sorted(Path(entry).glob("*.json")) if Path(entry).is_dir() else [entry]
            found = [Solver.load(file) for file in files]
            embedded += [table.to_dict() for table in found]
        else:
            name = Name.parse(os.fspath(entry))
            names.append(os.fspath(entry))
            if name.handmade:
                methods.append(name)
            else:
                found = published(name)
        for table in found:
            if table.num_steps in tables:
                raise ValueError(
                    f"two tables for {table.num_steps} steps: {tables[table.num_steps].name or '(unnamed)'} and "
                    f"{table.name or '(unnamed)'}; give one per number of steps"
                )
            tables[table.num_steps] = table
    return tables, methods, names, embedded
