"""Files are written whole or not at all."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.common.files import json_text, write_text

NUMBERS = st.floats() | st.integers()
DATA = st.recursive(NUMBERS | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


@given(DATA)
def test_json_never_holds_what_json_does_not_have(data):
    again = json.loads(json_text(data), parse_constant=refuse)
    if "NaN" not in (plain := json.dumps(data)) and "Infinity" not in plain:
        assert again == data


def test_numbers_that_are_not_finite_become_null():
    assert json.loads(json_text({"a": [math.nan, 1.5], "b": (math.inf, "NaN")})) == {
        "a": [None, 1.5],
        "b": [None, "NaN"],
    }


def test_a_file_that_cannot_be_written_is_as_before(tmp_path, monkeypatch):
    file = tmp_path / "table.csv"
    write_text(file, "a\r\n")
    assert file.read_bytes() == b"a\r\n"

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "b")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert file.read_bytes() == b"a\r\n"
