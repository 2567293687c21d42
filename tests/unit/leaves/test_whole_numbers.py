"""Numbers that users set: what is none on the command line is none to the plugin and over QMP."""

from __future__ import annotations

import pytest

from nbdmirror.cli.main import build_parser
from nbdmirror.errors import CommandError, ConfigError
from nbdmirror.limits import PORT_MAX, whole_number
from nbdmirror.nbd_uri import parse
from nbdmirror.nbdkit_host.process import PluginProcess
from nbdmirror.qmp.addresses import nbd_uri

NONE = ["", " 4", "4 ", "4\n", "+4", "-4", "4.0", "4e0", "0x4", "4_0", "²", "٤", "many", "4" * 5000]
"""Python's int() takes some of these, and fails on the last one with an error of its own."""


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_number(text: str) -> None:
    assert whole_number(text, 0, 1 << 62) is None


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("007", 7), ("9", 9), ("0", None), ("10", None)]
)
def test_what_is_one(text: str, number: int | None) -> None:
    assert whole_number(text, 1, 9) == number


@pytest.mark.parametrize("text", NONE)
def test_each_front_end_refuses_it(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["serve", "a.img", f"--port={text}"])
    assert ended.value.code == 2
    assert f"is not a whole number from 1 to {PORT_MAX}" in capsys.readouterr().err
    for key in ("connections", "keepalive", "open-timeout"):
        with pytest.raises(ConfigError, match=r"expected a number|is empty"):
            PluginProcess().configure(key, text)
    with pytest.raises(CommandError, match=f"a number from 1 to {PORT_MAX}"):
        nbd_uri({"type": "inet", "host": "h", "port": text}, "", None, None)


@pytest.mark.parametrize("port", ["+4", "4_0", "²", "٤", "many", "4" * 5000, "0", "65536"])
def test_a_port_of_a_uri(port: str) -> None:
    with pytest.raises(ConfigError, match=f"a number from 1 to {PORT_MAX}"):
        parse(f"nbd://h:{port}/")
