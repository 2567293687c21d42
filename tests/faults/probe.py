"""A guest of its own, in a process of its own, that does nothing but wait for its requests.

probe.py URI OFFSET: writes to the block at OFFSET what it holds, a thousand times a second, until
its standard input ends; then it prints how long that took, as JSON.
"""

from __future__ import annotations

import json
import select
import sys
import time

import nbd

BLOCK_BYTES = 4096
PAUSE_S = 0.001
STALL_S = 0.05
"""What a guest in background mode should not wait for because of a target."""


def main() -> None:
    uri, offset = sys.argv[1], int(sys.argv[2])
    handle = nbd.NBD()
    handle.connect_uri(uri)
    content = handle.pread(BLOCK_BYTES, offset)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    took: list[float] = []
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        began_s = time.monotonic()
        handle.pwrite(content, offset)
        took.append(time.monotonic() - began_s)
    handle.shutdown()
    over = sum(one > STALL_S for one in took)
    json.dump({"requests": len(took), "longest_s": max(took, default=0), "over": over}, sys.stdout)


main()
