"""State directories that an old nbdmirror has written (tests/data/state-v1), laid out for a fresh
disk and target: who wrote them knew other paths, inodes and memory.

Nothing here is the product's code: what it reads has to be what the old one wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.images import make_image

DATA = Path(__file__).parent.parent / "data" / "state-v1"
CASES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
MEMORY = Path("/dev/shm")
JSON_FILES = ("vda.json", "vda.pivoted")


def unsealed(content: bytes) -> tuple[str, bytes]:
    """The kind of a file, and what it holds."""
    line, _, body = content.partition(b"\n")
    word, kind, version, length, checksum = line.decode().split()
    assert (word, version, int(length)) == ("nbdmirror", "1", len(body))
    assert checksum == hashlib.sha256(body).hexdigest()
    return kind, body


def sealed(kind: str, body: bytes) -> bytes:
    return f"nbdmirror {kind} 1 {len(body)} {hashlib.sha256(body).hexdigest()}\n".encode() + body


@dataclass(frozen=True)
class Golden:
    """One of CASES."""

    case: str

    @property
    def about(self) -> dict[str, Any]:
        return dict(json.loads((DATA / self.case / "about.json").read_text()))

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (DATA / self.case / "state").iterdir()}

    def said(self, file: str) -> Any:
        """What a file of JSON holds."""
        return json.loads(unsealed(self.files[file])[1])

    def make_images(self, disk: Path, target: Path) -> None:
        """A disk, and a target that differs from it where it did when the server ended."""
        about = self.about
        content = bytearray(make_image(disk, about["size"], seed=3).read_bytes())
        noise, granule = random.Random(4), about["granule"]
        for number in about["differing granules"]:
            content[number * granule : (number + 1) * granule] = noise.randbytes(granule)
        target.write_bytes(content)

    def lay(self, state: Path, disk: Path, target_uri: str, *, loses_memory: bool = False) -> None:
        """Make the state directory, and the memory that the server has left, unless a power cut
        has taken it. `disk` is as it was when the server ended, from here on."""
        about = self.about
        os.utime(disk, ns=(about["disk mtime ns"], about["disk mtime ns"]))
        memory = ""
        if about["memory"] and not loses_memory:
            memory = self._make_memory()
        elif about["memory"]:
            memory = f"{MEMORY}/nbdmirror-state-gone"
        shutil.copytree(DATA / self.case / "state", state)
        for name in JSON_FILES:
            if (path := state / name).exists():
                kind, body = unsealed(path.read_bytes())
                said = _moved(json.loads(body), about, disk, target_uri)
                if said.get("memory"):
                    said["memory"] = memory
                path.write_bytes(sealed(kind, json.dumps(said, indent=1).encode()))

    def _make_memory(self) -> str:
        folder = Path(tempfile.mkdtemp(prefix="nbdmirror-state-", dir=MEMORY))
        for name, pages in self.about["memory"].items():
            content = bytearray(pages["length"])
            for offset, part in pages["hex by offset"].items():
                content[int(offset) : int(offset) + len(part) // 2] = bytes.fromhex(part)
            (folder / name).write_bytes(content)
        return str(folder)


def _moved(said: Any, about: dict[str, Any], disk: Path, target_uri: str) -> Any:
    """With the disk and the target of now in place of those that there were."""
    if isinstance(said, list):
        return [_moved(one, about, disk, target_uri) for one in said]
    if not isinstance(said, dict):
        return {about["disk"]: str(disk), about["target"]: target_uri}.get(said, said)
    new = {key: _moved(one, about, disk, target_uri) for key, one in said.items()}
    if said.get("source") == about["disk"]:
        status = disk.stat()
        new |= {"device": status.st_dev, "inode": status.st_ino}
    return new
