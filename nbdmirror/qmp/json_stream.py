"""QMP's input: a stream of JSON values, one after the other. Pure: no I/O, no threads.

A scanner finds the end of each value, where its brackets balance, and `json` reads the value. So a
value that is not JSON is one error, and the next value follows it. Other text between values is one
error as well, and so is a byte that never occurs in JSON; then everything up to the next line end
or `{` is skipped. No byte is scanned more than twice."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from nbdmirror.errors import CommandError

VALUE_BYTES_MAX = 1 << 20
"""Largest value. The longest real command, a transaction over many disks, has kilobytes. With
QEMU's 64 MiB each client could take so much memory of a process that serves guests."""
VALUE_TOKENS_MAX = 1 << 16
"""Most brackets, commas, colons, quotes and escapes of one value. QEMU: 2 Mi of its tokens. Each
takes some 100 bytes of memory, so a client takes 6 MiB at worst."""
DEPTH_MAX = 128
"""Most nested brackets. QEMU: 1024. QMP's schema needs less than ten, and `json` calls itself once
for each level."""

# These two match everywhere, at least the empty string: their match is never None.
_BETWEEN = re.compile(rb"[ \t\r\n]*")
_SKIPPED = re.compile(rb"[^\n{]*")
_MARKS = {  # where the scanner stops, by the quote of the string that it is in
    b"": re.compile(rb"[{}\[\]:,\"'\x00-\x08\x0b\x0c\x0e-\x1f\xfe\xff]"),
    b'"': re.compile(rb"\"|\\[\x20-\xfd]|[\x00-\x1f\xfe\xff]"),
    b"'": re.compile(rb"'|\\[\x20-\xfd]|[\x00-\x1f\xfe\xff]"),
}
_CLOSING = {b"{": b"}", b"[": b"]"}
_STRING = re.compile(r"\"(?P<a>(?:[^\"\\]++|\\.)*+)\"|'(?P<b>(?:[^'\\]++|\\.)*+)'", re.DOTALL)
_QUOTE = re.compile(r"\\.|\"", re.DOTALL)
_BACKSLASH = ord("\\")
_INTEGER_LENGTH_MAX = len(str(-(1 << 63)))


class ParseError(CommandError):
    """The input is not JSON. `fatal`: a limit was passed, and the stream cannot be read further."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class JsonStream:
    """Cuts a byte stream into JSON values. One owner."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_skipping = False
        self._drop(0)

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield each value (or ParseError, as an object) that `data` completes. Exhaust the
        iterator before the next call. After a fatal error the stream must not be used any more."""
        self._buffer += data
        value = None
        while not (isinstance(value, ParseError) and value.fatal):
            try:
                if not (end := self._find_end()):
                    return
                text = self._buffer[:end]
                self._drop(end)
                value = _parse(text)
            except ParseError as error:
                value = error
            yield value

    def _drop(self, end: int) -> None:
        del self._buffer[:end]
        self._seen = self._tokens = 0
        self._open: list[bytes] = []
        """The closing brackets of the open ones."""
        self._quote = b""
        """The closing quote of the open string."""

    def _has_begun(self) -> bool:
        """Drop the input before the next value. Returns whether that begins in the buffer."""
        if self._is_skipping:
            self._drop(_SKIPPED.match(self._buffer).end())  # type: ignore[union-attr]
            self._is_skipping = not self._buffer
        self._drop(_BETWEEN.match(self._buffer).end())  # type: ignore[union-attr]
        if self._buffer and self._buffer[0] not in b"{[":
            self._is_skipping = True
            raise ParseError("QMP input must be a JSON object")
        return bool(self._buffer)

    def _find_end(self) -> int:
        """The end of the first value; 0 if it is not in the buffer. Raises ParseError."""
        if not self._open and not self._has_begun():
            return 0
        while mark := _MARKS[self._quote].search(self._buffer, self._seen):
            self._seen, found = mark.end(), mark[0]
            self._tokens += 1
            self._check_limits(self._seen)
            if found == self._quote:
                self._quote = b""
            elif found in (b'"', b"'"):
                self._quote = found
            elif found in _CLOSING:
                self._open.append(_CLOSING[found])
            elif found == self._open[-1]:
                self._open.pop()
                if not self._open:
                    return self._seen
            elif found not in (b":", b",") and found[0] != _BACKSLASH:
                # A wrong bracket, or a byte that a client sends to end an unfinished value.
                self._is_skipping = found != b"\n"
                self._drop(self._seen)
                raise ParseError(f"JSON parse error, unexpected {str(found)[1:]}")
        self._check_limits(len(self._buffer))
        self._seen = max(self._seen, len(self._buffer) - 1)  # the last byte may begin an escape
        return 0

    def _check_limits(self, size: int) -> None:
        if len(self._open) > DEPTH_MAX:
            what = "nesting depth"
        elif size > VALUE_BYTES_MAX:
            what = "token size"
        elif self._tokens > VALUE_TOKENS_MAX:
            what = "token count"
        else:
            return
        raise ParseError(f"JSON {what} limit exceeded", fatal=True)


def _parse(value: bytearray) -> Any:
    """The JSON value. Raises ParseError."""
    try:
        text = value.decode()
        if "'" in text:
            text = _STRING.sub(_in_double_quotes, text)
        parsed = json.loads(
            text,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_number,
            object_pairs_hook=_members,
        )
        if "\\u" in text:  # half of a surrogate pair is not a character, and cannot be encoded
            json.dumps(parsed, ensure_ascii=False).encode()
    except ValueError as error:
        raise ParseError(f"JSON parse error, {error}") from None
    return parsed


def _in_double_quotes(string: re.Match[str]) -> str:
    """As in QEMU a string may be in single quotes, and contain \\'."""
    changed = {"\\'": "'", '"': '\\"'}
    inside = string["a"] or string["b"] or ""
    return f'"{_QUOTE.sub(lambda part: changed.get(part[0], part[0]), inside)}"'


def _number(text: str) -> int | float:
    """As in QEMU an integer that fits into 64 bits is an int, and any other number a double."""
    is_integer = len(text) <= _INTEGER_LENGTH_MAX and text.lstrip("-").isdecimal()
    if is_integer and -(1 << 63) <= int(text) < 1 << 64:
        return int(text)
    if not math.isfinite(number := float(text)):
        raise ValueError(f"number out of range: {text[:_INTEGER_LENGTH_MAX]}")
    return number


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members := dict(pairs)) != len(pairs):
        raise ValueError("duplicate key")
    return members
