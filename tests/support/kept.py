"""A server with a state directory, and its ends: killed, power cut."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Self

from support.processes import run
from support.qmpclient import Qmp
from support.servers import Nbdmirror

MEMORIES = "memories"
MEMORY = re.compile(r"/dev/shm/nbdmirror-state-\w+")


class Kept(Nbdmirror):
    """nbdmirror with a state directory; killed, it can be started again on the same sockets."""

    def __init__(self, folder: Path, disk: Path | str, *options: str, state: str = "state") -> None:
        self.state = folder / state
        super().__init__(folder, f"vda={disk}", options=("--state-dir", str(self.state), *options))

    def start(self) -> Self:
        super().start()
        self._note_memory()
        return self

    def kill(self) -> None:
        self._note_memory()
        super().kill()

    def _note_memory(self) -> None:
        """For `temporary_folder`: what outlives a server that is not started again."""
        if self.process is not None and self.process.poll() is None:
            maps = Path(f"/proc/{self.pid}/maps").read_text()
            with (self.folder / MEMORIES).open("a") as notes:
                notes.writelines(f"{path}\n" for path in set(MEMORY.findall(maps)))

    def definition(self) -> dict[str, object]:
        content = (self.state / "vda.json").read_text().partition("\n")[2]
        return dict(json.loads(content))

    def lose_memory(self) -> None:
        """What a reboot does."""
        shutil.rmtree(str(self.definition()["memory"]))

    def restart(self) -> Qmp:
        self.start()
        return self.qmp

    def job_status(self) -> dict[str, object]:
        status = self.qmp.execute("x-nbdmirror-query-status")
        return dict(status["disks"][0]["jobs"][0])


def power_cut(server: Kept) -> None:
    server.kill()
    server.lose_memory()


def refusal(server: Nbdmirror) -> str:
    """What it says, on one line, where it refuses to start."""
    done = run(*server.argv(), check=False)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr
