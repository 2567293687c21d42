"""A QMP client that records what it hears."""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Any, Self

from support.serverprocess import Server
from support.waiting import WAIT_S_MAX

Message = dict[str, Any]


class Refused(Exception):
    """The server answered a command with an error."""

    def __init__(self, error: dict[str, str]) -> None:
        super().__init__(error["desc"])
        self.error_class = error["class"]


class Qmp:
    """A blocking QMP client. `log` has every message of the server in the order of arrival."""

    def __init__(self, path: Path | str, *, timeout_s: float = WAIT_S_MAX) -> None:
        self.timeout_s = timeout_s
        self.log: list[Message] = []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout_s)
        self._received = b""
        self._ids = itertools.count(1)
        self._heard = 0
        try:
            self.socket.connect(os.fspath(path))
            self.greeting = self._read()
            self.log.clear()
            self.execute("qmp_capabilities")
        except BaseException:
            self.socket.close()
            raise

    def execute(self, command: str, **arguments: Any) -> Any:
        """'_' in an argument's name stands for '-'. Raises Refused."""
        number = next(self._ids)
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": named, "id": number}
        self.socket.sendall(json.dumps(message).encode())
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise Refused(answer["error"])
                return answer["return"]

    def refusal(self, command: str, **arguments: Any) -> str:
        """The error's text; the command must fail."""
        try:
            value = self.execute(command, **arguments)
        except Refused as error:
            return str(error)
        raise AssertionError(f"{command} was not refused: {value}")

    @property
    def events(self) -> list[Message]:
        """All events so far, in order."""
        return [message for message in self.log if "event" in message]

    def wait_for_event(
        self, name: str, timeout_s: float = WAIT_S_MAX, **fields: Any
    ) -> dict[str, Any]:
        """The data of the next event of that name with those fields, after the one found before."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            while self._heard < len(self.log):
                message = self.log[self._heard]
                self._heard += 1
                data = message.get("data", {})
                if message.get("event") == name and fields.items() <= data.items():
                    return dict(data)
            self._read(deadline_s, f"{name} {fields or ''}")

    def steps(self, job: str) -> list[str]:
        """What was told of a job, in order: statuses, events' names, and "return" for each answer
        to a command. X_NBDMIRROR_... events are left out."""
        found = []
        for message in self.log:
            data = message.get("data", {})
            if "return" in message:
                found.append("return")
            elif job in (data.get("id"), data.get("device")):
                is_status = message["event"] == "JOB_STATUS_CHANGE"
                found.append(data["status"] if is_status else message["event"])
        return [step for step in found if not step.startswith("X_NBDMIRROR_")]

    def forget(self) -> None:
        """Start an empty log."""
        self.log.clear()
        self._heard = 0

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Mirrors

    def add_target(self, name: str, target: Server, export: str = "") -> None:
        """blockdev-add of an export on a Unix socket."""
        server = {"type": "unix", "path": str(target.socket)}
        self.execute("blockdev-add", driver="nbd", node_name=name, server=server, export=export)

    def start_mirror(self, target: str, *, device: str = "disk0", **options: Any) -> None:
        """`target`: a node's name, or a URI. The job is "j" unless told otherwise."""
        options = {"job_id": "j", "sync": "full"} | options
        if "://" in target:
            self.execute("drive-mirror", device=device, target=target, mode="existing", **options)
        else:
            self.execute("blockdev-mirror", device=device, target=target, **options)

    def wait_ready(self, job: str = "j") -> dict[str, Any]:
        return self.wait_for_event("BLOCK_JOB_READY", device=job)

    def wait_completed(self, job: str = "j") -> dict[str, Any]:
        """Until the job has ended, well."""
        data = self.wait_for_event("BLOCK_JOB_COMPLETED", device=job)
        assert "error" not in data, data
        return data

    def complete(self, job: str = "j") -> dict[str, Any]:
        self.execute("block-job-complete", device=job)
        return self.wait_completed(job)

    def wait_status(self, status: str, job: str = "j") -> None:
        self.wait_for_event("JOB_STATUS_CHANGE", id=job, status=status)

    def job(self, job: str = "j") -> dict[str, Any]:
        """The job as query-block-jobs has it."""
        return next(j for j in self.execute("query-block-jobs") if j["device"] == job)

    def disk(self) -> dict[str, Any]:
        """The only disk as x-nbdmirror-query-status has it."""
        (found,) = self.execute("x-nbdmirror-query-status")["disks"]
        return dict(found)

    def _read(self, deadline_s: float = 0.0, what: str = "an answer") -> Message:
        """One message, which goes into the log."""
        deadline_s = deadline_s or time.monotonic() + self.timeout_s
        while b"\n" not in self._received:
            left_s = deadline_s - time.monotonic()
            readable = left_s > 0 and select.select([self.socket], [], [], left_s)[0]
            assert readable, f"no {what} in time; heard: {self.log[-12:]}"
            received = self.socket.recv(1 << 16)
            if not received:
                raise ConnectionResetError("the QMP server closed the connection")
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        message: Message = json.loads(line)
        self.log.append(message)
        return message
