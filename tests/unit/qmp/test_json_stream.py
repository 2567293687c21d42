"""What must hold of the parser of QMP's input, whatever it is made of.

That the same comes of the same bytes however they are cut, that nothing but ParseError is raised,
what is kept, and what `json` says of the same text, is in support/jsonfuzz.py; each test here goes
through that as well.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import strategies as st
from support import jsonfuzz
from support.in_parts import given_in_parts

from nbdmirror.qmp.json_stream import (
    DEPTH_MAX,
    VALUE_BYTES_MAX,
    VALUE_TOKENS_MAX,
    JsonStream,
    ParseError,
)

GOOD = b'{"execute":"query-status"}'
RESET = b"\x00\n"
"""A control character, with which a client makes sure that the next value is its own."""


def said(data: bytes) -> list[Any]:
    """Values, and errors as their texts; the same in small pieces."""
    jsonfuzz.check(data)
    found = list(JsonStream().feed(data))
    return [str(one) if isinstance(one, ParseError) else one for one in found]


def errors(data: bytes) -> list[str]:
    """The errors of what is rubbish; the value after that comes through."""
    *texts, value = said(data + b"\n" + GOOD)
    assert value == json.loads(GOOD)
    assert all(isinstance(text, str) for text in texts), texts
    return texts


RUBBISH = {
    "words": b"hello there",
    "numbers and strings between objects": b'5 "x" null true',
    "closing brackets": b"}}]]",
    "signs": b"@ , : @",
    "a byte that UTF-8 has not": b"\xff\xfe\xfd",
    "zero bytes": b"\x00\x00\x00",
    "a wrong bracket": b"{]",
    "another wrong bracket": b'{"a":[1}',
    "a comma too many": b'{"a":1,}',
    "two commas": b"[1,,2]",
    "no colon": b'{"execute" "x"}',
    "no comma": b'{"a":1 "b":2}',
    "a key that is no string": b"{5:1}",
    "a word that is not JSON": b'{"a":undefined}',
    "no number": b'{"a":NaN}',
    "infinity": b'{"a":-Infinity}',
    "a number beyond doubles": b'{"a":1e999}',
    "a whole number beyond doubles": b'{"a":' + b"9" * 400 + b"}",
    "more digits than Python reads": b'{"a":' + b"9" * 5000 + b"}",
    "a zero in front": b'{"a":01}',
    "no digit in front": b'{"a":.5}',
    "a plus sign": b'{"a":+5}',
    "a key twice": b'{"execute":"a","execute":"b"}',
    "a key twice below": b'{"a":[{"b":1,"b":2}]}',
    "half of a pair": b'{"a":"\\ud800"}',
    "the other half": b'{"a":"x\\uDC00"}',
    "half of a pair as a key": b'{"\\ud83d":1}',
    "half of a pair in bytes": b'{"a":"\xed\xa0\x80"}',
    "half a character": b'{"a":"\xc3"}',
    "an overlong slash": b'{"a":"\xc0\xaf"}',
    "an unknown escape": b'{"a":"\\q"}',
    "a bad number of a character": b'{"a":"\\u00zz"}',
    "a control character in a string": b'{"a":"x\x00y"}',
    "a control character between": b'{"a":\x1f1}',
    "a byte that UTF-8 has not in a string": b'{"a":"\xff"}',
    "a line end in a string": b'{"a":"x',
    "a comment": b"// hello",
    "a list of commands cut short": b'[{"execute":"a"\x1b',
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_one_error_and_the_next_line_is_read(name: str) -> None:
    """Whether it is there alone, again and again, or after something good."""
    (text,) = errors(RUBBISH[name])
    assert text.startswith(("JSON parse error, ", "QMP input must be a JSON object"))
    assert text.isprintable()
    assert errors(RUBBISH[name] + b"\n" + RUBBISH[name]) == [text, text]
    assert said(GOOD + RUBBISH[name] + b"\n")[0] == json.loads(GOOD)


FRAMED = [
    name
    for name, data in RUBBISH.items()
    if re.fullmatch(rb"[{\[][\x20-\xfd]*[}\]]", data) and "bracket" not in name
]
"""Those whose brackets match."""


@pytest.mark.parametrize("name", FRAMED)
def test_what_has_its_brackets_needs_no_line_end(name: str) -> None:
    text, *values = said(RUBBISH[name] + GOOD + GOOD)
    assert values == [json.loads(GOOD)] * 2
    assert text.startswith("JSON parse error, ")


def test_a_line_of_rubbish_ends_at_an_object() -> None:
    """A client that sends no line ends loses no more than what it spoilt."""
    assert said(b"@@@" + GOOD + b"@@@" + GOOD) == [
        *["QMP input must be a JSON object", json.loads(GOOD)] * 2
    ]


FRAGMENTS = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b"\\",
        b",",
        b":",
        b"x",
        b"1",
        b"\n",
        b"\xff",
        b"\x07",
        GOOD,
    ]
)


@given_in_parts(400, st.lists(FRAGMENTS | st.binary(max_size=3), max_size=30).map(b"".join))
def test_a_control_character_makes_the_next_value_the_clients_own(rubbish: bytes) -> None:
    assert said(rubbish + RESET + GOOD)[-1] == json.loads(GOOD)


LINE = st.lists(
    st.sampled_from(
        [b"}", b"]", b",", b":", b"'", b'"', b"\\", b"x", b"1", b" ", b"\xff", b"\x07"]
    ),
    min_size=1,
    max_size=20,
).map(lambda pieces: b"x" + b"".join(pieces))


@given_in_parts(300, st.lists(LINE, max_size=5))
def test_each_line_of_rubbish_is_one_error(lines: list[bytes]) -> None:
    assert len(errors(b"\n".join(lines))) == len(lines)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given_in_parts(
    200, st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=5), st.data()
)
def test_values_come_through_whatever_is_between_them(
    values: list[dict[str, Any]], data: st.DataObject
) -> None:
    between = st.sampled_from([b"", b" ", b"\r\n", b"\t"])
    text = b"".join(json.dumps(value).encode() + data.draw(between) for value in values)
    assert said(text) == values


@given_in_parts(200, st.text(alphabet="ab'\"\\\u00e9\n\U0001f600", max_size=12))
def test_strings_in_single_quotes_are_those_in_double_quotes(text: str) -> None:
    """As QEMU has them: what is `\\'` in the ones is `\\"` in the others."""
    inside = json.dumps(text)[1:-1].replace('\\"', '"').replace("'", "\\'")
    assert said(f"{{'a':'{inside}'}}".encode()) == [{"a": text}]
    assert said(f'{{"a":{json.dumps(text)},\'b\':""}}'.encode()) == [{"a": text, "b": ""}]


# Limits: each is passed by one and held by one less.


def fatal(data: bytes) -> str:
    """The error that ends the stream, whatever the size of the pieces."""
    found = [str(one) for one in JsonStream().feed(data)]
    for size in (1 << 16, 1 << 12, 999):
        stream, cut = JsonStream(), []
        for at in range(0, len(data), size):
            cut += [str(one) for one in stream.feed(data[at : at + size])]
            if cut:
                break
        assert cut[:1] == found[:1]
    (text,) = found
    return text


def string_of(size: int) -> bytes:
    return b'{"a":"' + b"x" * (size - 8) + b'"}'


def test_size() -> None:
    (value,) = JsonStream().feed(string_of(VALUE_BYTES_MAX))
    assert len(value["a"]) == VALUE_BYTES_MAX - 8
    for data in (
        string_of(VALUE_BYTES_MAX + 1),
        string_of(VALUE_BYTES_MAX + 3)[:-2],
        b"[" + b"1" * VALUE_BYTES_MAX,
        b"[" + b" " * VALUE_BYTES_MAX,
        b"[" + b"x" * VALUE_BYTES_MAX + b"\x00",
    ):
        assert fatal(data) == "JSON token size limit exceeded"


def test_depth() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = opening * DEPTH_MAX + b"1" + closing * DEPTH_MAX
        (value,) = JsonStream().feed(deep)
        assert not isinstance(value, ParseError)
        text = fatal(opening * (DEPTH_MAX + 1) + b"1" + closing * (DEPTH_MAX + 1))
        assert text == "JSON nesting depth limit exceeded"


@pytest.mark.parametrize("piece", [b"1,", b"[],", b'"",', b"{},", b'"\\n",'])
def test_tokens(piece: bytes) -> None:
    few = b"[" + piece * (VALUE_TOKENS_MAX // 8) + b"1]"
    (value,) = JsonStream().feed(few)
    assert len(value) == VALUE_TOKENS_MAX // 8 + 1
    assert fatal(b"[" + piece * VALUE_TOKENS_MAX) == "JSON token count limit exceeded"


def test_a_stream_of_rubbish_is_one_error_and_is_not_kept() -> None:
    stream = JsonStream()
    found = [one for _ in range(400) for one in stream.feed(b"}\x00'\"]," * 10_000)]
    assert len(found) == 1
    assert jsonfuzz.held_bytes(stream) < 1 << 16
    assert list(stream.feed(b"\n" + GOOD)) == [json.loads(GOOD)]
