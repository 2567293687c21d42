"""`./run images`: lints the Dockerfile and the compose file, builds the images with buildah, and
runs the compose file's demo with them.

For machines without a Docker engine: buildah needs none. The base image is made with debootstrap
from the packages that apt has here, and everything that pip installs is fetched before the build.
The services of the compose file run as their images say, as their users, but share the machine's
network, each on a port of its own on the loopback. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"
BASE = "docker.io/library/debian:bookworm-slim"
MIRROR = "http://deb.debian.org/debian"
SLIM = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man")
"""What that image leaves out."""
UID = 10809
WAIT_S_MAX = 60.0
BUILDERS = ("hatchling", "markdown-it-py", "shtab")


class TrialError(Exception):
    """Something is not as it should be; the text says what."""


def say(text: str) -> None:
    print(f"images: {text}", flush=True)


def expect(is_so: bool, what: str) -> None:
    if not is_so:
        raise TrialError(what)
    say(f"ok: {what}")


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """To its end; its output is shown if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, check=False, **options)
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-4000:])
        raise TrialError(f"{' '.join(words)[:200]}: exit status {done.returncode}")
    return done


def lint() -> None:
    tools = Path(sys.executable).parent
    run(tools / "hadolint", DOCKERFILE)
    say("ok: hadolint has nothing to say of docker/Dockerfile")
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(tools / "check-jsonschema", *schema, COMPOSE)
    say("ok: docker/compose.yaml follows the compose specification")


