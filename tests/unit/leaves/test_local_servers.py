"""What is seen of the other servers of a host, where nothing can be seen."""

from __future__ import annotations

import errno
import os

import pytest

from nbdmirror import local_servers


def test_a_system_without_the_folder_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/integration/test_no_proc.py has an empty one."""

    def missing(path: str) -> list[str]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(os, "listdir", missing)
    assert local_servers.holders([1]) == frozenset()
    assert local_servers.other_networks() == []
