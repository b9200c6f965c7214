"""Texts from files do not control the terminal."""

import sys

import pytest
from tqdm import tqdm

from policy.common.terminal import printable, printable_output, uncoloured


@pytest.mark.parametrize("plain", ["a\tb\n", "Größe 部屋", "100 %"])
def test_plain_texts_and_line_ends_stay(plain):
    assert printable(plain) == plain


@pytest.mark.parametrize(
    "code", ["\x1b", "\r", "\x07", "\x00", "\x08", "\x9b", "\x7f", "\u2028", "\u200e", "\u202e", "\u2066"]
)
def test_control_characters_are_written_with_their_codes(code):
    shown = printable(f"a{code}[2Jb")
    assert code not in shown
    assert shown.startswith("a\\")
    assert shown.endswith("[2Jb")


def test_nothing_that_is_printed_controls_the_terminal(capsys):
    with printable_output():
        print("name\x1b[2J\x1b[A\r")
        print("error\x1b]0;title\x07", file=sys.stderr)
        print("\x1b[33mWARN: outside\x1b[0m", file=sys.stderr)
        list(tqdm(range(2), desc="a\x1b[31m"))
    done = capsys.readouterr()
    assert done.out == "name\\x1b[2J\\x1b[A\\r\n"
    assert done.err.startswith("error\\x1b]0;title\\x07\n")
    assert done.err.splitlines()[1] == "WARN: outside"
    assert uncoloured("\x1b[1;33mWARN\x1b[0m \x1b[2J") == "WARN \x1b[2J"
    assert "\x1b" not in done.err.replace("\x1b[A", "")  # which moves a progress bar, as \\r does
