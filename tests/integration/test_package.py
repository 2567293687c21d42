"""The wheel and the sdist: what is in them, and that what they install works away from the
checkout, in a virtual environment of its own, from `serve` to the pivot.

Nothing is fetched: the packages that nbdmirror needs are copied from the environment that the tests
run in, and pip finds them there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from glob import glob
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.fixtures import Start
from support.images import MiB, assert_identical, make_image, make_noise
from support.processes import ROOT, Finished
from support.servers import Nbdmirror, QemuNbd
from support.waiting import WAIT_S_MAX

from nbdmirror import __version__

BUILD_S_MAX = 55.0
BUILDERS = ("hatchling", "markdown-it-py", "shtab")
"""What pyproject.toml's build-system requires."""
PYTHON = "/usr/bin/python3"
"""The interpreter that nbdkit embeds: see ./run."""
STEM = f"nbdmirror-{__version__}"
DATA = {
    "lib/systemd/system/nbdmirror@.service",
    "lib/systemd/system/nbdmirror-web.service",
    "lib/systemd/system/nbdmirror-apply@.service",
    "lib/sysusers.d/nbdmirror.conf",
    "share/doc/nbdmirror/example.conf",
    "share/man/man1/nbdmirror.1",
    "share/man/man1/nbdmirror-plugin.1",
    "share/man/man7/nbdmirror-qmp.7",
    "share/bash-completion/completions/nbdmirror",
    "share/zsh/site-functions/_nbdmirror",
    "share/fish/vendor_completions.d/nbdmirror.fish",
    *(
        f"share/doc/nbdmirror/{path}"
        for pattern in ("**/*.md", "monitoring/*")
        for path in glob(pattern, root_dir=ROOT / "docs", recursive=True)
    ),
}
"""What the wheel installs beside Python's files, under the prefix."""
PAGE = ("events.html", "page.css", "page.html", "page.js", "servers.html")
"""Of `nbdmirror web`."""

pytestmark = pytest.mark.xdist_group("package")  # which is built once


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `./run build` makes: ".whl" and ".gz" -> the file."""
    place = tmp_path_factory.mktemp("dist")
    outside(sys.executable, "-m", "hatchling", "build", "-d", str(place), cwd=ROOT)
    return {path.suffix: path for path in place.iterdir()}


def outside(*command: str, cwd: Path) -> Finished:
    """Run a tool to its end, with nothing in its environment that leads to the checkout."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=plain_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_S_MAX,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done


def plain_environment() -> dict[str, str]:
    unwanted = ("PYTHONPATH", "VIRTUAL_ENV", "NBDMIRROR_QMP")
    return {name: value for name, value in os.environ.items() if name not in unwanted}


MODULE = r"nbdmirror/(?!_plugin)(\w+/)?\w+\.py"


def installed_in_wheel(names: list[str]) -> set[str]:
    """Without the modules, which are compared with the checkout's by themselves."""
    return {name for name in names if not re.fullmatch(MODULE, name)}


def test_the_wheel_has_what_it_must_and_no_more(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = wheel.namelist()
        plugin = wheel.read("nbdmirror/_plugin/nbdmirror-plugin.py")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nbdmirror").rglob("*.py")}
    assert modules == {name for name in names if re.fullmatch(MODULE, name)}
    assert installed_in_wheel(names) == {
        "nbdmirror/py.typed",
        *(f"nbdmirror/web/{name}" for name in PAGE),
        "nbdmirror/_plugin/nbdmirror-plugin.py",
        f"{STEM}.dist-info/METADATA",
        f"{STEM}.dist-info/RECORD",
        f"{STEM}.dist-info/WHEEL",
        f"{STEM}.dist-info/entry_points.txt",
        f"{STEM}.dist-info/licenses/LICENSE",
        *(f"{STEM}.data/data/{name}" for name in DATA),
    }
    assert plugin == (ROOT / "plugin" / "nbdmirror-plugin.py").read_bytes()


def test_the_sdist_has_what_builds_and_tests_it(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as sdist:
        names = {name.removeprefix(f"{STEM}/") for name in sdist.getnames()}
    kept = (
        "nbdmirror",
        "plugin",
        "packaging",
        "docker",
        "tests",
        "docs",
        "bench",
        "matrix",
        "typings",
    )
    there = {
        str(path.relative_to(ROOT))
        for folder in kept
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there |= {"run", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert there <= names
    assert {name.partition("/")[0] for name in names} - {*kept, *there} <= {
        "PKG-INFO",
        ".gitignore",
    }


def requirements(name: str, found: set[str]) -> set[str]:
    """The distribution `name` and all that it needs to run."""
    if name not in found:
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                requirements(needed.name, found)
    return found


def copy_distributions(names: set[str], site: Path) -> None:
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                (site / file).write_bytes(Path(file.locate()).read_bytes())


class Installed(Nbdmirror):
    """`nbdmirror serve` as users have it: the command of a virtual environment, by its path."""

    command: Path

    def argv(self) -> list[str]:
        serve = super().argv()
        return [str(self.command), *serve[serve.index("serve") :]]

    def environment(self) -> dict[str, str]:
        return plain_environment()


@pytest.fixture(params=[".whl", ".gz"], ids=["wheel", "sdist"])
def command(built: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An installed `nbdmirror`."""
    place = tmp_path / "venv"
    outside(PYTHON, "-m", "venv", "--system-site-packages", str(place), cwd=tmp_path)
    site = next(place.glob("lib/python3*/site-packages"))
    needed = requirements("nbdmirror", set()) - {"nbdmirror"}
    if request.param == ".gz":
        for builder in BUILDERS:
            needed |= requirements(builder, set())
    copy_distributions(needed, site)
    options = ["--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", *options]
    outside(*pip, str(built[request.param]), cwd=tmp_path)
    return place / "bin" / "nbdmirror"


@pytest.mark.timeout(150)
def test_it_works_as_installed(command: Path, folder: Path, start: Start) -> None:
    place = command.parent.parent
    plugin = outside(str(command), "plugin-path", cwd=folder).stdout.strip()
    assert plugin.startswith(f"{place}/lib/") and plugin.endswith("_plugin/nbdmirror-plugin.py")
    disk = make_image(folder / "disk.img", 4 * MiB)
    target = start(QemuNbd(folder, make_noise(folder / "target.img", 4 * MiB)))
    server = Installed(folder, disk)
    server.command = command
    start(server)
    with open(f"/proc/{server.pid}/cmdline", "rb") as cmdline:
        assert plugin.encode() in cmdline.read().split(b"\0")

    def do(*words: str) -> str:
        return outside(str(command), *words, "--qmp", str(server.qmp_path), cwd=folder).stdout

    do("mirror", target.uri(), "--wait", "ready", "--timeout", str(WAIT_S_MAX))
    assert "the pivot held the guest" in do("complete", "--timeout", str(WAIT_S_MAX))
    assert target.uri() in do("status")
    assert_identical(disk, server.uri())
    assert_identical(disk, target.image)
    assert not [name for name in DATA if not (place / name).is_file()]
    pages = outside("man", "-M", str(place / "share/man"), "-w", "nbdmirror", cwd=folder).stdout
    assert pages.split() == [str(place / "share/man/man1/nbdmirror.1")]
