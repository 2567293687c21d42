"""Image locks: QEMU's programs and we keep one another off an image."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nbdmirror.devices.file import FileDevice
from nbdmirror.errors import ConfigError

QEMU_IMG = shutil.which("qemu-img")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return path


def test_a_second_writer_is_refused_until_the_first_has_gone(image: Path) -> None:
    first = FileDevice.open(image)
    with pytest.raises(ConfigError, match=r"in use by another process"):
        FileDevice.open(image)
    first.close()
    FileDevice.open(image).close()


def test_readers_do_not_mind_one_another(image: Path) -> None:
    first = FileDevice.open(image, read_only=True)
    FileDevice.open(image, read_only=True).close()
    first.close()


@pytest.mark.guarantee("No second server writes to a raw file")
@pytest.mark.skipif(QEMU_IMG is None, reason="qemu-img is not installed")
def test_qemu_sees_our_lock_and_honours_it(image: Path) -> None:
    device = FileDevice.open(image)
    command = [str(QEMU_IMG), "resize", "-f", "raw", str(image), "8192"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    device.close()
    subprocess.run(command, capture_output=True, timeout=20, check=True)
