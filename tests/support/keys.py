"""Keys for tests of TLS, made by GnuTLS's own tools: authorities, certificates, pre-shared keys."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

from support.processes import run

HERE = ("dns_name = localhost", "ip_address = 127.0.0.1")
PAST = (
    'activation_date = "2020-01-01 00:00:00"',
    'expiration_date = "2021-01-01 00:00:00"',
)


def until(moment: dt.datetime) -> tuple[str, str]:
    """Template lines of a certificate that expires then."""
    begin = moment - dt.timedelta(days=1)
    return (
        f'activation_date = "{begin:%Y-%m-%d %H:%M:%S UTC}"',
        f'expiration_date = "{moment:%Y-%m-%d %H:%M:%S UTC}"',
    )


class Authority:
    """A CA in a folder of its own, `folder`/`name`."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.place = folder / name
        self.place.mkdir()
        self.key, self.certificate = self.place / "ca-key.pem", self.place / "ca-cert.pem"
        _make_key(self.key)
        template = _template(self.place / "ca.info", name, "ca", "cert_signing_key")
        run(
            "certtool", "--generate-self-signed", "--load-privkey", self.key,
            "--template", template, "--outfile", self.certificate,
        )  # fmt: skip

    def directory(self, path: Path) -> Path:
        """A directory of keys with this authority's certificate alone."""
        path.mkdir(exist_ok=True)
        (path / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        return path

    def keys(self, path: Path, side: str, *lines: str) -> Path:
        """A directory of keys with a certificate for `side`, "server" or "client"; `lines` are
        certtool's."""
        directory = self.directory(path)
        key, certificate = directory / f"{side}-key.pem", directory / f"{side}-cert.pem"
        _make_key(key)
        usage = ("signing_key", "encryption_key", f"tls_www_{side}", *lines)
        template = _template(directory / f"{side}.info", side, *usage)
        run(
            "certtool", "--generate-certificate", "--load-privkey", key,
            "--load-ca-certificate", self.certificate, "--load-ca-privkey", self.key,
            "--template", template, "--outfile", certificate,
        )  # fmt: skip
        return directory


def psk(path: Path, user: str) -> Path:
    """A file of pre-shared keys, to which a new key of `user` is added."""
    run("psktool", "-u", user, "-p", path)
    os.chmod(path, 0o600)
    return path


def _make_key(path: Path) -> None:
    run("certtool", "--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", path)
    os.chmod(path, 0o600)


def _template(path: Path, name: str, *lines: str) -> Path:
    path.write_text("\n".join([f"cn = {name}", *lines, ""]))
    return path
