"""Files that are whole or not there: everything the package writes goes through this room, and all it reads again.

A file is written beside its name, synced and renamed, so that a crash leaves the old content or all of the new.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_BYTES, MAX_DEPTH = 8 << 20, 24  # JSON is read up to these; a solver of 600 steps or 1000 alphas_cumprod take less


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` to write into; it takes that name when the block ends without an error.

    The disk has file and name before this returns, so that a power cut is survived too.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def sealing(path: str | os.PathLike[str], command: str, overwrite: bool) -> Iterator[Path]:
    """A temporary file to write into, as in :func:`replacing`, which becomes a command's PNG, JSON or text file.

    It gets a seal, by which :func:`check_free` knows it. Raises FileExistsError as that does.
    """
    check_free(path, command, overwrite)
    with replacing(path) as temporary:
        yield temporary
        content = temporary.read_bytes()
        at = len(content) - _AFTER_SEAL[Path(path).suffix]
        seal = _seal(Path(path).suffix, command, content)
        temporary.write_bytes(content[:at] + seal + content[at:])


def check_free(path: str | os.PathLike[str], command: str, overwrite: bool) -> None:
    """Raises FileExistsError where a command may not write: a link, a folder, a pipe, and, without ``overwrite``, a
    file that this command did not write, or that was changed since."""
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        what = "a link" if path.is_symlink() else "no file"
        raise FileExistsError(f"{path} is {what}, which is never written over; move it, or choose another name")
    if not overwrite and not _is_sealed(path, command):
        raise FileExistsError(
            f"{path} is there, and not as {command} wrote it; move it, choose another name, or give --overwrite"
        )


def _is_sealed(path: Path, command: str) -> bool:
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)[1].get("command") == command
        except ValueError:
            return False
    content, after = path.read_bytes(), _AFTER_SEAL.get(path.suffix, 0)
    length = len(_seal(path.suffix, command, b""))
    at = len(content) - after - length
    body = content[: max(at, 0)] + content[len(content) - after :]
    return at >= 0 and content[at : at + length] == _seal(path.suffix, command, body)


_AFTER_SEAL = {".png": 12, ".json": len("\n}\n"), ".txt": 0}  # bytes behind it; a PNG ends with an empty chunk


def _seal(suffix: str, command: str, content: bytes) -> bytes:
    """A digest of a file's content as a part of it: a PNG's chunk of text, a last entry of JSON, a last line."""
    digest = hashlib.blake2b(content, digest_size=16, person=command.encode()).hexdigest().encode()
    if suffix == ".png":
        chunk = b"tEXtdss_fast\0" + digest
        return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b',\n "seal": "%s"' % digest if suffix == ".json" else b"seal %s\n" % digest


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], data: Any) -> None:
    """Writes :func:`json_text`."""
    write_text(path, json_text(data) + "\n")


def json_text(data: Any) -> str:
    """JSON data as text, lists of numbers on one line. Raises ValueError for NaN."""
    text = json.dumps(data, indent=1, allow_nan=False)
    return re.sub(r"\[\n\s*([^\[\]{}]+?)\n\s*\]", lambda found: "[" + re.sub(r",\n\s*", ", ", found[1]) + "]", text)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON data in a file.

    Raises ValueError naming the file for what is no strict JSON (NaN, numbers beyond float64, a key given twice, text
    that is not UTF-8), larger than ``MAX_BYTES`` or nested deeper than ``MAX_DEPTH``.
    """
    _check_file(path)
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MB; no file of this package is")
    try:
        data = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
        _check_values(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged, or no JSON: it is not text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged, or not a whole JSON file ({error}); is it truncated?") from error
    except RecursionError:
        raise ValueError(f"{path}: nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {shortened(error)}") from error
    return data


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that says the digest of its content. Raises OSError when it cannot."""
    with replacing(path) as temporary:
        try:
            contiguous = {name: value.contiguous() for name, value in tensors.items()}
            save_file(contiguous, temporary, {**metadata, "digest": _digest(tensors, metadata)})
        except SafetensorError as failed:  # a full disk comes as safetensors' own error
            raise OSError(f"{path}: {failed}") from failed


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file that :func:`write_tensors` wrote, and its metadata.

    Raises ValueError naming a file whose content is not what was written.
    """
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Copies begin at multiples of 64 bytes, a file's tensors of 8: matrix products round by the address.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error
    if metadata.pop("digest", None) != _digest(tensors, metadata):
        raise ValueError(f"{path}: damaged, or not written by this package: its digest does not fit its content")
    return tensors, metadata


def shortened(error: object, limit: int = 300) -> str:
    """What an error or a value says, without the middle of what is too long to read."""
    text = str(error)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor, any dtype and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Makes a folder and writes into it. Raises OSError if either fails, ValueError for a name that is empty."""
    if not os.fspath(folder):
        raise ValueError("the folder's name is empty: give one, '.' is the current folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder}: a part of this path is a file; choose another folder") from error
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe."):
        pass


def _check_file(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a folder, and for a pipe, whose opening would wait for a writer for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a file")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of tensors, their names, dtypes and shapes, and metadata."""
    about = {name: [str(value.dtype), list(value.shape)] for name, value in sorted(tensors.items())}
    digest = hashlib.blake2b(json.dumps([about, dict(sorted(metadata.items()))]).encode(), digest_size=16)
    for name in about:
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"{key}: given twice")
        data[key] = value
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
