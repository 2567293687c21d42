"""What a point may be called: never what stands for a number or a time."""

from __future__ import annotations

import pytest

from nbdmirror.errors import ConfigError
from nbdmirror.names import POINT_BYTES_MAX, check_point_name

GOOD = ("nightly", "before upgrade", "v1.2", "-1", "1e3", "ü" * (POINT_BYTES_MAX // 2))
BAD = {
    "": "empty",
    "17": "'17' is a number",
    "0017": "is a number",
    "2026-11-28": "is a time",
    "20261128T1809": "is a time",
    "2026-W48-6": "is a time",
    " a": "spaces at an end",
    "a\n": "cannot be printed",
    "a\ud800": "cannot be printed",
    "a\u202eb": "cannot be printed",
    "ü" * (POINT_BYTES_MAX // 2 + 1): "at most 255 bytes, and this one has 256",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name(name: str) -> None:
    check_point_name(name)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name(name: str) -> None:
    with pytest.raises(ConfigError, match=BAD[name]) as caught:
        check_point_name(name)
    assert "\n" not in str(caught.value)
