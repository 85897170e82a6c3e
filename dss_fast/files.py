"""Files that are whole or not there: everything the package writes goes through this room.

A file is written beside its name, synced and renamed, so that a crash leaves the old content or all of the new.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

SUFFIXES = ("safetensors", "json", "jsonl", "md", "png", "txt")


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` to write into; it takes that name when the block ends without an error.

    durable: wait until the disk has file and name, so that a power cut is survived too.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes JSON data, lists of numbers on one line. Raises ValueError for NaN and Inf."""
    text = json.dumps(data, indent=1, allow_nan=False)
    flat = re.sub(r"\[\n\s*([^\[\]{}]+?)\n\s*\]", lambda found: "[" + re.sub(r",\n\s*", ", ", found[1]) + "]", text)
    write_text(path, flat + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, durable: bool = True
) -> None:
    """Writes a safetensors file."""
    save_file = _safetensors().torch.save_file
    with replacing(path, durable=durable) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, dict(metadata))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped from it, and its metadata."""
    with _safetensors().safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor, any dtype and device; numpy is not needed."""
    flat = tensor.detach().to("cpu", copy=False).contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.numel() else b""


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes a folder and writes into it. Raises OSError if either fails."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe."):
        pass


def sweep(folder: Path, older_than: float = 0.0) -> None:
    """Removes what interrupted writes left in a folder, ``older_than`` seconds: the files to be renamed."""
    for suffix in SUFFIXES:
        for path in folder.glob(f".*.{suffix}.*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safetensors() -> ModuleType:
    """safetensors, which only run folders and trajectories on disk need."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("run folders and trajectories need safetensors: pip install 'dss_fast[search]'") from error
    return safetensors
