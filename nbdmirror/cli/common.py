"""Shared by all commands: exit statuses, the error that ends a command, paths and defaults."""

from __future__ import annotations

import os

DONE, FAILED, USAGE, NO_SERVER, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""Exit statuses: docs/cli.md."""

THREADS_DEFAULT, THREADS_DIRECT_DEFAULT = 8, 16
"""Never far from the optimum, see docs/performance.md. The second one is for --cache none, with
which each request waits for the disk."""


class CliError(Exception):
    """Ends a command: one line for stderr that says what to do, and the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def absolute_uri(text: str, option: str = "") -> str:
    """An NBD URI with absolute paths. Raises CliError, whose text begins with `option`."""
    from nbdmirror.errors import ConfigError
    from nbdmirror.nbd_uri import absolute

    try:
        return absolute(text)
    except ConfigError as error:
        raise CliError(f"{option}{error}") from error


def default_qmp_paths() -> list[str]:
    """The default paths of control sockets. A server uses the first one, a client the first that
    exists: root's login session has XDG_RUNTIME_DIR, a service does not."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    paths = [os.path.join(runtime, "nbdmirror.qmp")] if runtime else []
    if os.geteuid() == 0:
        paths.append("/run/nbdmirror.qmp")
    if not paths:
        text = "there is no default control socket without XDG_RUNTIME_DIR: name one with --qmp"
        raise CliError(text, USAGE)
    return paths
