"""Sealed files, and a directory that replaces them as a whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdmirror.errors import ConfigError
from nbdmirror.state.sealed_files import DiskFolder, StateError, seal, unseal

BODY = b'{"a": 1}\n\0binary'


def test_a_sealed_file_is_read() -> None:
    assert unseal("disk", seal("disk", BODY)) == BODY
    assert unseal("disk", seal("disk", b"")) == b""


def test_every_bit_counts() -> None:
    sealed = seal("disk", BODY)
    for at in range(len(sealed)):
        for bit in range(8):
            content = bytearray(sealed)
            content[at] ^= 1 << bit
            with pytest.raises(StateError):
                unseal("disk", bytes(content))


def test_every_length_counts() -> None:
    sealed = seal("disk", BODY)
    for length in range(len(sealed)):
        with pytest.raises(StateError):
            unseal("disk", sealed[:length])


def test_kinds_and_versions_are_told_apart() -> None:
    with pytest.raises(StateError, match="a file of another kind"):
        unseal("bitmaps", seal("disk", BODY))
    newer = seal("disk", BODY).replace(b" disk 1 ", b" disk 7 ")
    with pytest.raises(StateError, match="has version 7 of the format"):
        unseal("disk", newer)


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path / "state")
    assert folder.read("a") is None
    folder.prepare("a", b"one")
    assert folder.read("a") is None
    folder.commit(["a"])
    folder.prepare("a", b"two")
    assert folder.read("a") == b"one"
    folder.prepare("b", b"three")
    folder.commit(["a", "b"])
    assert (folder.read("a"), folder.read("b")) == (b"two", b"three")
    folder.commit([], ["a", "never there"])
    folder.refuse("b")
    folder.refuse("never there")
    assert sorted(os.listdir(tmp_path / "state")) == ["b.refused", "lock"]


def test_slots_are_there_whole(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path)
    slots = folder.slots("log", 512, 2)
    slots.write(1, b"x" * 512, sync=True)
    assert (slots.read(0), slots.read(1)) == (bytes(512), b"x" * 512)
    slots.close()
    slots.close()
    assert folder.slots("log", 512, 2).read(1) == b"x" * 512


def test_one_at_a_time(tmp_path: Path) -> None:
    first = DiskFolder(tmp_path)
    with pytest.raises(ConfigError, match="in use by another"):
        DiskFolder(tmp_path)
    first.close()
    DiskFolder(tmp_path)
