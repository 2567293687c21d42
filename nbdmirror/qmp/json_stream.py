"""QMP's input: a stream of JSON values, cut and resynchronised as QEMU does. Pure: no I/O, no
threads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nbdmirror.errors import CommandError

VALUE_BYTES_MAX = 1 << 20
"""Tokens of one value. The longest real command, a transaction over many disks, has kilobytes;
QEMU's 64 MiB would let each client take that much of a process that serves guests."""
VALUE_TOKENS_MAX = 1 << 16
"""QEMU: 2 Mi. A token costs us some 100 bytes, so this is 6 MiB a client at worst."""
DEPTH_MAX = 128
"""QEMU: 1024. QMP's schema needs less than ten; two Python frames a level stay far from the
interpreter's limit of 1000."""
WORD_BYTES_MAX = 1024
"""Numbers and keywords: looked at again from their start when a packet ends within one."""

_SPACE = re.compile(rb"[ \t\r\n]*")
_RECOVERY = re.compile(rb"[^{}\[\]:,\x00-\x1f\xfe\xff]*")
_WORD = re.compile(rb"[a-z]+|[-0-9][-+.0-9eE]*")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_STRING = {  # up to the closing quote, a byte that no string may hold, or an escape cut in two
    q: re.compile(rb"(?:[^\\\x00-\x1f\xfe\xff" + q + rb"]++|\\[\x20-\xfd])*+") for q in (b'"', b"'")
}
_ESCAPE = re.compile(
    r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
    r"|\\u([0-9a-fA-F]{4})|\\(u.{0,4}|.)",
    re.DOTALL,
)
_SIMPLE_ESCAPES = dict(zip("\"'\\/bfnrt", "\"'\\/\b\f\n\r\t", strict=True))


class ParseError(CommandError):
    """The input is not JSON. `fatal`: a limit was passed, the stream cannot be followed on."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


def _syntax(message: str) -> ParseError:
    return ParseError(f"JSON parse error, {message}")


class JsonStream:
    """Cuts a byte stream into JSON values. Pure: no I/O, one owner.

    As in QEMU, tokens are gathered until brackets balance and are then parsed as one value; after a
    byte that starts no token, everything up to a structural or control character is skipped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._quote = b""
        self._string = bytearray()
        self._recovering = False
        self._begin_value()

    def _begin_value(self) -> None:
        self._tokens: list[bytes] = []
        self._bytes = self._braces = self._brackets = 0

    def feed(self, data: bytes) -> Iterator[Any]:
        """Each value (or ParseError, as an object) that `data` completes; exhaust it before the
        next call. After a fatal error the stream is not to be used any more."""
        buf = self._rest + data
        self._rest = b""
        position = 0
        while position < len(buf):
            try:
                token, position = self._next_token(buf, position)
                if token and self._push(token):
                    value = _parse(self._tokens)
                    self._begin_value()
                    yield value
            except _Stray as stray:
                position = stray.position
                self._begin_value()
                self._recovering = True
                text = stray.text[:WORD_BYTES_MAX].split(b"\0")[0]
                yield _syntax(f"stray '{text.decode(errors='replace')}'")
            except ParseError as error:
                yield error
                if error.fatal:
                    return
                self._begin_value()

    def _next_token(self, buf: bytes, position: int) -> tuple[bytes, int]:
        """A token and the position behind it; an empty one if `buf` ends before the token does."""
        if self._quote:
            return self._go_on_string(buf, position)
        skipped = _RECOVERY if self._recovering else _SPACE
        if match := skipped.match(buf, position):
            position = match.end()
        if position == len(buf):
            return b"", position
        self._recovering = False
        byte = buf[position : position + 1]
        if byte in b"{}[]:,":
            return byte, position + 1
        if byte in b"\"'":
            self._quote = byte
            self._string = bytearray(byte)
            return b"", position + 1
        if byte in b" \t\r\n":  # what ended a recovery
            return b"", position + 1
        match = _WORD.match(buf, position)
        if not match:
            raise _Stray(byte, position + 1)
        if match.end() - position > WORD_BYTES_MAX:
            raise ParseError("JSON token size limit exceeded", fatal=True)
        if match.end() == len(buf):
            self._rest = buf[position:]
            return b"", len(buf)
        word = match.group()
        if not byte.isalpha() and not _NUMBER.fullmatch(word):
            raise _Stray(word, match.end())
        return word, match.end()

    def _go_on_string(self, buf: bytes, position: int) -> tuple[bytes, int]:
        match = _STRING[self._quote].match(buf, position)
        assert match
        end = match.end()
        self._string += buf[position:end]
        if self._bytes + len(self._string) > VALUE_BYTES_MAX:
            raise ParseError("JSON token size limit exceeded", fatal=True)
        if end == len(buf):
            return b"", end
        if buf[end:] == b"\\":
            self._rest = b"\\"
            return b"", len(buf)
        quote, self._quote = self._quote, b""
        if buf[end : end + 1] == quote:
            return bytes(self._string), end + 1
        end += buf[end] == 0x5C
        raise _Stray(bytes(self._string) + buf[end : end + 1], end + 1)

    def _push(self, token: bytes) -> bool:
        """Add a token; True when it completes a value, a correct one or not."""
        self._tokens.append(token)
        self._bytes += len(token)
        self._braces += (token == b"{") - (token == b"}")
        self._brackets += (token == b"[") - (token == b"]")
        if min(self._braces, self._brackets) < 0 or self._braces == self._brackets == 0:
            return True
        for what, size, limit in (
            ("token size", self._bytes, VALUE_BYTES_MAX),
            ("token count", len(self._tokens), VALUE_TOKENS_MAX),
            ("nesting depth", self._braces + self._brackets, DEPTH_MAX),
        ):
            if size > limit:
                raise ParseError(f"JSON {what} limit exceeded", fatal=True)
        return False


