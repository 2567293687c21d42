"""Descriptors: as many as the process may have, and some that guests do not get.

A guest takes a descriptor and more, and there is a last one. Whatever needs one then fails: the
control socket, the state directory, a target's connection; and nbdkit tries without a pause to
accept the next guest. So the last ones are kept for nbdmirror, and guests are refused before.
"""

from __future__ import annotations

import errno
import os
import resource

from nbdmirror.errors import ConfigError, DeviceError
from nbdmirror.process_limits import no_descriptor

FILES_MAX = 65536
"""Most descriptors, if the hard limit allows so many."""

KEPT = 64
KEPT_SHARE = 4
"""Descriptors that guests do not get, but no more than this part of all."""


NEEDED = 40
"""Descriptors that must be free at the start: for the threads and the control socket, for a guest,
and for the connections of a mirror."""


class Descriptors:
    def __init__(self) -> None:
        self._limit = self._kept = 0

    def raise_limit(self) -> None:
        """The usual soft limit of 1,024 is for programs that use select(2)."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, FILES_MAX)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        self._limit = FILES_MAX if soft == resource.RLIM_INFINITY else soft
        self._kept = min(KEPT, self._limit // KEPT_SHARE)

    def check_start(self) -> None:
        """Raise ConfigError if the server could not serve a guest and a mirror with what is left:
        then it would be half a server. Before each disk, and after the last one."""
        if self._lowest() + NEEDED > self._limit:
            text = f"{self._lowest()} descriptors are in use, and a server needs {NEEDED} more"
            raise ConfigError(f"{text}, but {no_descriptor()}")

    def _lowest(self) -> int:
        """The lowest number that is free: the kernel gives that one."""
        try:
            lowest = os.dup(2)
        except OSError:
            return self._limit
        os.close(lowest)
        return lowest

    def check_room(self) -> None:
        """A guest has connected. Raises DeviceError if too few descriptors are left."""
        lowest = self._lowest()
        if lowest >= self._limit - self._kept:
            text = f"no room for another guest: {lowest} of {self._limit} descriptors are in use"
            raise DeviceError(f"{text} (ulimit -n, LimitNOFILE)", errno.EMFILE)
