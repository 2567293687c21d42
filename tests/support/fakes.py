"""Servers with made-up jobs, for the command line: it must be right with what seldom happens."""

from __future__ import annotations

import threading
from typing import Any

from nbdmirror import unix_sockets as sockets
from nbdmirror.errors import CommandError, CommandNotFound, DeviceNotActive
from nbdmirror.events import EventRing, Reply
from nbdmirror.qmp import server as qmp

VERSION = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "nbdmirror"}
QEMU_VERSION = {**VERSION, "package": "Debian 1:7.2+dfsg-7"}
URI = "nbd://target/export"


class QmpFake:
    """Answers each command `x-y` with its method `do_x_y`, and remembers that it was called."""

    version = VERSION

    def __init__(self, path: str) -> None:
        self.path = path
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.ring = EventRing(lambda: 1_700_000_000.5)
        self.server = qmp.QmpServer(
            sockets.bind_unix_socket(path),
            dispatch=self.dispatch,
            events=self.ring,
            version=self.version,
        )

    async def dispatch(self, name: str, arguments: dict[str, Any]) -> Any:
        self.calls.append((name, arguments))
        method = getattr(self, f"do_{name.replace('-', '_')}", None)
        if not method:
            raise CommandNotFound(f"The command {name} has not been found")
        return Reply(method(arguments), self.ring.next_number)


class Fake(QmpFake):
    """A server whose jobs move on a quarter with each query, and end as `plan` says."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.disks = ["disk0"]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.queried = threading.Event()
        self.plan: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.source = "a.img"
        self.pivots: dict[str, float] = {}

    def add_job(self, job: str, **fields: Any) -> None:
        self.jobs[job] = {
            "device": job,
            "type": "mirror",
            "len": 400,
            "offset": 0,
            "status": "running",
            "ready": False,
            "paused": False,
            "io-status": "ok",
            **fields,
        }

    def end(self, job: str, event: str, **data: Any) -> None:
        """It ends, as the server tells it in an event and remembers it."""
        pivot = self.pivots.pop(job, None)
        last = {"id": job, "target": URI, "pivoted": pivot is not None, "ended-at-s": 1.7e9}
        last |= {"pause-ms": pivot} if pivot is not None else {}
        if event == "BLOCK_JOB_CANCELLED":
            last |= {"result": "cancelled", "reason": "cancelled by force"}
        elif "error" in data:
            last |= {"result": "failed", "reason": f"{URI}: {data['error']}"}
        else:
            last["result"] = "completed"
        last |= {"sync": self.jobs[job]["sync"]} if "sync" in self.jobs[job] else {}
        self.last = last
        del self.jobs[job]
        self.ring.append(event, {"device": job, "len": 400, "offset": 400, **data})

    def pivot(self, job: str, pause_ms: float = 3.25) -> None:
        self.pivots[job] = pause_ms
        self.source = URI
        data = {"device": "disk0", "id": job, "pause-ms": pause_ms}
        self.ring.append("X_NBDMIRROR_PIVOTED", data)

    def do_query_block_jobs(self, arguments: dict[str, Any]) -> Any:
        found = [dict(job) for job in self.jobs.values()]
        for name, job in list(self.jobs.items()):
            self._advance(name, job)
        self.queried.set()
        return found

    def _advance(self, name: str, job: dict[str, Any]) -> None:
        if self.plan.get("stuck"):
            return
        if job["offset"] == 200 and self.plan.get("fail"):
            data = {"device": name, "operation": "write", "action": "report"}
            self.ring.append("BLOCK_JOB_ERROR", data)
            self.end(name, "BLOCK_JOB_COMPLETED", error="No space left on device")
        elif job["offset"] == 200 and self.plan.get("vanish"):
            del self.jobs[name]
        elif job["status"] == "completing":
            self.pivot(name)
            self.end(name, "BLOCK_JOB_COMPLETED")
        elif job["offset"] < 400:
            job["offset"] += 100
            if job["offset"] == 400:
                job.update(ready=True, status="ready")
                self.ring.append("BLOCK_JOB_READY", {"device": name})

    def do_x_nbdmirror_query_status(self, arguments: dict[str, Any]) -> Any:
        jobs = [{**job, "target": URI} for job in self.do_query_block_jobs({})]
        disks: list[dict[str, Any]] = [
            {"name": name, "size": 1 << 30, "source": self.source, "jobs": []}
            for name in self.disks
        ]
        if disks:
            disks[0]["jobs"] = jobs
            disks[0] |= {"last-job": self.last} if self.last else {}
        return {"disks": disks}

    def do_x_nbdmirror_query_job_map(self, arguments: dict[str, Any]) -> Any:
        """What is left is at the disk's end."""
        job, cells = self._job({"id": arguments["id"]}), arguments["cells"]
        done = cells * job["offset"] // job["len"]
        nothing = [0] * cells
        dirty = [0] * done + [100] * (cells - done)
        shown = {"in-flight": nothing, "unflushed": nothing, "zero": nothing}
        return {"lengths": [100] * cells, "dirty": dirty, **shown}

    def do_drive_mirror(self, arguments: dict[str, Any]) -> Any:
        if self.plan.get("refuse"):
            raise CommandError("Target is smaller than the source")
        self.add_job(arguments.get("job-id") or arguments["device"])
        return {}

    def _job(self, arguments: dict[str, Any]) -> dict[str, Any]:
        name = arguments.get("id") or arguments["device"]
        if name not in self.jobs:
            raise DeviceNotActive(f"Block job '{name}' not found")
        return self.jobs[name]

    def do_job_complete(self, arguments: dict[str, Any]) -> Any:
        job = self._job(arguments)
        if not job["ready"]:
            text = "Job '{}' in state '{}' cannot accept command verb 'complete'"
            raise CommandError(text.format(arguments["id"], job["status"]))
        job["status"] = "completing"
        return {}

    def do_block_job_cancel(self, arguments: dict[str, Any]) -> Any:
        is_ready = self._job(arguments)["ready"]
        self.end(arguments["device"], f"BLOCK_JOB_{'COMPLETED' if is_ready else 'CANCELLED'}")
        return {}

    def do_job_cancel(self, arguments: dict[str, Any]) -> Any:
        self._job(arguments)
        self.end(arguments["id"], "BLOCK_JOB_CANCELLED")
        return {}

    def do_job_pause(self, arguments: dict[str, Any]) -> Any:
        job = self._job(arguments)
        job["paused"] = True
        if not self.plan.get("slow to pause"):
            job["status"] = "standby" if job["ready"] else "paused"
        return {}

    def do_job_resume(self, arguments: dict[str, Any]) -> Any:
        job = self._job(arguments)
        if not self.plan.get("stops again"):
            job.update(paused=False, status="ready" if job["ready"] else "running")
            job["offset"] += 0 if self.plan.get("silent") else 1
        return {}

    def do_block_job_set_speed(self, arguments: dict[str, Any]) -> Any:
        self._job(arguments)["speed"] = arguments["speed"]
        return {}

    def do_block_job_change(self, arguments: dict[str, Any]) -> Any:
        self._job(arguments)["copy-mode"] = arguments["copy-mode"]
        return {}

    def do_job_finalize(self, arguments: dict[str, Any]) -> Any:
        self._job(arguments)
        self.pivot(arguments["id"])
        self.end(arguments["id"], "BLOCK_JOB_COMPLETED")
        return {}

    def do_job_dismiss(self, arguments: dict[str, Any]) -> Any:
        self._job(arguments)
        del self.jobs[arguments["id"]]
        return {}