class _Stray(Exception):
    def __init__(self, text: bytes, position: int) -> None:
        super().__init__()
        self.text, self.position = text, position


def _parse(tokens: list[bytes]) -> Any:
    """The value that `tokens` spell. Strings are tokens without their closing quote."""
    source = iter(tokens)
    return _value(next(source), source)


def _value(token: bytes, source: Iterator[bytes]) -> Any:
    first = token[:1]
    if first in b"\"'":
        return _string(token)
    if first in b"-0123456789":
        return _number(token)
    if first.isalpha():
        if token not in (b"true", b"false", b"null"):
            raise _syntax(f"invalid keyword '{token.decode()}'")
        return {b"true": True, b"false": False}.get(token)
    if first == b"[":
        return _array(source)
    if first == b"{":
        return _object(source)
    raise _syntax("expecting value")


def _array(source: Iterator[bytes]) -> list[Any]:
    values: list[Any] = []
    token = next(source, b"]")
    while values or token != b"]":
        values.append(_value(token, source))
        token = next(source, b"]")
        if token == b"]":
            break
        if token != b",":
            raise _syntax("expected separator in list")
        token = next(source, b"]")
    return values


def _object(source: Iterator[bytes]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    token = next(source, b"}")
    while members or token != b"}":
        key = _value(token, source)
        if not isinstance(key, str):
            raise _syntax("key is not a string in object")
        if next(source, b"") != b":":
            raise _syntax("missing : in object pair")
        if key in members:
            raise _syntax("duplicate key")
        members[key] = _value(next(source, b"}"), source)
        token = next(source, b"}")
        if token == b"}":
            break
        if token != b",":
            raise _syntax("expected separator in dict")
        token = next(source, b"}")
    return members


def _number(token: bytes) -> int | float:
    """As QEMU: an integer that fits 64 bits stays one, anything else is a double."""
    if not set(token) & set(b".eE") and -(1 << 63) <= int(token) < 1 << 64:
        return int(token)
    number = float(token)
    if number in (float("inf"), float("-inf")):  # QEMU echoes `inf`, which is not JSON
        raise _syntax(f"number out of range '{token.decode()}'")
    return number


def _string(token: bytes) -> str:
    try:
        text = token[1:].decode()
    except UnicodeDecodeError:
        raise _syntax("invalid UTF-8 sequence in string") from None
    return _ESCAPE.sub(_unescape, text) if "\\" in text else text


def _unescape(match: re.Match[str]) -> str:
    high, low, unit, other = match.groups()
    if high:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF))
    if unit and not 0xD800 <= int(unit, 16) < 0xE000:
        return chr(int(unit, 16))
    if unit or other[0] == "u":
        raise _syntax(f"{match.group()} is not a valid Unicode character")
    if other not in _SIMPLE_ESCAPES:
        raise _syntax("invalid escape sequence in string")
    return _SIMPLE_ESCAPES[other]
