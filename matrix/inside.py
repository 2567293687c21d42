"""A command inside a root, with namespaces of its own for mounts and processes.

Nothing has to be cleaned up afterwards: the mounts exist in that namespace only, and the kernel
kills all of its processes when its first one has ended. That one ends with `unshare`, and `unshare`
with this process, even if this process is killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"),
)

ENTER = r"""
set -eu
root=$1 folder=$2; shift 2
mount --bind "$root" "$root"
while [ "$1" != -- ]; do  # what is shared with the machine
    to=$root$1
    if [ ! -e "$to" ]; then
        if [ -d "$1" ]; then mkdir -p "$to"; else mkdir -p "${to%/*}"; : >"$to"; fi
    fi
    mount --bind -o ro "$1" "$to"
    shift
done
shift
cd "$root"
find tmp var/tmp -mindepth 1 -delete
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=0755 tmpfs run
mkdir -m 1777 run/lock
mount --move . /
exec chroot . sh -c '
    cd "$1"
    shift
    "$@" || exit $?  # and not its place: who comes first collects those whose parents have ended
    exit 0
' sh "$folder" "$@"
"""
"""As a machine has it after it was booted: terminals, shared memory, an empty /run; and / is the
root of all mounts, for which tests make namespaces."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(argv: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> int:
    """To its end, with its output here and in `log`. Returns the exit status; when this is
    interrupted, nothing of the command is left."""
    process = subprocess.Popen(
        argv,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,  # Ctrl-C is ours alone
    )
    assert process.stdout is not None
    output = process.stdout.fileno()
    try:
        while text := os.read(output, 1 << 16):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
            log.write(text)
            log.flush()
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
            while os.read(output, 1 << 16):  # until all have ended who could write
                pass
        process.stdout.close()


def entering(root: Path, *command: str, folder: str = "/", shared: Sequence[str] = ()) -> list[str]:
    """The command line that runs `command` in `folder` of `root`. `shared` are files and folders
    of the machine that are seen there at the same place, read-only."""
    return [*NAMESPACES, "sh", "-c", ENTER, "sh", str(root), folder, *shared, "--", *command]