class FakeQemu(QmpFake):
    """A QEMU whose migration goes a step further with each query, and ends as `plan` says."""

    version = QEMU_VERSION

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.guest = "running"
        self.migration = "none"
        self.size = 1 << 30
        self.plan: dict[str, Any] = {}
        self.capabilities = {
            "xbzrle": False,
            "pause-before-switchover": False,
            "events": False,
            "return-path": True,
        }

    def go(self, state: str) -> None:
        self.migration = state
        if state == "pre-switchover":
            self.guest = "finish-migrate"
        elif state in ("cancelled", "failed"):
            self.guest = "running"
        elif state == "completed":
            self.guest = "postmigrate"
        if self.capabilities["events"]:
            self.ring.append("MIGRATION", {"status": state})

    def do_query_commands(self, arguments: dict[str, Any]) -> Any:
        return [{"name": name[3:].replace("_", "-")} for name in dir(self) if name[:3] == "do_"]

    def do_query_status(self, arguments: dict[str, Any]) -> Any:
        return {"status": self.guest, "running": self.guest == "running"}

    def do_query_named_block_nodes(self, arguments: dict[str, Any]) -> Any:
        return [{"node-name": "disk", "image": {"virtual-size": self.size}}]

    def do_query_migrate_capabilities(self, arguments: dict[str, Any]) -> Any:
        return [{"capability": name, "state": on} for name, on in self.capabilities.items()]

    def do_migrate_set_capabilities(self, arguments: dict[str, Any]) -> Any:
        for item in arguments["capabilities"]:
            self.capabilities[item["capability"]] = item["state"]
        return {}

    def do_migrate(self, arguments: dict[str, Any]) -> Any:
        self.go("setup")
        return {}

    def do_query_migrate(self, arguments: dict[str, Any]) -> Any:
        found: dict[str, Any] = {"status": self.migration} if self.migration != "none" else {}
        if self.migration == "completed":
            found["downtime"] = 7
        if self.migration == "failed":
            found["error-desc"] = "Connection reset by peer"
        steps = self.plan.get("steps", {"setup": "active", "active": "pre-switchover"})
        if following := steps.get(self.migration):
            self.go(following)
        return found

    def do_migrate_continue(self, arguments: dict[str, Any]) -> Any:
        self.go(self.plan.get("end", "completed"))
        return {}

    def do_migrate_cancel(self, arguments: dict[str, Any]) -> Any:
        self.go("cancelled")
        return {}
