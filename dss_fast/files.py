"""Files that are whole or not there: everything the package writes goes through this room, and all it reads again.

A file is written beside its name, synced and renamed, so that a crash leaves the old content or all of the new. A
sealed one says the hash of all its bytes, the hash's own digits taken as zeros, so that no changed bit is read.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

SUFFIXES = ("safetensors", "json", "jsonl", "md", "html", "png", "txt")
MAX_BYTES, MAX_DEPTH = 8 << 20, 24  # JSON is read up to these; a solver of 600 steps or 1000 alphas_cumprod take less
SEAL = re.compile(rb'"checksum": ?"([0-9a-f]{32})"')  # JSON text and the header of a safetensors file hold one
UNSEALED = "0" * 32


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


def write_json(path: str | os.PathLike[str], data: Any, *, sealed: bool = False) -> None:
    """Writes :func:`json_text`; an object sealed, if so wanted."""
    text = json_text({"checksum": UNSEALED, **data} if sealed else data)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
        if sealed:
            _seal(temporary, len(text))


def json_text(data: Any) -> str:
    """JSON data as text, lists of numbers on one line. Raises ValueError for NaN."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return re.sub(r"\[\n\s*([^\[\]{}]+?)\n\s*\]", lambda found: "[" + re.sub(r",\n\s*", ", ", found[1]) + "]", text)


def read_json(path: str | os.PathLike[str], *, sealed: bool = False) -> Any:
    """The JSON data in a file, without its checksum. sealed: refuse it when it has none.

    Raises ValueError naming the file for what is no strict JSON (NaN, numbers beyond float64, a key given twice, text
    that is not UTF-8), larger than ``MAX_BYTES``, nested deeper than ``MAX_DEPTH`` or changed since it was sealed.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MB; no file of this package is")
    try:
        data = json.loads(content.decode(), object_pairs_hook=_object)
        _check_values(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged, or no JSON: it is not text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged, or not a whole JSON file ({error}); is it truncated?") from error
    except RecursionError:
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {shortened(error)}") from error
    if sealed or (isinstance(data, dict) and "checksum" in data):
        _check_seal(path, content, len(content))
        data.pop("checksum", None)
    return data


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, durable: bool = True
) -> None:
    """Writes a sealed safetensors file. Raises OSError when it cannot."""
    save_file, error = _safetensors().torch.save_file, _safetensors().SafetensorError
    with replacing(path, durable=durable) as temporary:
        try:
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, temporary, {**metadata, "checksum": UNSEALED})
        except error as failed:  # a full disk comes as safetensors' own error
            raise OSError(f"{path}: {failed}") from failed
        _seal(temporary, _header(temporary))


def read_tensors(path: str | os.PathLike[str], *, checked: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a sealed safetensors file, mapped from it, and its metadata.

    checked: False when this process has checked its bytes before. Raises ValueError naming a file that has changed
    since it was written.
    """
    if checked:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path}: damaged: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _check_seal(path, content, _header(path))
    with _safetensors().safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        metadata.pop("checksum", None)
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def shortened(error: object, limit: int = 300) -> str:
    """What an error or a value says, without the middle of what is too long to read."""
    text = str(error)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


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


def _header(path: str | os.PathLike[str]) -> int:
    """Where the header of a safetensors file ends: 8 bytes of length, then JSON."""
    with open(path, "rb") as file:
        return min(8 + int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size)


def _hash(content: Any, seal: re.Match[bytes]) -> str:
    """The hash of bytes, those of the hash itself taken as zeros."""
    digest = hashlib.blake2b(digest_size=16)
    view = memoryview(content)
    for part in (view[: seal.start(1)], UNSEALED.encode(), view[seal.end(1) :]):
        digest.update(part)
    view.release()
    return digest.hexdigest()


def _seal(path: Path, end: int) -> None:
    """Writes the hash of a file into the place for it, which lies before ``end``."""
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = SEAL.search(content, 0, end)
            assert place is not None
            digest, start = _hash(content, place), place.start(1)
            del place  # the map cannot close while this holds it
        file.seek(start)
        file.write(digest.encode())


def _check_seal(path: str | os.PathLike[str], content: Any, end: int) -> None:
    found = SEAL.search(content, 0, end)
    if found is None:
        raise ValueError(f"{path}: carries no checksum: it is damaged, or of an older release; use another folder")
    if _hash(content, found) != found[1].decode():
        raise ValueError(
            f"{path}: its checksum does not fit its content: it is damaged, or was edited; restore it, or, if the "
            "edit was meant, remove the checksum"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)}: given twice")
    return data


def _check_values(value: Any, place: str = "", depth: int = 0) -> None:
    """Raises ValueError naming the place of what Python reads as JSON and other readers do not."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{place}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_values(item, f"{place}.{key}" if place else key, depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_values(item, f"{place}[{i}]", depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{place}: must be a finite number of float64")


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
