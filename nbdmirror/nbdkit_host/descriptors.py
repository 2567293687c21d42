"""Descriptors: as many as the process may have, and some that guests do not get.

A guest takes a descriptor and more, and there is a last one. Whatever needs one then fails: the
control socket, the state directory, a target's connection; and nbdkit tries without a pause to
accept the next guest. So the last ones are kept for nbdmirror, and guests are refused before.
"""

from __future__ import annotations

import errno
import os
import resource

from nbdmirror.errors import DeviceError

FILES_MAX = 65536
"""Most descriptors, if the hard limit allows so many."""

KEPT = 64
KEPT_SHARE = 4
"""Descriptors that guests do not get, but no more than this part of all."""


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

    def check_room(self) -> None:
        """A guest has connected. Raises DeviceError if too few descriptors are left: the kernel
        gives the lowest one that is free."""
        try:
            lowest = os.dup(2)
        except OSError:
            lowest = self._limit
        else:
            os.close(lowest)
        if lowest >= self._limit - self._kept:
            text = f"no room for another guest: {lowest} of {self._limit} descriptors are in use"
            raise DeviceError(f"{text} (ulimit -n, LimitNOFILE)", errno.EMFILE)
