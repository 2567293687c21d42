"""What a root gets from the machine that it is made on: from where packages come, and how they are
verified. A root is to be a bare system; but where the machine reaches its packages through a
mirror, a proxy, or with a certificate of its own, so must the root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from matrix.inside import PATH

MIRROR = "http://deb.debian.org/debian"
"""For machines that have no source of Debian's packages."""

AUTHORITIES = "usr/local/share/ca-certificates"
OLD_IS_GOOD = 'Acquire::Check-Valid-Until "false";'
"""The machine's mirror may be a snapshot, which has expired. Signatures are verified."""

PASSED_ON = re.compile(
    r"(http|https|ftp|no|all)_proxy|(SSL_CERT|CURL_CA|REQUESTS_CA)_\w+|PIP_\w+", re.IGNORECASE
)
"""Names of variables of the environment."""


def mirror() -> str:
    """Where apt fetches Debian's packages here."""
    wanted = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
    lines = _output("apt-get", "indextargets", "--format", wanted, "Created-By: Packages")
    for line in lines.splitlines():
        origin, label, uri = line.split("|", 2)
        if origin == label == "Debian":
            return uri.rstrip("/")
    return MIRROR


def environment() -> dict[str, str]:
    """A user's who has just logged in there, and the machine's ways to packages."""
    found = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    return {**found, "HOME": "/root", "LANG": "C.UTF-8", "PATH": PATH, "USER": "root"}


def shared(root: Path) -> list[str]:
    """Files and folders of the machine that its ways to packages lead to, and the root has not."""
    texts = [*environment().values(), *(path.read_text() for path in _pip_files())]
    found = set()
    for word in re.split(r"[\s=]+", " ".join(texts)):
        path = re.sub(r"^file://(?=/)", "", word).rstrip("/")
        # The pages of an index link to its neighbours.
        path = path if path == word else os.path.dirname(path)
        if re.match("/[^/]", path) and os.path.exists(path) and not (root / path[1:]).exists():
            found.add(path)
    return sorted(found)


def prepare(root: Path) -> None:
    """What may have changed since the root was made: names, proxies, authorities."""
    for name in ("etc/resolv.conf", "etc/hosts"):
        if os.path.exists(f"/{name}"):
            _replace(root / name, Path("/", name).read_bytes())
    for file, place in _pip_files().items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        _replace(root / place, file.read_bytes())
    ways = "".join(f"{line}\n" for line in [*_apt_settings(), OLD_IS_GOOD])
    _replace(root / "etc/apt/apt.conf.d/90machine", ways.encode())
    if os.path.isdir(f"/{AUTHORITIES}"):
        shutil.copytree(f"/{AUTHORITIES}", root / AUTHORITIES, dirs_exist_ok=True)


def _pip_files() -> dict[Path, str]:
    """pip's settings, by its documentation, and where they go."""
    places = {Path(f"/{name}"): name for name in ("etc/xdg/pip/pip.conf", "etc/pip.conf")}
    for name in (".config/pip/pip.conf", ".pip/pip.conf"):
        places[Path.home() / name] = f"root/{name}"
    return {file: place for file, place in places.items() if file.exists()}


def _apt_settings() -> Iterator[str]:
    for line in _output("apt-config", "dump", "Acquire").splitlines():
        if re.match(r"Acquire::(https?::(Proxy|CA|Verify|SslCert|SslKey)|Retries)", line):
            yield line


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be a link to somewhere
    path.write_bytes(content)


def _output(*command: str) -> str:
    """What it prints; nothing, if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
