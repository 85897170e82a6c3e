"""Where trajectories are kept: memory while they fit, then files that survive a crash and notice damage."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .problem import Batch, Problem, tensor_bytes

FORMAT = "dss_fast.trajectories/1"


class Store:
    """Named tensors of each batch: built once, then found again.

    An entry is found only if everything that determines it is the same: the settings, the schedule, the
    model (``key``, or else a hash of its parameters and of a probe of its output), guidance, dtype, and the
    batch itself (noise, conditions, scales). cache: a folder that outlives the process; None: none.
    memory: bytes to keep in memory; what exceeds it is read from the cache, or from a temporary folder.

    Files are written beside their name, synced and renamed, so a crash leaves none half written; a file
    whose checksum does not fit its content is reported and built again.
    """

    def __init__(
        self,
        problem: Problem,
        settings: dict,
        *,
        cache: str | Path | None = None,
        memory: int = 2 << 30,
        key: str | None = None,
    ):
        self.problem, self.memory = problem, memory
        self._held: dict[int, dict[str, Tensor]] = {}
        self._bytes = 0
        self._verified: set[Path] = set()
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._folder: Path | None = None
        self._key = ""
        if cache is not None:
            described = {
                "format": FORMAT,
                **settings,
                "model": key if key is not None else problem.fingerprint(),
                "schedule": problem.schedule.spec(),
                "shape": problem.shape,
                "dtype": str(problem.dtype),
                "guidance": [problem.guidance_scale, problem.guided_channels],
                "seed": problem.seed,
                "process": [problem.rank, problem.world],
            }
            self._key = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()
            self._folder = Path(cache) / self._key
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder, older_than=3600)  # younger ones may be another search's
            if not os.access(self._folder, os.W_OK):
                raise PermissionError(f"teacher cache {self._folder} is not writable; choose another folder")

    def get(self, number: int, batch: Batch, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a batch, on the CPU, from memory, from disk or from ``build``."""
        if number in self._held:
            return self._held[number]
        path = self._path(number)
        inputs = self._inputs(batch) if path is not None else ""
        tensors = self._read(path, inputs) if path is not None else None
        mapped = tensors is not None
        if not mapped:
            tensors = {name: value.detach().cpu().contiguous() for name, value in build().items()}
            if path is not None:
                self._write(path, tensors, inputs, durable=self._temporary is None)
        size = sum(value.nbytes for value in tensors.values())
        if self._bytes + size <= self.memory:
            self._bytes += size
            # Out of the mapped file: a held batch should not depend on the disk any more.
            self._held[number] = {k: v.clone() for k, v in tensors.items()} if mapped else tensors
        elif path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="dss_fast_teacher_")
            self._folder = Path(self._temporary.name)
            self._write(self._path(number), tensors, self._inputs(batch), durable=False)
        return tensors

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{number:06d}.safetensors"

    def _inputs(self, batch: Batch) -> str:
        digest = hashlib.blake2b(digest_size=16)
        values = {"noise": batch.noise, "scale": batch.scale, **batch.cond, **(self.problem.uncond or {})}
        for name, value in values.items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(tensor_bytes(value))
        return digest.hexdigest()

    def _read(self, path: Path, inputs: str) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT or metadata.get("key") != self._key:
                raise ValueError("it does not say that it belongs here")
            if metadata.get("inputs") != inputs:
                return None  # whole, but of other noise or conditions
            if path not in self._verified and metadata.get("checksum") != checksum(tensors):
                raise ValueError("its checksum does not fit its content")
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            warnings.warn(f"{path}: damaged ({error}); computing it again", stacklevel=4)
            return None
        self._verified.add(path)
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor], inputs: str, durable: bool) -> None:
        metadata = {"format": FORMAT, "key": self._key, "inputs": inputs, "checksum": checksum(tensors)}
        try:
            save_tensors(path, tensors, metadata, durable=durable)
        except OSError as error:
            if self._temporary is not None:
                raise
            warnings.warn(f"{path}: not kept ({error}); the search goes on without", stacklevel=4)
        self._verified.add(path)


def checksum(tensors: dict[str, Tensor]) -> str:
    """A hash of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, durable: bool = True
) -> None:
    """Writes a safetensors file so that ``path`` holds all of the old or all of the new, whatever happens.

    durable: wait until the disk has it, so that a power cut is survived too.
    """
    from safetensors.torch import save_file

    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        if durable:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sweep(folder: Path, older_than: float = 0.0) -> None:
    """Removes what interrupted writes left in a folder, ``older_than`` seconds: the files to be renamed."""
    for kind in ("safetensors", "json", "jsonl", "md"):
        for path in folder.glob(f".*.{kind}.*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file written by :func:`save_tensors`."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        return {name: torch.clone(file.get_tensor(name)) for name in file.keys()}, metadata  # noqa: SIM118
