"""What the tests of bad input have in common: that an error is one line, and that nothing was
touched."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from support.images import MiB
from support.processes import Finished, nbdmirror, run
from support.servers import PLUGIN

SIZE = 2 * MiB


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    before = [(path.stat().st_mtime_ns, hash_of(path)) for path in paths]
    yield
    assert before == [(path.stat().st_mtime_ns, hash_of(path)) for path in paths]


def one_line(done: Finished, *words: str, status: int = 1) -> str:
    """The error: exit status, one line on stderr that has those words, no traceback."""
    said = done.stderr.strip()
    assert done.returncode == status, f"exit {done.returncode}: {done.stdout}{said}"
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    return said


def serve(folder: Path, *arguments: str | Path) -> Finished:
    """`nbdmirror serve` with what must be refused."""
    where = ("--socket", folder / "s", "--qmp", folder / "q")
    done = nbdmirror("serve", *arguments, *(where if "--socket" not in arguments else where[2:]))
    assert not (folder / "s").exists(), "a refused start leaves nothing behind"
    assert not (folder / "q").exists(), "a refused start leaves nothing behind"
    return done


def bare(folder: Path, *parameters: str | Path) -> Finished:
    """nbdkit with the plugin and what must be refused."""
    done = run("nbdkit", "-f", "-U", folder / "s", "python", PLUGIN, *parameters, check=False)
    (folder / "s").unlink(missing_ok=True)  # nbdkit's own, which it does not remove
    return done
