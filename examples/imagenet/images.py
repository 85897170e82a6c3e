"""Fifty thousand images in one npz, made in chunks: any number of processes, stopped and started at will.

Image k depends on (seed, k) alone, so neither the number of processes nor an interruption changes it.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def draw(first: int, count: int, shape: tuple[int, ...], classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (count, *shape) and labels (count,) of images first, first + 1, ...; on the CPU, so on any machine."""
    noise, labels = [], []
    for k in range(first, first + count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
        noise.append(torch.randn(shape, generator=generator))
        labels.append(torch.randint(classes, (), generator=generator))
    return torch.stack(noise), torch.stack(labels)


def write_chunks(
    folder: Path,
    total: int,
    chunk: int,
    make: Callable[[int, int], Tensor],
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes ``chunk-00000.npy``, ...: this process's chunks of ``total`` images, those there already left alone.

    make: make(first, count) -> (count, H, W, 3) uint8. A chunk appears under its name only when it is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = chunk_names(total, chunk)
    for i in range(rank, len(names), world):
        path, first = folder / names[i], i * chunk
        if path.exists():
            continue
        images = make(first, min(chunk, total - first)).cpu().numpy()
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are {images.dtype} {images.shape}; needed is uint8 (n, H, W, 3)")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".chunk", delete=False) as file:
            np.save(file, images)
        os.replace(file.name, path)
        if progress is not None:
            progress(i, len(names))


def chunk_names(total: int, chunk: int) -> list[str]:
    return [f"chunk-{i:05d}.npy" for i in range(-(-total // chunk))]


def merge(folder: Path, total: int, chunk: int, target: Path) -> Path:
    """One ``.npz`` with ``arr_0`` (total, H, W, 3) uint8, what ADM's evaluator reads, copied chunk by chunk.

    Raises ValueError naming the first chunk that is missing or of another size.
    """
    paths = [folder / name for name in chunk_names(total, chunk)]
    parts = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is missing; run again to make it")
        parts.append(np.load(path, mmap_mode="r"))
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    if shape[0] != total or any(p.shape[1:] != shape[1:] for p in parts):
        raise ValueError(
            f"the chunks in {folder} hold {shape[0]} images where {total} were asked for; empty the folder"
        )
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    temporary = target.with_suffix(".partial")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).tobytes())
    os.replace(temporary, target)
    return target