class Builder:
    """buildah with a storage of its own, which goes when the trial ends."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}

    def command(self, *words: str | Path) -> list[str]:
        storage = ["--root", f"{self.place}/root", "--runroot", f"{self.place}/runroot"]
        return ["buildah", *storage, *map(str, words)]

    def __call__(self, *words: str | Path) -> str:
        return run(*self.command(*words), env=self.environment).stdout.strip()

    def make_base(self) -> None:
        rootfs = self.place / "rootfs"
        run("debootstrap", "--variant=minbase", "bookworm", rootfs, MIRROR)
        for folder in ("var/cache/apt", "var/lib/apt/lists", *SLIM):
            shutil.rmtree(rootfs / folder)
        excluded = "".join(f"path-exclude /{folder}/*\n" for folder in SLIM)
        (rootfs / "etc/dpkg/dpkg.cfg.d/slim").write_text(excluded)
        for folder in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial"):
            (rootfs / folder).mkdir(parents=True)
        scratch = self("from", "scratch")
        self("copy", scratch, rootfs, "/")
        self("commit", "--quiet", scratch, BASE)
        self("rm", scratch)
        shutil.rmtree(rootfs)

    def build(self, target: str, name: str) -> None:
        started_s = time.monotonic()
        self(
            *("build", "--quiet", "--format", "docker", "--layers", "--target", target),
            *("--file", DOCKERFILE, "--ignorefile", f"{DOCKERFILE}.dockerignore", "--tag", name),
            *("--volume", f"{self.place}/wheels:/wheels:ro"),
            *("--build-arg", "PIP_OPTIONS=--no-index --find-links /wheels"),
            ROOT,
        )
        size = self("images", "--format", "{{.Size}}", "--filter", f"reference={name}")
        say(f"built {name}: {size}, in {time.monotonic() - started_s:.0f} s")

    def inspect(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))
        return found["Docker"]["config"]

    def fetch_wheels(self) -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
        wheels = ("wheel", "--wheel-dir", self.place / "wheels")
        run(*pip, *wheels, ROOT, *BUILDERS)
        for wheel in (self.place / "wheels").glob("nbdmirror-*"):
            wheel.unlink()  # the image is to build its own


class Service:
    """A service of the compose file, in a container made of its image."""

    def __init__(self, buildah: Builder, name: str) -> None:
        self.buildah = buildah
        self.spec = YAML(typ="safe").load(COMPOSE)["services"][name]
        self.container = buildah("from", f"localhost/{self.spec['image']}")
        volumes = [volume.split(":") for volume in self.spec["volumes"]]
        volumes += [
            (f"{name}-tmpfs", entry.partition(":")[0]) for entry in self.spec.get("tmpfs", ())
        ]
        self.mounts = [
            f"--volume={volume(buildah.place, name)}:{inside}:rw" for name, inside in volumes
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str, **environment: str) -> list[str]:
        settings = [f"--env={name}={value}" for name, value in environment.items()]
        return self.buildah.command("run", *self.mounts, *settings, self.container, "--", *words)

    def start(self, *words: str) -> None:
        self.process = subprocess.Popen(
            self.command(*words), env=self.buildah.environment, stdin=subprocess.DEVNULL
        )

    def run(self, *words: str, quiet: bool = False, **environment: str) -> int:
        command = self.command(*words, **environment)
        options = {"stderr": subprocess.DEVNULL} if quiet else {}
        done = subprocess.run(command, env=self.buildah.environment, check=False, **options)
        return done.returncode

    def server_pid(self) -> int:
        """nbdkit, among the descendants of what was started."""
        assert self.process is not None
        left = [self.process.pid]
        while left:
            pid = left.pop()
            if Path(f"/proc/{pid}/comm").read_text().strip() == "nbdkit":
                return pid
            for task in Path(f"/proc/{pid}/task").iterdir():
                left += map(int, (task / "children").read_text().split())
        raise TrialError("the server is not running")

    def stop(self) -> int | None:
        """Its exit status; None if it had to be killed."""
        assert self.process is not None
        try:
            os.kill(self.server_pid(), signal.SIGTERM)
            return self.process.wait(WAIT_S_MAX)
        except (TrialError, subprocess.TimeoutExpired):
            return None
        finally:
            self.process.kill()
            self.process.wait()
            self.process = None


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)
        ]
        return [int(probe.getsockname()[1]) for probe in probes]


def volume(place: Path, name: str) -> Path:
    """A named volume begins with the owner that the folder has in the image."""
    path = place / "volumes" / name
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, UID, UID)
    return path


def try_demo(buildah: Builder) -> None:
    config = buildah.inspect("localhost/nbdmirror")
    expect(config["User"] == str(UID), "the image's user is not root")
    health = config["Healthcheck"]["Test"]
    expect(health == ["CMD", "nbdmirror", "status"], f"the image has a health check: {health}")
    sides = {name: Service(buildah, name) for name in ("source", "target")}
    demo = Service(buildah, "demo")
    ports = dict(zip(sides, free_ports(2), strict=True))
    try:
        expect(sides["source"].run(*health[1:], quiet=True) != 0, "unhealthy before it runs")
        for name, side in sides.items():
            side.start(*command_of(side, ports[name]))
        for name, side in sides.items():
            wait_until_healthy(side, health[1:], name)
        check_process(sides["source"])
        uris = {name.upper(): f"nbd://127.0.0.1:{port}" for name, port in ports.items()}
        expect(set(uris) == set(demo.spec["environment"]), "the demo's environment is known")
        entry = buildah.inspect("localhost/nbdmirror-demo")["Entrypoint"]
        expect(demo.run(*entry, **uris) == 0, "the demo: load, mirror, pivot, compare")
        expect(sides["source"].stop() == 0, "SIGTERM ends the source with status 0")
        again = sides["source"].run(*command_of(sides["source"], ports["source"]))
        expect(again == 1, "the source does not start again: it is not the disk any more")
    finally:
        ends = {name: side.stop() for name, side in sides.items() if side.process}
    expect(ends == {"target": 0}, "SIGTERM ends the target with status 0")


def command_of(service: Service, port: int) -> list[str]:
    """The compose file's, on a loopback port of its own."""
    (line,) = service.spec["command"]
    line = line.replace("0.0.0.0", "127.0.0.1") + f" --port {port}"
    return [*service.spec["entrypoint"], line]


def wait_until_healthy(service: Service, command: list[str], name: str) -> None:
    deadline_s = time.monotonic() + WAIT_S_MAX
    while service.run(*command, quiet=True) != 0:
        if time.monotonic() > deadline_s:
            raise TrialError(f"{name} is not healthy within {WAIT_S_MAX:g} s")
        time.sleep(0.2)
    say(f"ok: {name} is healthy")


def check_process(service: Service) -> None:
    status = Path(f"/proc/{service.server_pid()}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    uids = set(lines["Uid"].split())
    expect(uids == {str(UID)}, f"the server runs as user {UID}")
    expect(int(lines["CapEff"], 16) == 0, "the server has no capabilities")


def main() -> int:
    place = Path(tempfile.mkdtemp(prefix="nbdmirror-images-", dir="/var/tmp"))
    buildah = Builder(place)
    try:
        lint()
        buildah.fetch_wheels()
        buildah.make_base()
        say(f"made {BASE} with debootstrap")
        buildah.build("nbdmirror", "nbdmirror")
        buildah.build("demo", "nbdmirror-demo")
        try_demo(buildah)
    except (TrialError, OSError, subprocess.SubprocessError) as error:
        print(f"images: FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        subprocess.run(buildah.command("rm", "--all"), capture_output=True, check=False)
        shutil.rmtree(place, ignore_errors=True)
    say("all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
