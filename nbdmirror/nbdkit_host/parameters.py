"""Values of the plugin's parameters, as nbdkit passes them. Each function raises ConfigError, which
names the parameter and its value."""

from __future__ import annotations

import re

from nbdmirror.errors import ConfigError
from nbdmirror.limits import whole_number
from nbdmirror.nbd_uri import absolute
from nbdmirror.state.recovery import RECORD_ID_LENGTH

_BOOLEANS = {"true": True, "yes": True, "1": True, "on": True} | {
    "false": False,
    "no": False,
    "0": False,
    "off": False,
}


def absolute_of(key: str, uri: str) -> str:
    """The URI with absolute paths: nbdkit changes its directory when it goes into the
    background."""
    try:
        return absolute(uri)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}") from error


def number_of(key: str, value: str, least: int, most: int, what: str = "number") -> int:
    if (number := whole_number(value, least, most)) is None:
        raise ConfigError(f"{key}={value}: expected a {what} from {least} to {most}")
    return number


def record_id_of(key: str, value: str) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{RECORD_ID_LENGTH}}}", value):
        raise ConfigError(
            f"{key}={value}: expected the {RECORD_ID_LENGTH} digits that the refusal to serve the "
            f"old side shows"
        )
    return value


def boolean_of(key: str, value: str) -> bool:
    if value not in _BOOLEANS:
        raise ConfigError(f"{key}={value}: expected true or false")
    return _BOOLEANS[value]
