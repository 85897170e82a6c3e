"""Store: where trajectories are kept, memory while they fit, then files that survive a crash and notice damage."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..draws import Draws
from ..files import check_writable, read_tensors, sweep, tensor_bytes, write_tensors
from ..target import Samples

FORMAT = "dss_fast.trajectories/2"


class Store:
    """Named tensors of each batch: built once, then found again.

    An entry is found only if everything that determines it is the same: the settings, the schedule, the
    model (the target's ``key``, or else hashes of its parameters and outputs), guidance, dtype, and the
    batch itself (noise, conditions, scales). cache: a folder that outlives the process; None: none.
    memory: bytes to keep in memory; what exceeds it is read from the cache, or from a temporary folder.

    Files are written beside their name, synced and renamed, so a crash leaves none half written; a file
    whose checksum does not fit its content is reported and built again.
    """

    def __init__(
        self,
        draws: Draws,
        settings: dict[str, Any],
        *,
        cache: str | Path | None = None,
        memory: int = 2 << 30,
    ) -> None:
        self.draws, self.memory = draws, memory
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
                "targets": [
                    [
                        one.target.key or [one.parameters_hash(), one.outputs_hash()],
                        one.target.shape,
                        one.target.guidance_scale,
                        one.target.guided_channels,
                    ]
                    for one in draws.each
                ],
                "schedule": draws.schedule.to_dict(),
                "dtype": str(draws.target.dtype),
                "seed": draws.seed,
                "process": [draws.rank, draws.world],
            }
            self._key = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()
            self._folder = Path(cache) / self._key
            check_writable(self._folder)
            sweep(self._folder, older_than=3600)  # younger temporary files may be another search's

    def find(self, number: int, batch: Samples) -> dict[str, Tensor] | None:
        """The tensors of a batch, on the CPU, from memory or from disk; None when they are nowhere."""
        if number in self._held:
            return self._held[number]
        path = self._path(number)
        tensors = None if path is None else self._read(path, self._inputs(batch))
        if tensors is not None:
            self._hold(number, tensors, mapped=True)
        return tensors

    def keep(self, number: int, batch: Samples, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes what was computed for a batch; returns it on the CPU."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        path = self._path(number)
        if path is not None:
            self._write(path, tensors, self._inputs(batch), durable=self._temporary is None)
        if not self._hold(number, tensors) and path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="dss_fast_teacher_")
            self._folder = Path(self._temporary.name)
            self._write(self._folder / self._name(number), tensors, self._inputs(batch), durable=False)
        return tensors

    def _hold(self, number: int, tensors: dict[str, Tensor], mapped: bool = False) -> bool:
        """Keeps a batch in memory if it fits; one mapped from a file is copied, not to depend on the disk any more."""
        size = sum(value.nbytes for value in tensors.values())
        fits = self._bytes + size <= self.memory
        if fits:
            self._bytes += size
            self._held[number] = {k: v.clone() for k, v in tensors.items()} if mapped else tensors
        return fits

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / self._name(number)

    def _name(self, number: int) -> str:
        return f"{number:06d}.safetensors"

    def _inputs(self, batch: Samples) -> str:
        """A hash of all that a batch's trajectories start from: noise, guidance scales and conditions."""
        digest = hashlib.blake2b(digest_size=16)
        values = {"noise": batch.noise, "scale": batch.scale, **batch.cond, **(batch.target.uncond or {})}
        for name, value in values.items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(tensor_bytes(value))
        return digest.hexdigest()

    def _read(self, path: Path, inputs: str) -> dict[str, Tensor] | None:
        """The tensors of a file; None, with a warning, where it is damaged, and where it is of other inputs."""
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path, checked=path not in self._verified)
            if metadata.get("format") != FORMAT or metadata.get("key") != self._key:
                raise ValueError(f"{path}: does not say that it belongs here")
        except (OSError, ValueError) as error:
            warnings.warn(f"{error}; computing it again", stacklevel=4)
            return None
        if metadata.get("inputs") != inputs:
            return None  # the file is whole, but of other noise or conditions
        self._verified.add(path)
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor], inputs: str, durable: bool) -> None:
        metadata = {"format": FORMAT, "key": self._key, "inputs": inputs}
        try:
            write_tensors(path, tensors, metadata, durable=durable)
            self._verified.add(path)
        except OSError as error:
            warnings.warn(f"{path}: not kept ({error}); the search goes on without", stacklevel=4)
