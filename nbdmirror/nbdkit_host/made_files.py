"""MadeFiles: sockets and the pid file that a server has made, and removes at its end."""

from __future__ import annotations

import os

from nbdmirror.errors import ConfigError
from nbdmirror.unix_sockets import lock_pidfile, remove_socket


class MadeFiles:
    """A file is removed only if it is still the one that was made."""

    def __init__(self) -> None:
        self._by_path: dict[str, os.stat_result] = {}

    def add(self, path: str, file: os.stat_result | None = None) -> None:
        """`file`: what is at `path`, if that was looked at already."""
        self._by_path[path] = file or os.lstat(path)

    def add_pidfile(self, path: str) -> None:
        """nbdkit has written the pid file: lock it. Raises ConfigError if it is another server's,
        and then does not remove it."""
        self._by_path.pop(path, None)  # until it is known whose it is
        if lock_pidfile(path) is None:
            raise ConfigError(f"pidfile: {path}: is in use by another server")
        self.add(path)
        if not self._by_path[path].st_size:
            raise ConfigError(f"pidfile: {path}: is empty: is its file system full?")

    def remove(self) -> None:
        for path, file in self._by_path.items():
            remove_socket(path, file)
