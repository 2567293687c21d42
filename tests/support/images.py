"""Images, and `assert_identical`: of files, of bytes in memory, and of what an export serves."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
from support.clients import connected
from support.waiting import WAIT_S_MAX

KiB, MiB = 1 << 10, 1 << 20
CHUNK_BYTES = 4 * MiB

Content = bytes | bytearray | Path | str
"""What can be compared: bytes, a raw file, or an NBD URI."""

_RUNS = (1, 511, 512, 4095, 4096, 10_000, 65_536, 70_001, 131_072, 300_000)


def make_image(path: Path, size: int, seed: int = 1) -> Path:
    """A raw file of noise, holes and written zeroes, in runs of odd lengths at odd places."""
    noise = random.Random(seed)
    with path.open("wb") as file:
        offset = 0
        while offset < size:
            length = min(noise.choice(_RUNS) * noise.randint(1, 3), size - offset)
            kind = noise.random()
            if kind < 0.55:
                os.pwrite(file.fileno(), noise.randbytes(length), offset)
            elif kind < 0.7:
                os.pwrite(file.fileno(), bytes(length), offset)
            offset += length
        file.truncate(size)
    return path


def make_noise(path: Path, size: int, seed: int = 99) -> Path:
    """A raw file of noise alone: whatever shines through from it is seen."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def make_empty(path: Path, size: int) -> Path:
    """A raw file that is one hole."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_qcow2(path: Path, size: int, *options: str) -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size)]
    subprocess.run(command, check=True, timeout=WAIT_S_MAX)
    return path


def allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def chunks(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes | bytearray):
        for start in range(0, len(content), CHUNK_BYTES):
            yield bytes(content[start : start + CHUNK_BYTES])
    elif isinstance(content, Path):
        with content.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    else:
        with connected(content) as guest:
            size = guest.get_size()
            most = guest.get_block_size(nbd.SIZE_MAXIMUM) or CHUNK_BYTES
            for start in range(0, size, CHUNK_BYTES):
                parts = bytearray()
                for at in range(start, min(start + CHUNK_BYTES, size), min(most, CHUNK_BYTES)):
                    parts += guest.pread(min(most, CHUNK_BYTES, size - at), at)
                yield bytes(parts)


def assert_identical(source: Content, target: Content) -> None:
    """Byte by byte; tells the first byte that differs, and how many do."""
    offset, first, differing = 0, -1, 0
    for left, right in itertools.zip_longest(chunks(source), chunks(target), fillvalue=b""):
        assert len(left) == len(right), f"one ends within {len(left)}:{len(right)} of {offset}"
        if left != right:
            where = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
            first = offset + where[0] if first < 0 else first
            differing += len(where)
        offset += len(left)
    assert not differing, f"{differing} of {offset} bytes differ, the first at {first}"
